"""Samples of the model while it trains, from its averaged weights."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from attrs import field, frozen
from attrs.validators import gt

from opensora.core.contact_sheet import write_contact_sheet
from opensora.core.hookspecs import hook
from opensora.core.randomness import SampleKey

if TYPE_CHECKING:
    from opensora.core.pipelines.train_loop import TrainRun, Update

__all__ = ["Previews", "PreviewsSpec"]

log = logging.getLogger(__name__)


@frozen(kw_only=True)
class PreviewsSpec:
    """Sample a few prompts every so many steps, always with the same noise."""

    every: int = field(validator=gt(0))
    """Steps."""
    prompts: list[str] = field(factory=list)
    """What to show; empty: captions of the data's first rows."""
    num_prompts: int = field(default=4, validator=gt(0))
    """How many of the data's captions."""


class Previews:
    """Writes ``previews/step-NNNNNN.png``, a sheet with a row a prompt."""

    Spec = PreviewsSpec

    def __init__(self, spec: PreviewsSpec) -> None:
        self.spec = spec

    @hook
    def step_end(self, run: TrainRun, update: Update) -> None:
        """Sample in the main process; the others go on to their next step and wait there."""
        if update.step % self.spec.every == 0 and run.accelerator.is_main:
            self.preview(run, update.step)

    @torch.inference_mode()
    def preview(self, run: TrainRun, step: int) -> None:
        """Sample and write one sheet."""
        from contextlib import nullcontext

        from opensora.core.pipelines.sample_loop import decode, iter_denoising

        first = run.dataset[SampleKey(run.spec.seed, 0)]
        prompts = self.spec.prompts or [
            run.dataset[SampleKey(run.spec.seed, index)].text
            for index in range(min(self.spec.num_prompts, run.order.num_samples))
        ]
        run.denoiser.eval()
        with run.ema.applied(run.denoiser) if run.ema else nullcontext():
            *_, last = iter_denoising(
                run.parts,
                run.accelerator.predictor(run.denoiser),
                run.accelerator,
                prompts,
                [run.spec.seed + index for index in range(len(prompts))],
                size=first.size,
                fps=first.fps,
            )
        run.denoiser.train()
        videos = decode(run.parts, run.accelerator, last.latents, num_frames=first.size[0])
        path = run.folder / "previews" / f"step-{step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        write_contact_sheet(path, list(zip(prompts, videos, strict=True)), title=f"Step {step}")
        log.info("Preview %s", path)
