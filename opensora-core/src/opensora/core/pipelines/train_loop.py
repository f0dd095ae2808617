"""How a denoiser is trained: what of a batch it sees, and its loss. The loop is in `opensora.core.pipelines.loop`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from attrs import define
from torch import Tensor, nn

from opensora.core.composing import Parts
from opensora.core.conditioning import Conditioning
from opensora.core.frame_masks import draw_frame_mask
from opensora.core.loading import Batch, stand_in
from opensora.core.pipelines.loop import Counters, LoopRun, Update, train
from opensora.core.pipelines.train_spec import TrainSpec
from opensora.core.protocols import Denoiser

__all__ = ["Counters", "TrainRun", "Update", "train"]


@define(kw_only=True, eq=False)
class TrainRun(LoopRun):
    """A run that trains a denoiser."""

    spec: TrainSpec
    parts: Parts
    predict: Denoiser
    """What the scheduler calls: the denoiser with mixed precision, gradient exchange and hooks' wrappers."""
    mask_ratios: Mapping[str, float] | None

    @property
    def denoiser(self) -> nn.Module:
        """The trained module."""
        return self.module

    def loss(self, batch: Batch) -> Tensor:
        """See `LoopRun.loss`."""
        size = next((key.size for key, _ in batch.failed if key.size), self.clip_size)
        used, weight = (batch, 1.0) if len(batch) else (stand_in(size), 0.0)
        latents, conditioning = encode(self, used)
        draws = used.draws(self.accelerator.device)
        losses = self.parts.scheduler.loss(self.predict, latents, conditioning, draws=draws)  # [B]
        return losses.sum() * (weight / batch.nominal_size)


@torch.no_grad()
def encode(run: TrainRun, batch: Batch) -> tuple[Tensor, Conditioning]:
    """Latents and conditioning of a batch on the device, with frames masked and captions dropped as configured."""
    device, draws = run.accelerator.device, batch.draws(run.accelerator.device)
    video = batch.video.to(device, non_blocking=True)
    latents = run.parts.vae.encode(video, draws=draws).float()
    text = run.parts.text_encoder.encode(batch.texts)
    sizes = batch.conditioning
    conditioning = text.replace(
        fps=sizes.fps,
        height=sizes.height,
        width=sizes.width,
        num_frames=sizes.num_frames,
        latent_frames=torch.full((len(latents),), float(latents.shape[2])),
        aspect_ratio=sizes.aspect_ratio,
    ).to(device)
    if dropout := getattr(run.denoiser, "condition_dropout", 0.0):
        conditioning = conditioning.replace(dropped=draws.uniform("condition dropout") < dropout)
    if run.mask_ratios:
        masks = [draw_frame_mask(run.mask_ratios, latents.shape[2], key) for key in batch.keys]
        conditioning = conditioning.replace(frame_mask=torch.stack(masks).to(device))
    return latents, conditioning
