"""References: of any kind, at the sample's size and rate, with what was changed said in words."""

import hashlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from opensora.core import ConfigError, DataError
from opensora.core.frame_sources import frames_of
from opensora.core.references import Reference, digest_of, load_reference
from opensora.core.transforms import resize_crop_image, resize_crop_video
from opensora.core.video import open_sink, read_video, write_video


def numbered_frames(num_frames: int, height: int = 32, width: int = 48) -> torch.Tensor:
    """Frames whose index can be read back from their brightness."""
    levels = torch.arange(num_frames, dtype=torch.uint8) * 4 + 5
    return levels[:, None, None, None].expand(-1, height, width, 3).contiguous()


def indices_in(reference: Reference) -> list[int]:
    """The inverse of `numbered_frames`."""
    levels = (reference.video.mean(dim=(0, 2, 3)) + 1) * 127.5
    return [round((level - 5) / 4) for level in levels.tolist()]


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """60 frames of 32 x 48 at 30 frames/s."""
    write_video(tmp_path / "clip.mp4", numbered_frames(60), 30, crf=4)
    return tmp_path / "clip.mp4"


def load(path: str | Path, height: int = 32, width: int = 48, **options: object) -> Reference:
    return load_reference(str(path), height=height, width=width, **options)  # type: ignore[arg-type]  # as given


