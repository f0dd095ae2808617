"""Reading and writing video and image files, through PyAV and Pillow.

Frames in memory are uint8 RGB, [T, H, W, 3]: T frames, H height, W width. `to_uint8` makes them from model output.
Files that can't be used raise `DataError` with the path and the cause; libav itself prints nothing.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from struct import error as StructError
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, Self
from uuid import uuid4

import av
import numpy as np
import torch
from attrs import frozen
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from opensora.core.errors import DataError, MachineError, ShapeError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

__all__ = [
    "IMAGE_EXTENSIONS",
    "VIDEO_EXTENSIONS",
    "VideoFile",
    "VideoInfo",
    "is_image",
    "is_video",
    "probe_video",
    "read_image",
    "read_video",
    "to_uint8",
    "write_image",
    "write_video",
]

VIDEO_EXTENSIONS = frozenset({".mp4", ".avi", ".mov", ".mkv"})
IMAGE_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})

_UNKNOWN_FPS = 24.0
_IMAGE_ERRORS = (OSError, SyntaxError, ValueError, StructError, Image.DecompressionBombError)  # all that Pillow raises


def is_video(path: str | Path) -> bool:
    """Whether the file's name is that of a video. The file isn't opened."""
    return Path(path).suffix.lower() in VIDEO_EXTENSIONS


def is_image(path: str | Path) -> bool:
    """Whether the file's name is that of an image. The file isn't opened."""
    return Path(path).suffix.lower() in IMAGE_EXTENSIONS


@frozen(kw_only=True)
class VideoInfo:
    """What a video file says of itself."""

    num_frames: int
    """Exact: counted packet by packet where the header doesn't list them."""
    fps: float
    """Average rate; 24 where the file doesn't say."""
    height: int
    width: int
    metadata: Mapping[str, str]
    """Tags such as ``comment``; those given to `write_video` come back."""


def probe_video(path: str | Path) -> VideoInfo:
    """Number of frames, rate, size and tags, without decoding a frame.

    Raises:
        DataError: The file is missing, cut short, empty, or no video.
    """
    with VideoFile(path) as file:
        return file.info


def read_video(path: str | Path, indices: Iterable[int] | None = None) -> tuple[Tensor, float]:
    """Frames uint8 [T, H, W, 3] and the file's rate in frames a second.

    To choose the frames by the file's length, use `VideoFile`.

    Args:
        indices: Which frames, counted from 0, in any order; None: all of them.

    Raises:
        DataError: The file is missing, cut short, damaged, empty, or no video, or has no such frame.
    """
    with VideoFile(path) as file:
        return file.read(range(file.info.num_frames) if indices is None else indices), file.info.fps


