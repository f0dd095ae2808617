"""A run that is killed and resumed is the run that was never killed."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from runs import Command, command_line, environment, losses, tiny_training, weights
from witness import install, samples_of_steps


def train(command: Command, config: Path, folder: Path, *flags: object) -> None:
    done = command("opensora-run", config, "--run-folder", folder, *flags)
    assert done.returncode == 0, done.stderr


def kill_while_it_trains(
    arguments: list[str],
    folder: Path,
    delay_s: float,
    cwd: Path,
    *,
    variables: dict[str, str] | None = None,
    records: int | None = None,
) -> bool:
    """Start a command and kill it, ``delay_s`` after it has logged a step. Returns whether the kill came before its end.

    Args:
        records: Of the witness, to wait for instead: one comes of each step and process.
    """
    metrics, begin, known = folder / "metrics.jsonl", time.time(), count_records(folder)

    def has_come_far() -> bool:
        if records is not None:
            return count_records(folder) >= known + records
        return metrics.exists() and metrics.stat().st_mtime > begin + 0.2

    process = subprocess.Popen(
        arguments, cwd=cwd, env=variables or environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not has_come_far():
        time.sleep(0.005)
    time.sleep(delay_s)
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.kill()
    was_killed = process.wait(60) == -signal.SIGKILL
    _, survivors = psutil.wait_procs(children, timeout=20)
    assert not survivors, "processes of the killed run live on"
    return was_killed


def count_records(folder: Path) -> int:
    ids = folder / "ids.jsonl"
    return ids.read_bytes().count(b"\n") if ids.exists() else 0


def kill_and_resume(config: Path, folder: Path, kills: int, cwd: Path, *flags: object) -> int:
    """Kill a run at random moments, resume it each time, and let it end. Returns how many kills left a half-written save."""
    chance, in_saves = random.Random(5), 0
    resuming = command_line("opensora-run", config, "--run-folder", folder, "--resume", True, *flags)
    for _ in range(kills):
        assert kill_while_it_trains(resuming, folder, chance.uniform(0.0, 0.6), cwd)
        in_saves += any((folder / "checkpoints").glob(".step-*"))
    done = subprocess.run(resuming, cwd=cwd, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return in_saves


def assert_same_run(one: Path, other: Path) -> None:
    assert losses(one) == losses(other)
    for key, tensor in weights(one).items():
        assert torch.equal(tensor, weights(other)[key]), key


def test_killed_run_resumes_bit_for_bit(
    command: Command, clips: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    config = write(tiny_training(clips, max_steps=150, ckpt_every=1))
    train(command, config, tmp_path / "whole")
    kill_and_resume(config, tmp_path / "killed", 3, tmp_path)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_run_killed_twenty_times_resumes_bit_for_bit(
    command: Command, clips: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    config = write(tiny_training(clips, max_steps=1000, ckpt_every=1))
    train(command, config, tmp_path / "whole")
    in_saves = kill_and_resume(config, tmp_path / "killed", 20, tmp_path)
    assert in_saves >= 3, "too few of the kills hit a save"
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("kills", "rounds"), [(6, (2,)), (9, (2, 4, 1))], ids=["2 processes", "2, 4 and 1 processes, saved meanwhile"]
)
def test_dealt_out_run_killed_at_random_goes_on(
    kills: int, rounds: tuple[int, ...], command: Command, clips: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    """Also with another number of processes each time; and no sample is left out or seen twice."""
    steps, folder, variables = 150, tmp_path / "killed", {**environment(), **install(tmp_path / "site")}
    values = tiny_training(
        clips, max_steps=steps, ckpt_every=1, adam_eps=1e-6, accelerator={"type": "fsdp"}, hooks=[{"type": "witness"}]
    )
    whole = write({**values, "batch_size": 4, "ckpt_every": 0}, "whole.py")
    done = command("opensora-run", whole, "--run-folder", tmp_path / "whole", "--nproc", 2, env=variables)
    assert done.returncode == 0, done.stderr
    meanwhile = len(rounds) > 1
    chance, in_saves, config = random.Random(5), 0, write({**values, "async_checkpoints": meanwhile})
    for turn in range(kills + 1):
        processes = rounds[turn % len(rounds)]
        options = ["--run-folder", folder, "--resume", True, "--nproc", processes, "--batch-size", 8 // processes]
        resuming = command_line("opensora-run", config, *options)
        if turn < kills:
            delay_s, records = chance.uniform(0.0, 0.1), processes * chance.randint(2, 16)
            assert kill_while_it_trains(resuming, folder, delay_s, tmp_path, variables=variables, records=records)
            in_saves += any((folder / "checkpoints").glob(".step-*"))
    done = subprocess.run(resuming, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert in_saves or not meanwhile, "no kill hit a save"  # one that is written meanwhile is hard to miss
    if meanwhile:
        torch.testing.assert_close(losses(tmp_path / "whole"), losses(folder), rtol=1e-5, atol=1e-5)
    else:
        assert losses(tmp_path / "whole") == losses(folder)
    seen = samples_of_steps(folder)
    assert list(seen) == list(range(1, steps + 1))
    shown = [key for keys in seen.values() for key in keys]
    assert sorted(shown) == [(epoch, row) for epoch in range(steps * 8 // 24) for row in range(24)]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_signal_saves_and_ends(
    number: int, command: Command, clips: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    config = write(tiny_training(clips, max_steps=150))
    train(command, config, tmp_path / "whole")
    long = write(tiny_training(clips, max_steps=150), "long.py")
    folder = tmp_path / "stopped"
    arguments = command_line("opensora-run", long, "--run-folder", folder)
    process = subprocess.Popen(
        arguments,
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509  # ignored in the background
    )
    while not (folder / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number, stderr
    assert f"--load {folder}" in stderr
    assert "Traceback" not in stderr
    done = command("opensora-run", long, "--load", folder)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "whole", folder)


def test_two_processes_resume_as_one(command: Command, clips: Path, write: Callable[..., Path], tmp_path: Path) -> None:
    config = write(tiny_training(clips, max_steps=12, batch_size=4))
    train(command, config, tmp_path / "two", "--nproc", 2)
    half = write(tiny_training(clips, max_steps=6, batch_size=4), "half.py")
    train(command, half, tmp_path / "mixed", "--nproc", 2)
    done = command("opensora-run", config, "--load", tmp_path / "mixed", "--batch-size", 8)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "mixed"), rtol=1e-5, atol=0)


def test_resuming_what_is_no_checkpoint_says_so(
    command: Command, clips: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    config = write(tiny_training(clips))
    done = command("opensora-run", config, "--load", tmp_path / "nowhere")
    assert done.returncode == 2
    assert "nowhere" in done.stderr
    assert not (tmp_path / "outputs").exists()


def test_a_new_run_does_not_mix_with_an_old_one(
    command: Command, clips: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    config = write(tiny_training(clips, max_steps=2))
    train(command, config, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    done = command("opensora-run", config, "--run-folder", tmp_path / "run")
    assert done.returncode == 2
    assert "holds a run already" in done.stderr
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_an_earlier_checkpoint_branches_into_a_new_run(
    command: Command, clips: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    config = write(tiny_training(clips, max_steps=6, ckpt_every=2, keep_last=0))
    train(command, config, tmp_path / "run")
    done = command("opensora-run", config, "--load", tmp_path / "run" / "checkpoints" / "step-000002")
    assert done.returncode == 0, done.stderr
    (branch,) = (tmp_path / "outputs").iterdir()
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())[0] == "step-000002"
    for key, tensor in weights(tmp_path / "run").items():
        assert torch.equal(tensor, weights(branch)[key]), key


def test_loading_another_models_checkpoint_leaves_the_run_as_it_was(
    command: Command, clips: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    config = write(tiny_training(clips, max_steps=2))
    train(command, config, tmp_path / "run")
    before = (tmp_path / "run" / "config.py").read_text()
    done = command("opensora-run", config, "--load", tmp_path / "run", "--model.hidden_size", 64)
    assert done.returncode == 2, done.stderr
    assert "does not fit this config" in done.stderr
    assert "model.hidden_size: 32 -> 64" in done.stderr
    assert (tmp_path / "run" / "config.py").read_text() == before
    done = command("opensora-run", config, "--load", tmp_path / "run", "--model.hidden_size", 64, "--allow-changes")
    assert done.returncode == 2, done.stderr
    assert "does not fit this config's model STDiT3" in done.stderr
    assert (tmp_path / "run" / "config.py").read_text() == before
    changed = write(tiny_training(clips, max_steps=2, mask_ratios={"image_head": 0.5}), "changed.py")
    done = command("opensora-run", changed, "--load", tmp_path / "run", "--allow-changes")
    assert done.returncode == 0, done.stderr
    assert "mask_ratios: None -> {'image_head': 0.5}" in done.stderr


def test_optimizer_options_are_those_of_the_config_after_resuming(
    command: Command, clips: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    train(command, write(tiny_training(clips, max_steps=2)), tmp_path / "run")
    changed = write(tiny_training(clips, max_steps=4, weight_decay=0.1), "changed.py")
    done = command("opensora-run", changed, "--load", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    newest = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    (group,) = torch.load(newest / "optimizer.pt", weights_only=True)["optimizer"]["param_groups"]
    assert group["weight_decay"] == 0.1
    assert "weight_decay: 0.0 -> 0.1" in done.stderr
    assert "max_steps: 2 -> 4" in done.stderr


def test_two_runs_do_not_share_a_folder(
    command: Command, clips: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    from opensora.core.run_folder import held, make_folder

    with held(make_folder(tmp_path / "run")):
        done = command("opensora-run", write(tiny_training(clips)), "--run-folder", tmp_path / "run")
    assert done.returncode == 2
    assert "Another run" in done.stderr
