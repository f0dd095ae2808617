"""ClassImages: folders and tables of labelled images."""

import pickle

import pytest
import torch

from opensora.core import DataError, SampleKey
from opensora.core.video import write_image
from opensora.data.labelled_images import ClassImages, ClassImagesSpec

LEVELS = {"ant": 10, "bee": 120, "cat": 250}


def gray(level: int, height: int = 20, width: int = 30) -> torch.Tensor:
    return torch.full((height, width, 3), level, dtype=torch.uint8)


@pytest.fixture
def folder(tmp_path):
    for name, level in LEVELS.items():
        for number in range(2):
            write_image(tmp_path / "images" / name / f"{number}.png", gray(level))
    (tmp_path / "images" / "bee" / "readme.txt").write_text("no image")
    return tmp_path / "images"


def dataset(path, **options) -> ClassImages:
    return ClassImages(ClassImagesSpec(data_path=str(path), **{"image_size": (8, 8), **options}))


def test_folders_are_classes_in_the_order_of_their_names(folder):
    data = dataset(folder)
    clips = [data[SampleKey(0, index)] for index in range(len(data))]
    assert data.classes == ("ant", "bee", "cat")
    assert [clip.text for clip in clips] == ["0", "0", "1", "1", "2", "2"]
    assert all(clip.size == (1, 8, 8) and clip.fps == 120 for clip in clips)
    levels = [round(float(clip.video.add(1).mul(127.5).mean())) for clip in clips]
    assert levels == [10, 10, 120, 120, 250, 250]


def test_a_table_gives_labels(folder):
    (folder / "labels.csv").write_text("path, label\ncat/0.png, 7\nant/1.png, 0\n")
    data = dataset(folder / "labels.csv", image_size=(8, 12), transform_name="resize_crop")
    assert [data[SampleKey(0, index)].text for index in range(2)] == ["7", "0"]
    assert data[SampleKey(0, 0)].size == (1, 8, 12) == data.size
    assert data.classes == ()


def test_it_pickles(folder):
    data = pickle.loads(pickle.dumps(dataset(folder)))
    assert data[SampleKey(0, 5)].text == "2"
    assert data[SampleKey(0, 5)].path.endswith("cat/1.png")


def test_relative_folders_work_from_anywhere(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    data = dataset("images")
    monkeypatch.chdir("/")
    assert data[SampleKey(0, 0)].text == "0"


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("path,class\ncat/0.png,7\n", 'has no column "label"'),
        ("path,label\ncat/0.png,cat\n", "label is 'cat', not a whole number in data row 1"),
        ("path,label\ncat/0.png,-1\n", "label -1 is negative"),
    ],
    ids=["no label column", "a name as label", "negative"],
)
def test_wrong_tables_are_refused(folder, table, says):
    (folder / "labels.csv").write_text(table)
    with pytest.raises(DataError, match=says):
        dataset(folder / "labels.csv")


def test_wrong_folders_are_refused(folder, tmp_path):
    with pytest.raises(DataError, match=r"has no folders in it"):
        dataset(folder / "ant")
    (folder / "dog").mkdir()
    with pytest.raises(DataError, match=r"dog has no images\. Classes without images: 1"):
        dataset(folder)
    with pytest.raises(DataError, match=r"missing"):
        dataset(tmp_path / "gone.csv")


def test_a_bad_image_is_named(folder):
    (folder / "ant" / "0.png").write_text("hello")
    with pytest.raises(DataError, match=r"ant/0\.png is not an image"):
        dataset(folder)[SampleKey(0, 0)]
