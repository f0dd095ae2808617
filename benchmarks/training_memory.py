"""Whether training leaks: resident memory of the run and its loader workers at the end against that at step 500.

    python benchmarks/training_memory.py [STEPS]

A tiny model learns from 24 clips, so that 10,000 steps take minutes and hold some 1,600 epochs, 10 checkpoints and 1,000 log
records, with averaged weights and TensorBoard. Watched from outside, as `ps` does: the sum over the process and its workers.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import torch

from opensora.core.config.write import write_config
from opensora.core.video import write_video

FIRST, EVERY = 500, 10


def write_clips(folder: Path) -> Path:
    """A table of 24 clips of noise."""
    rows = ["path,text"]
    for index in range(24):
        frames = torch.randint(256, (4, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
        write_video(folder / f"{index}.mp4", frames, fps=8)
        rows.append(f"{index}.mp4,noise number {index}")
    (folder / "clips.csv").write_text("\n".join(rows) + "\n")
    return folder / "clips.csv"


def config(clips: Path, steps: int) -> dict[str, object]:
    """All that accompanies training is on."""
    return {
        "model": {"type": "STDiT3", "hidden_size": 32, "depth": 1, "num_heads": 2, "patch_size": (2, 4, 4)},
        "scheduler": {"type": "rflow"},
        "dataset": {"type": "VideoTextDataset", "data_path": str(clips), "num_frames": 4, "image_size": (16, 16)},
        "dtype": "fp32", "batch_size": 4, "num_workers": 2, "epochs": steps, "max_steps": steps,
        "log_every": EVERY, "ckpt_every": max(steps // 10, 1),
    }  # fmt: skip


def resident_mib(process: psutil.Process) -> float:
    """Of the process and its children."""
    total = process.memory_info().rss
    for child in process.children(recursive=True):
        try:
            total += child.memory_info().rss
        except psutil.Error:  # a worker that ended meanwhile
            continue
    return total / 2**20


def watch(folder: Path, command: list[str]) -> list[tuple[int, float]]:
    """Step and MiB, twice a second while the command runs."""
    seen = []
    process = psutil.Popen(command, stderr=(folder / "log").open("w"))
    metrics = folder / "run" / "metrics.jsonl"
    while process.poll() is None:
        time.sleep(0.5)
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        try:
            seen.append((json.loads(lines[-1])["step"] if lines else 0, resident_mib(process)))
        except (psutil.Error, ValueError):  # it just ended, or a line is half written
            continue
    if process.returncode:
        sys.exit((folder / "log").read_text())
    return seen


def around(seen: list[tuple[int, float]], low: float, high: float) -> float:
    """The median of what was seen at these steps."""
    return statistics.median([mib for step, mib in seen if low <= step <= high])


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_config(folder / "config.py", config(write_clips(folder), steps), "The benchmark's.")
        command = [str(Path(sys.executable).with_name("opensora-run")), str(folder / "config.py")]
        seen = watch(folder, [*command, "--run-folder", str(folder / "run")])
    spread = steps * 0.02
    for share in range(1, 10):
        step = steps * share // 10
        print(f"step {step}: {around(seen, step - spread, step + spread):.1f} MiB")
    first, last = around(seen, FIRST, FIRST + spread), around(seen, steps - spread, steps)
    print(
        f"resident at step {steps} / at step {FIRST} = {last / first:.3f} ({first:.1f} -> {last:.1f} MiB, with 2 workers)"
    )


if __name__ == "__main__":
    main()
