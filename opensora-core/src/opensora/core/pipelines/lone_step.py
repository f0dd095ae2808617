"""Training steps on made-up clips, without data, folder or loop: to measure what a step takes."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from opensora.core.accelerator import Accelerator
from opensora.core.blocks import offloading
from opensora.core.composing import build_parts, choose_text_placement, place
from opensora.core.conditioning import Conditioning
from opensora.core.frame_masks import check_mask_ratios
from opensora.core.hooking import build_hooks
from opensora.core.hooks.ema import EMA, EMASpec
from opensora.core.loading import Batch
from opensora.core.optimization import build_optimizer
from opensora.core.pipelines.train import change_blocks
from opensora.core.pipelines.train_loop import encode
from opensora.core.pipelines.train_spec import TrainSpec
from opensora.core.protocols import Size
from opensora.core.randomness import SampleKey
from opensora.core.trainable import adapt

__all__ = ["LoneStep", "made_up_batch"]


class LoneStep:
    """A denoiser with its encoders, optimizer and averages, as a training run has them."""

    features = None

    def __init__(self, spec: TrainSpec, accelerator: Accelerator, size: Size | None) -> None:
        """Build and place all parts.

        Args:
            spec: Of the config.
            accelerator: That was entered.
            size: (T, H, W) of all clips; None if they differ.
        """
        self.spec, self.accelerator = spec, accelerator
        torch.manual_seed(spec.seed)
        text_device, text_dtype = choose_text_placement(spec.text_encoder, accelerator)
        self.parts = build_parts(spec, size_of=lambda: size)
        self.denoiser: nn.Module = self.parts.denoiser.train()
        change_blocks(self.denoiser, spec)
        adapt(self.denoiser, build_hooks(spec.default_hooks(), spec.hooks, without=spec.without_hooks), spec)
        self.predict = accelerator.prepare(self.denoiser)
        place(self.parts.vae, accelerator)
        place(self.parts.text_encoder, accelerator, text_device, text_dtype)
        self.mask_ratios = check_mask_ratios(spec.mask_ratios) if spec.mask_ratios else None
        self.parameters = [each for each in self.denoiser.parameters() if each.requires_grad]
        self.optimizer = build_optimizer(self.parameters, spec)
        self.average = EMA(EMASpec(decay=spec.ema_decay)) if spec.ema_decay else None
        if self.average:
            self.average.train_start(run=SimpleNamespace(module=self.denoiser))  # type: ignore[arg-type]  # all it needs

    def forward(self, batch: Batch) -> Tensor:
        """Encoders, denoiser and scheduler: the mean loss."""
        run: Any = self  # which has what `encode` asks of a run
        latents, conditioning = encode(run, batch)
        draws = batch.draws(self.accelerator.device)
        with offloading(self.accelerator.device) if self.spec.offload else nullcontext():
            return self.parts.scheduler.loss(self.predict, latents, conditioning, draws=draws).mean()

    def backward(self, loss: Tensor) -> None:
        """Gradients."""
        with self.accelerator.micro_step(last=True):
            self.accelerator.backward(loss)

    def finish(self) -> None:
        """Optimizer and averages."""
        self.accelerator.update(self.optimizer, self.parameters, grad_clip=self.spec.grad_clip)
        if self.average:
            self.average.step_end(run=None, update=SimpleNamespace(is_left_out=False, step=1))  # type: ignore[arg-type]

    def make(self, batch: Batch) -> None:
        """The whole step."""
        self.backward(self.forward(batch))
        self.finish()


def made_up_batch(size: Size, batch_size: int, *, prompt: str) -> Batch:
    """Noise of (T, H, W), every clip with the same prompt."""
    frames, height, width = size
    values = {
        "fps": 24.0,
        "height": float(height),
        "width": float(width),
        "num_frames": float(frames),
        "aspect_ratio": height / width,
    }
    numbers: dict[str, Any] = {name: torch.full((batch_size,), value) for name, value in values.items()}
    return Batch(
        video=torch.rand(batch_size, 3, *size) * 2 - 1,
        texts=[prompt] * batch_size,
        conditioning=Conditioning(**numbers),
        keys=[SampleKey(0, index) for index in range(batch_size)],
        paths=["made up"] * batch_size,
    )