class VideoFile:
    """A video file open for reading: what it is in `info`, its frames through `read`. A context manager.

    A flag that asks players to rotate the picture is ignored, as the field's loaders do.

    Raises:
        DataError: The file is missing, cut short, empty, or no video.
    """

    info: VideoInfo

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._packets: _PacketTable | None = None
        self._container = _open(self.path)
        try:
            self._stream = self._video_stream()
            self.info = self._probe()
        except BaseException as error:
            self.close()
            if isinstance(error, av.FFmpegError):
                self._fail(f"can't be read: {error.strerror}.", error)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the file. Done by leaving the ``with`` block."""
        self._container.close()

    def read(self, indices: Iterable[int]) -> Tensor:
        """Frames uint8 [T, H, W, 3] at ``indices``, which may repeat and be in any order.

        Decodes from the last key frame before the first index to the last index, nothing else.

        Raises:
            DataError: The file has no such frame, or it can't be decoded.
        """
        indices = list(indices)
        wanted = set(indices)
        if not wanted:
            self._fail("no frame of it was asked for.")
        if min(wanted) < 0 or max(wanted) >= self.info.num_frames:
            self._fail(f"has frames 0 to {self.info.num_frames - 1}; asked for {min(wanted)} to {max(wanted)}.")
        found: dict[int, NDArray[np.uint8]] = {}
        try:
            if min(wanted) > 0:
                found = self._collect(self._decode_from(min(wanted)), wanted)
            if len(found) < len(wanted):  # from the start; or the time stamps misled us, and counting frames settles it
                found = self._collect(self._decode_all(), wanted)
        except av.FFmpegError as error:
            self._fail(f"is damaged near frame {len(found)} of {self.info.num_frames}: {error.strerror}.", error)
        if missing := wanted - found.keys():
            self._fail_truncated(min(missing), self.info.num_frames)
        return torch.from_numpy(np.stack([found[index] for index in indices]))

    def _collect(self, frames: Iterator[tuple[int, VideoFrame]], wanted: set[int]) -> dict[int, NDArray[np.uint8]]:
        found: dict[int, NDArray[np.uint8]] = {}
        last = max(wanted)
        size = (self.info.width, self.info.height)
        for index, frame in frames:
            if index in wanted:
                if frame.is_corrupt:
                    self._fail(f"is damaged at frame {index} of {self.info.num_frames}.")
                if (frame.width, frame.height) != size:
                    self._fail(f"changes its size from {size} to {(frame.width, frame.height)} at frame {index}.")
                found[index] = np.asarray(frame.to_ndarray(format="rgb24", threads=1), np.uint8)
            if index >= last:
                break
        return found

    def _decode_all(self) -> Iterator[tuple[int, VideoFrame]]:
        """(index, frame) from the start."""
        self._container.close()  # a fresh one, since not every format can go back to its first frame by seeking
        self._container = _open(self.path)
        self._stream = self._video_stream()
        return enumerate(self._container.decode(self._stream))

    def _decode_from(self, first: int) -> Iterator[tuple[int, VideoFrame]]:
        """(index, frame) from the last key frame at or before ``first``; nothing where seeking isn't exact."""
        table = self._scan()
        key_frame = table.key_frame_before(first)
        if key_frame is None:
            return
        self._container.seek(key_frame, stream=self._stream)
        for frame in self._container.decode(self._stream):
            if frame.pts in table.index_of:
                yield table.index_of[frame.pts], frame

    def _video_stream(self) -> VideoStream:
        name = self._container.format.name
        if name == "image2" or name.endswith("_pipe"):
            self._fail(f"is an image ({name.removesuffix('_pipe')}), not a video.")
        if not self._container.streams.video:
            found = ", ".join(sorted({stream.type for stream in self._container.streams})) or "nothing"
            self._fail(f"has no video frames (format {name}, holds {found}): not a video, or cut short.")
        stream = self._container.streams.video[0]
        if stream.codec_context is None:
            self._fail("has a video track that nothing here can decode: damaged, or of an unknown codec.")
        stream.codec_context.thread_count = 1  # loader workers are the parallelism; threads cost small clips dear
        return stream

    def _probe(self) -> VideoInfo:
        stream = self._stream
        num_frames = self._listed_frames()
        if num_frames is None:
            num_frames = len(self._scan().index_of)
        if num_frames == 0 or not stream.width or not stream.height:
            self._fail("has no video frames.")
        rate = stream.average_rate
        return VideoInfo(
            num_frames=num_frames,
            fps=float(rate) if rate else _UNKNOWN_FPS,
            height=stream.height,
            width=stream.width,
            metadata=dict(self._container.metadata),
        )

    def _listed_frames(self) -> int | None:
        """Number of frames by the header's list, if it is one to rely on: an mp4 header lists each with its place."""
        entries = self._stream.index_entries
        announced, listed = self._stream.frames, len(entries)
        if 0 < listed < announced:
            self._fail_truncated(listed, announced)
        if "mp4" not in self._container.format.name or not 0 < announced <= listed:
            return None
        file_size = self.path.stat().st_size
        if beyond := sum(entry.pos + entry.size > file_size for entry in entries):
            self._fail_truncated(listed - beyond, listed)
        return sum(not entry.is_discard for entry in entries)  # an edit list may hide some

    def _scan(self) -> _PacketTable:
        """Time stamps of all frames, by reading the file through without decoding it."""
        if self._packets is None:
            stamps: list[tuple[int | None, bool]] = []
            for packet in self._container.demux(self._stream):
                if packet.is_corrupt:
                    self._fail_truncated(len(stamps), self._stream.frames)
                if packet.size and not packet.is_discard:
                    stamps.append((packet.pts, packet.is_keyframe))
            if "matroska" in self._container.format.name and _is_matroska_cut(self.path):
                self._fail_truncated(len(stamps), 0)
            # AVI has no presentation times: what libav makes up for them doesn't follow the order of frames.
            self._packets = _PacketTable(stamps, exact=self._container.format.name != "avi")
        return self._packets

    def _fail_truncated(self, whole: int, announced: int) -> NoReturn:
        total = f" of {announced}" if announced else ""
        self._fail(f"stops at frame {whole}{total} (truncated file).")

    def _fail(self, what: str, cause: BaseException | None = None) -> NoReturn:
        raise DataError(f"{self.path}{':' if what.startswith('stops') else ''} {what}") from cause


class _PacketTable:
    """Which frame has which time stamp, and where decoding can start."""

    def __init__(self, stamps: Sequence[tuple[int | None, bool]], *, exact: bool) -> None:
        times = sorted(time for time, _ in stamps if time is not None)
        self._can_seek = exact and len(set(times)) == len(stamps)
        if not self._can_seek:
            times = list(range(len(stamps)))
        self._times = times
        self._key_frames = sorted(time for time, is_key in stamps if is_key and time is not None)
        self.index_of = {time: index for index, time in enumerate(times)}

    def key_frame_before(self, index: int) -> int | None:
        """Time stamp of the last key frame at or before the frame; None where it can't be told."""
        position = bisect_right(self._key_frames, self._times[index]) if self._can_seek else 0
        return self._key_frames[position - 1] if position else None


def _open(path: Path) -> InputContainer:
    if not path.is_file():
        raise DataError(f"{path} is {'a folder' if path.is_dir() else 'missing'}; a video file was expected.")
    try:
        # "file:" and the whitelist, so that neither a name like "a:b.mp4" nor a playlist's content reaches the network
        return av.open(f"file:{path}", options={"protocol_whitelist": "file"}, metadata_errors="replace")
    except av.FFmpegError as error:
        raise DataError(f"{path} can't be read as a video ({_kind_of(path)}): {error.strerror}.") from error


