"""What the pipelines cost: a training step and a sampling step against the same tensors in a bare loop.

    python benchmarks/pipeline_overhead.py

Both are timed in one process, in turns: a hook makes a bare step after each step of the pipeline. Printed is the ratio of the
medians. Model, batch and data are those of the quickstart; the clips are few, so that after the warm-up all are in memory and
the decoding of files, which a bare loop over ready tensors hasn't, is not counted. The bare training step has what every
training step needs: noise, forward, backward, clipping, AdamW, averaged weights.
"""

from __future__ import annotations

import copy
import json
import logging
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from attrs import frozen

from opensora.core import components, hook
from opensora.core.config.evaluate import Config, evaluate
from opensora.core.config.names import resolve
from opensora.core.config.structure import structure
from opensora.core.pipelines.stages import fill

WARM_UP, STEPS = 15, 80


@frozen(kw_only=True)
class BareSpec:
    """No options."""


class BareTraining:
    """After each step of the pipeline, one of a plain loop over a copy of the model, with a batch that is ready."""

    Spec = BareSpec
    seconds: dict[str, list[float]] = {"pipeline": [], "bare": []}  # noqa: RUF012  # read after the run

    def __init__(self, spec: BareSpec) -> None:
        self.spec = spec

    @hook(trylast=True)
    def train_start(self, run: Any) -> None:
        """Copy the model and take one batch."""
        from opensora.core.loading import iter_batches
        from opensora.core.pipelines.train_loop import encode

        self.denoiser = copy.deepcopy(run.denoiser)
        self.parameters = [each for each in self.denoiser.parameters() if each.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)
        self.averages = [each.detach().clone() for each in self.parameters]
        self.latents, self.conditioning = encode(run, next(iter_batches(run.dataset, run.order, run.slicing)))
        self.begin = time.perf_counter()

    @hook(trylast=True)
    def step_end(self, run: Any) -> None:
        """Time the pipeline's step, then make and time a bare one."""
        self.seconds["pipeline"].append(time.perf_counter() - self.begin)
        begin = time.perf_counter()
        latents = self.latents
        t = torch.rand(len(latents))
        noise = torch.randn_like(latents)
        level = t[:, None, None, None, None]
        velocity = self.denoiser((1 - level) * latents + level * noise, 1000 * t, self.conditioning)
        (velocity - (latents - noise)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(self.averages, [each.detach() for each in self.parameters], 0.002)
        self.seconds["bare"].append(time.perf_counter() - begin)
        self.begin = time.perf_counter()


class BareSampling:
    """After each step of the sampler, one Euler step of a plain loop."""

    Spec = BareSpec
    seconds: dict[str, list[float]] = {"pipeline": [], "bare": []}  # noqa: RUF012  # read after the run

    def __init__(self, spec: BareSpec) -> None:
        self.spec, self.begin = spec, None

    @hook(trylast=True)
    def sample_step(self, run: Any, state: Any) -> None:
        """Time the pipeline's step (but for a batch's first), then make and time a bare one."""
        from opensora.core import Conditioning
        from opensora.core.video_sampler import build_conditioning

        if state.step > 0:
            self.seconds["pipeline"].append(time.perf_counter() - self.begin)
        parts = run.sampler.parts
        given = build_conditioning(parts, run.requests[: len(state.latents)])
        both = Conditioning.cat([given, given.unconditional()])
        denoiser = parts.denoiser
        latents = state.latents
        begin = time.perf_counter()
        t = torch.full((2 * len(latents),), 500.0)
        conditional, null = denoiser(torch.cat([latents, latents]), t, both).chunk(2)
        latents = latents + (null + 4.0 * (conditional - null)) / state.num_steps
        if state.step > 0:
            self.seconds["bare"].append(time.perf_counter() - begin)
        self.begin = time.perf_counter()


@contextmanager
def registered() -> Iterator[None]:
    """Make the two hooks known as any plugin's are: by metadata on the path."""
    with TemporaryDirectory() as folder:
        info = Path(folder, "pipeline_overhead-0.dist-info")
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pipeline-overhead\nVersion: 0\n")
        names = "bare-training = pipeline_overhead:BareTraining\nbare-sampling = pipeline_overhead:BareSampling\n"
        (info / "entry_points.txt").write_text(f"[opensora.hooks]\n{names}")
        sys.path[:0] = [folder, str(Path(__file__).parent)]
        components.refresh()
        yield


def run(pipeline: str, values: dict[str, Any]) -> None:
    """Run a pipeline in this process."""
    cls = components.load("pipelines", pipeline)
    cls(structure(cls.Spec, values), config=Config(values=values)).run()


def report(name: str, seconds: dict[str, list[float]]) -> dict[str, float]:
    """Print the ratio of the medians."""
    medians = {key: statistics.median(values[WARM_UP:]) for key, values in seconds.items()}
    ratio = medians["pipeline"] / medians["bare"]
    print(f"{name}: pipeline / bare loop = {ratio:.3f} (medians of {len(seconds['bare']) - WARM_UP} steps each)")
    return {"ratio": ratio, **medians}


def main() -> None:
    """Train and sample the quickstart's model for some steps each."""
    logging.disable(logging.WARNING)
    stages = evaluate(resolve("quickstart")).values["stages"]
    with registered(), TemporaryDirectory() as folder:
        filled = fill(stages, Path(folder))
        run("make-digits", {**filled["data"], "num_clips": 80})
        added = {"max_steps": WARM_UP + STEPS, "hooks": [{"type": "bare-training"}]}
        run("train", {**filled["train"], **added})
        sampling = {
            **filled["sample"],
            "hooks": [{"type": "bare-sampling"}],
            "prompt": ["a handwritten seven moving left"] * 32,
        }
        run("sample", {**sampling, "num_sample": 1})
    import pipeline_overhead  # the hooks ran in the module that the entry point names

    print(json.dumps({
        "training step": report("training step", pipeline_overhead.BareTraining.seconds),
        "sampling step": report("sampling step", pipeline_overhead.BareSampling.seconds),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
