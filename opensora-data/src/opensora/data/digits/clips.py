"""Captioned clips of real handwritten digits on the move.

10 digits x 4 directions = 40 captions, made of the 8 x 8 scans of scikit-learn's `load_digits`. The scans are split in
two halves that never meet: clips show the half ``"clips"``; the half ``"grader"`` is all that the grader learns from.

Shapes: T H W frames, height and width; N scans.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Literal

import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from opensora.core.errors import ConfigError, MachineError

__all__ = [
    "DIGITS",
    "DIRECTIONS",
    "SCAN_SIZE",
    "DigitClip",
    "Split",
    "caption_of",
    "captions",
    "check_path",
    "load_scans",
    "make_clips",
    "need_scikit_learn",
]

Split = Literal["clips", "grader"]

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
"""Rows and columns per frame, in pixels of the scan."""
SCAN_SIZE = 8

_ROOM = SCAN_SIZE  # steps between a digit's first and last place on an axis: the canvas is twice as large as the digit
_SPLIT_SEED = 0  # fixed, so that no seed of a dataset can leak a scan into the grader's half


@frozen(eq=False)
class DigitClip:
    """One captioned clip."""

    frames: NDArray[np.uint8]
    """[T, H, W, 3], gray."""
    digit: int
    direction: str
    caption: str


def caption_of(digit: int, direction: str) -> str:
    """The caption of a clip: "a handwritten seven moving left"."""
    return f"a handwritten {DIGITS[digit]} moving {direction}"


def captions() -> list[tuple[int, str, str]]:
    """All 40 (digit, direction, caption), digits outermost."""
    return [
        (digit, direction, caption_of(digit, direction)) for digit in range(len(DIGITS)) for direction in DIRECTIONS
    ]


def need_scikit_learn() -> None:
    """Check that scikit-learn is there.

    Raises:
        MachineError: It isn't; the message has the line that installs it.
    """
    try:
        import sklearn.datasets  # noqa: F401
    except ImportError as error:
        raise MachineError(
            'The moving digits need scikit-learn: pip install "opensora-data[quickstart]" or pip install scikit-learn.'
        ) from error


@cache
def load_scans(split: Split) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """One half of the real scans, [N, 8, 8] in [0, 1] with white ink, and their digits [N].

    Raises:
        MachineError: scikit-learn is missing.
    """
    need_scikit_learn()
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(bunch.target))
    half = order[: len(order) // 2] if split == "clips" else order[len(order) // 2 :]
    return (bunch.images[half] / 16).astype(np.float32), bunch.target[half].astype(np.int64)


def check_path(*, canvas: int, num_frames: int, jitter: int) -> None:
    """Check that a digit can travel ``num_frames`` frames without leaving the canvas.

    Raises:
        ConfigError: It can't.
    """
    if canvas < 2 * SCAN_SIZE or canvas % (2 * SCAN_SIZE):
        raise ConfigError(f"canvas={canvas} must be a multiple of {2 * SCAN_SIZE}.")
    if not 2 <= num_frames <= _ROOM + 1:
        raise ConfigError(f"num_frames={num_frames} must be 2 to {_ROOM + 1}, so that the path fits on the canvas.")
    if not 0 <= jitter <= _ROOM // 2:
        raise ConfigError(f"jitter={jitter} must be 0 to {_ROOM // 2}, so that the digit stays on the canvas.")


def make_clips(
    num_clips: int,
    *,
    seed: int | Sequence[int] = 0,
    canvas: int = 16,
    num_frames: int = 8,
    jitter: int = 1,
    split: Split = "clips",
) -> Iterator[DigitClip]:
    """Yield clips of one scan that travels one eighth of its own size a frame; captions in equal shares.

    Which scan, how far off the middle its line is and how far along it starts are drawn anew for each clip, so that a
    caption does not determine the pixels. The digit stays in the picture from the first to the last frame.

    Args:
        num_clips: Captions take turns, so a multiple of 40 holds each equally often.
        canvas: Height and width in pixels, a multiple of 16. The digit is half as large.
        num_frames: T; see `check_path`.
        jitter: Largest distance of the line from the middle, in pixels of the scan.

    Raises:
        ConfigError: See `check_path`.
        MachineError: scikit-learn is missing.
    """
    check_path(canvas=canvas, num_frames=num_frames, jitter=jitter)
    scans, targets = load_scans(split)
    scans_of = [np.flatnonzero(targets == digit) for digit in range(len(DIGITS))]
    kinds = captions()
    rng = np.random.default_rng(seed)
    for index in range(num_clips):
        digit, direction, caption = kinds[index % len(kinds)]
        ink = _enlarged(scans[rng.choice(scans_of[digit])], canvas // (2 * SCAN_SIZE))
        line = _ROOM // 2 + int(rng.integers(-jitter, jitter + 1))
        start = int(rng.integers(0, _ROOM - num_frames + 2))
        frames = _moving(ink, direction, line, start, num_frames)
        gray = np.round(frames * 255).astype(np.uint8)
        yield DigitClip(np.repeat(gray[..., None], 3, axis=-1), digit, direction, caption)


def _moving(ink: NDArray[np.float32], direction: str, line: int, start: int, num_frames: int) -> NDArray[np.float32]:
    """The ink on its way: [T, H, W] in [0, 1], H and W twice the ink's."""
    scale = len(ink) // SCAN_SIZE
    rows, columns = DIRECTIONS[direction]
    frames = np.zeros((num_frames, 2 * len(ink), 2 * len(ink)), np.float32)
    for frame, step in zip(frames, range(start, start + num_frames), strict=True):
        along = _ROOM - step if rows + columns < 0 else step
        top, left = (along, line) if rows else (line, along)
        frame[top * scale : top * scale + len(ink), left * scale : left * scale + len(ink)] = ink
    return frames


def _enlarged(scan: NDArray[np.float32], scale: int) -> NDArray[np.float32]:
    """[8, 8] to [8 * scale, 8 * scale], bilinearly; ink fades to black outside."""
    places = (np.arange(len(scan) * scale) + 0.5) / scale - 0.5
    weights = np.maximum(0, 1 - np.abs(places[:, None] - np.arange(len(scan))))  # [8 * scale, 8]
    enlarged: NDArray[np.float32] = (weights @ scan @ weights.T).astype(np.float32)
    return enlarged
