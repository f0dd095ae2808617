"""Pictures and videos that a sample starts from: read, brought to its size and rate, and what that changed said in words.

Shapes: T frames, H height, W width.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import torch
from attrs import frozen
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from opensora.core.downloads import default_folder, download
from opensora.core.errors import ConfigError, DataError
from opensora.core.frame_sources import FrameSource, open_frames
from opensora.core.transforms import resize_crop_geometry, resize_crop_image, resize_crop_video

__all__ = ["Reference", "digest_of", "load_reference"]

_ALL = slice(None)


@frozen(kw_only=True, eq=False)
class Reference:
    """Frames to start from."""

    video: Tensor
    """float32 [3, T, H, W] in [-1, 1]; T is 1 for a picture."""
    source: str
    """The path or address that was asked for."""
    digest: str
    """SHA-256 of the file's bytes, hexadecimal; see `digest_of`."""
    notes: Sequence[str]
    """What was changed, in words, with the file's name; none if nothing was."""


def load_reference(
    source: str,
    *,
    height: int,
    width: int,
    fps: float | None = None,
    frames: slice = _ALL,
    folder_for_downloads: Path | None = None,
) -> Reference:
    """Read a picture, a video, an animation or a folder of frames, told by its content.

    It is scaled to cover ``height`` x ``width`` and cropped evenly, as models were trained: pictures bicubically with
    antialiasing, videos bilinearly. It is read as players show it: turned by the camera's note, with square pixels, and with
    white where it is transparent.

    Args:
        source: A path, or an address (http, https, ftp), whose file is kept in ``folder_for_downloads``.
        fps: The rate at which the frames will be shown. Of a video, those nearest in time are taken, some of them twice if it
            has fewer. None: all of its own frames.
        frames: Which of those to keep, such as ``slice(0, 17)`` or ``slice(-17, None)``; no others are held in memory.
        folder_for_downloads: None: `opensora.core.downloads.default_folder`.

    Raises:
        DataError: It is missing, damaged, cut, empty, no picture or video, can't be downloaded, or has no such frames.
        MachineError: The folder for downloads can't be written.
    """
    path = download(source, folder_for_downloads or default_folder()) if _is_address(source) else Path(source)
    try:
        with open_frames(path) as opened:
            indices, rate_note = _chosen(opened, fps, frames)
            video = torch.cat(opened.map(_fitting(opened, height, width), indices), dim=1)
    except DataError as error:
        if not _is_address(source):
            raise
        path.unlink(missing_ok=True)  # it may be another file next time
        raise DataError(f"{source}, downloaded: {error}") from error
    changes = [*opened.remarks, *_size_note(opened, height, width), *rate_note]
    notes = [f"{_name(source)}: {'; '.join(changes)}"] if changes else []
    return Reference(video=video, source=source, digest=digest_of(path), notes=notes)


def digest_of(path: Path) -> str:
    """SHA-256 of a file's bytes, or of the names and digests of all files in a folder; hexadecimal."""
    if path.is_dir():
        lines = (f"{entry.name} {digest_of(entry)}\n" for entry in sorted(path.iterdir()) if entry.is_file())
        return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _chosen(source: FrameSource, fps: float | None, frames: slice) -> tuple[list[int], list[str]]:
    """Indices of the frames to read, and what to say of them."""
    count = source.info.num_frames
    shown, notes = list(range(count)), []
    if fps is not None and not source.is_image:
        times = source.times()
        own_fps = _mean_rate(times, source.info.fps)
        shown = _nearest(times, own_fps, fps)
        if shown != list(range(count)):
            used = len(set(shown))
            told = f"{used} of {count} frames" if used == len(shown) else f"{len(shown)} frames from {used}"
            notes.append(f"resampled from {own_fps:.5g} to {fps:.5g} frames/s: {told}")
    kept = shown[frames]
    first, end, _ = frames.indices(len(shown))
    if not kept:
        raise DataError(f"{source.path} gives {len(shown)} frames; there is none from {frames.start} to {frames.stop}.")
    if len(kept) < len(shown):
        notes.append(f"frames {first + 1} to {end} of {len(shown)} taken")
    return kept, notes


def _mean_rate(times: Sequence[float], announced: float) -> float:
    """Frames a second by the time stamps, where they say something else than the file's head does."""
    counted = (len(times) - 1) / times[-1] if len(times) > 1 else announced
    return announced if abs(counted / announced - 1) < 0.01 else counted


def _nearest(times: Sequence[float], own_fps: float, fps: float) -> list[int]:
    """For each frame at ``fps``, for as long as the video lasts, the video's own that is nearest in time.

    Args:
        times: Of the video's frames, in seconds, from 0.
        own_fps: For how long the last one is shown.
    """
    if not fps > 0:
        raise ConfigError(f"fps is {fps}; a reference can be resampled to more than 0 frames a second.")
    number = max(1, round((times[-1] + 1 / own_fps) * fps))
    return [_nearest_index(times, index / fps) for index in range(number)]


def _nearest_index(times: Sequence[float], time: float) -> int:
    after = bisect_left(times, time)
    if after == 0 or after == len(times):
        return min(after, len(times) - 1)
    is_before_nearer = (
        time - times[after - 1] <= times[after] - time + 1e-6
    )  # half-way, the earlier, whatever rounding says
    return after - 1 if is_before_nearer else after


def _fitting(source: FrameSource, height: int, width: int) -> Callable[[NDArray[np.uint8]], Tensor]:
    """A frame [H, W, 3] to [3, 1, height, width]."""
    if source.is_image:
        return lambda picture: resize_crop_image(Image.fromarray(picture), height, width)
    return lambda picture: resize_crop_video(torch.from_numpy(picture)[None], height, width)


def _size_note(source: FrameSource, height: int, width: int) -> list[str]:
    own = (source.info.height, source.info.width)
    if own == (height, width):
        return []
    geometry = resize_crop_geometry(*own, height, width, is_image=source.is_image)
    scaled = (geometry.height, geometry.width)
    steps = [] if scaled == own else [f"resized to {scaled[0]} x {scaled[1]}"]
    steps += [] if scaled == (height, width) else [f"cropped to {height} x {width}"]
    return [f"{own[0]} x {own[1]} (height x width) {' and '.join(steps)}"]


def _is_address(source: str) -> bool:
    return "://" in source


def _name(source: str) -> str:
    return unquote(urlsplit(source).path).rpartition("/")[2] if _is_address(source) else Path(source).name
