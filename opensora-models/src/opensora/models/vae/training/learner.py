"""What an autoencoder is trained on: the losses of Open-Sora 1.2's three stages, and which frames are shown.

Shapes: B videos, T frames; see `opensora.models.vae.video_vae.Reconstruction` for the rest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from opensora.core.errors import ConfigError
from opensora.core.randomness import Draws, generator_for
from opensora.models.vae.losses import ReconstructionLoss
from opensora.models.vae.lpips import LPIPS
from opensora.models.vae.training.specs import TrainVAESpec
from opensora.models.vae.video_vae import VideoAutoencoderPipeline

__all__ = ["Learned", "VAELearner", "choose_length", "freeze_decoder"]


class Learned(NamedTuple):
    """What `VAELearner` gives."""

    loss: Tensor
    """[B], all but the adversarial part."""
    nll: Tensor
    """[B], of pixels if they are compared, else of latents: what the adversarial part is balanced with."""
    x_rec: Tensor | None
    """[B, 3, T, H, W] in [-1, 1], if a loss looks at pixels."""
    terms: dict[str, Tensor]
    """The loss's parts, [B] each."""


class VAELearner(nn.Module):
    """An autoencoder and its losses: all that the optimizer may change."""

    def __init__(self, vae: VideoAutoencoderPipeline, spec: TrainVAESpec, lpips: LPIPS | None) -> None:
        """Make trainable what the losses reach.

        Raises:
            ConfigError: The identity loss compares latents of different numbers of channels.
        """
        super().__init__()
        if spec.use_image_identity_loss and vae.latent_channels != vae.temporal_vae.spec.in_out_channels:
            raise ConfigError(
                "use_image_identity_loss wants latents of an image to be those of the image autoencoder, but these have "
                f"{vae.temporal_vae.spec.in_out_channels} channels, and vae_temporal.embed_dim is {vae.latent_channels}."
            )
        self.vae, self.spec = vae, spec
        self.losses = ReconstructionLoss(
            logvar_init=spec.logvar_init,
            perceptual_loss_weight=spec.perceptual_loss_weight,
            kl_loss_weight=spec.kl_loss_weight,
            perceptual=lpips,
        )
        self.losses.logvar.requires_grad_(spec.learn_logvar)
        vae.train_parts()
        if not spec.needs_pixels:
            freeze_decoder(vae.spatial_vae)

    def forward(self, video: Tensor, draws: Draws) -> Learned:
        """The losses of videos [B, 3, T, H, W] in [-1, 1]."""
        spec = self.spec
        result = self.vae.reconstruct(video, draws=draws, pixels=spec.needs_pixels)
        x_z = result.x_z.detach()  # what is to be met must not come to meet
        terms: dict[str, Tensor] = {}
        if spec.use_real_rec_loss:
            assert result.x_rec is not None  # pixels were asked for
            pixels = self.losses(video, result.x_rec, result.posterior)
            terms |= {"nll_loss": pixels.weighted_nll, "kl_loss": pixels.weighted_kl}
        if spec.use_z_rec_loss:
            terms["z_nll_loss"] = self.losses(x_z, result.x_z_rec, no_perceptual=True).weighted_nll
        if spec.use_image_identity_loss and video.shape[2] == 1:
            terms["image_identity_loss"] = self.losses(x_z, result.z, no_perceptual=True).weighted_nll
        nll = terms["nll_loss" if spec.use_real_rec_loss else "z_nll_loss"]
        return Learned(torch.stack(list(terms.values())).sum(0), nll, result.x_rec, terms)


def freeze_decoder(image_vae: nn.Module) -> None:
    """Without a loss of pixels, no gradient ever reaches what makes them."""
    network = getattr(image_vae, "module", image_vae)
    for name in ("decoder", "post_quant_conv"):
        if isinstance(part := getattr(network, name, None), nn.Module):
            part.requires_grad_(False)


def choose_length(spec: TrainVAESpec, num_frames: int, *, step: int) -> int:
    """How many frames all samples of an optimizer step are cut to, whatever process has them.

    Args:
        num_frames: Those of the clips.
        step: Counts from 0.
    """
    generator = generator_for(spec.seed, "mixed length", step)
    match spec.mixed_strategy:
        case "mixed_video_image":
            return 1 if float(torch.rand((), generator=generator)) < spec.mixed_image_ratio else num_frames
        case "mixed_video_random":
            return int(torch.randint(1, num_frames + 1, (), generator=generator))
        case _:
            return num_frames
