"""Frames of anything that has some: told by content, seen as shown, and never garbled."""

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from opensora.core import DataError
from opensora.core import frame_sources as frame_sources_module
from opensora.core.frame_sources import frames_of, open_frames
from opensora.core.video import open_sink, write_image

LEVELS = [20, 60, 100, 140, 180]


def pictures(height: int = 24, width: int = 40) -> list[Image.Image]:
    """Gray pictures, each of its own level, all with a darker left half."""
    made = []
    for level in LEVELS:
        array = np.full((height, width, 3), level, np.uint8)
        array[:, : width // 2] = level // 2
        made.append(Image.fromarray(array))
    return made


def levels_in(frames: torch.Tensor) -> list[int]:
    """The inverse of `pictures`: the nearest level of each."""
    right = frames[:, :, frames.shape[2] // 2 :].float().mean(dim=(1, 2, 3))
    return [min(LEVELS, key=lambda level: abs(level - value)) for value in right.tolist()]


def video(path: Path, codec: str, pixels: str = "yuv420p") -> Path:
    """A video not written by the code under test."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(10))
        stream.height, stream.width, stream.pix_fmt = 24, 40, pixels
        for picture in pictures():
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    first, *others = pictures()
    animated = {"save_all": True, "append_images": others, "duration": 100}
    for name, options in (("gif", {}), ("webp", {"lossless": True}), ("png", {})):
        first.save(folder / f"animated.{name}", **animated, **options)
    made = {path.name: path for path in folder.iterdir()}
    for name, codec, pixels in (
        ("vp8.webm", "libvpx", "yuv420p"),
        ("vp9.webm", "libvpx-vp9", "yuv420p"),
        ("a.m4v", "libx264", "yuv420p"),
        ("a.ts", "libx264", "yuv420p"),
        ("a.mov", "prores", "yuv422p10le"),
        ("a.avi", "mjpeg", "yuvj420p"),
        ("a.mkv", "ffv1", "yuv420p"),
    ):
        made[name] = video(folder / name, codec, pixels)
    frames = torch.from_numpy(np.stack([np.array(picture) for picture in pictures()]))
    for name in ("ours.mp4", "ours.gif", "ours"):
        with open_sink(folder / name, fps=10, crf=4) as sink:
            sink.append(frames)
        made[name] = folder / name
    return made


KINDS = [
    "animated.gif",
    "animated.webp",
    "animated.png",
    "vp8.webm",
    "vp9.webm",
    "a.m4v",
    "a.ts",
    "a.mov",
    "a.avi",
    "a.mkv",
    "ours.mp4",
    "ours.gif",
    "ours",
]
ANIMATIONS = ["animated.gif", "animated.webp", "animated.png", "ours.gif"]


@pytest.mark.parametrize("kind", KINDS)
def test_frames_of_every_kind_are_read(files, kind):
    frames, fps = frames_of(files[kind])
    assert frames.dtype == torch.uint8
    assert frames.shape == (5, 24, 40, 3)
    assert levels_in(frames) == LEVELS
    assert fps == pytest.approx(10, rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_chosen_by_index(files, kind):
    with open_frames(files[kind]) as source:
        assert (source.info.num_frames, source.info.height, source.info.width) == (5, 24, 40)
        assert not source.is_image
        assert levels_in(source.read([3, 0, 3])) == [LEVELS[3], LEVELS[0], LEVELS[3]]
        assert source.map(lambda picture: picture.shape, [4]) == [(24, 40, 3)]
        assert source.times() == pytest.approx([0, 0.1, 0.2, 0.3, 0.4], abs=0.002)
        for wanted in ([5], [-1], []):
            with pytest.raises(DataError, match=files[kind].name):
                source.read(wanted)


@pytest.mark.parametrize("kind", ["animated.gif", "animated.webp", "vp9.webm", "ours.mp4"])
def test_names_do_not_matter(files, kind, tmp_path):
    for name in ("photo.jpg", "nothing", "clip.mp4"):
        (tmp_path / name).write_bytes(files[kind].read_bytes())
        assert levels_in(frames_of(tmp_path / name)[0]) == LEVELS


def test_a_still_picture_is_one_frame(tmp_path):
    for name in ("a.png", "a.bmp", "a.webp", "a.tiff", "a.ppm", "a.gif"):
        pictures()[3].save(tmp_path / name)
        with open_frames(tmp_path / name) as source:
            assert source.is_image
            assert source.info.num_frames == 1
            assert levels_in(source.read([0])) == [LEVELS[3]]


def test_pages_are_no_animation(tmp_path):
    first, *others = pictures()
    first.save(tmp_path / "pages.tiff", save_all=True, append_images=others)
    first.save(tmp_path / "both-eyes.mpo", save_all=True, append_images=others[:1])
    for name in ("pages.tiff", "both-eyes.mpo"):
        with open_frames(tmp_path / name) as source:
            assert source.is_image
            assert levels_in(source.read([0])) == LEVELS[:1]


def test_uneven_times_of_an_animation_are_kept(tmp_path):
    first, *others = pictures()
    first.save(tmp_path / "a.gif", save_all=True, append_images=others, duration=[50, 200, 0, 10, 40])
    with open_frames(tmp_path / "a.gif") as source:
        assert source.times() == pytest.approx([0, 0.05, 0.25, 0.35, 0.45])  # browsers show hurried frames for 0.1 s
        assert source.info.fps == pytest.approx(5 / 0.49)


def test_the_picture_for_programs_without_animations_is_left_out(tmp_path):
    first, *others = pictures()
    first.save(tmp_path / "a.png", save_all=True, append_images=others, duration=100, default_image=True)
    frames, fps = frames_of(tmp_path / "a.png")
    assert levels_in(frames) == LEVELS[1:]
    assert fps == pytest.approx(10)


def test_folders_of_anyone_are_read_in_the_order_of_their_numbers(tmp_path):
    for number, picture in zip((10, 2, 1, 100, 9), pictures(), strict=True):
        picture.save(tmp_path / f"frame{number}.bmp")
    (tmp_path / "notes.txt").write_text("not a picture")
    frames, fps = frames_of(tmp_path)
    assert levels_in(frames) == [LEVELS[2], LEVELS[1], LEVELS[4], LEVELS[0], LEVELS[3]]
    assert fps == 24


def test_a_folder_of_one_picture_is_a_picture(tmp_path):
    pictures()[0].save(tmp_path / "a.png")
    with open_frames(tmp_path) as source:
        assert source.is_image


# As shown


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_as_the_camera_says(tmp_path, orientation):
    corner = np.full((20, 30, 3), 60, np.uint8)
    corner[:8, :8] = 250
    exif = Image.Exif()
    exif[0x112] = orientation
    Image.fromarray(corner).save(tmp_path / "a.jpg", exif=exif, quality=95)
    with open_frames(tmp_path / "a.jpg") as source:
        picture = source.read([0])[0]
        remarks = list(source.remarks)
    # EXIF 2.3: where row 0 and column 0 of what is stored are seen
    place = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    assert picture.shape == ((20, 30, 3) if orientation < 5 else (30, 20, 3))
    assert picture[place[orientation]].float().mean() > 200
    expected = [] if orientation == 1 else [f"turned as its EXIF orientation ({orientation}) asks viewers to"]
    assert remarks == expected


@pytest.mark.parametrize("kind", ["png", "webp", "gif"])
def test_transparent_parts_are_white(tmp_path, kind):
    array = np.zeros((8, 8, 4), np.uint8)
    array[:, 4:] = (200, 0, 0, 255)
    Image.fromarray(array).save(tmp_path / f"a.{kind}", **({"lossless": True} if kind == "webp" else {}))
    with open_frames(tmp_path / f"a.{kind}") as source:
        picture = source.read([0])[0]
        assert source.remarks == ["its transparent parts made white"]
    assert picture[0, 0].tolist() == [255, 255, 255]
    assert picture[0, 7].tolist() == [200, 0, 0]


def test_a_layer_that_hides_nothing_is_not_mentioned(tmp_path):
    Image.new("RGBA", (5, 4), (1, 2, 3, 255)).save(tmp_path / "a.png")
    with open_frames(tmp_path / "a.png") as source:
        assert source.remarks == []
        assert source.read([0])[0, 0, 0].tolist() == [1, 2, 3]


def test_pictures_of_sixteen_bits_keep_their_brightness(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, axis=0)
    for name in ("a.png", "a.tiff"):
        Image.fromarray(ramp).save(tmp_path / name)
        frames, _ = frames_of(tmp_path / name)
        assert (frames[0, 0, :, 0].int() - torch.arange(256)).abs().max() <= 1


def test_other_modes_become_rgb(tmp_path):
    Image.new("L", (5, 4), 7).save(tmp_path / "gray.png")
    Image.new("CMYK", (5, 4), (0, 255, 255, 0)).save(tmp_path / "print.jpg", quality=95)
    Image.new("1", (5, 4), 1).save(tmp_path / "bits.png")
    assert frames_of(tmp_path / "gray.png")[0][0, 0, 0].tolist() == [7, 7, 7]
    assert frames_of(tmp_path / "print.jpg")[0][0, 0, 0].tolist() == pytest.approx([255, 0, 0], abs=6)
    assert frames_of(tmp_path / "bits.png")[0][0, 0, 0].tolist() == [255, 255, 255]


# Bad files


@pytest.mark.parametrize("kind", ANIMATIONS)
def test_a_cut_animation_is_refused_wherever_it_is_cut(files, kind, tmp_path):
    data, whole = files[kind].read_bytes(), frames_of(files[kind])[0]
    for length in range(0, len(data), max(1, len(data) // 150)):
        cut = tmp_path / "cut"
        cut.write_bytes(data[:length])
        try:
            frames, _ = frames_of(cut)
        except DataError:
            continue
        assert torch.equal(frames, whole)  # all was there but the end mark


def test_a_gif_cut_between_frames_is_refused(tmp_path):
    with open_sink(tmp_path / "a.gif", fps=10) as sink:
        for picture in pictures():
            sink.append(np.array(picture)[None])
    data = (tmp_path / "a.gif").read_bytes()
    starts = [position for position in range(len(data)) if data[position : position + 3] == b"!\xf9\x04"]
    assert len(starts) == 5
    (tmp_path / "cut.gif").write_bytes(data[: starts[3]])
    with pytest.raises(DataError, match=r"cut\.gif stops before its end \(truncated file\)"):
        frames_of(tmp_path / "cut.gif")
    (tmp_path / "padded.gif").write_bytes(data + bytes(20))
    assert len(frames_of(tmp_path / "padded.gif")[0]) == 5


def test_what_is_missing_or_empty_is_named(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.mp4").write_text("hello")
    for name, says in (
        ("gone.mp4", "is missing; a video, a picture or a folder of pictures was expected"),
        ("empty.png", "the file is empty"),
        ("folder", "is a folder without pictures"),
        ("text.mp4", "it holds text"),
    ):
        with pytest.raises(DataError, match=f"{name} .*{says}"):
            frames_of(tmp_path / name)


def test_phone_pictures_of_another_kind_are_named(tmp_path):
    (tmp_path / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    with pytest.raises(DataError, match=r"IMG_1\.HEIC is a HEIC picture, .* Convert it to jpg or png"):
        frames_of(tmp_path / "IMG_1.HEIC")


def test_drawings_that_are_programs_are_not_run(tmp_path, monkeypatch):
    interpreter = tmp_path / "gs"
    interpreter.write_text(f"#!/bin/sh\ntouch {tmp_path}/was-run\n")
    interpreter.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / "a.eps").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) print\n%%EOF\n"
    )
    with pytest.raises(DataError, match=r"a\.eps"):
        frames_of(tmp_path / "a.eps")
    assert not (tmp_path / "was-run").exists()


def folder_of_frames(folder: Path) -> Path:
    with open_sink(folder, fps=10) as sink:
        sink.append(torch.zeros(3, 8, 8, 3, dtype=torch.uint8))
    return folder


def test_a_folder_that_lost_a_frame_is_refused(tmp_path):
    folder = folder_of_frames(tmp_path / "a")
    (folder / "0001.png").unlink()
    with pytest.raises(DataError, match="a has 2 pictures, but was written with 3 frames"):
        frames_of(folder)


def test_a_folder_with_a_damaged_frame_is_refused(tmp_path):
    folder = folder_of_frames(tmp_path / "a")
    (folder / "0001.png").write_bytes((folder / "0001.png").read_bytes()[:40])
    with open_frames(folder) as source:
        assert source.read([0, 2]).shape == (2, 8, 8, 3)
        with pytest.raises(DataError, match=r"0001\.png"):
            source.read([1])


def test_a_folder_with_frames_of_two_sizes_is_refused(tmp_path):
    folder = folder_of_frames(tmp_path / "a")
    write_image(folder / "0002.png", torch.zeros(9, 8, 3, dtype=torch.uint8))
    with pytest.raises(DataError, match=r"0002\.png is 9 x 8; the first is 8 x 8"):
        frames_of(folder)


@pytest.mark.parametrize("facts", ["{", '{"fps": "fast"}', '{"fps": 0}', '{"fps": 8, "metadata": 3}', "[" * 100_000])
def test_a_folder_whose_facts_are_damaged_is_refused(tmp_path, facts):
    folder = folder_of_frames(tmp_path / "a")
    (folder / "frames.json").write_text(facts)
    with pytest.raises(DataError, match=r"frames\.json is damaged"):
        frames_of(folder)


def test_frames_of_changed_bytes_are_read_or_refused(files, tmp_path):
    """Whatever a file holds, no other error comes out."""
    generator = np.random.default_rng(0)
    for kind in ANIMATIONS:
        data = np.frombuffer(files[kind].read_bytes(), np.uint8)
        for _ in range(40):
            changed = data.copy()
            changed[generator.integers(0, min(len(data), 400), 3)] = generator.integers(0, 256, 3)
            (tmp_path / "changed").write_bytes(changed.tobytes())
            try:
                with open_frames(tmp_path / "changed") as source:
                    source.read([0])
            except DataError:
                pass


TAIL = """
import resource, sys
from opensora.core.frame_sources import open_frames
with open_frames(sys.argv[1]) as source:
    source.read([0])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    source.map(lambda picture: float(picture.mean()), range(source.info.num_frames))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a"])
def test_frames_that_are_handed_on_are_not_held(tmp_path, name):
    with open_sink(tmp_path / name, fps=10) as sink:
        for level in range(40):
            sink.append(torch.full((1, 400, 600, 3), 4 * level, dtype=torch.uint8))
    program = [sys.executable, "-c", TAIL, tmp_path / name]
    result = subprocess.run(program, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 12_000  # KiB; the frames have 28,000


def test_everything_public_is_listed():
    public = {
        name
        for name, value in vars(frame_sources_module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == frame_sources_module.__name__
    }
    assert public == set(frame_sources_module.__all__)
