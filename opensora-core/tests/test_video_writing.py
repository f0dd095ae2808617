"""Results written as they come: whole or not at all, the same bytes however they are cut, in constant memory."""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from opensora.core import ConfigError, MachineError, ShapeError
from opensora.core import video_writing as video_writing_module
from opensora.core.frame_sources import frames_of, open_frames
from opensora.core.video import open_sink, probe_video, read_video, write_image, write_video
from opensora.core.video_writing import format_of

FORMATS = ["mp4", "gif", "frames"]
NAMES = {"mp4": "a.mp4", "gif": "a.gif", "png": "a.png", "frames": "a"}


def noisy_frames(num_frames: int = 12, height: int = 32, width: int = 48) -> torch.Tensor:
    """Frames that no codec can guess."""
    return torch.randint(
        0, 256, (num_frames, height, width, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )


def moving_frames(num_frames: int = 12, height: int = 32, width: int = 48) -> torch.Tensor:
    """A picture of few colours that moves to the right."""
    columns = torch.arange(width)[None, :] - 2 * torch.arange(num_frames)[:, None]
    picture = torch.stack([columns.remainder(16) * 15, columns.remainder(8) * 30, columns.remainder(4) * 60], dim=-1)
    return picture[:, None].expand(-1, height, -1, -1).to(torch.uint8).contiguous()


def write_and_fail(
    path: Path, kind: str, pieces: Iterable[torch.Tensor], error: type[BaseException] | None = None
) -> None:
    """Write the pieces, and raise an error before the end of the block."""
    with open_sink(path, kind, fps=8) as sink:
        for piece in pieces:
            sink.append(piece)
        if error is not None:
            raise error("before the end")


def contents(path: Path) -> dict[str, bytes]:
    """The bytes of a file, or of all files in a folder."""
    return {each.name: each.read_bytes() for each in (path.iterdir() if path.is_dir() else [path])}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("pieces", [[1] * 12, [5, 7], [11, 1]], ids=str)
def test_pieces_give_the_bytes_of_the_whole(tmp_path, kind, pieces):
    frames, metadata = noisy_frames(), {"comment": '{"version": 1}'}
    for folder, cuts in (("whole", [12]), ("pieces", pieces)):
        with open_sink(tmp_path / folder / NAMES[kind], kind, fps=8, metadata=metadata) as sink:
            for piece in frames.split(cuts):
                sink.append(piece)
        assert sink.num_frames == 12
    assert contents(tmp_path / "whole" / NAMES[kind]) == contents(tmp_path / "pieces" / NAMES[kind])


def test_write_video_is_the_same_as_a_sink(tmp_path):
    frames = noisy_frames()
    write_video(tmp_path / "a.mp4", frames, 8, crf=20, metadata={"comment": "x"})
    with open_sink(tmp_path / "b.mp4", fps=8, crf=20, metadata={"comment": "x"}) as sink:
        sink.append(frames[:5].numpy())
        sink.append(frames[5:])
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_written_comes_back(tmp_path, kind):
    path, frames = tmp_path / "new" / NAMES[kind], moving_frames()
    with open_sink(path, kind, fps=12.5, crf=1, metadata={"comment": '{"prompt": "Grüße 波"}'}) as sink:
        sink.append(frames)
    back, fps = frames_of(path)
    assert fps == pytest.approx(12.5)
    assert back.shape == frames.shape
    if kind != "mp4":
        assert torch.equal(back, frames)  # 16 colours
    with open_frames(path) as source:
        assert source.info.metadata["comment"] == '{"prompt": "Grüße 波"}'
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_png_comes_back_with_its_metadata(tmp_path):
    frames = noisy_frames(1)
    with open_sink(tmp_path / "a.png", fps=24, metadata={"comment": "波", "seed": "3"}) as sink:
        sink.append(frames)
    assert torch.equal(frames_of(tmp_path / "a.png")[0], frames)
    with Image.open(tmp_path / "a.png") as image:
        assert image.text == {"comment": "波", "seed": "3"}
    write_image(tmp_path / "b.png", frames[0], metadata={"comment": "波", "seed": "3"})
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_gif_keeps_the_average_rate_and_plays_for_ever(tmp_path):
    with open_sink(tmp_path / "a.gif", fps=24) as sink:
        sink.append(moving_frames(48))
    with Image.open(tmp_path / "a.gif") as image:
        assert image.info["loop"] == 0
        durations = []
        for index in range(image.n_frames):
            image.seek(index)
            durations.append(image.info["duration"])
    assert sum(durations) == 2000
    assert set(durations) == {40, 50}


def test_a_gif_plays_no_faster_than_browsers_do(tmp_path):
    with open_sink(tmp_path / "a.gif", fps=120) as sink:
        sink.append(moving_frames(10))
    assert frames_of(tmp_path / "a.gif")[1] == pytest.approx(50)


def test_other_programs_read_the_gif(tmp_path):
    frames = moving_frames()
    with open_sink(tmp_path / "a.gif", fps=10, metadata={"comment": "x" * 1000}) as sink:
        sink.append(frames)
    with av.open(str(tmp_path / "a.gif")) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert np.array_equal(np.stack(decoded), frames.numpy())


def test_a_gif_of_many_colours_is_close(tmp_path):
    ramp = torch.linspace(0, 255, 64)
    picture = torch.stack(torch.meshgrid(ramp, ramp, indexing="ij"), dim=-1)
    frames = torch.cat([picture, picture.mean(-1, keepdim=True)], dim=-1).to(torch.uint8)[None]
    with open_sink(tmp_path / "a.gif", fps=10) as sink:
        sink.append(frames)
    assert (frames_of(tmp_path / "a.gif")[0].float() - frames.float()).abs().mean() < 8


def test_a_folder_of_frames_says_its_rate_and_holds_its_recipe(tmp_path):
    with open_sink(tmp_path / "a 3.5", fps=23.976, metadata={"comment": '{"version": 1}', "title": "x"}) as sink:
        sink.append(noisy_frames(3))
    names = sorted(entry.name for entry in (tmp_path / "a 3.5").iterdir())
    assert names == ["0000.png", "0001.png", "0002.png", "frames.json", "recipe.json"]
    facts = json.loads((tmp_path / "a 3.5" / "frames.json").read_text())
    assert facts == {"fps": 23.976, "num_frames": 3, "metadata": {"title": "x"}}
    assert (tmp_path / "a 3.5" / "recipe.json").read_text() == '{"version": 1}'


def test_a_folder_of_frames_is_replaced_as_a_whole(tmp_path):
    for count in (5, 2):
        with open_sink(tmp_path / "a", fps=8, metadata={"comment": "{}"} if count == 5 else {}) as sink:
            sink.append(noisy_frames(count))
    assert sorted(entry.name for entry in (tmp_path / "a").iterdir()) == ["0000.png", "0001.png", "frames.json"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("kind", [*FORMATS, "png"])
def test_nothing_stays_of_a_block_that_fails(tmp_path, kind):
    path = tmp_path / NAMES[kind]
    for pieces in ([], [noisy_frames(1)]):
        with pytest.raises(RuntimeError, match="before the end"):
            write_and_fail(path, kind, pieces, RuntimeError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", FORMATS)
def test_a_block_that_fails_leaves_what_was_there(tmp_path, kind):
    path = tmp_path / NAMES[kind]
    with open_sink(path, kind, fps=8) as sink:
        sink.append(moving_frames(3))
    before = contents(path)
    with pytest.raises(KeyboardInterrupt):
        write_and_fail(path, kind, [noisy_frames(2)], KeyboardInterrupt)
    assert contents(path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("kind", [*FORMATS, "png"])
def test_nothing_is_there_before_the_end(tmp_path, kind):
    path = tmp_path / NAMES[kind]
    with open_sink(path, kind, fps=8) as sink:
        sink.append(noisy_frames(1))
        assert not path.exists()
    assert path.exists()


@pytest.mark.parametrize("kind", [*FORMATS, "png"])
def test_wrong_frames_are_refused(tmp_path, kind):
    path = tmp_path / NAMES[kind]
    with pytest.raises(ShapeError, match="no frame was written"), open_sink(path, kind, fps=8):
        pass
    with pytest.raises(ShapeError, match=r"uint8 \[T, H, W, 3\]; got float32"), open_sink(path, kind, fps=8) as sink:
        sink.append(torch.zeros(1, 8, 8, 3))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", FORMATS)
def test_frames_of_another_size_are_refused(tmp_path, kind):
    with pytest.raises(ShapeError, match=r"a.*: frames of 32 x 48 are followed by frames of 48 x 32"):
        write_and_fail(tmp_path / NAMES[kind], kind, [noisy_frames(1), noisy_frames(1, 48, 32)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("pieces", [[2], [1, 1]], ids=str)
def test_a_png_of_two_frames_is_refused(tmp_path, pieces):
    with pytest.raises(ShapeError, match=r"a\.png: a png holds one frame"):
        write_and_fail(tmp_path / "a.png", "png", noisy_frames(2).split(pieces))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.mp4", "mp4"),
        ("A.GIF", "gif"),
        ("b.png", "png"),
        ("a", "frames"),
        ("v1.2 of it", "frames"),
        ("a.b.mp4", "mp4"),
    ],
)
def test_the_ending_says_the_format(name, kind):
    assert format_of(name) == kind


def test_formats_that_are_not_written_are_named():
    for name in ("a.webm", "a.mov", "a.JPG", "a.webp"):
        with pytest.raises(ConfigError, match=rf"{name} can't be written: results are \.mp4"):
            open_sink(name, fps=8)
    says = r'"mp5" is not a format of results: mp4, gif, png, frames\. Did you mean "mp4"'
    with pytest.raises(ConfigError, match=says):
        open_sink("a", "mp5", fps=8)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), 1e-9])
@pytest.mark.parametrize("kind", FORMATS)
def test_rates_that_are_none_are_refused(tmp_path, kind, fps):
    with pytest.raises(ConfigError, match=r"fps is .*more than 0 frames a second"):
        open_sink(tmp_path / NAMES[kind], kind, fps=fps)


def test_what_is_in_the_way_is_told_before_the_work(tmp_path):
    for name in ("a.mp4", "a.gif", "a.png"):
        (tmp_path / name).mkdir()
        with pytest.raises(MachineError, match="there is a folder of that name"), open_sink(tmp_path / name, fps=8):
            pytest.fail("the block must not begin")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MachineError, match="there is a file of that name"), open_sink(tmp_path / "file", fps=8):
        pytest.fail("the block must not begin")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    says = r"it holds other things \(thesis\.txt\)"
    with pytest.raises(MachineError, match=says), open_sink(tmp_path / "mine", fps=8):
        pytest.fail("the block must not begin")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("kind", [*FORMATS, "png"])
