"""A checkpoint is whole or not there, whatever happens while it is written, and damage is found and named."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opensora.core import CheckpointError
from opensora.core.checkpoints import (
    Checkpoint,
    find_checkpoint,
    list_checkpoints,
    prune_checkpoints,
    read_checkpoint,
    save_checkpoint,
    sweep,
)

WORKERS = Path(__file__).parent / "workers"


def content(step: int = 0) -> Checkpoint:
    tensors: Mapping[str, Tensor] = {
        "weight": torch.randn(30, 7, generator=torch.Generator().manual_seed(step)),
        "half": torch.randn(5).bfloat16(),
        "count": torch.tensor([step]),
        "empty": torch.empty(0, 3),
        "strided": torch.arange(12.0).view(3, 4).T,
    }
    return Checkpoint(
        tensors={"model": tensors, "ema": {"weight": torch.full((3,), float("nan"))}},
        optimizer={
            "state": {0: {"exp_avg": torch.randn(4), "step": torch.tensor([3.0])}},
            "groups": [{"lr": 0.1 + 0.2}],
        },
        state={"step": step, "seed": 2**40, "loss": 0.1 + 0.2, "text": "ä"},
    )


def assert_same_bits(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype  # bits: not a number equals itself
        assert one.shape == other.shape
        assert one.contiguous().view(torch.uint8).tolist() == other.contiguous().view(torch.uint8).tolist()
    elif isinstance(one, Mapping):
        assert set(one) == set(other)
        for key in one:
            assert_same_bits(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same_bits(left, right)
    else:
        assert one == other


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with the checkpoints of steps 5, 10 and 15."""
    for step in (5, 10, 15):
        save_checkpoint(tmp_path / "checkpoints", step, content(step))
    return tmp_path


@pytest.fixture
def checkpoint(run: Path) -> Path:
    return run / "checkpoints" / "step-000015"


# ---- saving and reading


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    saved = content(7)
    path = save_checkpoint(tmp_path / "run" / "checkpoints", 7, saved)
    assert path == tmp_path / "run" / "checkpoints" / "step-000007"
    assert {file.name for file in path.iterdir()} == {
        "model.safetensors", "ema.safetensors", "optimizer.pt", "state.json", "manifest.json",
    }  # fmt: skip
    read = read_checkpoint(path)
    assert_same_bits(saved.tensors, read.tensors)
    assert_same_bits(saved.optimizer, read.optimizer)
    assert_same_bits(saved.state, read.state)


