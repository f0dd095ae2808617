"""How a denoiser is trained: what of a batch it sees, and its loss. The loop is in `opensora.core.pipelines.loop`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import torch
from attrs import define
from torch import Tensor, nn

from opensora.core.blocks import offloading
from opensora.core.composing import Parts
from opensora.core.conditioning import Conditioning
from opensora.core.features import Features, draw_latents, stack
from opensora.core.frame_masks import draw_frame_mask
from opensora.core.loading import Batch, stand_in
from opensora.core.pipelines.loop import Counters, LoopRun, Update, train
from opensora.core.pipelines.train_spec import TrainSpec
from opensora.core.profiling import marked
from opensora.core.protocols import Denoiser, Size
from opensora.core.randomness import Draws
from opensora.core.ready_features import ready_stand_in

__all__ = ["Counters", "TrainRun", "Update", "describe_clips", "encode", "train"]


@define(kw_only=True, eq=False)
class TrainRun(LoopRun):
    """A run that trains a denoiser."""

    spec: TrainSpec
    parts: Parts
    predict: Denoiser
    """What the scheduler calls: the denoiser with mixed precision, gradient exchange and hooks' wrappers."""
    mask_ratios: Mapping[str, float] | None
    features: Features | None = None
    """Latents and embeddings that are computed once."""

    @property
    def denoiser(self) -> nn.Module:
        """The trained module."""
        return self.module

    def loss(self, batch: Batch) -> Tensor:
        """See `LoopRun.loss`."""
        size = next((key.size for key, _ in batch.failed if key.size), self.clip_size)
        if self.features is not None:
            self.note("features_found", torch.full((), self.features.count(batch), device=self.accelerator.device))
        used, weight = (batch, 1.0) if len(batch) else (self.stand_in(size), 0.0)
        latents, conditioning = encode(self, used)
        draws = used.draws(self.accelerator.device)
        with marked("forward"), offloading(self.accelerator.device) if self.spec.offload else nullcontext():
            losses = self.parts.scheduler.loss(self.predict, latents, conditioning, draws=draws)  # [B]
        self.sample_losses.append(losses.detach())
        return losses.sum() * (weight / batch.nominal_size)

    def stand_in(self, size: Size) -> Batch:
        """A batch for a process that has nothing to read. It must not need encoders that the others don't."""
        if isinstance(self.parts.vae, nn.Module):
            return stand_in(size)
        return ready_stand_in(size, self.parts.vae, self.parts.text_encoder)


@torch.no_grad()
def encode(run: TrainRun, batch: Batch) -> tuple[Tensor, Conditioning]:
    """Latents and conditioning of a batch on the device, with frames masked and captions dropped as configured."""
    device, draws = run.accelerator.device, batch.draws(run.accelerator.device)
    with marked("vae"):
        latents = encode_video(run, batch, draws)
    with marked("text"):
        text = batch.text if batch.text is not None else run.parts.text_encoder.encode(batch.texts)
    conditioning = describe_clips(batch, latents, text, run.mask_ratios).to(device)
    if dropout := getattr(run.denoiser, "condition_dropout", 0.0):
        conditioning = conditioning.replace(dropped=draws.uniform("condition dropout") < dropout)
    return latents, conditioning


def describe_clips(
    batch: Batch, latents: Tensor, text: Conditioning, mask_ratios: Mapping[str, float] | None
) -> Conditioning:
    """What a denoiser is told of a batch: its texts, sizes and rates and, with ``mask_ratios``, which frames are given.

    Args:
        batch: Of B clips.
        latents: Its latents, [B, C, T, H, W].
        text: Of its captions.
        mask_ratios: Share of samples by frame mask; None: no frame is given.
    """
    sizes, num_frames = batch.conditioning, latents.shape[2]
    conditioning = text.replace(
        fps=sizes.fps,
        height=sizes.height,
        width=sizes.width,
        num_frames=sizes.num_frames,
        latent_frames=torch.full((len(latents),), float(num_frames)),
        aspect_ratio=sizes.aspect_ratio,
    )
    if not mask_ratios:
        return conditioning
    masks = [draw_frame_mask(mask_ratios, num_frames, key) for key in batch.keys]
    return conditioning.replace(frame_mask=torch.stack(masks))


def encode_video(run: TrainRun, batch: Batch, draws: Draws) -> Tensor:
    """Latents on the device: of features, where the batch has or wants some, else of pixels."""
    device, features, moments = run.accelerator.device, run.features, batch.moments
    if moments is None and batch.features and features is not None and features.vae is not None:
        moments = stack(features.make_moments(batch))
    if moments is not None:
        return draw_latents(run.parts.vae, moments, draws, device)
    return run.parts.vae.encode(batch.video.to(device, non_blocking=True), draws=draws).float()
