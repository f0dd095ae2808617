"""VideoTextDataset on real files: what comes out, that it depends on the key alone, and what bad files say."""

import pickle
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from opensora.core import ConfigError, DataError, SampleKey
from opensora.core.config.structure import structure
from opensora.core.protocols import Dataset
from opensora.core.video import write_image, write_video
from opensora.data.video_text import VideoTextDataset, VideoTextSpec

NUM_FRAMES = 40


def numbered_frames(num_frames: int = NUM_FRAMES, height: int = 24, width: int = 32) -> torch.Tensor:
    """Frame i is gray of level 5 * i + 20."""
    levels = torch.arange(num_frames, dtype=torch.uint8) * 5 + 20
    return levels[:, None, None, None].expand(-1, height, width, 3).contiguous()


def indices_in(video: torch.Tensor) -> list[int]:
    """Which of `numbered_frames` a clip [3, T, H, W] in [-1, 1] shows."""
    return [round(((level + 1) * 127.5 - 20) / 5) for level in video.mean(dim=(0, 2, 3)).tolist()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_video(folder / "long.mp4", numbered_frames(), 12, crf=4)
    write_video(folder / "short.mp4", numbered_frames(5), 24, crf=4)
    write_image(folder / "image.png", numbered_frames(1)[0])
    (folder / "clips.csv").write_text("path,text\nlong.mp4,a wave\nshort.mp4,a drop\nimage.png,a stone\n")
    return folder


def dataset(folder: Path, table: str = "clips.csv", **options) -> VideoTextDataset:
    options = {"num_frames": 4, "image_size": (16, 16), **options}
    return VideoTextDataset(VideoTextSpec(data_path=str(folder / table), **options))


def key(index: int, *, seed: int = 0, epoch: int = 0) -> SampleKey:
    return SampleKey(seed=seed, index=index, epoch=epoch)


def test_a_video_gives_a_clip(folder):
    data = dataset(folder)
    clip = data[key(0)]
    assert isinstance(data, Dataset)
    assert len(data) == 3
    assert clip.size == (4, 16, 16)
    assert clip.video.dtype == torch.float32
    assert (clip.text, clip.fps, clip.path, clip.key) == ("a wave", 12, str(folder / "long.mp4"), key(0))
    first, *_ = shown = indices_in(clip.video)
    assert shown == list(range(first, first + 4))


def test_an_image_is_repeated_and_told_a_rate_of_120(folder):
    clip = dataset(folder)[key(2)]
    assert clip.size == (4, 16, 16)
    assert (clip.text, clip.fps) == ("a stone", 120)
    assert indices_in(clip.video) == [0] * 4


def test_a_frame_interval_spreads_the_frames(folder):
    shown = indices_in(dataset(folder, frame_interval=3)[key(0)].video)
    assert [index - shown[0] for index in shown] == [0, 3, 7, 11]


@pytest.mark.parametrize(("transform", "size"), [("center", (16, 16)), ("resize_crop", (12, 20))])
def test_transforms_give_the_wanted_size(folder, transform, size):
    data = dataset(folder, transform_name=transform, image_size=size)
    assert [data[key(index)].size for index in range(3)] == [(4, *size)] * 3 == [data.size] * 3


def test_the_same_key_gives_the_same_clip_and_others_differ(folder):
    data = dataset(folder)
    assert torch.equal(data[key(0)].video, data[key(0)].video)
    by_epoch = {indices_in(data[key(0, epoch=epoch)].video)[0] for epoch in range(60)}
    by_seed = {indices_in(data[key(0, seed=seed)].video)[0] for seed in range(60)}
    assert len(by_epoch) > 20
    assert len(by_seed) > 20
    assert by_epoch <= set(range(36))  # starts 0 to 35: the last that fits is left out, as in the reference


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing(folder, workers):
    data = dataset(folder)
    keys = [key(index % 3, epoch=index // 3) for index in range(9)]
    loader = DataLoader(data, sampler=keys, batch_size=None, num_workers=workers)
    assert all(torch.equal(clip.video, data[one].video) for clip, one in zip(loader, keys, strict=True))


def test_clips_kept_in_memory_are_those_of_the_files(folder):
    reading, keeping = (dataset(folder, keep_in_memory=keep) for keep in (False, True))
    for epoch in range(3):
        for index in range(3):
            one = key(index, epoch=epoch)
            assert torch.equal(keeping[one].video, reading[one].video)
            assert keeping[one].fps == reading[one].fps


def test_it_pickles(folder):
    data = dataset(folder)
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy[key(1)].video, data[key(1)].video)
    assert copy[key(1)].text == "a drop"


def test_paths_are_found_from_the_working_directory(folder, tmp_path, monkeypatch):
    (tmp_path / "elsewhere.csv").write_text("path,text\nlong.mp4,a wave\n")
    monkeypatch.chdir(folder)
    assert dataset(tmp_path, "elsewhere.csv")[key(0)].path == "long.mp4"


BAD_FILES = {
    "missing": ("gone.mp4", r"gone\.mp4 is missing"),
    "too short": ("short.mp4", r"short\.mp4 has 5 frames from frame 0 on; 8 are needed"),
    "truncated": ("truncated.mp4", r"truncated\.mp4: stops at frame \d+ of 40 \(truncated file\)"),
    "index lost": ("headless.mp4", r"headless\.mp4 has no video frames .*: not a video, or cut short"),
    "no frames": ("frameless.mp4", r"frameless\.mp4 has no video frames"),
    "empty": ("empty.mp4", r"empty\.mp4 can't be read as a video \(the file is empty\)"),
    "text as video": ("text.mp4", r"text\.mp4 can't be read as a video \(it holds text\)"),
    "image as video": ("image.mp4", r"image\.mp4 is an image \(png\), not a video"),
    "video as image": ("video.png", r"video\.png is not an image but a video of 40 frames"),
    "truncated image": ("truncated.png", r"truncated\.png can't be read as an image"),
    "text as image": ("text.jpg", r"text\.jpg is not an image"),
    "other kind": ("notes.txt", r"notes\.txt is neither a video nor an image by its extension"),
    "folder": ("folder.mp4", r"folder\.mp4 is a folder"),
}


@pytest.fixture(scope="module")
def bad_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bad = tmp_path_factory.mktemp("bad")
    good = (folder / "long.mp4").read_bytes()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    write_image(bad / "noise.png", noise)
    with av.open(str(bad / "frameless.mp4"), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.height, stream.width, stream.pix_fmt = 16, 16, "yuv420p"
        container.start_encoding()
    contents = {
        "short.mp4": (folder / "short.mp4").read_bytes(),
        "truncated.mp4": good[: len(good) - 150],
        "headless.mp4": good[:200],
        "empty.mp4": b"",
        "text.mp4": b"path,text\n" * 30,
        "image.mp4": (folder / "image.png").read_bytes(),
        "video.png": good,
        "truncated.png": (bad / "noise.png").read_bytes()[:4000],
        "text.jpg": b"hello",
        "notes.txt": b"hello",
    }
    for name, content in contents.items():
        (bad / name).write_bytes(content)
    (bad / "folder.mp4").mkdir()
    rows = [f"{name},a caption" for name, _ in BAD_FILES.values()]
    (bad / "clips.csv").write_text("\n".join(["path,text", *rows]) + "\n")
    return bad


@pytest.mark.parametrize("fault", BAD_FILES)
def test_a_bad_file_is_named_with_its_cause(bad_folder, fault):
    with pytest.raises(DataError, match=BAD_FILES[fault][1]):
        dataset(bad_folder, num_frames=8)[key(list(BAD_FILES).index(fault))]


def test_the_same_files_fail_in_every_epoch(bad_folder):
    data = dataset(bad_folder, num_frames=2)
    truncated = list(BAD_FILES).index("truncated")
    for epoch in range(20):
        with pytest.raises(DataError, match=r"truncated"):
            data[key(truncated, epoch=epoch)]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"image_size": (16, 20)}, r'transform_name="center" makes squares, not image_size=\(16, 20\)'),
        ({"num_frames": 0}, "num_frames must be > 0, not 0"),
        ({"image_size": (0, 0)}, "> 0"),
        ({"transform_name": "centre"}, "transform_name"),
        ({"frame_intervall": 2}, 'Did you mean "frame_interval"'),
        ({"data_path": ""}, "data_path"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_options_are_refused(options, says):
    with pytest.raises(ConfigError, match=says):
        structure(VideoTextSpec, {"data_path": "clips.csv", **options})


def test_captions_can_be_left_out_where_no_one_needs_them(folder):
    (folder / "paths.csv").write_text("path\nlong.mp4\n")
    spec = VideoTextSpec(data_path=str(folder / "paths.csv"), num_frames=4, image_size=(16, 16))
    assert VideoTextDataset(spec, needs_text=False)[key(0)].text == ""
    with pytest.raises(DataError, match="text"):
        VideoTextDataset(spec)


def test_a_table_must_be_given():
    with pytest.raises(DataError, match=r"dataset\.data_path is not set\. Give --data-path table\.csv"):
        VideoTextDataset(VideoTextSpec())


def look(path: Path):
    """What features know of a file."""
    from opensora.core.protocols import SourceFacts
    from opensora.core.video import VideoFile, is_video

    if not is_video(path):
        return SourceFacts(digest="")
    with VideoFile(path) as file:
        return SourceFacts(digest="", num_frames=file.info.num_frames, fps=file.info.fps)


@pytest.mark.parametrize("options", [{}, {"num_starts": 3}, {"frame_interval": 3}])
def test_a_recipe_says_what_the_clip_will_be(folder, options):
    data = dataset(folder, **options)
    for row, epoch in [(0, 0), (0, 1), (2, 0)]:
        clip, recipe = data[key(row, epoch=epoch)], data.recipe(key(row, epoch=epoch), look)
        assert (recipe.text, recipe.fps, recipe.size, str(recipe.path)) == (clip.text, clip.fps, clip.size, clip.path)
        if row == 0:
            assert list(recipe.frames) == indices_in(clip.video)
    assert data.recipe(key(2), look).frames == (0,)


def test_a_recipe_of_what_is_no_clip(folder):
    (folder / "bad.csv").write_text("path,text\nclips.csv,a table\nshort.mp4,a drop\nmissing.mp4,nothing\n")
    data = dataset(folder, "bad.csv", num_frames=6)
    for row, message in enumerate(["neither a video nor an image", "has 5 frames", "missing"]):
        with pytest.raises(DataError, match=message):
            data.recipe(key(row), look)


def test_starts_are_shown_in_turns(folder):
    data = dataset(folder, num_starts=3)
    starts = [indices_in(data[key(0, epoch=epoch)].video)[0] for epoch in range(6)]
    assert sorted(starts[:3]) == [0, 17, 35]  # of 36 that fit, of which the field's loaders use the first 35
    assert starts[3:] == starts[:3]
    assert {indices_in(dataset(folder, num_starts=1)[key(0, epoch=epoch)].video)[0] for epoch in range(3)} == {0}
    orders = {
        tuple(indices_in(data[key(0, seed=seed, epoch=epoch)].video)[0] for epoch in range(3)) for seed in range(9)
    }
    assert len(orders) == 3
