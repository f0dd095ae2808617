"""Reading video and image files, through PyAV and Pillow. How they are written: `opensora.core.video_writing`.

Frames in memory are uint8 RGB, [T, H, W, 3]: T frames, H height, W width. `to_uint8` makes them from model output.
Files that can't be used raise `DataError` with the path and the cause; libav itself prints nothing.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from struct import error as StructError
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, Self, TypeVar

import av
import numpy as np
import torch
from attrs import evolve, frozen
from av.stream import Disposition
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from opensora.core.errors import DataError
from opensora.core.video_writing import Sink, VideoWriter, open_sink, to_uint8, write_image, write_video

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

__all__ = [
    "IMAGE_EXTENSIONS",
    "VIDEO_EXTENSIONS",
    "Sink",
    "VideoFile",
    "VideoInfo",
    "VideoWriter",
    "content_of",
    "is_image",
    "is_video",
    "load_image",
    "open_sink",
    "probe_video",
    "read_image",
    "read_video",
    "reading_image",
    "to_uint8",
    "write_image",
    "write_video",
]

VIDEO_EXTENSIONS = frozenset({".mp4", ".avi", ".mov", ".mkv"})
IMAGE_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})

_Made = TypeVar("_Made")

_UNKNOWN_FPS = 24.0
_IMAGE_ERRORS = (  # all that Pillow raises
    OSError,
    SyntaxError,
    ValueError,
    IndexError,
    EOFError,
    RuntimeError,
    ArithmeticError,
    StructError,
    Image.DecompressionBombError,
)


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

    Args:
        as_shown: Turn the frames as a flag in the file asks players to, and stretch them if their pixels aren't square.
            Without it both are ignored, as the field's loaders do.
        content: The file's bytes, where they are part of another file; ``path`` is then what messages call them.

    Raises:
        DataError: The file is missing, cut short, empty, or no video.
    """

    info: VideoInfo
    remarks: Sequence[str]
    """What ``as_shown`` changed, in words."""

    def __init__(self, path: str | Path, *, as_shown: bool = False, content: bytes | None = None) -> None:
        self.path = Path(path)
        self._content = content
        self.remarks = []
        self._is_read_from = False
        self._packets: _PacketTable | None = None
        self._quarter_turns = 0  # counterclockwise
        self._stretched_width: int | None = None
        self._container = _open(self.path, content)
        try:
            self._stream = self._video_stream()
            self.info = self._probe()
            self._stored_size = (self.info.width, self.info.height)
            if as_shown:
                self._prepare_to_show()
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
        return torch.from_numpy(np.stack(self.map(lambda picture: picture, indices)))

    def map(self, function: Callable[[NDArray[np.uint8]], _Made], indices: Iterable[int]) -> list[_Made]:
        """As `read`, but only what ``function`` makes of each frame [H, W, 3] is kept, so that large frames needn't be held.

        Raises:
            DataError: The file has no such frame, or it can't be decoded.
        """
        indices = list(indices)
        wanted = set(indices)
        if not wanted:
            self._fail("has frames, but none was asked for.")
        if min(wanted) < 0 or max(wanted) >= self.info.num_frames:
            self._fail(f"has frames 0 to {self.info.num_frames - 1}; asked for {min(wanted)} to {max(wanted)}.")
        found: dict[int, _Made] = {}
        try:
            if min(wanted) > 0:
                found = self._collect(self._decode_from(min(wanted)), wanted, function)
            if len(found) < len(wanted):  # from the start; or the time stamps misled us, and counting frames settles it
                found = self._collect(self._decode_all(), wanted, function)
        except av.FFmpegError as error:
            self._fail(f"is damaged near frame {len(found)} of {self.info.num_frames}: {error.strerror}.", error)
        if missing := wanted - found.keys():
            self._fail_truncated(min(missing), self.info.num_frames)
        return [found[index] for index in indices]

    def times(self) -> list[float]:
        """Seconds from the first frame to each, by the file's time stamps; evenly spaced where it has none."""
        times, base = self._scan().times, self._stream.time_base
        if times is None or base is None or len(times) != self.info.num_frames:
            return [index / self.info.fps for index in range(self.info.num_frames)]
        return [float((time - times[0]) * base) for time in times]

    def _collect(
        self, frames: Iterator[tuple[int, VideoFrame]], wanted: set[int], function: Callable[[NDArray[np.uint8]], _Made]
    ) -> dict[int, _Made]:
        found: dict[int, _Made] = {}
        last = max(wanted)
        size = self._stored_size
        for index, frame in frames:
            if index in wanted:
                if frame.is_corrupt:
                    self._fail(f"is damaged at frame {index} of {self.info.num_frames}.")
                if (frame.width, frame.height) != size:
                    self._fail(f"changes its size from {size} to {(frame.width, frame.height)} at frame {index}.")
                found[index] = function(self._picture(frame))
            if index >= last:
                break
        return found

    def _picture(self, frame: VideoFrame) -> NDArray[np.uint8]:
        """[H, W, 3]."""
        picture = np.asarray(frame.to_ndarray(format="rgb24", width=self._stretched_width, threads=1), np.uint8)
        return np.ascontiguousarray(np.rot90(picture, self._quarter_turns))

    def _prepare_to_show(self) -> None:
        """Find out how players turn and stretch the frames, and let ``info`` have the size that results."""
        remarks = []
        width, height = self._stored_size
        pixel_width = self._stream.sample_aspect_ratio or Fraction(1)
        if pixel_width != 1 and Fraction(1, 4) <= pixel_width <= 4:  # others are damage
            self._stretched_width = round(width * pixel_width)
            remarks.append(f"stretched from {height} x {width}, since its pixels aren't square")
            width = self._stretched_width
        first = next((frame for _, frame in self._decode_all()), None)
        self._quarter_turns = round(first.rotation / 90) % 4 if first else 0
        if self._quarter_turns:
            way = ("90 degrees to the left", "180 degrees", "90 degrees to the right")[self._quarter_turns - 1]
            remarks.append(f"turned by {way}, as it asks players to")
        if self._quarter_turns % 2:
            height, width = width, height
        self.info = evolve(self.info, height=height, width=width)
        self.remarks = remarks

    def _decode_all(self) -> Iterator[tuple[int, VideoFrame]]:
        """(index, frame) from the start."""
        self._rewind()
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

    def _rewind(self) -> None:
        """Open the file anew, if it was read from: not every format can go back to its first frame by seeking."""
        if self._is_read_from:
            self._container.close()
            self._container = _open(self.path, self._content)
            self._stream = self._video_stream()
        self._is_read_from = True

    def _video_stream(self) -> VideoStream:
        name = self._container.format.name
        if name == "image2" or name.endswith("_pipe"):
            self._fail(f"is an image ({name.removesuffix('_pipe')}), not a video.")
        videos = [each for each in self._container.streams.video if not each.disposition & Disposition.attached_pic]
        if not videos:  # the cover of a sound file is none
            found = ", ".join(sorted({stream.type for stream in self._container.streams})) or "nothing"
            self._fail(f"has no video frames (format {name}, holds {found}): not a video, or cut short.")
        stream = videos[0]
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
        file_size = self._size()
        if beyond := sum(entry.pos + entry.size > file_size for entry in entries):
            self._fail_truncated(listed - beyond, listed)
        return sum(not entry.is_discard for entry in entries)  # an edit list may hide some

    def _scan(self) -> _PacketTable:
        """Time stamps of all frames, by reading the file through without decoding it."""
        if self._packets is None:
            self._rewind()
            stamps: list[tuple[int | None, bool]] = []
            for packet in self._container.demux(self._stream):
                if packet.is_corrupt:
                    self._fail_truncated(len(stamps), self._stream.frames)
                if packet.size and not packet.is_discard:
                    stamps.append((packet.pts, packet.is_keyframe))
            if "matroska" in self._container.format.name and _is_matroska_cut(self._head(256), self._size()):
                self._fail_truncated(len(stamps), 0)
            # AVI has no presentation times: what libav makes up for them doesn't follow the order of frames.
            self._packets = _PacketTable(stamps, exact=self._container.format.name != "avi")
        return self._packets

    def _size(self) -> int:
        """Bytes."""
        return self.path.stat().st_size if self._content is None else len(self._content)

    def _head(self, size: int) -> bytes:
        """The first bytes."""
        if self._content is not None:
            return self._content[:size]
        with self.path.open("rb") as file:
            return file.read(size)

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
        self.times = times if self._can_seek else None
        if not self._can_seek:
            times = list(range(len(stamps)))
        self._times = times
        self._key_frames = sorted(time for time, is_key in stamps if is_key and time is not None)
        self.index_of = {time: index for index, time in enumerate(times)}

    def key_frame_before(self, index: int) -> int | None:
        """Time stamp of the last key frame at or before the frame; None where it can't be told."""
        position = bisect_right(self._key_frames, self._times[index]) if self._can_seek else 0
        return self._key_frames[position - 1] if position else None


