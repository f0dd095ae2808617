"""How much validation and training loss vary from one step to the next, on the quickstart.

    python benchmarks/validation_loss.py RUN_FOLDER [STEPS [CLIPS]]

RUN_FOLDER is that of `opensora-run quickstart`. From its checkpoint of step 4500 training goes on for STEPS (200), with the
optimizer's state: at the learning rate that it had there, 5e-5, and at its mean over the whole training, 1e-3, which moves
the weights far more, so that the loss itself changes; there of the weights, and of their averages. After every step the loss
is measured on CLIPS (40) of those held out of the data, at 10 timesteps. The figure is the standard deviation of the
differences between neighbouring steps, over the same steps for both losses. Needs about 6 minutes on one core.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from opensora.core.config.evaluate import evaluate
from opensora.core.config.write import write_config

START = 4500
RUNS = ((5e-5, False), (1e-3, False), (1e-3, True))


def main() -> None:
    run_folder, steps = Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 200
    num_clips = int(sys.argv[3]) if len(sys.argv) > 3 else 40
    print("| learning rate | training loss | validation loss | varies less, times |\n| --- | --- | --- | --- |")
    for lr, ema in RUNS:
        training, validation = losses(run_folder, steps, lr=lr, ema=ema, num_clips=num_clips)
        jumps = [statistics.stdev(b - a for a, b in pairwise(series)) for series in (training, validation)]
        shown = [
            f"{statistics.mean(series):.4f}, varies by {jump:.5f}"
            for series, jump in zip((training, validation), jumps, strict=True)
        ]
        print(f"| {lr:g}{', averages' if ema else ''} | {' | '.join(shown)} | {jumps[0] / jumps[1]:.1f} |", flush=True)


def losses(run_folder: Path, steps: int, *, lr: float, ema: bool, num_clips: int) -> tuple[list[float], list[float]]:
    """Of every step: in training, and on held-out clips after it."""
    values: dict[str, Any] = dict(evaluate(run_folder / "train" / "config.py").values)
    data = {**values["dataset"], "data_path": str(run_folder / "data" / "held_out.csv")}
    values["dataset"] = {**values["dataset"], "data_path": str(run_folder / "data" / "clips.csv")}
    values |= {
        "load": str(run_folder / "train" / "checkpoints" / f"step-{START:06d}"),
        "allow_changes": True,
        "lr": lr,
        "lr_schedule": "constant",
        "max_steps": START + steps,
        "log_every": 1,
        "ckpt_every": 0,
        "validation": {"every": 1, "data": data, "num_clips": num_clips, "num_timesteps": 10, "ema": ema},
    }
    with TemporaryDirectory() as folder:
        config = Path(folder) / "config.py"
        write_config(config, values, "The quickstart goes on.")
        command = [str(Path(sys.executable).with_name("opensora-run")), str(config), "--run-folder", f"{folder}/run"]
        subprocess.run(command, check=True, capture_output=True)
        training = [record["loss"] for record in read(Path(folder) / "run" / "metrics.jsonl")]
        validation = [record["loss"] for record in read(Path(folder) / "run" / "validation.jsonl")]
    return training, validation


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
