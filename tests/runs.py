"""Small configs, the real commands, and what a run folder says: shared by the tests across packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

Command = Callable[..., subprocess.CompletedProcess[str]]


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


def environment() -> dict[str, str]:
    """Two processes on two cores must not have two threads each, and nothing may look for a network."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def command_line(*arguments: object) -> list[str]:
    """The command as a user starts it."""
    name, *rest = map(str, arguments)
    return [str(Path(sys.executable).with_name(name)), *rest]


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
