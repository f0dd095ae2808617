"""Writing frames as they come to one of four kinds of result: mp4, gif, png, or a folder of pngs.

Frames are uint8 RGB, [T, H, W, 3]. A result appears whole when the ``with`` block ends well, or not at all; memory doesn't
grow with the number of frames; the same frames give the same bytes, however they are cut into pieces.
"""

from __future__ import annotations

import json
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Literal, Self, get_args
from uuid import uuid4

import av
import numpy as np
import torch
from av.filter import Graph
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from numpy.typing import NDArray
from PIL import GifImagePlugin, Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from opensora.core.errors import ConfigError, MachineError, ShapeError, did_you_mean

if TYPE_CHECKING:
    from av.container import OutputContainer
    from av.video.stream import VideoStream

__all__ = [
    "RESULT_EXTENSIONS",
    "FolderWriter",
    "GifWriter",
    "ImageWriter",
    "ResultFormat",
    "Sink",
    "VideoWriter",
    "format_of",
    "open_sink",
    "to_uint8",
    "write_image",
    "write_video",
]

ResultFormat = Literal["mp4", "gif", "png", "frames"]

RESULT_EXTENSIONS: Mapping[ResultFormat, str] = {"mp4": ".mp4", "gif": ".gif", "png": ".png", "frames": ""}
"""What the name of a result ends in; ``frames`` is a folder."""

_SMALL = 128
"""Pixels: of pictures with a shorter side each frame is encoded by itself."""
_ALONE = {"g": "1", "bf": "0", "x264-params": "rc-lookahead=0:mbtree=0:scenecut=0"}
"""For x264: no frame is predicted from others. Its look ahead and its search for motion read memory beyond small pictures
that they have not written, so that the same frames give other bytes now and then."""
_NOT_WRITTEN = re.compile(r"\.(3gp|apng|avi|avif|bmp|flv|jpe?g|json|m4v|mkv|mov|mpe?g|tiff?|webm|webp|wmv)")
_FOLDER_FILES = re.compile(r"\d{4,}\.png|frames\.json|recipe\.json")


def to_uint8(video: Tensor) -> Tensor:
    """Model output [3, T, H, W] in [-1, 1] (clamped) to frames uint8 [T, H, W, 3], rounded to the nearest."""
    pixels = video.detach().float().clamp(-1, 1).add(1).mul(127.5).add(0.5)
    return pixels.clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0).contiguous()


