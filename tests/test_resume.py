"""A run that is killed and resumed is the run that was never killed."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import Command, command_line, environment, losses, tiny_training, weights


def train(command: Command, config: Path, folder: Path, *flags: object) -> None:
    done = command("opensora-run", config, "--run-folder", folder, *flags)
    assert done.returncode == 0, done.stderr


def kill_after(seconds: float, arguments: list[str], cwd: Path, number: int = signal.SIGKILL) -> int:
    """Start a command, signal it (and what it started) after a while, and return its exit code."""
    process = subprocess.Popen(
        arguments,
        cwd=cwd,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        if number == signal.SIGKILL:
            import os

            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
    return process.wait(60)


def kill_and_resume(config: Path, folder: Path, kills: int, cwd: Path, *flags: object, longest: float = 9.0) -> int:
    """Kill a run at random moments, resume it each time, and let it end. Returns how many kills hit it while it ran."""
    generator, hits = random.Random(5), 0
    for _ in range(kills):
        load = ["--load", folder] if list((folder / "checkpoints").glob("step-*")) else ["--run-folder", folder]
        arguments = command_line("opensora-run", config, *load, *flags)
        hits += kill_after(generator.uniform(2.5, longest), arguments, cwd) == -signal.SIGKILL
    load = ["--load", folder] if list((folder / "checkpoints").glob("step-*")) else ["--run-folder", folder]
    done = subprocess.run(
        command_line("opensora-run", config, *load, *flags),
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return hits


def assert_same_run(one: Path, other: Path) -> None:
    assert losses(one) == losses(other)
    for key, tensor in weights(one).items():
        assert torch.equal(tensor, weights(other)[key]), key


def test_killed_run_resumes_bit_for_bit(
    command: Command, clips: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    config = write(tiny_training(clips, max_steps=120, ckpt_every=1))
    train(command, config, tmp_path / "whole")
    assert kill_and_resume(config, tmp_path / "killed", 3, tmp_path, longest=6.0)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("processes", [1, 2])
def test_run_killed_twenty_times_resumes_bit_for_bit(
    processes: int, command: Command, clips: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    config = write(tiny_training(clips, max_steps=1500, ckpt_every=2, batch_size=8 // processes))
    flags = ["--nproc", processes] if processes > 1 else []
    train(command, config, tmp_path / "whole", *flags)
    hits = kill_and_resume(config, tmp_path / "killed", 20, tmp_path, *flags, longest=12.0)
    assert hits >= 15
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_ends(
    number: int, command: Command, clips: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    config = write(tiny_training(clips, max_steps=150))
    train(command, config, tmp_path / "whole")
    long = write(tiny_training(clips, max_steps=150), "long.py")
    folder = tmp_path / "stopped"
    arguments = command_line("opensora-run", long, "--run-folder", folder)
    process = subprocess.Popen(arguments, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
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
