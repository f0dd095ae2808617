"""WebDataset: real shards, their index, the order of epochs, and what damaged shards and samples say."""

from __future__ import annotations

import io
import json
import pickle
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("webdataset")

from opensora.core import ConfigError, DataError, MachineError, SampleKey
from opensora.core.loading import iter_batches
from opensora.core.orders import Place, SampleOrder, Slicing
from opensora.core.protocols import Dataset
from opensora.core.video import write_image, write_video
from opensora.data.video_text import VideoTextDataset, VideoTextSpec
from opensora.data.web_dataset import WebDataset, WebDatasetSpec

COUNTS = (5, 1, 7)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clip i is gray of level 10 * i."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(sum(COUNTS)):
        write_video(folder / f"{number}.mp4", torch.full((6, 16, 24, 3), 10 * number, dtype=torch.uint8), 8)
    write_image(folder / "image.png", torch.full((20, 20, 3), 200, dtype=torch.uint8))
    return folder


@pytest.fixture
def folder(tmp_path: Path, clips: Path) -> Path:
    """Three shards; sample 3 has its caption in JSON, 12 is an image."""
    number = 0
    for shard, count in enumerate(COUNTS):
        with tarfile.open(tmp_path / f"clips-{shard:02}.tar", "w") as tar:
            for _ in range(count):
                ending = "png" if number == 12 else "MP4"
                source = clips / ("image.png" if number == 12 else f"{number}.mp4")
                add(tar, f"set/{number:04}.{ending}", source.read_bytes())
                if number == 3:
                    add(tar, f"set/{number:04}.json", json.dumps({"text": " clip 3 ", "id": 3}).encode())
                else:
                    add(tar, f"set/{number:04}.txt", f"clip {number}\n".encode())
                number += 1
    return tmp_path


def dataset(path: object, **options: object) -> WebDataset:
    values = {"num_frames": 4, "image_size": (16, 16), "data_path": path if isinstance(path, list) else str(path)}
    return WebDataset(WebDatasetSpec(**{**values, **options}))


def test_samples_are_those_of_the_shards(folder, clips):
    data = dataset(folder)
    assert isinstance(data, Dataset)
    assert len(data) == sum(COUNTS)
    for index in range(len(data)):
        clip = data[SampleKey(0, index)]
        assert clip.text == f"clip {index}"
        assert clip.size == data.size == (4, 16, 16)
        level = 200 if index == 12 else 10 * index
        assert float(clip.video.add(1).mul(127.5).mean()) == pytest.approx(level, abs=3)
    assert data[SampleKey(0, 12)].fps == 120
    assert data[SampleKey(0, 0)].path == str(folder / "clips-00.tar/set/0000.mp4")


def test_clips_are_those_of_a_table_of_the_same_files(folder, clips):
    (clips / "table.csv").write_text("path,text\n" + "\n".join(f"{number}.mp4,clip {number}" for number in range(5)))
    table = VideoTextDataset(VideoTextSpec(data_path=str(clips / "table.csv"), num_frames=4, image_size=(16, 16)))
    data = pickle.loads(pickle.dumps(dataset(folder)))
    for index in range(5):
        key = SampleKey(3, index, 1)
        assert torch.equal(data[key].video, table[key].video)
        assert data[key].fps == table[key].fps


def test_shards_are_named_by_folder_braces_or_list(folder):
    names = [str(folder / f"clips-{shard:02}.tar") for shard in range(3)]
    for path in (folder, folder / "clips-{00..02}.tar", names, [names[0], str(folder / "clips-{01,02}.tar")]):
        assert list(dataset(path).row_paths()) == list(dataset(folder).row_paths())
    assert dataset(names[::-1]).row_paths()[0].startswith(names[2])


def test_an_epoch_has_each_sample_once_in_shards_and_its_order_depends_on_seed_and_epoch(folder):
    data = dataset(folder, shuffle_window=0)
    orders = {(seed, epoch): data.order(seed, epoch).tolist() for seed in range(4) for epoch in range(4)}
    assert all(sorted(order) == list(range(13)) for order in orders.values())
    shards = {tuple(tuple(order[at : at + 1]) for at in range(13)) for order in orders.values()}
    assert len(shards) == 6  # the orders of three shards
    for order in orders.values():
        breaks = [at for at in range(1, 13) if order[at] != order[at - 1] + 1]
        assert len(breaks) <= 2  # each shard in sequence
    mixed = dataset(folder, shuffle_window=4).order(0, 0)
    plain = data.order(0, 0).tolist()
    moves = [abs(place - plain.index(index)) for place, index in enumerate(mixed.tolist())]
    assert 0 < max(moves) <= 4
    assert sorted(mixed.tolist()) == list(range(13))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_goes_on_on_other_processes_with_each_sample_once(folder, num_workers):
    data, place, seen = dataset(folder, shuffle_window=3), Place(), []
    for world_size, batch_size in ((2, 2), (1, 3), (3, 2)):
        for rank in range(world_size):
            order = SampleOrder.of(data, 7)
            slicing = Slicing(batch_size=batch_size, world_size=world_size, rank=rank)
            batch = next(iter(iter_batches(data, order, slicing, place=place, num_workers=num_workers)))
            seen += [(key.epoch, key.index) for key in batch.keys]
        place = order.after_step(slicing, place)
    assert seen == [(0, index) for index in data.order(7, 0)[:13].tolist()]


