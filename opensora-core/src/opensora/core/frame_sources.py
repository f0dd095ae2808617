"""Frames of any file that has some, told by its content: a video, an animated picture, a still one, or a folder of pictures.

Frames are uint8 RGB, [T, H, W, 3], as a viewer or player shows them: turned by the camera's note, with square pixels, and
with white where a picture is transparent. What that changed is said in ``remarks``.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
import torch
from attrs import field, frozen
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from opensora.core.errors import DataError
from opensora.core.video import IMAGE_EXTENSIONS, VideoFile, VideoInfo, content_of, is_image, reading_image

__all__ = ["FrameSource", "frames_of", "open_frames"]

_Made = TypeVar("_Made")

_UNKNOWN_FPS = 24.0
_PICTURES = frozenset({"AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP"})
_ANIMATIONS = frozenset({"GIF", "WEBP", "PNG", "AVIF"})  # others have pages, or a picture for each eye
_HURRIED_MS, _SHOWN_MS = 10, 100  # browsers show a frame of at most 10 ms for 100 ms
_HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"})


def frames_of(path: str | Path) -> tuple[Tensor, float]:
    """All frames, uint8 [T, H, W, 3], and their rate in frames a second.

    Raises:
        DataError: What is there is damaged or has no frames, or nothing is there.
    """
    with open_frames(path) as source:
        return source.read(range(source.info.num_frames)), source.info.fps


def open_frames(path: str | Path) -> FrameSource:
    """Open what has frames, by its content, whatever it is called.

    Raises:
        DataError: What is there is damaged or has no frames, or nothing is there.
    """
    path = Path(path)
    if path.is_dir():
        return _PictureFolder(path)
    if not path.is_file():
        raise DataError(f"{path} is missing; a video, a picture or a folder of pictures was expected.")
    if _is_picture(path):
        return _PictureFile(path)
    if _is_heic(path):
        raise DataError(f"{path} is a HEIC picture, which can't be read here. Convert it to jpg or png.")
    try:
        return _Video(path)
    except DataError as error:
        if is_image(path):
            raise DataError(f"{path} is no picture that can be read ({content_of(path)}).") from error
        raise


class FrameSource(ABC):
    """Frames that are read by index. A context manager."""

    info: VideoInfo
    """Their number, size and rate, and the file's tags."""
    remarks: Sequence[str] = ()
    """How what is read differs from what is stored, in words."""
    is_image = False
    """Whether it is one still picture."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def times(self) -> list[float]:
        """Seconds from the first frame to each."""

    @abstractmethod
    def map(self, function: Callable[[NDArray[np.uint8]], _Made], indices: Iterable[int]) -> list[_Made]:
        """What ``function`` makes of each frame [H, W, 3] at ``indices``; the frames themselves aren't held.

        Raises:
            DataError: There is no such frame, or it can't be decoded.
        """

    def read(self, indices: Iterable[int]) -> Tensor:
        """Frames uint8 [T, H, W, 3] at ``indices``, which may repeat and be in any order.

        Raises:
            DataError: There is no such frame, or it can't be decoded.
        """
        return torch.from_numpy(np.stack(self.map(lambda picture: picture, indices)))

    def close(self) -> None:  # noqa: B027  # most hold nothing open
        """Release the file. Done by leaving the ``with`` block."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Video(FrameSource):
    """Whatever libav reads."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._file = VideoFile(path, as_shown=True)
        self.info, self.remarks = self._file.info, self._file.remarks

    def times(self) -> list[float]:
        return self._file.times()

    def map(self, function: Callable[[NDArray[np.uint8]], _Made], indices: Iterable[int]) -> list[_Made]:
        return self._file.map(function, indices)

    def close(self) -> None:
        self._file.close()


class _PictureFile(FrameSource):
    """Whatever Pillow reads, still or animated. It is decoded once when opened, to know its times and that it is whole."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        remarks, tags = dict[str, None](), dict[str, str]()
        durations, sizes = [], []
        for image, picture in self._iter_pictures(remarks):
            durations.append(_duration_ms(image))
            sizes.append(picture.shape[:2])
            tags |= _tags(image)
        if len(set(sizes)) != 1:
            raise DataError(f"{path} has frames of different sizes.")
        self.is_image = len(durations) == 1
        self._ends = [end / 1000 for end in accumulate(durations)]
        self.info = VideoInfo(
            num_frames=len(durations),
            fps=_UNKNOWN_FPS if self.is_image else len(durations) / self._ends[-1],
            height=sizes[0][0],
            width=sizes[0][1],
            metadata=tags,
        )
        self.remarks = list(remarks)

    def times(self) -> list[float]:
        return [0.0, *self._ends[:-1]]

    def map(self, function: Callable[[NDArray[np.uint8]], _Made], indices: Iterable[int]) -> list[_Made]:
        indices = _checked(self, indices)
        wanted, found = set(indices), dict[int, _Made]()
        for index, (_, picture) in enumerate(self._iter_pictures({})):
            if index in wanted:
                found[index] = function(picture)
            if len(found) == len(wanted):
                break
        return [found[index] for index in indices]

    def _iter_pictures(self, remarks: dict[str, None]) -> Iterator[tuple[Image.Image, NDArray[np.uint8]]]:
        """(Pillow's image at the frame, the frame [H, W, 3]); ``remarks`` are added to."""
        with reading_image(self.path) as image:
            if image.format == "GIF" and _is_gif_cut(self.path):
                raise DataError(f"{self.path} stops before its end (truncated file).")
            count = getattr(image, "n_frames", 1) if image.format in _ANIMATIONS else 1
            # a png may have a picture for programs that show no animations, which isn't part of the film
            for index in range(1 if count > 1 and image.info.get("default_image") else 0, count):
                image.seek(index)
                image.load()
                yield image, _as_shown(image, remarks)