def test_a_real_optimizer_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    def trained(steps: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(steps):
            model(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    model, optimizer = build()
    trained(3, model, optimizer)
    tensors, states = {"model": model.state_dict()}, {"optimizer": optimizer.state_dict()}
    path = save_checkpoint(tmp_path, 3, Checkpoint(tensors=tensors, optimizer=states))
    trained(3, model, optimizer)
    other, other_optimizer = build()
    read = read_checkpoint(path)
    other.load_state_dict(read.tensors["model"])
    other_optimizer.load_state_dict(read.optimizer["optimizer"])
    trained(3, other, other_optimizer)
    assert_same_bits(model.state_dict(), other.state_dict())


def test_tied_weights_and_views_are_saved_under_each_name(tmp_path: Path) -> None:
    weight = torch.randn(4, 6)
    tensors = {
        "a": weight,
        "b": weight,
        "transposed": weight.T,
        "row": weight[1],
        "rows": weight[2:],
        "param": nn.Parameter(weight),
    }
    read = read_checkpoint(save_checkpoint(tmp_path, 1, Checkpoint(tensors={"model": tensors})))
    assert_same_bits({key: value.detach() for key, value in tensors.items()}, read.tensors["model"])


def test_the_same_step_may_be_saved_again(run: Path) -> None:
    save_checkpoint(run / "checkpoints", 10, content(99))
    assert read_checkpoint(run / "checkpoints" / "step-000010").state["step"] == 99
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step-000005",
        "step-000010",
        "step-000015",
    ]


# ---- being killed, and full disks


def test_a_kill_at_any_moment_leaves_the_last_whole_checkpoint(tmp_path: Path) -> None:
    kills = 8
    done = subprocess.run(
        [sys.executable, WORKERS / "save_until_killed.py", tmp_path, str(kills)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(reports) == kills
    for report in reports:
        assert all(report["whole"])
        assert report["found"] == max(report["steps"])
        assert report["found"] >= report["promised"]
        assert report["after sweep"] == [f"step-{step:06d}" for step in sorted(report["steps"])]
    found = [report["found"] for report in reports]
    assert found == sorted(set(found)), "no step was saved between two kills"
    assert any(report["leftovers"] for report in reports), "no kill hit a save: the test proves nothing"


def test_a_full_disk_is_an_error_that_leaves_earlier_checkpoints_and_nothing_else(tmp_path: Path) -> None:
    limits = ["0", "5000", "12100", "20000", "29000"]  # in the weights, at their end, in the optimizer, in the state
    done = subprocess.run(
        [sys.executable, WORKERS / "save_on_full_disk.py", tmp_path, *limits],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(reports) == len(limits)
    for report in reports:
        assert report["said"] is not None
        assert "Checkpoint of step 2 can't be written" in report["said"]
        assert "File too large" in report["said"]
        assert "Earlier checkpoints are untouched" in report["said"]
        assert report["left"] == ["step-000001"]
        assert report["intact"]


def test_a_folder_that_can_not_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"can't be written to .*Not a directory"):
        save_checkpoint(tmp_path / "file" / "checkpoints", 1, content())


# ---- damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


FILES = ["model.safetensors", "ema.safetensors", "optimizer.pt", "state.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("damage", "words"),
    [(flip, "has another checksum"), (shorten, r"has \d+ bytes, not \d+"), (Path.unlink, "is missing")],
    ids=["one bit", "cut short", "missing"],
)
def test_damage_is_found_and_the_file_is_named(
    damage: Callable[[Path], None], words: str, name: str, checkpoint: Path
) -> None:
    damage(checkpoint / name)
    with pytest.raises(CheckpointError, match=rf"step-000015 is damaged: {name} {words}.* Use an earlier checkpoint"):
        read_checkpoint(checkpoint)


@pytest.mark.parametrize(
    "text",
    [None, "", "{", "null", "[]", '{"model.safetensors": 3}', '{"model.safetensors": {"bytes": 1}}', "\x00" * 100],
    ids=["missing", "empty", "cut", "null", "list", "numbers", "half an entry", "zeros"],
)
def test_a_damaged_manifest_is_named(text: str | None, run: Path, checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()
    if text is not None:
        (checkpoint / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json can't be read"):
        read_checkpoint(checkpoint)
    assert find_checkpoint(run).name == "step-000010"


# ---- finding


def test_the_newest_whole_checkpoint_is_found(run: Path) -> None:
    assert find_checkpoint(run).name == "step-000015"
    assert find_checkpoint(run / "checkpoints").name == "step-000015"
    assert find_checkpoint(run / "checkpoints" / "step-000005").name == "step-000005"


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000, 20):
        save_checkpoint(tmp_path, step, content())
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000020", "step-999999", "step-1000000"]
    assert find_checkpoint(tmp_path).name == "step-1000000"


@pytest.mark.parametrize("damage", [shorten, Path.unlink], ids=["cut short", "missing"])
def test_damaged_checkpoints_are_passed_over_and_said(
    damage: Callable[[Path], None], run: Path, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(checkpoint / "model.safetensors")
    (run / "checkpoints" / "step-000020").mkdir()
    (run / "checkpoints" / ".step-000030.77").mkdir()
    (run / "checkpoints" / "step-notes").mkdir()
    with caplog.at_level(logging.WARNING, "opensora"):
        assert find_checkpoint(run).name == "step-000010"
    assert "step-000015 is left out: model.safetensors" in caplog.text
    assert "step-000020 is left out: manifest.json" in caplog.text


@pytest.mark.parametrize("place", ["nowhere", "empty", "file"])
def test_a_place_without_checkpoints_is_named(place: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=f"{place} is no checkpoint"):
        find_checkpoint(tmp_path / place)


# ---- clearing up


def steps(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(run)]


@pytest.mark.parametrize(
    ("newest", "every", "left"),
    [(0, 0, [5, 10, 15, 20]), (1, 0, [20]), (2, 0, [15, 20]), (1, 10, [10, 20]), (9, 0, [5, 10, 15, 20])],
)
def test_pruning_keeps_the_newest_and_the_wanted(newest: int, every: int, left: list[int], run: Path) -> None:
    save_checkpoint(run / "checkpoints", 20, content(20))
    prune_checkpoints(run, lambda step: bool(every) and step % every == 0, newest=newest)
    assert steps(run) == left
    assert len(list((run / "checkpoints").iterdir())) == len(left)


def test_sweeping_removes_what_a_kill_left_and_nothing_else(run: Path) -> None:
    for name in (".step-000020.123", ".doomed-step-000005-123"):
        shutil.copytree(run / "checkpoints" / "step-000005", run / "checkpoints" / name)
    (run / "checkpoints" / "notes").mkdir()
    sweep(run)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "notes", "step-000005", "step-000010", "step-000015",
    ]  # fmt: skip
    sweep(run / "nowhere")
