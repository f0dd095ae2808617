"""The quickstart from beginning to end, shortened: every stage runs and leaves what it should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import Command

from opensora.core.video import probe_video

SHORT = {
    "stages.data.num_clips": 80,
    "stages.data.num_held_out": 40,
    "stages.train.max_steps": 4,
    "stages.sample.scheduler.num_sampling_steps": 2,
    "stages.sample.num_sample": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, run_in: Command) -> Path:
    """The run folder of a shortened quickstart."""
    home = tmp_path_factory.mktemp("quickstart")
    flags = [part for key, value in SHORT.items() for part in (f"--{key}", value)]
    done = run_in(home, "opensora-run", "quickstart", *flags)
    assert done.returncode == 0, done.stderr
    assert "Stage 4 of 4: grade" in done.stderr
    return home / "outputs" / "000-quickstart"


def test_data_are_real_videos_with_captions(folder: Path) -> None:
    clips = sorted((folder / "data").rglob("*.mp4"))
    assert len(clips) == 120
    info = probe_video(clips[0])
    assert (info.num_frames, info.height, info.width) == (8, 16, 16)
    assert "a handwritten" in (folder / "data" / "clips.csv").read_text()


def test_training_leaves_checkpoint_metrics_and_plot(folder: Path) -> None:
    assert (folder / "train" / "checkpoints" / "step-000004" / "ema.safetensors").exists()
    assert (folder / "train" / "metrics.jsonl").exists()
    assert (folder / "train" / "loss.png").stat().st_size > 1000


def test_samples_stand_beside_their_recipes(folder: Path) -> None:
    videos = sorted((folder / "samples").glob("*.mp4"))
    assert len(videos) == 40
    recipe = json.loads(videos[0].with_suffix(".json").read_text())
    assert recipe["prompt"] == "a handwritten zero moving left"
    assert recipe["seed"] == 1024
    assert (folder / "samples" / "contact-sheet.png").stat().st_size > 1000


def test_summary_names_files_that_are_there(folder: Path) -> None:
    lines = (folder / "summary.txt").read_text().splitlines()
    paths = [folder.parents[1] / line.split(":", 1)[1].strip() for line in lines]
    assert len(paths) >= 6
    assert all(path.exists() for path in paths)


def test_run_folder_has_the_config_that_repeats_all_stages(folder: Path, command: Command) -> None:
    done = command("opensora-run", folder / "config.py", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert all(f"[{stage}]" in done.stdout for stage in ("data", "train", "sample", "grade"))


def test_grades_say_what_chance_gives_and_trust_the_grader(folder: Path) -> None:
    grades = json.loads((folder / "grade.json").read_text())
    assert grades["samples"]["clips"] == 40
    assert grades["held_out"]["digit"] >= 0.95
    assert grades["held_out"]["direction"] >= 0.99
    assert grades["classifier"] >= 0.95
    assert grades["chance"] == {"digit": 0.1, "direction": 0.25}


def test_grading_again_needs_the_folder_alone(folder: Path, command: Command) -> None:
    done = command("opensora-run", "quickstart/grade", "--samples", folder)
    assert done.returncode == 0, done.stderr
    assert "chance" in done.stderr