class _PictureFolder(FrameSource):
    """A folder of pictures in the order of their numbers: what `FolderWriter` writes, or anyone's."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._pictures = sorted(
            (entry for entry in path.iterdir() if entry.suffix.lower() in IMAGE_EXTENSIONS and entry.is_file()),
            key=lambda entry: _numerically(entry.name),
        )
        if not self._pictures:
            raise DataError(f"{path} is a folder without pictures; frames were expected in it.")
        facts = _Facts.read(path)
        if len(self._pictures) != (facts.num_frames or len(self._pictures)):
            raise DataError(
                f"{path} has {len(self._pictures)} pictures, but was written with {facts.num_frames} frames."
            )
        remarks: dict[str, None] = {}
        height, width = _read_still(self._pictures[0], remarks).shape[:2]
        self.info = VideoInfo(
            num_frames=len(self._pictures), fps=facts.fps, height=height, width=width, metadata=facts.metadata
        )
        self.remarks = list(remarks)
        self.is_image = len(self._pictures) == 1

    def times(self) -> list[float]:
        return [index / self.info.fps for index in range(self.info.num_frames)]

    def map(self, function: Callable[[NDArray[np.uint8]], _Made], indices: Iterable[int]) -> list[_Made]:
        indices = _checked(self, indices)
        found = {index: function(self._picture(index)) for index in sorted(set(indices))}
        return [found[index] for index in indices]

    def _picture(self, index: int) -> NDArray[np.uint8]:
        picture = _read_still(self._pictures[index], {})
        size, first = picture.shape[:2], (self.info.height, self.info.width)
        if size != first:
            raise DataError(f"{self._pictures[index]} is {size[0]} x {size[1]}; the first is {first[0]} x {first[1]}.")
        return picture


@frozen(kw_only=True)
class _Facts:
    """What a folder of frames says of itself beside the pictures."""

    fps: float = _UNKNOWN_FPS
    num_frames: int | None = None
    metadata: Mapping[str, str] = field(factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Defaults where nothing is said, as in a folder that someone else made.

        Raises:
            DataError: What it says is damaged.
        """
        facts = _read_json(folder / "frames.json")
        fps, num_frames, metadata = facts.get("fps", _UNKNOWN_FPS), facts.get("num_frames"), facts.get("metadata", {})
        if not isinstance(fps, int | float) or not fps > 0 or not isinstance(metadata, dict):
            raise DataError(f"{folder / 'frames.json'} is damaged: fps {fps!r}, metadata {metadata!r}.")
        recipe = folder / "recipe.json"
        comment = {"comment": _read_text(recipe)} if recipe.is_file() else {}
        return cls(fps=fps, num_frames=num_frames, metadata={**metadata, **comment})


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty if the file isn't there."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error}.") from error
    return value if isinstance(value, dict) else {}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} can't be read: {error}.") from error


def _read_still(path: Path, remarks: dict[str, None]) -> NDArray[np.uint8]:
    """A picture [H, W, 3]; of an animation the first."""
    with reading_image(path) as image:
        image.load()
        return _as_shown(image, remarks)


def _as_shown(image: Image.Image, remarks: dict[str, None]) -> NDArray[np.uint8]:
    """[H, W, 3] as a viewer shows it; ``remarks`` (a set in order) are added to."""
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    shown = ImageOps.exif_transpose(image)
    if orientation in range(2, 9):
        remarks[f"turned as its EXIF orientation ({orientation}) asks viewers to"] = None
    if shown.mode.startswith("I;16"):  # Pillow would cut off what is above 255
        gray = (np.asarray(shown).astype(np.uint16) >> 8).astype(np.uint8)
        return np.repeat(gray[..., None], 3, axis=2)
    if shown.has_transparency_data:
        layers = shown.convert("RGBA")
        if layers.getchannel("A").getextrema() != (255, 255):
            remarks["its transparent parts made white"] = None
            shown = Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers)
    return np.array(shown.convert("RGB"), np.uint8)


def _duration_ms(image: Image.Image) -> float:
    """How long the frame that ``image`` is at is shown."""
    duration = float(image.info.get("duration") or 0)
    return duration if duration > _HURRIED_MS else _SHOWN_MS


def _tags(image: Image.Image) -> dict[str, str]:
    """Text in the file, such as ``comment``."""
    found = {**image.info, **getattr(image, "text", {})}
    text = {
        name: value.decode(errors="replace") if isinstance(value, bytes) else value for name, value in found.items()
    }
    return {name: str(value) for name, value in text.items() if name == "comment" or name in getattr(image, "text", {})}


def _checked(source: FrameSource, indices: Iterable[int]) -> list[int]:
    indices = list(indices)
    count = source.info.num_frames
    if not indices:
        raise DataError(f"{source.path} has frames, but none was asked for.")
    if min(indices) < 0 or max(indices) >= count:
        raise DataError(f"{source.path} has frames 0 to {count - 1}; asked for {min(indices)} to {max(indices)}.")
    return indices


def _numerically(name: str) -> list[tuple[int, str]]:
    """To sort by: ``frame10`` after ``frame9``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _is_picture(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            return image.format in _PICTURES
    except Image.DecompressionBombError:
        return True
    except (OSError, SyntaxError, ValueError):
        return False


def _is_gif_cut(path: Path) -> bool:
    """Whether the last byte isn't a gif's last; Pillow reads a file that was cut between two frames as a shorter one."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 64))
        return not file.read().rstrip(b"\0\r\n").endswith(b";")


def _is_heic(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(12)
    return head[4:8] == b"ftyp" and head[8:] in _HEIC_BRANDS
