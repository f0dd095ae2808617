"""Which frames of a file make a clip."""

from __future__ import annotations

from opensora.core.errors import DataError

__all__ = ["last_start", "sample_frames"]


def last_start(total: int, num_frames: int, *, frame_interval: int = 1) -> int:
    """The highest start that `sample_frames` may be given: starts are drawn from 0 to this, both included.

    One less than would fit, as in the field's loaders: a clip that ends at the file's last frame only starts at 0.
    """
    return max(0, total - num_frames * frame_interval - 1)


def sample_frames(total: int, num_frames: int, *, frame_interval: int = 1, start: int = 0) -> list[int]:
    """Indices of frames spread evenly over the window of ``num_frames * frame_interval`` from ``start`` on.

    The window's first and last frame are among them, so that some steps exceed the interval: 0, 3, ..., 21, 25, ..., 47
    for 16 frames at interval 3. A file shorter than the window is used whole, in smaller steps.

    Args:
        total: Frames of the file.
        start: In [0, `last_start`].

    Raises:
        DataError: Fewer than ``num_frames`` frames are there.
    """
    end = min(start + num_frames * frame_interval, total)
    if end - start < num_frames:
        raise DataError(f"has {end - start} frames from frame {start} on; {num_frames} are needed.")
    steps = max(1, num_frames - 1)
    return [start + index * (end - 1 - start) // steps for index in range(num_frames)]