def _kind_of(path: Path) -> str:
    """What a file that isn't a readable video seems to be."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        return error.strerror or "unreadable"
    if not head:
        return "the file is empty"
    if head[4:8] == b"ftyp" or head[:4] in (b"RIFF", b"\x1aE\xdf\xa3"):
        return "truncated or damaged file"
    is_text = b"\0" not in head and not any(byte < 9 for byte in head)
    return "it holds text" if is_text else "no known video format"


def _is_matroska_cut(path: Path) -> bool:
    """Whether a Matroska file ends before the end that it announces; libav reads such a file as a short one.

    Source: RFC 8794 (EBML): an element is an id, a size of 1 to 8 bytes (leading zeros count them), and its content.
    """

    def size_at(position: int) -> tuple[int, int]:
        length = 9 - head[position].bit_length()
        value = int.from_bytes(head[position : position + length]) & ((1 << 7 * length) - 1)
        return value, position + length

    with path.open("rb") as file:
        head = file.read(256)
    header_size, start = size_at(4)
    segment = start + header_size
    if head[segment : segment + 4] != b"\x18\x53\x80\x67":
        return False
    segment_size, start = size_at(segment + 4)
    is_unknown = segment_size + 1 == 1 << 7 * (start - segment - 4)  # all ones: a live recording
    return not is_unknown and start + segment_size > path.stat().st_size


def read_image(path: str | Path) -> Image.Image:
    """An image as Pillow's RGB, read completely. Transparency is dropped.

    Raises:
        DataError: The file is missing, cut short, or no image.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} is {'a folder' if path.is_dir() else 'missing'}; an image file was expected.")
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise DataError(f"{path} is not an image{_video_note(path)}.") from error
    except _IMAGE_ERRORS as error:
        raise DataError(f"{path} can't be read as an image: {error}.") from error


def _video_note(path: Path) -> str:
    try:
        info = probe_video(path)
    except DataError:
        return " that Pillow can read"
    return f" but a video of {info.num_frames} frames"


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
    """Write an mp4 that plays in a browser (H.264, yuv420p, BT.709, index first); missing folders are made.

    The file appears whole or not at all, and the same frames give the same bytes. 4:2:0 chroma needs an even height and
    width: odd ones are extended by repeating the last row or column.

    Args:
        frames: uint8 [T, H, W, 3].
        fps: Frames a second.
        crf: x264's quality, 0 to 51, lower is better: 18 is hard to tell from the original; 1 to 4 keeps tiny pictures
            nearly as they are; 0 is lossless, in a profile that some browsers don't play.
        metadata: Tags to store in the file; `probe_video` gives them back.

    Raises:
        ShapeError: ``frames`` aren't uint8 [T, H, W, 3] with at least one frame.
        MachineError: The file can't be written: permissions, full disk.
    """
    pixels = _even(_as_frames(frames))
    height, width = pixels.shape[1:3]
    with (
        _replacing(Path(path)) as temporary,
        av.open(
            f"file:{temporary}", "w", format="mp4", options={"movflags": "+faststart+use_metadata_tags"}
        ) as container,
    ):
        container.metadata.update(metadata or {})
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": str(crf)})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        codec = stream.codec_context
        codec.thread_count = 1 if height * width < 256 * 256 else 4  # by size alone: it changes x264's output
        codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
        codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for picture in pixels:
            rgb = av.VideoFrame.from_ndarray(picture, format="rgb24")
            yuv = rgb.reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG, threads=1
            )
            container.mux(stream.encode(yuv))
        container.mux(stream.encode())


def write_image(
    path: str | Path, frame: Tensor | NDArray[np.uint8], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a png; missing folders are made. The file appears whole or not at all.

    Args:
        frame: uint8 [H, W, 3].
        metadata: Text chunks to store in the file.

    Raises:
        ShapeError: ``frame`` isn't uint8 [H, W, 3].
        MachineError: The file can't be written: permissions, full disk.
    """
    picture = Image.fromarray(_as_frames(frame[None])[0])
    chunks = PngInfo()
    for name, text in (metadata or {}).items():
        chunks.add_itxt(name, text)
    with _replacing(Path(path)) as temporary:
        picture.save(temporary, format="PNG", pnginfo=chunks)


def _as_frames(frames: Tensor | NDArray[np.uint8]) -> NDArray[np.uint8]:
    array = frames.detach().cpu().numpy() if isinstance(frames, Tensor) else frames
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3 or 0 in array.shape:
        raise ShapeError(f"Frames must be uint8 [T, H, W, 3]; got {array.dtype} {list(array.shape)}. See to_uint8.")
    return np.ascontiguousarray(array)


def _even(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    _, height, width, _ = frames.shape
    if height % 2 == width % 2 == 0:
        return frames
    return np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place if the block succeeds and is removed if it doesn't."""
    temporary = path.with_name(f".{uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, av.FFmpegError) as error:
        raise MachineError(f"{path} can't be written: {error.strerror or error}.") from error
