"""What tests across packages share: a small dataset of real mp4 files, small configs, and the real commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from opensora.core.config.write import write_config
from opensora.core.video import write_video

Command = Callable[..., subprocess.CompletedProcess[str]]


def clip(digit: int, *, num_frames: int = 4, side: int = 16) -> torch.Tensor:
    """A bright square, larger for higher numbers, that moves right: [T, H, W, 3] uint8."""
    frames = torch.zeros(num_frames, side, side, 3, dtype=torch.uint8)
    for step in range(num_frames):
        frames[step, 4 : 6 + digit, step + 2 : step + 5] = 220
    return frames


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 24 captioned mp4 files."""
    folder = tmp_path_factory.mktemp("clips")
    rows = ["path,text"]
    for index in range(24):
        write_video(folder / f"clip_{index:02d}.mp4", clip(index % 6), fps=8, crf=4)
        rows.append(f"clip_{index:02d}.mp4,a square of size {index % 6}")
    (folder / "clips.csv").write_text("\n".join(rows) + "\n")
    return folder / "clips.csv"


def tiny_training(clips: Path, **changes: object) -> dict[str, object]:
    """A config that trains for a few seconds."""
    return {
        "model": {
            "type": "STDiT3",
            "hidden_size": 32,
            "depth": 1,
            "num_heads": 2,
            "patch_size": (2, 4, 4),
            "pred_sigma": False,
        },
        "scheduler": {"type": "rflow", "num_sampling_steps": 3},
        "dataset": {"type": "VideoTextDataset", "data_path": str(clips), "num_frames": 4, "image_size": (16, 16)},
        "dtype": "fp32",
        "lr": 1e-3,
        "grad_clip": 1.0,
        "batch_size": 8,
        "num_workers": 0,
        "max_steps": 12,
        "ema_decay": 0.9,
        "without_hooks": ["tensorboard", "loss-plot"],
        **changes,
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes values as a config file."""

    def write(values: dict[str, object], name: str = "config.py") -> Path:
        write_config(tmp_path / name, values, "A test's config.")
        return tmp_path / name

    return write


def environment() -> dict[str, str]:
    """Two processes on two cores must not have two threads each, and nothing may look for a network."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def command_line(*arguments: object) -> list[str]:
    """The command as a user starts it."""
    name, *rest = map(str, arguments)
    return [str(Path(sys.executable).with_name(name)), *rest]


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """Runs one of the commands in an empty folder."""

    def run(*arguments: object, timeout_s: float = 200, **options: object) -> subprocess.CompletedProcess[str]:
        options = {"cwd": tmp_path, "env": environment(), **options}
        return subprocess.run(
            command_line(*arguments), capture_output=True, text=True, check=False, timeout=timeout_s, **options
        )

    return run


def losses(run_folder: Path) -> list[float]:
    """Each step's loss, exactly as it was logged."""
    records = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record["loss"] for record in records]


def weights(run_folder: Path) -> dict[str, torch.Tensor]:
    """The newest checkpoint's weights."""
    from safetensors.torch import load_file

    newest = max((run_folder / "checkpoints").glob("step-*"))
    return load_file(newest / "model.safetensors")
