"""Checkpoints in shards, written and read in one process; several are in the repository's ``tests/test_fsdp.py``."""

from __future__ import annotations

import os
import pickle
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from opensora.core import CheckpointError
from opensora.core.accelerator import Accelerator, Single, SingleSpec
from opensora.core.checkpoints import (
    Checkpoint,
    find_checkpoint,
    read_checkpoint,
    save_checkpoint,
    save_checkpoint_together,
    sweep,
    verify_checkpoint,
)
from opensora.core.saving import Saver
from opensora.core.sharding import is_sharded, map_tensors
from opensora.core.weight_files import read_weights


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    """One process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.new_group(backend="gloo")
    dist.destroy_process_group()


def dealt(tensor: Tensor) -> Tensor:
    return distribute_tensor(tensor, init_device_mesh("cpu", (1,)), [Shard(0)])


def content(step: int, *, is_dealt: bool = True) -> Checkpoint:
    weight = torch.randn(30, 7, generator=torch.Generator().manual_seed(step))
    dealer = dealt if is_dealt else torch.clone
    return Checkpoint(
        tensors={"model": {"weight": dealer(weight), "count": torch.tensor(3)}, "ema": {"weight": dealer(weight / 2)}},
        optimizer={
            "optimizer": {
                "state": {0: {"exp_avg": dealer(weight * 3), "step": torch.tensor(5.0)}},
                "param_groups": [{"lr": 0.1 + 0.2, "betas": (0.9, 0.99), "params": [0], "decay": None}],
            },
            "scaler": {},
        },
        state={"step": step, "text": "ä"},
    )


def assert_same(one: Checkpoint, other: Checkpoint) -> None:
    def whole(_: object, tensor: Tensor) -> list[object]:
        return [str(tensor.dtype), (tensor.full_tensor() if is_sharded(tensor) else tensor).tolist()]  # type: ignore[operator]

    assert map_tensors(dict(one.tensors), whole) == map_tensors(dict(other.tensors), whole)
    assert map_tensors(dict(one.optimizer), whole) == map_tensors(dict(other.optimizer), whole)
    assert one.state == other.state


def like_weight(path: tuple[str | int, ...], size: torch.Size) -> Tensor | None:
    return dealt(torch.empty(size)) if len(size) == 2 else None


# ---- saving and reading


@pytest.mark.parametrize("written", ["in shards", "whole"])
@pytest.mark.parametrize("wanted", ["in shards", "whole"])
def test_either_kind_is_read_as_either(written: str, wanted: str, group: dist.ProcessGroup, tmp_path: Path) -> None:
    saved = content(7, is_dealt=written == "in shards")
    if written == "in shards":
        path = save_checkpoint_together(tmp_path, 7, saved, group=group)
        assert {"__0_0.distcp", ".metadata", "optimizer.pt", "state.json", "manifest.json"} == set(os.listdir(path))
    else:
        path = save_checkpoint(tmp_path, 7, saved)
    read = read_checkpoint(path, like=like_weight if wanted == "in shards" else None)
    assert_same(saved, read)
    assert is_sharded(read.tensors["ema"]["weight"]) == (wanted == "in shards")
    assert not is_sharded(read.tensors["model"]["count"])
    assert read.optimizer["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.99)


def test_averaged_weights_are_the_weights_of_a_folder_of_shards(group: dist.ProcessGroup, tmp_path: Path) -> None:
    saved = content(3)
    save_checkpoint_together(tmp_path / "checkpoints", 3, saved, group=group)
    assert torch.equal(read_weights(tmp_path)["weight"], saved.tensors["ema"]["weight"].full_tensor())  # type: ignore[operator]


def test_the_same_step_may_be_saved_again(group: dist.ProcessGroup, tmp_path: Path) -> None:
    save_checkpoint_together(tmp_path, 3, content(3), group=group)
    path = save_checkpoint_together(tmp_path, 3, content(4), group=group)
    assert read_checkpoint(path).state["step"] == 4
    assert os.listdir(tmp_path) == ["step-000003"]


# ---- what goes wrong


@pytest.mark.parametrize("limit", [0, 2000, 9000])
def test_a_full_disk_is_an_error_that_leaves_nothing(limit: int, group: dist.ProcessGroup, tmp_path: Path) -> None:
    save_checkpoint_together(tmp_path, 1, content(1), group=group)
    large = Checkpoint(tensors={"model": {"weight": dealt(torch.zeros(100, 100))}}, state={"note": "x" * 1000})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(CheckpointError, match=r"step 2 can't be written.*File too large.*Earlier checkpoints"):
            save_checkpoint_together(tmp_path, 2, large, group=group)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["step-000001"]
    verify_checkpoint(tmp_path / "step-000001")


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "optimizer.pt", "state.json"])
def test_damage_is_named(name: str, group: dist.ProcessGroup, tmp_path: Path) -> None:
    path = save_checkpoint_together(tmp_path / "checkpoints", 1, content(1), group=group)
    save_checkpoint_together(tmp_path / "checkpoints", 2, content(2), group=group)
    data = bytearray((path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"step-000001 is damaged: {name} has another checksum"):
        read_checkpoint(path)
    (path.with_name("step-000002") / name).unlink()
    (path / name).unlink()
    with pytest.raises(CheckpointError, match="no whole one"):
        find_checkpoint(tmp_path)


def test_several_processes_find_damage_that_one_of_them_sees(group: dist.ProcessGroup, tmp_path: Path) -> None:
    path = save_checkpoint_together(tmp_path, 1, content(1), group=group)
    (path / "state.json").write_text("{}")

    class Other(Accelerator):
        rank, world_size = 1, 3  # of the files in their order, it compares the second and the fifth

        def gather(self, value: list[str]) -> list[list[str]]:  # type: ignore[override]
            return [value, ["state.json has 2 bytes, not 30"], []]

    with pytest.raises(CheckpointError, match=r"damaged: state\.json has 2 bytes") as caught:
        verify_checkpoint(path, Other(SingleSpec(), device="cpu"))
    assert caught.value.is_told_once


class Code:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_metadata_that_asks_for_code_is_refused_and_not_run(group: dist.ProcessGroup, tmp_path: Path) -> None:
    path = save_checkpoint_together(tmp_path / "checkpoints", 1, content(1), group=group)
    (path / ".metadata").write_bytes(pickle.dumps(Code(tmp_path / "it ran")))
    with pytest.raises(CheckpointError, match="which no checkpoint needs"):
        read_checkpoint(path, is_verified=True)
    assert not (tmp_path / "it ran").exists()


# ---- while the run goes on


def saver(folder: Path) -> Saver:
    return Saver(folder, Single(SingleSpec(), device="cpu"), in_background=True)


def test_what_is_written_in_the_background_is_the_state_of_that_moment(tmp_path: Path) -> None:
    weight = torch.zeros(300, 300)
    saving = saver(tmp_path)
    saving.begin(4, lambda: Checkpoint(tensors={"model": {"weight": weight}}, optimizer={"a": [weight]}))
    weight += 1
    path = saving.finish()
    assert saving.step is None
    assert not read_checkpoint(path).tensors["model"]["weight"].any()
    assert not read_checkpoint(path).optimizer["a"][0].any()


def test_a_failure_in_the_background_is_seen_without_waiting(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    saving = saver(tmp_path / "file" / "checkpoints")
    saving.check()
    saving.begin(4, lambda: Checkpoint(tensors={}))
    while saving.is_writing:
        time.sleep(0.01)
    with pytest.raises(CheckpointError, match="Not a directory"):
        saving.check()
    with pytest.raises(CheckpointError, match="Not a directory"):
        saving.finish()
    saving.close()


def test_sweeping_knows_what_a_kill_leaves_of_shards(group: dist.ProcessGroup, tmp_path: Path) -> None:
    path = save_checkpoint_together(tmp_path / "checkpoints", 1, content(1), group=group)
    path.rename(path.with_name(".step-000001.77"))
    sweep(tmp_path)
    assert not os.listdir(tmp_path / "checkpoints")
