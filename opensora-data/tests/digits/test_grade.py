"""The pipeline grade: prompts against pixels, from the files that sampling leaves."""

import json
import os

import pytest
import torch

from opensora.core import DataError
from opensora.core.config.evaluate import Config
from opensora.core.config.structure import structure
from opensora.core.video import write_video
from opensora.data.digits.clips import make_clips
from opensora.data.digits.grade import Grade, GradeSpec
from opensora.data.digits.make import MakeDigits, MakeDigitsSpec


def write_samples(folder, prompts=None, *, num_clips=40) -> None:
    """Clips as samples, each with its caption as the prompt, or with the one from ``prompts``."""
    for index, clip in enumerate(make_clips(num_clips, seed=9)):
        write_video(folder / f"sample_{index:04d}.mp4", clip.frames, 8, crf=4)
        prompt = clip.caption if prompts is None else prompts[index % len(prompts)]
        (folder / f"sample_{index:04d}.json").write_text(json.dumps({"prompt": prompt, "seed": index}))


def grader(**options) -> Grade:
    values = {"pipeline": "grade", **{key: str(value) for key, value in options.items()}}
    return Grade(structure(GradeSpec, values), config=Config(values=values, locations={}))


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "outputs" / "000-quickstart"
    spec = MakeDigitsSpec(save_dir=str(folder / "data"), num_clips=1, num_held_out=80)
    MakeDigits(spec, config=Config(values={}, locations={})).run()
    write_samples(folder / "samples")
    return folder


def test_right_samples_are_graded_right(run_folder, caplog):
    with caplog.at_level("INFO"):
        grader(samples=run_folder).run()
    grades = json.loads((run_folder / "grade.json").read_text())
    assert grades["samples"]["clips"] == 40
    assert grades["held_out"]["clips"] == 80
    assert grades["samples"]["digit"] >= 0.95
    assert grades["samples"]["direction"] == 1
    assert grades["held_out"]["digit"] >= 0.95
    assert grades["held_out"]["direction"] >= 0.99
    assert grades["chance"] == {"digit": 0.1, "direction": 0.25}
    assert grades["classifier"] >= 0.97
    assert len(grades["records"]) == 40
    assert grades["records"][1]["direction"] == "right"
    for word in ("samples", "held-out clips", "chance", "10.0%", "25.0%", "classifier reads"):
        assert word in caplog.text
    assert "WARNING" not in caplog.text


def test_a_swapped_prompt_is_graded_wrong(run_folder):
    for path in (run_folder / "samples").glob("*.json"):
        path.write_text(path.read_text().replace("moving left", "moving right"))
    grader(samples=run_folder).run()
    grades = json.loads((run_folder / "grade.json").read_text())
    assert grades["samples"]["direction"] == 0.75
    assert grades["samples"]["digit"] >= 0.95


def test_other_prompts_are_compared_with_captions_in_turn(tmp_path):
    write_samples(tmp_path / "samples", ["", "a cat"])
    grader(samples=tmp_path / "samples").run()
    grades = json.loads((tmp_path / "grade.json").read_text())
    assert grades["samples"] is None
    assert grades["other_prompts"]["clips"] == 40


def test_noise_is_graded_as_chance(tmp_path):
    generator = torch.Generator().manual_seed(0)
    write_samples(tmp_path / "samples", num_clips=80)
    for path in (tmp_path / "samples").glob("*.mp4"):
        write_video(path, torch.randint(0, 256, (8, 16, 16, 3), generator=generator, dtype=torch.uint8), 8)
    grader(samples=tmp_path / "samples", save_path=tmp_path / "noise.json").run()
    grades = json.loads((tmp_path / "noise.json").read_text())["samples"]
    assert grades["digit"] < 0.25
    assert grades["direction"] < 0.4


def test_the_newest_run_of_a_folder_is_taken(run_folder):
    newer = run_folder.with_name("001-quickstart") / "samples"
    write_samples(newer, num_clips=2)
    os.utime(run_folder / "samples", (1, 1))
    grader(samples=run_folder.parent).run()
    assert (newer.parent / "grade.json").exists()
    assert not (run_folder / "grade.json").exists()


def test_a_grader_that_fails_on_real_clips_says_so(run_folder, caplog):
    table = run_folder / "data" / "held_out.csv"
    table.write_text(table.read_text().replace("moving up", "moving down"))
    grader(samples=run_folder).run()
    assert "Don't trust these grades" in caplog.text


def test_without_real_clips_it_says_so(tmp_path, caplog):
    write_samples(tmp_path, num_clips=2)
    grader(samples=tmp_path).run()
    assert "No real clips to check the grader on" in caplog.text


def test_missing_files_are_named(tmp_path, run_folder):
    with pytest.raises(DataError, match=r"No samples in .*gone: .*Give --samples FOLDER"):
        grader(samples=tmp_path / "gone").run()
    with pytest.raises(DataError, match=r"other\.csv is missing"):
        grader(samples=run_folder, held_out=tmp_path / "other.csv").run()
    (run_folder / "samples" / "sample_0003.json").unlink()
    with pytest.raises(DataError, match=r"sample_0003\.mp4 has no prompt: sample_0003\.json beside it must hold one"):
        grader(samples=run_folder).run()


def test_samples_of_another_size_are_named(tmp_path):
    write_samples(tmp_path, num_clips=1)
    write_video(tmp_path / "sample_0000.mp4", torch.zeros(8, 16, 32, 3, dtype=torch.uint8), 8)
    with pytest.raises(DataError, match=r"sample_0000\.mp4 has 8 frames of 16 x 32; the grader reads"):
        grader(samples=tmp_path).run()


def test_a_dry_run_needs_no_samples(tmp_path):
    assert "gone" in grader(samples=tmp_path / "gone").dry_run()
