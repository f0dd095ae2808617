"""Step caches, pyramid broadcast and fewer steps on the quickstart's world: what each spares, and what it costs.

    python benchmarks/step_caches.py [RUN_FOLDER]

RUN_FOLDER is that of `opensora-run quickstart`; without one the quickstart is run first. 200 videos of seeds that no
calibration has seen are sampled in full, in 30 Euler steps, and in each other way; with the step cache five times, each
calibrated on another video. Prints a table in markdown: calls of the guided denoiser a video, distance of the latents from
full sampling relative to their length, the share of videos that keep the stated tolerance (all calibrations, and the worst),
grades and seconds; and one line of JSON. Seconds and grades are of the first calibration; calibrating itself is not in them.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sampling import graded, quickstart, sampling_config  # the script beside this one
from torch import Tensor

from opensora.core.config.write import write_config
from opensora.core.sampling import SamplingPipeline, load
from opensora.data.digits.clips import captions

NUM_VIDEOS, BATCH, FIRST_SEED, CALIBRATIONS = 200, 40, 90_000, 5
KINDS = [captions()[index % 40] for index in range(NUM_VIDEOS)]


def ways() -> dict[str, dict[str, Any]]:
    """What is tried, by name: changes of the config."""
    found: dict[str, dict[str, Any]] = {"30 steps of Euler": {}}
    for tolerance in (0.02, 0.05, 0.1):
        found[f"`step-cache`, tolerance {tolerance}"] = {"hooks": [{"type": "step-cache", "tolerance": tolerance}]}
    found["`pyramid-broadcast`"] = {"hooks": [{"type": "pyramid-broadcast"}]}
    for steps in (25, 20, 15, 10, 7, 5):
        found[f"{steps} steps of Euler"] = {"scheduler": {"num_sampling_steps": steps}}
    for steps in (30, 20, 15, 10, 7, 5):
        options = {"num_sampling_steps": steps, "solver": "unipc", "sampling_shift": 2.0}
        found[f"{steps} steps of UniPC, `sampling_shift = 2`"] = {"scheduler": options}
    return found


class Counting:
    """A denoiser that counts the rows that it is asked for."""

    def __init__(self, denoiser: Any) -> None:
        self.denoiser, self.rows = denoiser, 0

    def __call__(self, latents: Tensor, timestep: Tensor, conditioning: Any) -> Tensor:
        """As `Denoiser.__call__`."""
        self.rows += len(latents)
        return self.denoiser(latents, timestep, conditioning)


def main() -> None:
    """Measure and print."""
    facts: dict[str, dict[str, float]] = {}
    with TemporaryDirectory() as temporary, quickstart(sys.argv[1:], Path(temporary)) as run_folder:
        config = Path(temporary, "config.py")
        write_config(config, sampling_config(run_folder), "The quickstart's model.")
        full: Tensor | None = None
        print(
            "| | calls a video | distance: median | 95 of 100 below | keep tolerance (worst) | digit | direction | seconds |"
        )
        print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
        for name, changes in ways().items():
            latents, fact = measure(config, changes, full)
            full = latents if full is None else full
            facts[name] = fact
            print(row(name, fact), flush=True)
    print(json.dumps(facts))


def measure(config: Path, changes: dict[str, Any], full: Tensor | None) -> tuple[Tensor, dict[str, float]]:
    """Sample all videos in one way."""
    tolerance = next((hook.get("tolerance") for hook in changes.get("hooks", [])), None)
    times = 1 if tolerance is None else CALIBRATIONS
    runs = [sample(config, changes, calibrated_on=index) for index in range(times)]
    latents, _, seconds, frames = runs[0]
    calls = sum(calls for _, calls, *_ in runs) / times
    fact = {"calls": calls, "seconds": seconds, **graded(frames, [kind[:2] for kind in KINDS])}
    if full is not None:
        distances = torch.stack(
            [(found - full).flatten(1).norm(dim=1) / full.flatten(1).norm(dim=1) for found, *_ in runs]
        )
        fact |= {"median": distances.median().item(), "most": distances.flatten().quantile(0.95).item()}
        if tolerance is not None:
            kept = (distances <= tolerance).double().mean(dim=1)
            fact |= {"kept": kept.mean().item(), "kept_worst": kept.min().item()}
    return latents, fact


def sample(
    config: Path, changes: dict[str, Any], *, calibrated_on: int
) -> tuple[Tensor, float, float, Sequence[NDArray[np.uint8]]]:
    """Latents, calls a video, seconds and frames. Calibration is on a video of its own, and not counted."""
    pipeline = load(config, **changes)
    guided = pipeline.sampler.guided
    counting = Counting(guided.denoiser)  # type: ignore[attr-defined]  # of opensora-schedulers
    guided.denoiser = counting  # type: ignore[attr-defined]
    next(start(pipeline, [KINDS[7 * calibrated_on][2]], [1 + calibrated_on]))
    counting.rows = 0
    begin = time.perf_counter()
    latents = torch.cat([batch.finish() for batch in batches(pipeline)])
    seconds = time.perf_counter() - begin
    frames = [each.numpy() for each in pipeline.decode(latents)]
    return latents, counting.rows / 2 / NUM_VIDEOS, seconds, frames


def batches(pipeline: SamplingPipeline) -> list[Any]:
    """All videos, not begun."""
    return [
        start(
            pipeline,
            [kind[2] for kind in KINDS[first : first + BATCH]],
            range(FIRST_SEED + first, FIRST_SEED + first + BATCH),
        )
        for first in range(0, NUM_VIDEOS, BATCH)
    ]


def start(pipeline: SamplingPipeline, prompts: Sequence[str], seeds: Sequence[int]) -> Any:
    """Denoising of prompts with their seeds."""
    denoising = pipeline.start(list(prompts), seed=seeds[0])
    assert [key.seed for key in denoising.keys] == list(seeds)
    return denoising


def row(name: str, fact: dict[str, float]) -> str:
    """Of the table."""

    def shown(key: str, form: str) -> str:
        return format(fact[key], form) if key in fact else ""

    kept = f"{shown('kept', '.1%')} ({shown('kept_worst', '.1%')})" if "kept" in fact else ""
    cells = [shown("calls", ".1f"), shown("median", ".4f"), shown("most", ".4f"), kept]
    return f"| {name} | {' | '.join([*cells, shown('digit', '.1%'), shown('direction', '.1%'), shown('seconds', '.0f')])} |"


if __name__ == "__main__":
    main()
