"""Whole runs with ZeRO-2, through ColossalAI, on two processes: the same run as that of one."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import command_line, environment, losses, tiny_training, weights

from opensora.core.config.write import write_config

pytestmark = pytest.mark.colossalai

STEPS, HALF = 20, 10
# See tests/test_equivalence.py for adam_eps. The width makes parameters of odd sizes, which have to be padded.
OPTIONS = {"max_steps": STEPS, "adam_eps": 1e-6, "ckpt_every": HALF, "keep_last": 0}
TWO = {"accelerator": {"type": "zero2"}, "batch_size": 4}
ONE = {"batch_size": 8}


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory, clips: Path) -> Callable[..., Path]:
    """Trains in a new folder, or goes on from a checkpoint."""

    def run(changes: dict[str, object], *flags: object, load: Path | None = None) -> Path:
        folder = tmp_path_factory.mktemp("run")
        config = tiny_training(clips, **{**OPTIONS, **changes})
        config["model"] = {**config["model"], "hidden_size": 36}  # type: ignore[dict-item]
        write_config(folder / "config.py", config, "A test's config.")
        where = ["--load", load, "--outputs", folder] if load else ["--run-folder", folder / "run"]
        done = subprocess.run(
            command_line("opensora-run", folder / "config.py", *where, *flags),
            cwd=folder, env=environment(), capture_output=True, text=True, check=False, timeout=200,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return next(path for path in folder.iterdir() if path.is_dir())

    return run


@pytest.fixture(scope="module")
def alone(train: Callable[..., Path]) -> Path:
    return train(ONE)


@pytest.fixture(scope="module")
def together(train: Callable[..., Path]) -> Path:
    return train(TWO, "--nproc", 2)


def assert_same(run: Path, other: Path) -> None:
    """The same losses, as far as ``run`` has any, and in the end the same weights."""
    ours, theirs = losses_by_step(run), losses_by_step(other)
    for step, loss in ours.items():
        assert loss == pytest.approx(theirs[step], abs=1e-5), step
    assert max(ours) == STEPS
    for name, tensor in weights(other).items():
        torch.testing.assert_close(weights(run)[name], tensor, rtol=1e-5, atol=1e-5)


def losses_by_step(run: Path) -> dict[int, float]:
    import json

    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records}


def test_two_processes_train_as_one_does(alone: Path, together: Path) -> None:
    assert len(losses(together)) == STEPS
    assert_same(together, alone)


def test_micro_batches_are_added_up(alone: Path, train: Callable[..., Path]) -> None:
    assert_same(train({**TWO, "batch_size": 2, "accumulation_steps": 2}, "--nproc", 2), alone)


def test_two_processes_can_share_each_sample(alone: Path, train: Callable[..., Path]) -> None:
    assert_same(train({"accelerator": {"type": "zero2-seq"}, "batch_size": 8}, "--nproc", 2), alone)


@pytest.mark.parametrize("then", ["zero2", "one process"])
def test_a_run_of_zero2_goes_on(then: str, alone: Path, together: Path, train: Callable[..., Path]) -> None:
    half = together / "checkpoints" / f"step-{HALF:06d}"
    run = train(TWO, "--nproc", 2, load=half) if then == "zero2" else train(ONE, load=half)
    assert min(losses_by_step(run)) == HALF + 1
    assert_same(run, alone)


def test_a_run_of_one_process_goes_on_with_zero2(alone: Path, train: Callable[..., Path]) -> None:
    run = train(TWO, "--nproc", 2, load=alone / "checkpoints" / f"step-{HALF:06d}")
    assert_same(run, alone)


def test_the_checkpoint_is_that_of_one_process(alone: Path, together: Path) -> None:
    ours, theirs = (
        torch.load(run / "checkpoints" / f"step-{HALF:06d}" / "optimizer.pt", weights_only=True)["optimizer"]
        for run in (together, alone)
    )
    assert ours["param_groups"][0]["params"] == theirs["param_groups"][0]["params"]
    for index, state in theirs["state"].items():
        for name, value in state.items():
            torch.testing.assert_close(ours["state"][index][name], value, rtol=1e-4, atol=1e-6)
