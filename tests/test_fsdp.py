"""Fully sharded training through the real command: the same numbers as one process, in pieces, and checkpoints of pieces."""

from __future__ import annotations

import json
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from runs import Command, command_line, environment, losses, tiny_training
from witness import install, samples_of_steps

from opensora.core.accelerator import Single, SingleSpec
from opensora.core.checkpoints import Checkpoint, find_checkpoint, read_checkpoint
from opensora.core.config.write import write_config
from opensora.core.run_folder import read_jsonl
from opensora.core.video import read_video
from opensora.core.weights import read_weights

sys.path.insert(0, str(Path(__file__).parent / "workers"))
from share_sequences import CASES, sample, train  # what sequence parallelism is tested on

# Widths that neither 2 nor 4 divide evenly: parts differ in size, and of a table of 2 or 6 rows some processes have none.
MODEL = {"type": "STDiT3", "hidden_size": 36, "depth": 2, "num_heads": 3, "patch_size": (2, 4, 4), "pred_sigma": False}
STEPS = 20

Start = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, clips: Path) -> Start:
    """Trains: ``start(folder, 2, "fsdp", batch_size=4)`` in two processes."""
    home = tmp_path_factory.mktemp("home")
    variables = {**environment(), **install(home / "site")}

    def run(
        folder: Path,
        processes: int,
        accelerator: str | Mapping[str, Any],
        *flags: object,
        limit: int | None = None,
        **changes: Any,
    ) -> subprocess.CompletedProcess[str]:
        chosen = {"type": accelerator} if isinstance(accelerator, str) else dict(accelerator)
        values = tiny_training(
            clips, model=MODEL, adam_eps=1e-6, hooks=[{"type": "witness"}],
            **{"max_steps": STEPS, "batch_size": 8 // processes, "accelerator": chosen, **changes},
        )  # fmt: skip
        config = folder.with_suffix(".py")
        write_config(config, values, "A test's config.")
        launch = ["--nproc", processes] if accelerator != "single" else []
        where = () if "--load" in flags else ("--run-folder", folder)

        def keep_files_small() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        return subprocess.run(
            command_line("opensora-run", config, *where, *launch, *flags), cwd=home, env=variables, text=True,
            capture_output=True, check=False, timeout=300, preexec_fn=keep_files_small if limit else None,
        )  # fmt: skip

    return run


def run_to_end(start: Start, folder: Path, *arguments: Any, **changes: Any) -> Path:
    done = start(folder, *arguments, **changes)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def whole(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process."""
    return run_to_end(start, tmp_path_factory.mktemp("whole") / "run", 1, "single", ckpt_every=10, keep_last=0)


@pytest.fixture(scope="module")
def sharded(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two processes, each with a part of everything."""
    return run_to_end(start, tmp_path_factory.mktemp("sharded") / "run", 2, "fsdp", ckpt_every=10, keep_last=0)


def norms(run_folder: Path) -> list[float]:
    return [float(str(record["grad_norm"])) for record in read_jsonl(run_folder / "metrics.jsonl")]


def newest(run_folder: Path) -> Checkpoint:
    return read_checkpoint(find_checkpoint(run_folder))


def flat(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Weights, averages and optimizer state by name."""
    tensors = {f"{stem}.{key}": each for stem, own in checkpoint.tensors.items() for key, each in own.items()}
    state = checkpoint.optimizer["optimizer"]["state"]
    return tensors | {f"optimizer.{index}.{name}": each for index, own in state.items() for name, each in own.items()}


def assert_same(one: Path, other: Path, *, exactly: bool = False) -> None:
    """Losses, gradient norms, weights, averages and optimizer state."""
    if exactly:
        assert losses(one) == losses(other)
    torch.testing.assert_close(losses(one), losses(other), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norms(one), norms(other), rtol=1e-5, atol=1e-5)
    ours, theirs = flat(newest(one)), flat(newest(other))
    assert ours.keys() == theirs.keys()
    for key in ours:
        if exactly:
            assert torch.equal(ours[key], theirs[key]), key
        torch.testing.assert_close(
            ours[key], theirs[key], rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )


def assert_dealt_out(run_folder: Path, processes: int) -> None:
    """Each process holds a part of every large tensor, the parts make up the whole, and blocks are wrapped one by one."""
    held = [json.loads((run_folder / f"held-{rank}.json").read_text()) for rank in range(processes)]
    assert {"FSDPSTDiT3", "FSDPSTDiT3Block"} <= set(held[0]["types"])
    for what in ("parameters", "averages", "momenta"):
        whole = sum(size for size, _ in held[0][what].values())
        own = [sum(part for _, part in each[what].values()) for each in held]
        assert sum(own) == whole, what
        assert max(own) < 1.2 * whole / processes, what


# ---- the same numbers


def test_two_processes_train_as_one(whole: Path, sharded: Path) -> None:
    assert len(losses(whole)) == STEPS
    assert_same(whole, sharded)


def test_each_process_holds_its_part(sharded: Path) -> None:
    assert_dealt_out(sharded, 2)
    parts = [path.stat().st_size for path in find_checkpoint(sharded).glob("*.distcp")]
    assert len(parts) == 2
    assert max(parts) < 1.5 * min(parts)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "options", "changes"),
    [
        (4, {}, {}),
        (4, {"replicas": 2, "reshard_after_forward": False}, {}),
        (2, {}, {"batch_size": 2, "accumulation_steps": 2, "grad_checkpoint": True}),
        (2, {"offload": True}, {"async_checkpoints": True, "ckpt_every": 5}),
    ],
    ids=["4 processes", "2 replicas of 2", "2 micro-batches, activations checkpointed", "offload, saved meanwhile"],
)
def test_trains_as_one_process(
    processes: int, options: dict[str, Any], changes: dict[str, Any], whole: Path, start: Start, tmp_path: Path
) -> None:
    run_to_end(start, tmp_path / "run", processes, {"type": "fsdp", **options}, **changes)
    assert_same(whole, tmp_path / "run")
    if "replicas" not in options:
        assert_dealt_out(tmp_path / "run", processes)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_stays_near(dtype: str, whole: Path, start: Start, tmp_path: Path) -> None:
    done = start(tmp_path / "run", 2, "fsdp", dtype=dtype, max_steps=6)
    if "does not work on cpu" in done.stderr:
        pytest.skip(f"{dtype} does not work on this CPU")
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(losses(tmp_path / "run"), losses(whole)[:6], rtol=0.03, atol=0.03)
    assert all(tensor.dtype == torch.float32 for tensor in newest(tmp_path / "run").tensors["model"].values())


@pytest.fixture(scope="module")
def alone_in_its_group() -> Iterator[Any]:
    """The accelerator in this process, by itself: parts are wholes, and all else is as with several."""
    from opensora.core.components import build

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in place.items():
            patch.setenv(name, value)
        with build("accelerators", {"type": "fsdp", "timeout_s": 60}, device="cpu", dtype="fp32") as accelerator:
            yield accelerator


@pytest.mark.parametrize("name", CASES)
def test_every_denoiser_trains_and_samples_when_its_blocks_are_wrapped(name: str, alone_in_its_group: Any) -> None:
    plain, case = Single(SingleSpec(), device="cpu", dtype="fp32"), attrs.evolve(CASES[name], steps=2)
    expected, seen = train(case, case.build(), plain), train(case, case.build(), alone_in_its_group)
    for what in ("losses", "norms", "output", "gradients"):
        torch.testing.assert_close(seen[what], expected[what], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sample(case, alone_in_its_group), sample(case, plain), rtol=1e-5, atol=1e-5)


# ---- going on


def half_way(run_folder: Path, to: Path) -> Path:
    """The run as it was after half of its steps."""
    shutil.copytree(run_folder, to)
    shutil.rmtree(to / "checkpoints" / f"step-{STEPS:06d}")
    return to


def go_on(start: Start, source: Path, to: Path, processes: int, accelerator: str) -> Path:
    half_way(source, to)
    return run_to_end(start, to, processes, accelerator, "--load", to)


def test_goes_on_bit_for_bit_in_as_many_processes(sharded: Path, start: Start, tmp_path: Path) -> None:
    assert_same(sharded, go_on(start, sharded, tmp_path / "on", 2, "fsdp"), exactly=True)


def test_goes_on_in_one_process_that_holds_all(sharded: Path, start: Start, tmp_path: Path) -> None:
    run = go_on(start, sharded, tmp_path / "on", 1, "single")
    assert_same(sharded, run)
    assert (find_checkpoint(run) / "model.safetensors").exists()


@pytest.mark.slow
def test_goes_on_from_one_process_dealt_out(whole: Path, start: Start, tmp_path: Path) -> None:
    assert_same(whole, go_on(start, whole, tmp_path / "on", 2, "fsdp"))
    assert_dealt_out(tmp_path / "on", 2)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "accelerator"), [(4, "fsdp"), (1, "fsdp"), (2, "ddp")])
def test_goes_on_in_any_number_of_processes(
    processes: int, accelerator: str, sharded: Path, start: Start, tmp_path: Path
) -> None:
    assert_same(sharded, go_on(start, sharded, tmp_path / "on", processes, accelerator))


def test_every_sample_is_seen_once_an_epoch(sharded: Path) -> None:
    steps = samples_of_steps(sharded)
    assert list(steps) == list(range(1, STEPS + 1))
    seen = [key for keys in steps.values() for key in keys]
    for epoch in range(STEPS * 8 // 24):
        assert sorted(row for of, row in seen if of == epoch) == list(range(24))


# ---- damage, and disks that are full


@pytest.mark.parametrize(("processes", "accelerator"), [(1, "single"), pytest.param(2, "fsdp", marks=pytest.mark.slow)])
def test_a_corrupt_shard_is_named(
    processes: int, accelerator: str, sharded: Path, start: Start, tmp_path: Path
) -> None:
    run = half_way(sharded, tmp_path / "run")
    shard = find_checkpoint(run) / "__1_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 0x10
    shard.write_bytes(data)
    done = start(run, processes, accelerator, "--load", run)
    assert done.returncode == 2
    assert done.stderr.count("__1_0.distcp has another checksum than when it was saved") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_full_disk_while_saving_in_the_background_ends_the_run(
    processes: int, whole: Path, sharded: Path, start: Start, tmp_path: Path
) -> None:
    run = half_way(whole if processes == 1 else sharded, tmp_path / "run")
    accelerator = "single" if processes == 1 else "fsdp"
    done = start(
        run, processes, accelerator, "--load", run, limit=60_000, async_checkpoints=True, ckpt_every=1, max_steps=500
    )
    assert done.returncode == 2, done.stderr
    assert "Checkpoint of step 11 can't be written" in done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(losses(run)) < 100, "the loop didn't notice"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000010"]
    read_checkpoint(run / "checkpoints" / "step-000010")


# ---- what else reads it


def test_weights_are_the_averaged_ones(sharded: Path) -> None:
    read = read_weights(sharded)
    averages = newest(sharded).tensors["ema"]
    assert read.keys() == averages.keys()
    assert all(torch.equal(read[key], averages[key]) for key in averages)
    assert not all(torch.equal(read[key], each) for key, each in newest(sharded).tensors["model"].items())


@pytest.mark.slow
def test_samples_and_conversions_take_it(
    sharded: Path, command: Command, write: Callable[..., Path], tmp_path: Path
) -> None:
    def sample(name: str, *flags: object) -> list[torch.Tensor]:
        config = write(
            {
                "model": {**MODEL, "from_pretrained": str(sharded)},
                "scheduler": {"type": "rflow", "num_sampling_steps": 3, "cfg_scale": 3.0},
                "prompt": [f"a square of size {size}" for size in range(3)],
                "num_frames": 4, "image_size": (16, 16), "fps": 8, "dtype": "fp32", "crf": 0,
            },
            f"{name}.py",
        )  # fmt: skip
        done = command("opensora-run", config, "--save-dir", tmp_path / name, *flags)
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / name / "summary.json").read_text())["saved"] == 3
        return [read_video(path)[0] for path in sorted((tmp_path / name).glob("*.mp4"))]

    for ours, theirs in zip(sample("one"), sample("two", "--nproc", 2, "--accelerator.type", "fsdp"), strict=True):
        assert (ours.int() - theirs.int()).abs().max() <= 2
    options = ["--model", "STDiT3", "num_heads=3"]
    done = command("opensora", "convert", sharded, tmp_path / "converted", "--to", "opensora", *options)
    assert done.returncode == 0, done.stderr
    assert read_weights(tmp_path / "converted").keys() == newest(sharded).tensors["ema"].keys()