def test_a_place_that_can_not_be_written_is_an_error(tmp_path, kind):
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(MachineError, match="can't be written: "),
        open_sink(tmp_path / "file" / NAMES[kind], kind, fps=8),
    ):
        pytest.fail("the block must not begin")


FULL_DISK = """
import resource, sys, torch
from opensora.core.errors import MachineError
from opensora.core.video import open_sink
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # writing beyond fails, as on a full disk
try:
    with open_sink(sys.argv[1], sys.argv[2], fps=8) as sink:
        for _ in range(8):
            sink.append(torch.randint(0, 256, (1, 160, 160, 3), dtype=torch.uint8))
except MachineError as error:
    print(error)
"""


@pytest.mark.parametrize("kind", FORMATS)
def test_a_full_disk_leaves_nothing(tmp_path, kind):
    program = [sys.executable, "-c", FULL_DISK, tmp_path / NAMES[kind], kind]
    result = subprocess.run(program, capture_output=True, text=True, check=False)
    assert "can't be written: " in result.stdout, result
    assert list(tmp_path.iterdir()) == []


GROWTH = """
import resource, sys, torch
from opensora.core.video import open_sink
def needed(num_frames):
    with open_sink(sys.argv[1], sys.argv[2], fps=8) as sink:
        for index in range(num_frames):
            sink.append(torch.full((1, 96, 96, 3), index % 256, dtype=torch.uint8))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = needed(80)  # more than x264 looks ahead
print(needed(640) - before)
"""


