"""What reading a clip from a video file costs, by PyAV as datasets use it, and by torchcodec where that is installed.

    python benchmarks/video_reading.py

From each file of 300 frames, 16 frames in a row from a random place are read, each way in turns, in one process with one
thread: only the needed frames through `VideoFile`; the whole file through PyAV, as older loaders do; and the needed
frames through torchcodec's VideoDecoder, with its exact seeking (it reads the file through first) and its approximate one.
Printed are ratios of medians. torchcodec needs FFmpeg's libraries, and on a machine without CUDA a build without it.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from attrs import frozen

from opensora.core.video import VideoFile, write_video

SIZES = {"240p": (240, 426), "480p": (480, 854)}
NUM_FRAMES, CLIP, FILES, READS = 300, 16, 2, 10

Read = Callable[[Path, list[int]], torch.Tensor]
"""(file, indices) -> uint8 [T, H, W, 3]."""


@frozen
class Way:
    """One way to read frames, and how long it took."""

    name: str
    read: Read
    seconds: list[float]


def make_files(folder: Path, height: int, width: int) -> list[Path]:
    """Videos of moving noise, smooth enough to be coded as films are."""
    generator = np.random.default_rng(0)
    paths = []
    for number in range(FILES):
        picture = generator.integers(0, 256, (height // 8 + 40, width // 8 + 40, 3), np.uint8)
        large = np.kron(picture, np.ones((8, 8, 1), np.uint8))
        frames = [large[shift : shift + height, 2 * shift % 300 :][:, :width] for shift in range(NUM_FRAMES)]
        paths.append(folder / f"{height}-{number}.mp4")
        write_video(paths[-1], torch.from_numpy(np.stack(frames)), 24)
    return paths


def read_needed(path: Path, indices: list[int]) -> torch.Tensor:
    """As datasets do."""
    with VideoFile(path) as file:
        return file.read(indices)


def read_whole(path: Path, indices: list[int]) -> torch.Tensor:
    """All frames, of which some are kept."""
    with VideoFile(path) as file:
        return file.read(range(file.info.num_frames))[indices]


def torchcodec_ways() -> list[Way]:
    """Both kinds of seeking; none where the library can't be loaded."""
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, OSError, RuntimeError) as error:
        print(f"torchcodec can't be loaded: {str(error).splitlines()[0]}")
        return []

    def reader(mode: str) -> Read:
        def read(path: Path, indices: list[int]) -> torch.Tensor:
            decoder = VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode=mode)
            return decoder.get_frames_at(indices).data

        return read

    return [Way(f"torchcodec, {mode} seeking", reader(mode), []) for mode in ("exact", "approximate")]


def main() -> None:
    """Read in turns, and print ratios."""
    torch.set_num_threads(1)
    for name, (height, width) in SIZES.items():
        ways = [
            Way("PyAV, needed frames", read_needed, []),
            Way("PyAV, whole file", read_whole, []),
            *torchcodec_ways(),
        ]
        with TemporaryDirectory() as folder:
            paths = make_files(Path(folder), height, width)
            places = random.Random(0)
            for number in range(READS):
                start = places.randrange(NUM_FRAMES - CLIP)
                indices = list(range(start, start + CLIP))
                expected = None
                for way in ways:
                    if way.read is read_whole and number >= 2:
                        continue  # it takes long
                    begin = time.perf_counter()
                    frames = way.read(paths[number % FILES], indices)
                    way.seconds.append(time.perf_counter() - begin)
                    expected = frames if expected is None else expected
                    if int((frames.int() - expected.int()).abs().max()) > 2:
                        print(f"{way.name}: other frames than PyAV's")
        base = statistics.median(ways[0].seconds)
        for way in ways[1:]:
            ratio = statistics.median(way.seconds) / base
            print(f"{name}, {CLIP} of {NUM_FRAMES} frames: {way.name} / {ways[0].name} = {ratio:.2f}")


if __name__ == "__main__":
    main()
