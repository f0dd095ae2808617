"""Samples of the model while it trains, from its averaged weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING

import torch
from attrs import field, frozen
from attrs.validators import gt

from opensora.core.contact_sheet import write_contact_sheet
from opensora.core.errors import DataError
from opensora.core.hookspecs import hook
from opensora.core.orders import BatchOrder
from opensora.core.protocols import IMAGE_FPS
from opensora.core.randomness import SampleKey
from opensora.core.requests import Request
from opensora.core.video_sampler import VideoSampler

if TYPE_CHECKING:
    from torch import Tensor

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
    def train_start(self, run: TrainRun) -> None:
        """Choose the prompts, and the rate that the model is told."""
        if not run.accelerator.joins_main:
            return
        self.prompts, self.fps = list(self.spec.prompts), IMAGE_FPS
        for key in first_keys(run):
            with suppress(DataError):  # the loop's policy will deal with it
                clip = run.dataset[key]
                self.fps = clip.fps
                if self.spec.prompts or len(self.prompts) == self.spec.num_prompts:
                    break
                self.prompts.append(clip.text)

    @hook
    def step_end(self, run: TrainRun, update: Update) -> None:
        """Sample in the main process; those that it doesn't need for that go on to their next step and wait there."""
        if update.step % self.spec.every == 0 and run.accelerator.joins_main:
            self.preview(run, update.step)

    @torch.inference_mode()
    def preview(self, run: TrainRun, step: int) -> None:
        """Sample and write one sheet."""
        run.denoiser.eval()
        try:
            with run.ema.applied(run.denoiser) if run.ema else nullcontext():
                videos = self.sample(run)
        finally:
            run.denoiser.train()
        if not run.accelerator.is_main:
            return
        path = run.folder / "previews" / f"step-{step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        write_contact_sheet(path, list(zip(self.prompts, videos, strict=True)), title=f"Step {step}")
        log.info("Preview %s", path)

    def sample(self, run: TrainRun) -> list[Tensor]:
        """Videos [T, H, W, 3] uint8 of the prompts."""
        guided = run.parts.scheduler.guide(run.accelerator.predictor(run.denoiser))
        sampler = VideoSampler(
            parts=run.parts, accelerator=run.accelerator, hooks=run.hooks, guided=guided, denoiser=guided
        )
        requests = [
            Request(
                prompt=prompt,
                text=prompt,
                seed=run.spec.seed + index,
                path=run.folder / "previews",
                size=run.clip_size,
                fps=self.fps,
                file_fps=self.fps,
                frame_fps=self.fps,
            )
            for index, prompt in enumerate(self.prompts)
        ]
        pieces = [piece.frames for piece in sampler.iter_pieces(requests)]
        return [torch.cat(rows) for rows in zip(*pieces, strict=True)]


def first_keys(run: TrainRun) -> Iterator[SampleKey]:
    """The data's rows in their order or, where the dataset makes its own batches, the first epoch's."""
    if isinstance(run.order, BatchOrder):
        return (key for batch in run.order.of_epoch(0) for key in batch)
    return (SampleKey(run.spec.seed, index) for index in range(run.order.num_samples))