def _open(path: Path, content: bytes | None = None) -> InputContainer:
    if content is not None:
        try:  # no protocol is called "none": nothing that a playlist names can be opened
            return av.open(BytesIO(content), "r", options={"protocol_whitelist": "none"}, metadata_errors="replace")
        except av.FFmpegError as error:
            kind = _describe_content(content[:4096])
            raise DataError(f"{path} can't be read as a video ({kind}): {error.strerror}.") from error
    if not path.is_file():
        raise DataError(f"{path} is {'a folder' if path.is_dir() else 'missing'}; a video file was expected.")
    try:
        # "file:" and the whitelist, so that neither a name like "a:b.mp4" nor a playlist's content reaches the network
        return av.open(f"file:{path}", options={"protocol_whitelist": "file"}, metadata_errors="replace")
    except av.FFmpegError as error:
        raise DataError(f"{path} can't be read as a video ({content_of(path)}): {error.strerror}.") from error


def content_of(path: Path) -> str:
    """What a file that can't be read seems to be, in words for a message."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        return error.strerror or "unreadable"
    return _describe_content(head)


def _describe_content(head: bytes) -> str:
    if not head:
        return "the file is empty"
    if head[4:8] == b"ftyp" or head.startswith((b"RIFF", b"\x1aE\xdf\xa3", b"\x89PNG", b"\xff\xd8", b"GIF8")):
        return "truncated or damaged file"
    is_text = b"\0" not in head and not any(byte < 9 for byte in head)
    return "it holds text" if is_text else "no known format"


def _is_matroska_cut(head: bytes, file_size: int) -> bool:
    """Whether a Matroska file ends before the end that it announces; libav reads such a file as a short one.

    Source: RFC 8794 (EBML): an element is an id, a size of 1 to 8 bytes (leading zeros count them), and its content.
    """

    def size_at(position: int) -> tuple[int, int]:
        length = 9 - head[position].bit_length()
        value = int.from_bytes(head[position : position + length]) & ((1 << 7 * length) - 1)
        return value, position + length

    header_size, start = size_at(4)
    segment = start + header_size
    if head[segment : segment + 4] != b"\x18\x53\x80\x67":
        return False
    segment_size, start = size_at(segment + 4)
    is_unknown = segment_size + 1 == 1 << 7 * (start - segment - 4)  # all ones: a live recording
    return not is_unknown and start + segment_size > file_size


def read_image(path: str | Path, *, content: bytes | None = None) -> Image.Image:
    """An image as Pillow's RGB, read completely. Transparency is dropped.

    Args:
        content: The file's bytes, where they are part of another file; ``path`` is then what messages call them.

    Raises:
        DataError: The file is missing, cut short, or no image.
    """
    with reading_image(path, content=content) as image:
        return image.convert("RGB")


def load_image(path: str | Path) -> Image.Image:
    """An image in the mode that the file has, read completely.

    Raises:
        DataError: The file is missing, cut short, or no image.
    """
    with reading_image(path) as image:
        image.load()
        return image


@contextmanager
def reading_image(path: str | Path, *, content: bytes | None = None) -> Iterator[Image.Image]:
    """Pillow's image, open for the length of the block; what Pillow raises in it is translated. See `read_image`.

    Raises:
        DataError: The file is missing, cut short, or no image.
    """
    path = Path(path)
    if content is None and not path.is_file():
        raise DataError(f"{path} is {'a folder' if path.is_dir() else 'missing'}; an image file was expected.")
    try:
        with Image.open(path if content is None else BytesIO(content)) as image:
            yield image
    except UnidentifiedImageError as error:
        raise DataError(f"{path} is not an image{_video_note(path, content)}.") from error
    except _IMAGE_ERRORS as error:
        raise DataError(f"{path} can't be read as an image: {error}.") from error


def _video_note(path: Path, content: bytes | None) -> str:
    try:
        with VideoFile(path, content=content) as file:
            info = file.info
    except DataError:
        return " that Pillow can read"
    return f" but a video of {info.num_frames} frames"
