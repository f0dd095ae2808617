"""The pipeline make-digits: files that the ordinary dataset reads, written whole or not at all."""

import csv
import sys

import pytest
import torch

from opensora.core import ConfigError, DataError, MachineError, SampleKey
from opensora.core.config.evaluate import Config
from opensora.core.config.structure import structure
from opensora.core.video import probe_video
from opensora.data.digits import make
from opensora.data.digits.clips import make_clips
from opensora.data.digits.make import MakeDigits, MakeDigitsSpec
from opensora.data.video_text import VideoTextDataset, VideoTextSpec


def maker(folder, **options) -> MakeDigits:
    values = {"pipeline": "make-digits", "save_dir": str(folder), "num_clips": 12, "num_held_out": 5, **options}
    return MakeDigits(structure(MakeDigitsSpec, values), config=Config(values=values, locations={}))


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_dataset_reads_what_was_made(tmp_path):
    maker(tmp_path / "data").run()
    data = VideoTextDataset(
        VideoTextSpec(data_path=str(tmp_path / "data" / "clips.csv"), num_frames=8, image_size=(16, 16))
    )
    assert len(data) == 12
    for index, made in enumerate(make_clips(12)):
        clip = data[SampleKey(0, index)]
        assert (clip.text, clip.fps) == (made.caption, 8)
        expected = torch.from_numpy(made.frames).permute(3, 0, 1, 2) / 127.5 - 1
        assert (clip.video - expected).abs().mean() < 0.01
        assert (clip.video - expected).abs().max() < 0.2


def test_the_tables_tell_the_truth(tmp_path):
    maker(tmp_path / "data", canvas=32, num_frames=6, fps=12).run()
    for name, count in (("clips", 12), ("held_out", 5)):
        with (tmp_path / "data" / f"{name}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == count
        for row in rows:
            info = probe_video(tmp_path / "data" / row["path"])
            facts = (info.num_frames, info.height, info.width, info.fps)
            assert (
                facts == tuple(float(row[key]) for key in ("num_frames", "height", "width", "fps")) == (6, 32, 32, 12)
            )


def test_the_same_spec_gives_the_same_bytes_and_held_out_clips_are_others(tmp_path):
    maker(tmp_path / "a", num_held_out=12).run()
    maker(tmp_path / "b", num_held_out=12).run()
    first = contents(tmp_path / "a")
    assert first == contents(tmp_path / "b")
    assert not {first[f"clips/{index:05d}.mp4"] for index in range(12)} & {
        first[f"held_out/{index:05d}.mp4"] for index in range(12)
    }


def test_a_folder_with_the_same_clips_is_left_as_it_is(tmp_path, caplog):
    maker(tmp_path / "data").run()
    before = (tmp_path / "data" / "clips.csv").stat().st_mtime_ns
    with caplog.at_level("INFO"):
        maker(tmp_path / "data").run()
    assert "holds these clips already" in caplog.text
    assert (tmp_path / "data" / "clips.csv").stat().st_mtime_ns == before


def test_a_folder_with_other_clips_is_never_overwritten(tmp_path):
    maker(tmp_path / "data").run()
    with pytest.raises(DataError, match=r"holds clips made with num_clips=12, seed=0. Remove it or choose another"):
        maker(tmp_path / "data", num_clips=13, seed=1).run()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match=r"other is in the way"):
        maker(tmp_path / "other").run()
    assert contents(tmp_path / "other") == {"thesis.txt": b"precious"}


def test_a_failure_in_between_leaves_nothing(tmp_path, monkeypatch):
    written = []

    def full_disk(path, *_, **__):
        written.append(path)
        if len(written) == 5:
            raise MachineError(f"{path} can't be written: No space left on device.")

    monkeypatch.setattr(make, "write_video", full_disk)
    with pytest.raises(MachineError, match=r"No space left"):
        maker(tmp_path / "data").run()
    assert not list(tmp_path.iterdir())


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MachineError, match=r"file/data can't be written: "):
        maker(tmp_path / "file" / "data").run()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_clips": 0}, "num_clips must be > 0, not 0"),
        ({"num_frames": 12}, "num_frames=12 must be 2 to 9"),
        ({"crf": 60}, "crf"),
        ({"canvass": 16}, 'Did you mean "canvas"'),
    ],
    ids=str,
)
def test_wrong_options_are_refused_before_anything_is_made(tmp_path, options, says):
    with pytest.raises(ConfigError, match=says):
        maker(tmp_path / "data", **options)


def test_a_dry_run_writes_nothing(tmp_path):
    assert "12 clips and 5 held-out ones" in maker(tmp_path / "data").dry_run()
    assert not list(tmp_path.iterdir())


def test_without_scikit_learn_the_install_line_is_given(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MachineError, match=r'pip install "opensora-data\[quickstart\]"'):
        maker(tmp_path / "data")
