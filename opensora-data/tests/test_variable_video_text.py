"""VariableVideoTextDataset on real files: clips of their bucket's size, and what bad files and configs say."""

from pathlib import Path

import pytest
import torch

from opensora.core import ConfigError, DataError, SampleKey
from opensora.core.orders import OwnBatches
from opensora.core.video import write_image, write_video
from opensora.data.variable_video_text import VariableVideoTextDataset, VariableVideoTextSpec

BUCKETS = {"144p": {1: (1.0, 2), 4: (1.0, 2)}}


def frames(count: int, height: int, width: int) -> torch.Tensor:
    return torch.full((count, height, width, 3), 128, dtype=torch.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_video(folder / "wide.mp4", frames(13, 144, 256), 24)
    write_video(folder / "tall.mp4", frames(6, 256, 144), 30)
    write_image(folder / "image.png", frames(1, 200, 200)[0])
    rows = ["wide.mp4,a wave,13,144,256", "tall.mp4,a tower,6,256,144", "image.png,a stone,1,200,200"]
    (folder / "clips.csv").write_text("\n".join(["path,text,num_frames,height,width", *rows]))
    return folder


def dataset(folder: Path, **options) -> VariableVideoTextDataset:
    spec = VariableVideoTextSpec(data_path=str(folder / "clips.csv"), **options)
    return VariableVideoTextDataset(spec, bucket_config=BUCKETS)


def test_clips_have_the_size_of_their_bucket(folder):
    data: OwnBatches = dataset(folder)
    clips = {key.index: data[key] for batch in data.batches(0, 0) for key in batch}
    assert {index: clip.size for index, clip in clips.items()} == {0: (4, 144, 256), 1: (4, 256, 144), 2: (1, 192, 192)}
    assert {index: clip.fps for index, clip in clips.items()} == {0: 24, 1: 30, 2: 120}
    assert clips[0].text == "a wave"


def test_an_interval_asks_for_longer_files_and_lowers_the_rate(folder):
    data = dataset(folder, frame_interval=3)
    clips = [data[key] for batch in data.batches(0, 0) for key in batch]
    assert sorted((clip.size[0], clip.fps) for clip in clips) == [(1, 120), (4, 8)]


def test_a_key_gives_the_same_clip_again(folder):
    data = dataset(folder)
    key = SampleKey(3, 0, 1, (4, 144, 256))
    torch.testing.assert_close(data[key].video, dataset(folder)[key].video, rtol=0, atol=0)


def test_files_that_are_not_what_the_table_says_are_data_errors(folder):
    data = dataset(folder)
    with pytest.raises(DataError, match="is an image, but the table says that it has more than one frame"):
        data[SampleKey(0, 2, 0, (4, 144, 256))]
    with pytest.raises(DataError, match=r"has 6 frames from frame 0 on; 16 are needed"):
        data[SampleKey(0, 1, 0, (16, 144, 256))]


def test_buckets_and_a_table_must_be_given(folder):
    with pytest.raises(ConfigError, match="needs bucket_config"):
        VariableVideoTextDataset(VariableVideoTextSpec(data_path=str(folder / "clips.csv")))
    with pytest.raises(DataError, match=r"dataset\.data_path is not set"):
        VariableVideoTextDataset(VariableVideoTextSpec(), bucket_config=BUCKETS)


def test_a_table_without_sizes_is_refused(folder):
    (folder / "bare.csv").write_text("path,text\nwide.mp4,a wave\n")
    with pytest.raises(DataError, match="num_frames"):
        VariableVideoTextDataset(VariableVideoTextSpec(data_path=str(folder / "bare.csv")), bucket_config=BUCKETS)