def test_a_video_that_fits_is_left_as_it_is(clip):
    reference = load(clip, fps=30)
    expected = read_video(clip)[0].permute(3, 0, 1, 2) / 127.5 - 1
    assert torch.equal(reference.video, expected)
    assert reference.video.dtype == torch.float32
    assert (reference.source, reference.notes) == (str(clip), [])
    assert reference.digest == hashlib.sha256(clip.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("fps", "expected", "note"),
    [
        (24, [round(index * 1.25 - 0.01) for index in range(48)], "resampled from 30 to 24 frames/s: 48 of 60 frames"),
        (15, list(range(0, 60, 2)), "resampled from 30 to 15 frames/s: 30 of 60 frames"),
        (60, [index // 2 for index in range(120)], "resampled from 30 to 60 frames/s: 120 frames from 60"),
        (1, [0, 30], "resampled from 30 to 1 frames/s: 2 of 60 frames"),
        (0.1, [0], "resampled from 30 to 0.1 frames/s: 1 of 60 frames"),
        (None, list(range(60)), None),
    ],
    ids=str,
)
def test_frames_are_those_nearest_in_time(clip, fps, expected, note):
    reference = load(clip, fps=fps)
    assert indices_in(reference) == expected
    assert reference.notes == ([f"clip.mp4: {note}"] if note else [])


@pytest.mark.parametrize(
    ("frames", "kept", "note"),
    [
        (slice(0, 5), range(5), "frames 1 to 5 of 60 taken"),
        (slice(-8, None), range(52, 60), "frames 53 to 60 of 60 taken"),
        (slice(10, 12), range(10, 12), "frames 11 to 12 of 60 taken"),
        (slice(50, 99), range(50, 60), "frames 51 to 60 of 60 taken"),
        (slice(-99, None), range(60), None),
        (slice(None), range(60), None),
    ],
    ids=str,
)
def test_only_the_wanted_part_is_read(clip, frames, kept, note):
    reference = load(clip, frames=frames)
    assert indices_in(reference) == list(kept)
    assert reference.notes == ([f"clip.mp4: {note}"] if note else [])


def test_the_part_is_counted_in_frames_of_the_samples_rate(clip):
    assert indices_in(load(clip, fps=15, frames=slice(-3, None))) == [54, 56, 58]


def test_uneven_times_are_followed(tmp_path):
    stamps = [0, 100, 150, 200, 600, 700]  # milliseconds
    with av.open(str(tmp_path / "uneven.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=20, options={"crf": "4"})
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for stamp, picture in zip(stamps, numbered_frames(6).numpy(), strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = stamp, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    reference = load(tmp_path / "uneven.mkv", fps=10)
    assert indices_in(reference)[:8] == [0, 1, 3, 3, 3, 4, 4, 5]
    assert "resampled from 7.1429 to 10 frames/s" in reference.notes[0]


def test_sizes_are_changed_and_said(tmp_path):
    write_video(tmp_path / "clip.mp4", torch.randint(0, 256, (3, 36, 64, 3), dtype=torch.uint8), 24)
    reference = load(tmp_path / "clip.mp4", 24, 42)
    assert torch.equal(reference.video, resize_crop_video(read_video(tmp_path / "clip.mp4")[0], 24, 42))
    assert reference.notes == ["clip.mp4: 36 x 64 (height x width) resized to 24 x 43 and cropped to 24 x 42"]
    assert load(tmp_path / "clip.mp4", 18, 32).notes == ["clip.mp4: 36 x 64 (height x width) resized to 18 x 32"]
    assert load(tmp_path / "clip.mp4", 36, 60).notes == ["clip.mp4: 36 x 64 (height x width) cropped to 36 x 60"]


def test_pictures_are_scaled_as_pictures(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    reference = load(tmp_path / "photo.png", fps=24, frames=slice(-17, None))
    assert reference.video.shape == (3, 1, 32, 48)
    assert torch.equal(reference.video, resize_crop_image(Image.fromarray(pixels), 32, 48))
    assert not torch.equal(reference.video, resize_crop_video(torch.from_numpy(pixels)[None], 32, 48))
    assert reference.notes == ["photo.png: 90 x 120 (height x width) resized to 36 x 48 and cropped to 32 x 48"]


def test_pictures_are_turned_and_said(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    Image.new("RGB", (32, 48)).save(tmp_path / "photo.jpg", exif=exif)
    assert load(tmp_path / "photo.jpg").notes == ["photo.jpg: turned as its EXIF orientation (6) asks viewers to"]


def test_videos_are_turned_and_said(tmp_path):
    with av.open(str(tmp_path / "phone.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.height, stream.width, stream.pix_fmt = 48, 32, "yuv420p"
        stream.set_display_rotation(-90)
        for picture in numbered_frames(3, 48, 32).numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    reference = load(tmp_path / "phone.mp4")
    assert reference.video.shape == (3, 3, 32, 48)
    assert reference.notes == ["phone.mp4: turned by 90 degrees to the right, as it asks players to"]


@pytest.mark.parametrize("name", ["a.gif", "a", "a.mp4"])
def test_results_are_references_too(tmp_path, name):
    frames = numbered_frames(8)
    with open_sink(tmp_path / name, fps=10, crf=4) as sink:
        sink.append(frames)
    reference = load(tmp_path / name, fps=5)
    assert indices_in(reference) == [0, 2, 4, 6]
    assert reference.notes == [f"{name}: resampled from 10 to 5 frames/s: 4 of 8 frames"]
    assert torch.equal(frames_of(tmp_path / name)[0][::2].permute(3, 0, 1, 2) / 127.5 - 1, reference.video)


def test_digests_are_those_of_the_content(tmp_path):
    for name, level in (("a", 1), ("b", 1), ("c", 2)):
        with open_sink(tmp_path / name, fps=10) as sink:
            sink.append(torch.full((2, 8, 8, 3), level, dtype=torch.uint8))
    assert digest_of(tmp_path / "a") == digest_of(tmp_path / "b") != digest_of(tmp_path / "c")
    assert digest_of(tmp_path / "a" / "0000.png") == digest_of(tmp_path / "b" / "0000.png")
    assert len(load(tmp_path / "a").digest) == 64


@given(own=st.integers(1, 60), count=st.integers(1, 40), fps=st.floats(0.5, 120))
def test_resampling_keeps_order_and_length(own, count, fps, tmp_path_factory):
    path = tmp_path_factory.mktemp("any") / "a"
    with open_sink(path, fps=own) as sink:
        sink.append(torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 2, 2, 3) * 4 + 5)
    reference = load(path, 2, 2, fps=fps)
    found = indices_in(reference)
    if count == 1:
        assert found == [0]  # a picture
        return
    assert len(found) == max(1, round(count / own * fps))
    assert found == sorted(found)
    assert all(
        abs(index / own - place / fps) <= 0.5 / own + 1e-5 for place, index in enumerate(found) if index < count - 1
    )


TAIL = """
import resource, sys
from opensora.core.references import load_reference
load = lambda **part: load_reference(sys.argv[1], height=32, width=48, fps=24, **part)
load(frames=slice(0, 1))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
load(frames=slice(-4, None))
load(frames=slice(0, 4))
tail = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
load()
print(tail, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_long_clip_is_not_held(tmp_path):
    with open_sink(tmp_path / "long.mp4", fps=24) as sink:
        for index in range(300):
            sink.append(torch.full((1, 300, 400, 3), index % 256, dtype=torch.uint8))
    program = [sys.executable, "-c", TAIL, tmp_path / "long.mp4"]
    result = subprocess.run(program, capture_output=True, text=True, check=True)
    tail, whole = map(int, result.stdout.split())
    assert tail < 10_000  # KiB
    assert whole < 40_000  # the frames have 105,000 before they are reduced


# Addresses


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # theirs
        """Silent."""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    """Serves the folder ``site``."""
    (tmp_path / "site").mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(tmp_path / "site")))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_addresses_are_downloaded(site, clip, tmp_path):
    (tmp_path / "site" / "my clip.mp4").write_bytes(clip.read_bytes())
    source = f"{site}/my%20clip.mp4?as=video"
    reference = load(source, fps=15, folder_for_downloads=tmp_path / "cache")
    assert torch.equal(reference.video, load(clip, fps=15).video)
    assert reference.source == source
    assert reference.digest == load(clip).digest
    assert reference.notes == ["my clip.mp4: resampled from 30 to 15 frames/s: 30 of 60 frames"]
    (tmp_path / "site" / "my clip.mp4").unlink()
    assert load(source, folder_for_downloads=tmp_path / "cache").digest == reference.digest


def test_what_was_downloaded_in_vain_is_downloaded_again(site, clip, tmp_path):
    target = tmp_path / "site" / "clip.mp4"
    target.write_text("<html>Come back later</html>")
    with pytest.raises(DataError, match=r"http://.*/clip\.mp4, downloaded: .*it holds text"):
        load(f"{site}/clip.mp4", folder_for_downloads=tmp_path / "cache")
    target.write_bytes(clip.read_bytes())
    assert len(indices_in(load(f"{site}/clip.mp4", folder_for_downloads=tmp_path / "cache"))) == 60


def test_an_address_without_a_file_is_told(site, tmp_path):
    with pytest.raises(DataError, match=r"gone\.png can't be downloaded: the server answers 404"):
        load(f"{site}/gone.png", folder_for_downloads=tmp_path / "cache")


# Bad references


def test_what_can_not_be_read_is_named(clip, tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "cut.mp4").write_bytes(clip.read_bytes()[:-500])
    with av.open(str(tmp_path / "sound.mp3"), "w") as container:
        stream = container.add_stream("mp3", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for name, says in (
        ("gone.png", "is missing"),
        ("empty.mp4", "the file is empty"),
        ("text.png", "it holds text"),
        ("cut.mp4", r"stops at frame \d+ of 60 \(truncated file\)"),
        ("sound.mp3", "has no video frames .*audio"),
    ):
        with pytest.raises(DataError, match=f"{name}.*{says}"):
            load(tmp_path / name)
    with pytest.raises(DataError, match="can't be downloaded: addresses start with http, https, ftp"):
        load("s3://bucket/clip.mp4", folder_for_downloads=tmp_path)


def test_a_part_that_is_not_there_is_told(clip):
    with pytest.raises(DataError, match=r"clip\.mp4 gives 30 frames; there is none from 40 to 50"):
        load(clip, fps=15, frames=slice(40, 50))


@pytest.mark.parametrize("fps", [0, -3, float("nan")])
def test_rates_that_are_none_are_refused(clip, fps):
    with pytest.raises(ConfigError, match="a reference can be resampled to more than 0 frames a second"):
        load(clip, fps=fps)
