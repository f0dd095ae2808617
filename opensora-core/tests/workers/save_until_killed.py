"""Saves checkpoints in children that are killed at random moments; reports on stdout what each kill left."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from opensora.core.checkpoints import (
    Checkpoint,
    find_checkpoint,
    list_checkpoints,
    prune_checkpoints,
    read_checkpoint,
    save_checkpoint,
    sweep,
)

torch.set_num_threads(1)  # a forked child has no others


def content(step: int) -> Checkpoint:
    """A checkpoint that can be told from its step."""
    weights = torch.randn(60_000, generator=torch.Generator().manual_seed(step))
    return Checkpoint(
        tensors={"model": {"weight": weights}, "ema": {"weight": weights / 2}},
        optimizer={"state": {0: {"exp_avg": weights + 1}}},
        state={"step": step},
    )


def save_for_ever(run: Path, step: int, promises: int) -> None:
    """Keep the newest two, so that kills hit removals too. Write each step that was saved to ``promises``."""
    while True:
        step += 1
        save_checkpoint(run / "checkpoints", step, content(step))
        os.write(promises, b"%d " % step)
        prune_checkpoints(run, lambda _: False, newest=2)


def is_whole(path: Path, step: int) -> bool:
    """Whether the checkpoint reads back as it was saved."""
    read, saved = read_checkpoint(path), content(step)
    return read.state["step"] == step and all(
        torch.equal(read.tensors[stem]["weight"], tensors["weight"]) for stem, tensors in saved.tensors.items()
    )


def main() -> None:
    """Kill, look, sweep, go on from there."""
    run, kills = Path(sys.argv[1]), int(sys.argv[2])
    save_checkpoint(run / "checkpoints", 0, content(0))
    chance = random.Random(0)
    for _ in range(kills):
        before = find_checkpoint(run)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            save_for_ever(run, int(before.name.removeprefix("step-")), writing)
        os.close(writing)
        first = os.read(reading, 8)  # so that a slow machine gets to save at all
        time.sleep(chance.uniform(0.0, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(reading, "rb") as promises:
            promised = max(map(int, (first + promises.read()).split()))
        leftovers = [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]
        sweep(run)
        steps = [int(path.name.removeprefix("step-")) for path in list_checkpoints(run)]
        found = int(find_checkpoint(run).name.removeprefix("step-"))
        whole = [is_whole(path, step) for path, step in zip(list_checkpoints(run), steps, strict=True)]
        names = sorted(path.name for path in (run / "checkpoints").iterdir())
        report = {
            "found": found,
            "promised": promised,
            "steps": steps,
            "whole": whole,
            "leftovers": leftovers,
            "after sweep": names,
        }
        print(json.dumps(report), flush=True)


main()
