"""Reads digit and direction back from the pixels of a clip.

Shapes: T H W frames, height and width; N scans; K the side of the crop that the classifier reads.
"""

from __future__ import annotations

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from opensora.core.errors import DataError
from opensora.data.digits.clips import DIGITS, DIRECTIONS, SCAN_SIZE, load_scans, need_scikit_learn

__all__ = ["CHANCE", "Grader", "Reading"]

_CROP = 10  # K: a scan and a margin of one, since the centre of ink is not the centre of the scan
_SHIFTS = [(0, 0), (0, 1), (1, 0), (0, -1), (-1, 0)]  # of the crops that the classifier learns from
_MIN_SPEED = 0.25  # pixels of the scan a frame; slower is no motion. Clips move at 1
_BLACK = 0.12  # darker than this is background: compression noise, not ink


@frozen
class Reading:
    """What a clip shows."""

    digit: int
    direction: str | None
    """None where nothing moves along an axis."""


class Grader:
    """Knows only the scans of the ``"grader"`` half, none that a clip shows.

    The digit: in each frame the square around the centre of ink is shown to a support vector machine, and the frames
    vote with their margins. The direction: axis and sign of the line fitted through the centres of ink.

    Raises:
        MachineError: scikit-learn is missing.
    """

    def __init__(self) -> None:
        need_scikit_learn()
        from sklearn.svm import SVC

        scans, digits = load_scans("grader")
        crops = np.stack([_crop(_padded(scan), shift) for shift in _SHIFTS for scan in scans])  # [5 N, K, K]
        self._classifier = SVC(C=10.0, gamma=0.06, decision_function_shape="ovr")
        self._classifier.fit(_normalized(crops), np.tile(digits, len(_SHIFTS)))

    def read(self, frames: NDArray[np.uint8]) -> Reading:
        """What ``frames`` [T, H, W, 3] show.

        Raises:
            DataError: Height and width differ or are no multiple of 16, or a single frame.
        """
        ink = _ink(frames)
        crops = np.stack([_crop(frame) for frame in ink])
        margins = self._classifier.decision_function(_normalized(crops)).mean(axis=0)  # [10]
        return Reading(int(margins.argmax()), _direction(ink))

    def accuracy_on_scans(self) -> float:
        """Share of the other half's real scans that the classifier reads right."""
        scans, digits = load_scans("clips")
        crops = np.stack([_crop(_padded(scan)) for scan in scans])
        return float((self._classifier.predict(_normalized(crops)) == digits).mean())


CHANCE = {"digit": 1 / len(DIGITS), "direction": 1 / len(DIRECTIONS)}
"""What guessing gets."""


def _ink(frames: NDArray[np.uint8]) -> NDArray[np.float32]:
    """[T, h, w] in [0, 1] at the resolution of the scans, background exactly 0."""
    num_frames, height, width, _ = frames.shape
    if num_frames < 2 or height != width or height % (2 * SCAN_SIZE):
        raise DataError(
            f"has {num_frames} frames of {height} x {width}; the grader reads two or more, square, of a multiple of 16."
        )
    gray = frames.astype(np.float32).mean(axis=-1) / 255
    scale = height // (2 * SCAN_SIZE)
    small = gray.reshape(num_frames, height // scale, scale, width // scale, scale).mean(axis=(2, 4))
    return np.where(small < _BLACK, 0, small)


def _direction(ink: NDArray[np.float32]) -> str | None:
    centres = np.array([_centre(frame) for frame in ink])  # [T, 2]
    time = np.arange(len(ink)) - (len(ink) - 1) / 2
    speed = time @ centres / (time @ time)  # [2], least squares
    along = {name: float(speed @ np.array(step)) for name, step in DIRECTIONS.items()}
    fastest = max(along, key=lambda name: along[name])
    return fastest if along[fastest] >= _MIN_SPEED else None


def _centre(frame: NDArray[np.float32]) -> NDArray[np.float64]:
    """Centre of ink (row, column); the middle of the frame where there is none."""
    total = float(frame.sum())
    if total == 0:
        return (np.array(frame.shape) - 1) / 2
    rows, columns = np.indices(frame.shape)
    return np.array([(rows * frame).sum() / total, (columns * frame).sum() / total])


def _padded(scan: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.pad(scan, SCAN_SIZE // 2)


def _crop(frame: NDArray[np.float32], shift: tuple[int, int] = (0, 0)) -> NDArray[np.float32]:
    """[K, K] around the centre of ink, moved by ``shift``; black beyond the frame."""
    top, left = np.round(_centre(frame) - (_CROP - 1) / 2).astype(int) + _CROP + np.array(shift)
    return np.pad(frame, _CROP)[top : top + _CROP, left : left + _CROP]


def _normalized(crops: NDArray[np.float32]) -> NDArray[np.float32]:
    """[N, K, K] to [N, K * K] at equal contrast, so that a pale digit reads like a bright one."""
    flat = crops.reshape(len(crops), -1)
    normalized: NDArray[np.float32] = flat / np.maximum(flat.max(axis=1, keepdims=True), 1e-3)
    return normalized