@pytest.mark.parametrize("kind", FORMATS)
def test_memory_does_not_grow_with_the_number_of_frames(tmp_path, kind):
    program = [sys.executable, "-c", GROWTH, tmp_path / NAMES[kind], kind]
    result = subprocess.run(program, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 5_000  # KiB; the frames themselves have 15,000 more


def test_large_metadata_fits(tmp_path):
    comment = json.dumps({"prompt": "a wave é 波 " * 10_000})
    assert len(comment) > 100_000
    for kind, name in NAMES.items():
        with open_sink(tmp_path / name, kind, fps=8, metadata={"comment": comment}) as sink:
            sink.append(noisy_frames(1))
        with open_frames(tmp_path / name) as source:
            assert source.info.metadata["comment"] == comment, kind


def test_the_file_of_a_stream_plays_in_a_browser(tmp_path):
    with open_sink(tmp_path / "a.mp4", fps=24) as sink:
        for piece in moving_frames(30).split(4):
            sink.append(piece)
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    assert probe_video(tmp_path / "a.mp4").num_frames == 30
    assert len(read_video(tmp_path / "a.mp4")[0]) == 30


def test_everything_public_is_listed():
    public = {
        name
        for name, value in vars(video_writing_module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == video_writing_module.__name__
    }
    assert public | {"RESULT_EXTENSIONS", "ResultFormat"} == set(video_writing_module.__all__)
