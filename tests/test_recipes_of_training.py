"""Recipes, through the real command: adapters, chosen parts, other optimizers, validation, Weights & Biases."""

from __future__ import annotations

import json
import logging
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Command, losses, tiny_training, weights
from safetensors.torch import load_file

from opensora.core import WeightsError
from opensora.core.adapters import load_adapter
from opensora.core.commands.opensora_run import main
from opensora.core.components import build
from opensora.core.config.write import write_config
from opensora.core.conversion import convert
from opensora.core.weights import load_weights

LORA: dict[str, Any] = {"type": "lora", "rank": 2, "target_modules": [r"(spatial|temporal)_blocks\..*attn"]}


@pytest.fixture
def run(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., str]:
    """Runs a config in this process, and returns what it said."""
    monkeypatch.chdir(tmp_path)

    def run(values: dict[str, object], *flags: object, code: int = 0) -> str:
        write_config(tmp_path / "config.py", values, "A test's config.")
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="opensora"):
            found = main([str(tmp_path / "config.py"), *map(str, flags)])
        said = capsys.readouterr().err + caplog.text
        assert found == code, said
        return said

    return run


@pytest.fixture(scope="module")
def base(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a model."""
    folder = tmp_path_factory.mktemp("base")
    write_config(folder / "config.py", tiny_training(clips, max_steps=3), "")
    assert main([str(folder / "config.py"), "--run-folder", str(folder / "run")]) == 0
    return folder / "run"


def adapting(clips: Path, base: Path, **changes: object) -> dict[str, object]:
    values = tiny_training(clips, max_steps=6, hooks=[LORA], **changes)
    return {**values, "model": {**values["model"], "from_pretrained": str(base)}}  # type: ignore[dict-item]  # a dict


def model(clips: Path) -> torch.nn.Module:
    network: torch.nn.Module = build(
        "models",
        tiny_training(clips)["model"],
        latent_channels=3,
        latent_size=(4, 16, 16),
        text_width=64,
        text_length=16,
    )
    return network


def validations(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]


def test_adapters_resume_bit_for_bit_and_only_they_are_kept(run, clips: Path, base: Path, tmp_path: Path) -> None:
    run(adapting(clips, base), "--run-folder", "whole")
    run({**adapting(clips, base), "max_steps": 3}, "--run-folder", "half")
    said = run(adapting(clips, base), "--load", "half")
    assert "step 3 of 6" in said
    assert losses(tmp_path / "half") == losses(tmp_path / "whole")
    kept, again = weights(tmp_path / "whole"), weights(tmp_path / "half")
    assert all(torch.equal(tensor, again[name]) for name, tensor in kept.items())
    assert {name.split(".lora_")[1] for name in kept} == {"A.default.weight", "B.default.weight"}
    (path,) = (tmp_path / "whole" / "checkpoints").iterdir()
    state = torch.load(path / "optimizer.pt", weights_only=True)["optimizer"]["state"]
    assert len(state) == len(kept) == len(load_file(path / "ema.safetensors"))


def test_adapters_are_sampled_and_written_into_the_weights(run, clips: Path, base: Path, tmp_path: Path) -> None:
    run(adapting(clips, base, lr=0.05), "--run-folder", "adapted")
    loaded = model(clips)
    load_weights(loaded, tmp_path / "adapted")
    plain = model(clips)
    load_weights(plain, base)
    changed = {
        name for name, tensor in plain.state_dict().items() if not torch.equal(tensor, loaded.state_dict()[name])
    }
    assert changed
    assert all(".attn." in name or ".cross_attn." in name for name in changed)
    own = {key: value for key, value in tiny_training(clips)["model"].items() if key != "type"}  # type: ignore[attr-defined]  # a dict
    convert(tmp_path / "adapted", tmp_path / "merged", to="opensora", model="STDiT3", options=own)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(tensor, merged[name]) for name, tensor in loaded.state_dict().items() if name in merged)
    sampling = {key: tiny_training(clips)[key] for key in ("model", "scheduler", "dtype")}
    sampling |= {
        "pipeline": "sample",
        "prompt": "a square of size 3",
        "num_frames": 4,
        "image_size": [16, 16],
        "fps": 8,
    }
    pictures = []
    for source in (
        {"from_pretrained": "adapted"},
        {"from_pretrained": "merged"},
        {"from_pretrained": str(base), "adapter": "adapted"},
        {"from_pretrained": str(base)},
    ):
        said = run(
            {**sampling, "model": {**sampling["model"], **source}, "format": "frames"},
            "--save-dir",
            f"s{len(pictures)}",
        )  # type: ignore[dict-item]  # a dict
        assert ("Adapters of" in said) == ("adapted" in source.values())
        pictures.append(
            sorted(
                path.read_bytes()
                for path in (tmp_path / f"s{len(pictures)}").rglob("*.png")
                if "sheet" not in path.name
            )
        )
    assert pictures[0] == pictures[1] == pictures[2] != pictures[3]


@pytest.mark.slow
@pytest.mark.parametrize("accelerator", ["ddp", "fsdp"])
def test_adapters_on_two_processes_learn_as_on_one(
    accelerator: str, run, command: Command, clips: Path, base: Path, tmp_path: Path
) -> None:
    options = {"every": 3, "held_out": 0.25, "num_clips": 5, "num_timesteps": 2, "ema": True}
    run(adapting(clips, base, validation=options), "--run-folder", "one")
    flags = ("--nproc", 2, "--batch-size", 4, "--accelerator.type", accelerator)
    done = command("opensora-run", "config.py", "--run-folder", "two", *flags)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(losses(tmp_path / "one"), losses(tmp_path / "two"), rtol=1e-5, atol=0)
    for mine, other in zip(*(validations(tmp_path / name) for name in ("one", "two")), strict=True):
        assert mine["by_timestep"] == pytest.approx(other["by_timestep"], rel=1e-5)
    loaded = [model(clips), model(clips)]
    for network, name in zip(loaded, ("one", "two"), strict=True):
        load_weights(network, tmp_path / name)
    for mine, other in zip(*(network.parameters() for network in loaded), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_a_base_is_needed_and_a_pattern_must_match(run, clips: Path, base: Path) -> None:
    values = adapting(clips, base)
    wrong = {**LORA, "target_modules": ["spatial_blocks.0.atn"]}
    assert "Nearest: spatial_blocks.0.attn.qkv" in run({**values, "hooks": [wrong]}, code=2)
    assert "give them as model.from_pretrained" in run({**values, "model": tiny_training(clips)["model"]}, code=2)
    assert "model.adapter needs model.from_pretrained" in run(
        {**values, "model": {**tiny_training(clips)["model"], "adapter": "x"}},  # type: ignore[dict-item]  # a dict
        code=2,
    )


def test_a_base_that_was_moved_is_given_apart(run, clips: Path, base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "before")
    run(adapting(clips, tmp_path / "before"), "--run-folder", "adapted")
    (tmp_path / "before").rename(tmp_path / "after")
    with pytest.raises(WeightsError, match=r"are not at .*before any more: give both.*adapter="):
        load_weights(model(clips), tmp_path / "adapted")
    loaded = model(clips)
    load_weights(loaded, tmp_path / "after")
    load_adapter(loaded, tmp_path / "adapted")


def test_only_the_named_parts_change(run, clips: Path, tmp_path: Path) -> None:
    run(tiny_training(clips, max_steps=1, lr=1e-12), "--run-folder", "start")
    run(tiny_training(clips, max_steps=3, trainable=["temporal_blocks.*", "final_layer"]), "--run-folder", "part")
    start, part = weights(tmp_path / "start"), weights(tmp_path / "part")
    changed = {name.split(".")[0] for name in start if not torch.allclose(start[name], part[name], atol=1e-9)}
    assert changed == {"temporal_blocks", "final_layer"}
    assert "Nearest: temporal_blocks" in run(tiny_training(clips, trainable=["temporal_block"]), code=2)


def test_a_stage_begins_with_the_averages_of_the_one_before_and_nothing_else(run, clips: Path, tmp_path: Path) -> None:
    run(tiny_training(clips, max_steps=3), "--run-folder", "stage1")
    larger = {**tiny_training(clips)["dataset"], "image_size": (32, 32)}  # type: ignore[dict-item]  # a dict
    stage2 = tiny_training(clips, max_steps=1, lr=1e-12, dataset=larger, seed=7)
    said = run(stage2, "--ckpt-path", "stage1", "--run-folder", "stage2")
    assert "Weights: stage1: 55 tensors loaded" in said
    assert "Went on from" not in said
    (before,) = (tmp_path / "stage1" / "checkpoints").iterdir()
    after = weights(tmp_path / "stage2")
    for name, average in load_file(before / "ema.safetensors").items():
        torch.testing.assert_close(after[name], average, rtol=0, atol=1e-9)


def test_another_optimizer_resumes_bit_for_bit(run, clips: Path, tmp_path: Path) -> None:
    chosen = {"optimizer": {"type": "torch.optim.SGD", "momentum": 0.9}, "lr": 1e-2}
    run(tiny_training(clips, max_steps=4, **chosen), "--run-folder", "whole")
    run(tiny_training(clips, max_steps=2, **chosen), "--run-folder", "half")
    run(tiny_training(clips, max_steps=4, **chosen), "--load", "half")
    assert losses(tmp_path / "whole") == losses(tmp_path / "half")
    assert "torch.optim has no optimizer SGDD" in run(
        tiny_training(clips, optimizer={"type": "torch.optim.SGDD"}), code=2
    )


def test_validation_is_the_same_on_two_processes_and_leaves_training_alone(
    run, command: Command, clips: Path, tmp_path: Path
) -> None:
    data = tiny_training(clips)["dataset"]
    options = {"every": 2, "data": data, "num_clips": 7, "num_timesteps": 3}
    values = tiny_training(clips, max_steps=5, validation=options, without_hooks=[])
    run(tiny_training(clips, max_steps=5), "--run-folder", "without")
    run(values, "--run-folder", "one")
    assert losses(tmp_path / "one") == losses(tmp_path / "without")
    done = command("opensora-run", "config.py", "--run-folder", "two", "--nproc", 2, "--batch-size", 4)
    assert done.returncode == 0, done.stderr
    one, two = validations(tmp_path / "one"), validations(tmp_path / "two")
    assert [record["step"] for record in one] == [0, 2, 4, 5]
    assert one[0]["clips"] == 7
    assert list(one[0]["by_timestep"]) == ["250.0", "500.0", "750.0"]
    assert list(one[0]["by_bucket"]) == ["4x16x16"]
    for mine, other in zip(one, two, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert mine["by_timestep"] == pytest.approx(other["by_timestep"], rel=1e-5)
        assert mine.get("training_loss", 0.0) == pytest.approx(other.get("training_loss", 0.0), rel=1e-5)
    assert one[1]["training_loss"] == pytest.approx(sum(losses(tmp_path / "one")[:2]) / 2)
    assert one[-1]["loss"] < one[0]["loss"]
    assert (tmp_path / "one" / "validation.png").stat().st_size > 10_000
    events = b"".join(path.read_bytes() for path in (tmp_path / "one" / "tensorboard").iterdir())
    assert b"validation/timestep 250.0" in events


def test_held_out_rows_are_measured_resumed_and_measured_again_by_eval_loss(run, clips: Path, tmp_path: Path) -> None:
    options = {"every": 2, "held_out": 0.25, "num_clips": 24, "num_timesteps": 2, "ema": True, "seed": 1024}
    values = tiny_training(clips, max_steps=6, validation=options)
    run(values, "--run-folder", "whole")
    run({**values, "max_steps": 3}, "--run-folder", "half")
    run(values, "--load", "half")
    whole, half = validations(tmp_path / "whole"), validations(tmp_path / "half")
    assert [record["step"] for record in half] == [0, 2, 3, 4, 6]
    assert [record["loss"] for record in half if record["step"] != 3] == [record["loss"] for record in whole]
    assert whole[0]["clips"] == 6
    seen = {
        record["epoch"] for record in map(json.loads, (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines())
    }
    assert max(seen) == pytest.approx(6 * 8 / 18)
    wrong = {**options, "ema": True}
    assert "ema_decay = 0 keeps none" in run({**values, "validation": wrong, "ema_decay": 0}, code=2)


def test_a_trained_model_is_measured(run, clips: Path, tmp_path: Path) -> None:
    data = tiny_training(clips)["dataset"]
    options = {"every": 9, "data": data, "num_clips": 24, "num_timesteps": 4, "ema": True, "seed": 1024}
    values = tiny_training(clips, max_steps=2, validation=options)
    run(values, "--run-folder", "run")
    said = run(
        values, "--pipeline", "eval-loss", "--ckpt-path", "run", "--run_folder", "found", "--num_eval_timesteps", 4
    )
    assert "timestep" in said
    found = json.loads((tmp_path / "found" / "losses.json").read_text())
    measured = validations(tmp_path / "run")[-1]
    assert found["by_timestep"] == pytest.approx(measured["by_timestep"], rel=1e-6)
    assert found["clips"] == 24
    part = run(values, "--pipeline", "eval-loss", "--run_folder", "part", "--num_clips", 3)
    assert "has random weights. Give --ckpt-path" in part
    assert json.loads((tmp_path / "part" / "losses.json").read_text())["clips"] == 3


def test_losses_by_bucket(run, clips: Path, tmp_path: Path) -> None:
    table = clips.parent / "sized.csv"
    rows = [f"clip_{index:02d}.mp4,a square,9,160,256" for index in range(3)]
    table.write_text("\n".join(["path,text,num_frames,height,width", *rows]) + "\n")
    values = tiny_training(clips)
    values |= {
        "model": {**values["model"], "patch_size": (2, 32, 32)},  # type: ignore[dict-item]  # a dict
        "dataset": {"type": "VariableVideoTextDataset", "data_path": str(table)},
        "bucket_config": {"144p": {1: (0.5, 2), 4: (None, 2)}, "240p": {1: (0.0, None), 4: (1.0, 2)}},
    }
    flags = ("--pipeline", "eval-loss", "--num_eval_timesteps", 2, "--end_index", 1)
    said = run(values, *flags, "--run_folder", "found")
    found = json.loads((tmp_path / "found" / "losses.json").read_text())
    assert set(found["by_bucket"]) == {"144p-4"}
    assert found["clips"] == 3
    assert "Bucket 144p, 1 frames: None of the 3 rows" in said
    assert "No row of the data falls into a bucket" in run(values, *flags, "--start_index", 1, code=2)
    buckets = {"144p": {1: (1.0, 2), 4: (1.0, 2)}}
    held = {**values, "bucket_config": buckets, "validation": {"held_out": 0.1}}
    assert "Give the validation a table of its own" in run(held, code=2)


def wandb_records(path: Path) -> list[Any]:
    """Those of an offline file, which another process writes to its end."""
    for _ in range(300):
        records = list(iter_wandb(path))
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        time.sleep(0.1)
    raise AssertionError(f"{path} has no end")


def iter_wandb(path: Path) -> Iterator[Any]:
    """The records of an offline file: a log of LevelDB's format, whose entries are protocol buffers."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block is empty
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def test_a_run_is_logged_offline_and_goes_on(run, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    options = {"every": 2, "held_out": 0.25, "num_clips": 3, "num_timesteps": 2}
    values = tiny_training(clips, max_steps=2, wandb=True, validation=options, preview_every=2)
    run(values, "--run-folder", "run")
    (path,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    records = wandb_records(path)
    history = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    assert [line["loss"] for line in history if "loss" in line] == losses(tmp_path / "run")
    assert [line["validation/loss"] for line in history if "validation/loss" in line] == [
        record["loss"] for record in validations(tmp_path / "run")
    ]
    assert [line["step"] for line in history if "previews" in line or "previews/_type" in line] == [2]
    (first,) = {record.run.run_id for record in records if record.WhichOneof("record_type") == "run"}
    run({**values, "max_steps": 3}, "--load", "run")
    newest = max((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert {each.run.run_id for each in wandb_records(newest) if each.WhichOneof("record_type") == "run"} == {first}


def test_without_package_or_account_it_says_what_to_do(run, clips: Path, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("wandb")
    values = tiny_training(clips, max_steps=1, wandb=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    assert 'run "wandb login", set WANDB_API_KEY' in run(values, code=2)
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    assert "pip install 'opensora-core[wandb]'" in run(values, code=2)


def test_a_hook_that_only_a_key_sets_says_so(run, clips: Path) -> None:
    assert "by the key validation" in run(tiny_training(clips, hooks=[{"type": "validation"}]), code=2)