def write_video(
    path: str | Path,
    frames: Tensor | NDArray[np.uint8],
    fps: float,
    *,
    crf: int = 18,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write all frames of an mp4 at once: see `VideoWriter`.

    Args:
        frames: uint8 [T, H, W, 3].

    Raises:
        ShapeError: ``frames`` aren't uint8 [T, H, W, 3] with at least one frame.
        MachineError: The file can't be written: permissions, full disk.
    """
    with VideoWriter(path, fps, crf=crf, metadata=metadata) as sink:
        sink.append(frames)


def write_image(
    path: str | Path, frame: Tensor | NDArray[np.uint8], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a png at once: see `ImageWriter`.

    Args:
        frame: uint8 [H, W, 3].

    Raises:
        ShapeError: ``frame`` isn't uint8 [H, W, 3].
        MachineError: The file can't be written: permissions, full disk.
    """
    with ImageWriter(path, metadata=metadata) as sink:
        sink.append(frame[None])


def open_sink(
    path: str | Path,
    format: ResultFormat | None = None,  # noqa: A002  # the word that users know
    *,
    fps: float,
    crf: int = 18,
    metadata: Mapping[str, str] | None = None,
) -> Sink:
    """The writer of a format.

    Args:
        path: Complete: see `RESULT_EXTENSIONS`.
        format: None: what the path ends in.
        fps: Frames a second. A png has none.
        crf: Quality of an mp4.
        metadata: Tags to store; a gif takes only ``comment``.

    Raises:
        ConfigError: There is no such format, or no such rate.
    """
    chosen: str = format or format_of(path)
    match chosen:
        case "mp4":
            return VideoWriter(path, fps, crf=crf, metadata=metadata)
        case "gif":
            return GifWriter(path, fps, metadata=metadata)
        case "png":
            return ImageWriter(path, metadata=metadata)
        case "frames":
            return FolderWriter(path, fps, metadata=metadata)
    known = get_args(ResultFormat)
    raise ConfigError(f'"{chosen}" is not a format of results: {", ".join(known)}.{did_you_mean(chosen, known)}')


def format_of(path: str | Path) -> ResultFormat:
    """The format that a name's ending stands for; a name without one that files have is a folder of frames.

    Raises:
        ConfigError: It ends as a picture or a video that can't be written.
    """
    ending = Path(path).suffix.lower()
    for name, extension in RESULT_EXTENSIONS.items():
        if ending == extension:
            return name
    if _NOT_WRITTEN.fullmatch(ending):
        raise ConfigError(f"{path} can't be written: results are .mp4, .gif or .png, or a folder of png files.")
    return "frames"


class Sink(ABC):
    """Takes frames in pieces. A context manager.

    Raises:
        ShapeError: When writing: the frames aren't uint8 [T, H, W, 3] of one size. At the end: there were none.
        MachineError: It can't be written: permissions, full disk, another folder in the way.
    """

    num_frames: int
    """Written so far."""

    def __init__(self, path: str | Path, *, metadata: Mapping[str, str] | None = None) -> None:
        self.path = Path(path)
        self.num_frames = 0
        self._metadata = dict(metadata or {})
        self._temporary = self.path.with_name(f".{uuid4().hex}.tmp")
        self._size: tuple[int, int] | None = None

    def __enter__(self) -> Self:
        with self._reporting():
            self._check_place()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._open()
            except BaseException:
                self._discard()
                raise
        return self

    def append(self, frames: Tensor | NDArray[np.uint8]) -> None:
        """Add frames uint8 [T, H, W, 3]; the first ones set the size."""
        pixels = _as_frames(frames)
        height, width = pixels.shape[1:3]
        with self._reporting():
            if self._size is None:
                self._begin(height, width)
                self._size = (height, width)
            elif self._size != (height, width):
                was = f"{self._size[0]} x {self._size[1]}"
                raise ShapeError(f"{self.path}: frames of {was} are followed by frames of {height} x {width}.")
            for picture in pixels:
                self._add(picture)
                self.num_frames += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                if not self.num_frames:
                    raise ShapeError(f"{self.path}: no frame was written.")
                with self._reporting():
                    self._finish()
                    self._publish()
        finally:
            self._discard()

    def _check_place(self) -> None:
        """Fail before the work if something is in the way that can't be replaced."""
        if self.path.is_dir():
            raise MachineError(f"{self.path} can't be written: there is a folder of that name.")

    @abstractmethod
    def _open(self) -> None:
        """Make the temporary file."""

    def _begin(self, height: int, width: int) -> None:  # noqa: B027  # some have nothing to do
        """Write what comes before the first frame."""

    @abstractmethod
    def _add(self, picture: NDArray[np.uint8]) -> None:
        """Write a frame [H, W, 3]."""

    def _finish(self) -> None:  # noqa: B027  # some have nothing to do
        """Write what comes after the last frame, and close the temporary file."""

    def _publish(self) -> None:
        self._temporary.replace(self.path)

    def _discard(self) -> None:
        """Close and remove what is left; called at every end."""
        self._temporary.unlink(missing_ok=True)

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except (OSError, av.FFmpegError) as error:
            raise MachineError(f"{self.path} can't be written: {error.strerror or error}.") from error


class VideoWriter(Sink):
    """Writes an mp4 that plays in a browser (H.264, yuv420p, BT.709, index first); missing folders are made.

    4:2:0 chroma needs an even height and width: odd ones are extended by repeating the last row or column.

    Args:
        fps: Frames a second.
        crf: x264's quality, 0 to 51, lower is better: 18 is hard to tell from the original; 1 to 4 keeps tiny pictures
            nearly as they are; 0 is lossless, in a profile that some browsers don't play.
        metadata: Tags to store in the file; `probe_video` gives them back.
    """

    def __init__(
        self, path: str | Path, fps: float, *, crf: int = 18, metadata: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(path, metadata=metadata)
        self._rate = _rate(fps)
        self._crf = crf
        self._container: OutputContainer | None = None
        self._stream: VideoStream | None = None

    def _open(self) -> None:
        options = {"movflags": "+faststart+use_metadata_tags"}
        self._container = av.open(f"file:{self._temporary}", "w", format="mp4", options=options)
        self._container.metadata.update(self._metadata)

    def _begin(self, height: int, width: int) -> None:
        assert self._container is not None
        options = {"crf": str(self._crf)}
        if min(height, width) < _SMALL:
            options |= _ALONE
        stream = self._container.add_stream("libx264", rate=self._rate, options=options)
        stream.height, stream.width, stream.pix_fmt = height + height % 2, width + width % 2, "yuv420p"
        codec = stream.codec_context
        # by size alone, since it changes x264's output
        codec.thread_count = 1 if stream.height * stream.width < 256 * 256 else 4
        codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
        codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        self._stream = stream

    def _add(self, picture: NDArray[np.uint8]) -> None:
        rgb = av.VideoFrame.from_ndarray(_even(picture), format="rgb24")
        self._encode(
            rgb.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG, threads=1)
        )

    def _finish(self) -> None:
        self._encode(None)
        self._close()

    def _encode(self, frame: av.VideoFrame | None) -> None:
        assert self._container is not None
        assert self._stream is not None
        self._container.mux(self._stream.encode(frame))

    def _close(self) -> None:
        container, self._container = self._container, None
        if container is not None:
            container.close()

    def _discard(self) -> None:
        with suppress(OSError, av.FFmpegError):  # the file is given up
            self._close()
        super()._discard()


class GifWriter(Sink):
    """Writes a gif that plays for ever, each frame with 256 colours of its own, dithered; missing folders are made.

    A gif counts time in hundredths of a second: frames last a little longer and shorter so that the whole is right. Faster
    than 50 frames a second it plays at 50, since browsers slow down what is faster.

    Args:
        fps: Frames a second.
        metadata: ``comment`` is stored in the file, as UTF-8; a gif has no place for others.
    """

    def __init__(self, path: str | Path, fps: float, *, metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(path, metadata=metadata)
        self._rate = min(_rate(fps), Fraction(50))
        self._file: BinaryIO | None = None
        self._quantizer: Graph | None = None

    def _open(self) -> None:
        self._file = self._temporary.open("wb")

    def _begin(self, height: int, width: int) -> None:
        self._quantizer = _quantizer(height, width)
        self._put(b"GIF89a" + width.to_bytes(2, "little") + height.to_bytes(2, "little") + b"\x70\0\0")
        self._put(b"!\xff\x0bNETSCAPE2.0\x03\x01\0\0\0")  # for ever
        if comment := self._metadata.get("comment", "").encode("utf-8", "backslashreplace"):
            parts = (comment[start : start + 255] for start in range(0, len(comment), 255))
            self._put(b"!\xfe" + b"".join(bytes([len(part)]) + part for part in parts) + b"\0")

    def _add(self, picture: NDArray[np.uint8]) -> None:
        assert self._quantizer is not None
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts, frame.time_base = self.num_frames, Fraction(1)
        self._quantizer.push(frame)
        indices, palette = self._quantizer.pull().to_ndarray()  # [H, W]; [256, 4] alpha, red, green, blue
        indexed = Image.fromarray(indices)
        indexed.putpalette(palette[: int(indices.max()) + 1, 1:].tobytes())
        begin, end = (round(count * 100 / self._rate) for count in (self.num_frames, self.num_frames + 1))
        for block in GifImagePlugin.getdata(indexed, duration=(end - begin) * 10, include_color_table=True):
            self._put(block)

    def _finish(self) -> None:
        self._put(b";")
        self._close()

    def _put(self, data: bytes) -> None:
        assert self._file is not None
        self._file.write(data)

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _discard(self) -> None:
        with suppress(OSError):  # the file is given up
            self._close()
        super()._discard()


def _quantizer(height: int, width: int) -> Graph:
    """Frames rgb24 to pal8, each with the 256 colours that suit it best, by libavfilter's palettegen and paletteuse."""
    graph = Graph()
    source = graph.add_buffer(width=width, height=height, format=av.VideoFormat("rgb24"), time_base=Fraction(1))
    split, sink = graph.add("split"), graph.add("buffersink")
    palettegen = graph.add("palettegen", "stats_mode=single:reserve_transparent=0")
    paletteuse = graph.add("paletteuse", "new=1")
    source.link_to(split)
    split.link_to(palettegen, 0, 0)
    split.link_to(paletteuse, 1, 0)
    palettegen.link_to(paletteuse, 0, 1)
    paletteuse.link_to(sink)
    graph.configure()
    return graph


class ImageWriter(Sink):
    """Writes a png of one frame; missing folders are made.

    Args:
        metadata: Text chunks to store in the file.
    """

    def _open(self) -> None:
        self._temporary.touch()

    def _add(self, picture: NDArray[np.uint8]) -> None:
        if self.num_frames:
            raise ShapeError(f"{self.path}: a png holds one frame. Use the format mp4, gif or frames for more.")
        _save_png(self._temporary, picture, self._metadata)


class FolderWriter(Sink):
    """Writes a folder of ``0000.png``, ``0001.png``, ..., with the rate in ``frames.json``; missing folders are made.

    A folder of frames that is there already is replaced; one that holds anything else is left alone, and refused.

    Args:
        fps: Frames a second.
        metadata: ``comment`` becomes ``recipe.json`` in the folder, others go into ``frames.json``.
    """

    def __init__(self, path: str | Path, fps: float, *, metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(path, metadata=metadata)
        _rate(fps)
        self._fps = float(fps)

    def _check_place(self) -> None:
        if self.path.is_dir():
            others = [entry.name for entry in self.path.iterdir() if not _FOLDER_FILES.fullmatch(entry.name)]
            if others:
                raise MachineError(
                    f"{self.path} can't be replaced by a folder of frames: it holds other things ({others[0]})."
                )
        elif self.path.exists():
            raise MachineError(f"{self.path} can't be written: there is a file of that name.")

    def _open(self) -> None:
        self._temporary.mkdir()

    def _add(self, picture: NDArray[np.uint8]) -> None:
        _save_png(self._temporary / f"{self.num_frames:04d}.png", picture, {})

    def _finish(self) -> None:
        others = dict(self._metadata)
        if recipe := others.pop("comment", None):
            (self._temporary / "recipe.json").write_text(recipe, encoding="utf-8", errors="backslashreplace")
        facts = {"fps": self._fps, "num_frames": self.num_frames, "metadata": others}
        (self._temporary / "frames.json").write_text(json.dumps(facts))

    def _publish(self) -> None:
        if not self.path.is_dir():
            self._temporary.replace(self.path)
            return
        old = self.path.with_name(f".{uuid4().hex}.tmp")
        self.path.replace(old)
        self._temporary.replace(self.path)
        shutil.rmtree(old)

    def _discard(self) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)


def _save_png(path: Path, picture: NDArray[np.uint8], metadata: Mapping[str, str]) -> None:
    chunks = PngInfo()
    for name, text in metadata.items():
        chunks.add_itxt(name, text)
    Image.fromarray(picture).save(path, format="PNG", pnginfo=chunks)


def _as_frames(frames: Tensor | NDArray[np.uint8]) -> NDArray[np.uint8]:
    array = frames.detach().cpu().numpy() if isinstance(frames, Tensor) else frames
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3 or 0 in array.shape:
        raise ShapeError(f"Frames must be uint8 [T, H, W, 3]; got {array.dtype} {list(array.shape)}. See to_uint8.")
    return np.ascontiguousarray(array)


def _even(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width, _ = picture.shape
    if height % 2 == width % 2 == 0:
        return picture
    return np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _rate(fps: float) -> Fraction:
    """Frames a second as a fraction that files can hold.

    Raises:
        ConfigError: It is none.
    """
    rate = Fraction(fps).limit_denominator(1001) if 0 < fps < float("inf") else Fraction(0)
    if not rate:
        raise ConfigError(f"fps is {fps}; a video needs more than 0 frames a second.")
    return rate