def test_the_index_is_made_once_and_anew_when_the_shard_changes(folder, clips):
    dataset(folder)
    index = folder / "clips-01.tar.index.npz"
    before = index.stat().st_mtime_ns
    assert len(dataset(folder)) == 13
    assert index.stat().st_mtime_ns == before
    with tarfile.open(folder / "clips-01.tar", "w") as tar:
        for name in ("a", "b"):
            add(tar, f"{name}.mp4", (clips / "1.mp4").read_bytes())
            add(tar, f"{name}.txt", b"new")
    assert [dataset(folder)[SampleKey(0, index)].text for index in (4, 5, 6, 7)] == ["clip 4", "new", "new", "clip 6"]
    index.write_bytes(index.read_bytes()[:100])  # cut short
    assert len(dataset(folder)) == 14


def test_the_index_may_be_elsewhere(folder, tmp_path):
    data = dataset(folder, index_folder=str(tmp_path / "indices"))
    assert len(data) == 13
    assert len(list((tmp_path / "indices").iterdir())) == 3
    assert not list(folder.glob("*.npz"))


def test_where_no_index_can_be_written_none_is_kept(folder):
    assert len(dataset(folder, index_folder=str(folder / "clips-00.tar"))) == 13
    assert not list(folder.glob("*.npz"))


def test_bad_samples_are_data_errors_that_name_shard_and_sample(tmp_path, clips):
    good = (clips / "1.mp4").read_bytes()
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        samples = [
            {"mp4": good[: len(good) - 150], "txt": b"x"},
            {"mp4": b"", "txt": b"x"},
            {"mp4": b"path,text\n" * 30, "txt": b"x"},
            {"mp4": (clips / "image.png").read_bytes(), "txt": b"x"},
            {"txt": b"x"},
            {"mp4": good},
            {"mp4": good, "json": b'{"caption": "x"}'},
            {"mp4": good, "json": b"{"},
            {"mp4": good, "txt": b"\xff\xfe\xff"},
            {"jpg": good, "txt": b"x"},
        ]
        for number, sample in enumerate(samples):
            for ending, content in sample.items():
                add(tar, f"{number}.{ending}", content)
    data = dataset(tmp_path)
    messages = [
        r"bad\.tar/0\.mp4: stops at frame \d of 6",
        r"bad\.tar/1\.mp4 can't be read as a video \(the file is empty\)",
        r"bad\.tar/2\.mp4 can't be read as a video \(it holds text\)",
        r"bad\.tar/3\.mp4 is an image \(png\), not a video",
        r"bad\.tar/4 has no video or image",
        r"bad\.tar/5\.mp4 has no caption",
        r'bad\.tar/6\.mp4: the \.json has no "text"',
        r'bad\.tar/7\.mp4: the \.json has no "text"',
        r"bad\.tar/8\.mp4: the caption is not UTF-8",
        r"bad\.tar/9\.jpg is not an image but a video of 6 frames",
    ]
    assert len(data) == len(messages)
    for index, message in enumerate(messages):
        with pytest.raises(DataError, match=message):
            data[SampleKey(0, index)]
    assert dataset(tmp_path, text_field="caption")[SampleKey(0, 6)].text == "x"


def test_damaged_missing_and_foreign_shards_are_refused(folder, tmp_path):
    whole = (folder / "clips-00.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.tar").write_text("no archive" * 100)
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        add(tar, "a.txt", b"x")
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    for name in ("cut", "text", "packed"):
        with pytest.raises(DataError, match=rf"{name}\.tar can't be read: .*It must be a whole \.tar, not compressed"):
            dataset(tmp_path / f"{name}.tar")
    with pytest.raises(DataError, match=r"None of the 1 shards of .* has a sample"):
        dataset(tmp_path / "empty.tar")
    with pytest.raises(DataError, match=r"gone\.tar is missing"):
        dataset(tmp_path / "gone.tar")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match=r"has no \.tar files"):
        dataset(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"dataset\.data_path is not set"):
        WebDataset(WebDatasetSpec())
    for name in ("pipe:curl example.org/a.tar", "https://example.org/{0..3}.tar"):
        with pytest.raises(ConfigError, match="is no file"):
            dataset(name)


def test_without_the_library_the_message_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset.shardlists", None)
    with pytest.raises(MachineError, match=r"pip install 'opensora-data\[webdataset\]'"):
        dataset(folder / "clips-{00..02}.tar")


def test_order_counts_each_sample_once_an_epoch_across_epochs(folder):
    order = SampleOrder.of(dataset(folder), 0)
    keys = [order.key(position) for position in range(26)]
    assert Counter((key.epoch, key.index) for key in keys) == Counter((e, i) for e in range(2) for i in range(13))
