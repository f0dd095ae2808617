"""How well two stretches of a video meet: whether the step across the join is larger than those on either side."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from attrs import frozen
from numpy.typing import NDArray
from torch import Tensor

from opensora.core.errors import ShapeError

__all__ = ["Seam", "measure_seam"]

_AROUND = 8  # frames on either side that say what is usual
_ONE_LEVEL = 1 / 255  # what rounding to 8 bits can make of nothing


@frozen
class Seam:
    """A join, measured in mean absolute difference of pixels in [0, 1]."""

    jump: float
    """Between the last frame before the join and the first after it."""
    typical: float
    """Between neighbouring frames on both sides: the median."""
    ratio: float
    """``jump / typical``: about 1 where the motion goes on, large at a cut."""


def measure_seam(before: Tensor | NDArray[np.uint8], after: Tensor | NDArray[np.uint8]) -> Seam:
    """Compare the step across a join with those of the 8 frames on either side of it.

    Args:
        before: uint8 [t, H, W, 3], in time; the last frame is the one before the join.
        after: uint8 [t, H, W, 3]; the first frame is the first new one.

    Raises:
        ShapeError: They aren't frames of one size.
    """
    first, second = _pixels(before)[-_AROUND:], _pixels(after)[:_AROUND]
    if first.shape[1:] != second.shape[1:]:
        raise ShapeError(f"A seam needs frames of one size; got {list(first.shape)} and {list(second.shape)}.")
    steps = [_difference(*pair) for side in (first, second) for pair in pairwise(side)]
    jump, typical = _difference(first[-1], second[0]), float(np.median(steps)) if steps else 0.0
    return Seam(jump=jump, typical=typical, ratio=jump / max(typical, _ONE_LEVEL))


def _pixels(frames: Tensor | NDArray[np.uint8]) -> NDArray[np.uint8]:
    array = frames.detach().cpu().numpy() if isinstance(frames, Tensor) else frames
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3 or 0 in array.shape:
        raise ShapeError(f"Frames must be uint8 [T, H, W, 3]; got {array.dtype} {list(array.shape)}.")
    return array


def _difference(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    return float(np.abs(one.astype(np.int16) - other).mean()) / 255
