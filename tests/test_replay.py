"""A logged step can be made again, and nothing of its run changes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import Command, losses, tiny_training

from opensora.core.commands.opensora_run import main
from opensora.core.config.write import write_config

OPTIONS = {
    "mask_ratios": {"image_head": 0.5, "random": 0.3}, "lr_schedule": "cosine", "accumulation_steps": 2, "batch_size": 4,
    "ckpt_every": 5, "keep_last": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, clips: Path) -> Path:
    """A run of 12 steps with checkpoints at 5, 10 and 12."""
    folder = tmp_path_factory.mktemp("trained")
    write_config(folder / "config.py", tiny_training(clips, **OPTIONS), "A test's config.")
    assert main([str(folder / "config.py"), "--run-folder", str(folder / "run")]) == 0
    return folder / "run"


def replay(run: Path, step: int, *flags: object) -> dict[str, object]:
    arguments = [run / "config.py", "--pipeline", "replay", "--step", step, *flags]
    assert main([str(each) for each in arguments]) == 0
    return json.loads((run / "replay" / f"step-{step:06d}.json").read_text())


def contents(run: Path) -> dict[str, str]:
    """Every file of a run but its replays."""
    files = [path for path in run.rglob("*") if path.is_file() and path.relative_to(run).parts[0] != "replay"]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(("step", "source"), [(3, "the start"), (6, "step-000005"), (9, "step-000005")])
def test_a_step_has_the_logged_loss_again(step: int, source: str, trained: Path) -> None:
    before = contents(trained)
    report = replay(trained, step)
    assert report["from"] == source
    assert report["loss"] == report["logged_loss"] == losses(trained)[step - 1]
    assert report["grad_norm"] == report["logged_grad_norm"]
    assert report["first_step_with_another_loss"] is None
    assert contents(trained) == before
    assert (trained / "replay" / f"step-{step:06d}.png").stat().st_size > 1000


def test_each_sample_is_reported(trained: Path) -> None:
    report = replay(trained, 6)
    samples = report["samples"]
    assert len(samples) == 8
    assert sum(sample["loss"] for sample in samples) / 8 == pytest.approx(report["loss"], rel=1e-6)
    assert [sample["micro_batch"] for sample in samples] == [0] * 4 + [1] * 4
    for sample in samples:
        assert Path(sample["path"]).name == f"clip_{sample['row']:02d}.mp4"
        assert sample["caption"] == f"a square of size {sample['row'] % 6}"
        assert 0 <= sample["timestep"] <= 1000
    assert any(0 in sample["frame_mask"] for sample in samples)
    assert len({sample["timestep"] for sample in samples}) == 8


def test_another_run_is_told_apart(trained: Path, caplog: pytest.LogCaptureFixture) -> None:
    report = replay(trained, 8, "--lr", 0.01)
    assert report["first_step_with_another_loss"] == 7  # the 6th still has the checkpoint's weights
    assert report["loss"] != report["logged_loss"]
    assert "The logged loss is" in caplog.text
    replay(trained, 8)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--step", "13"], "step is 13, but .* got to step 12"),
        (["--step", "8", "--batch-size", "2"], "After step 6 the run had seen 48 samples, this one 44"),
        (["--step", "0"], "step"),
        (["--step", "8", "--run-folder", "nowhere"], "nowhere is no run folder"),
    ],
)
def test_what_cannot_be_replayed_is_refused(
    flags: list[str], message: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(trained / "config.py"), "--pipeline", "replay", *flags]) == 2
    import re

    assert re.search(message, capsys.readouterr().err)


@pytest.mark.slow
def test_two_processes_replay_what_two_processes_made(
    command: Command, clips: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    config = write(tiny_training(clips, **{**OPTIONS, "accumulation_steps": 1, "max_steps": 4}))
    done = command("opensora-run", config, "--run-folder", tmp_path / "run", "--nproc", 2)
    assert done.returncode == 0, done.stderr
    again = [tmp_path / "run" / "config.py", "--pipeline", "replay", "--step", 3]
    done = command("opensora-run", *again, "--nproc", 2)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "replay" / "step-000003.json").read_text())
    assert report["loss"] == report["logged_loss"]
    assert [sample["process"] for sample in report["samples"]] == [0] * 4 + [1] * 4
    assert len({sample["row"] for sample in report["samples"]}) == 8
