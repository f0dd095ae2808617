"""Losses of video autoencoders: reconstruction, Kullback-Leibler divergence, and the two sides of adversarial training.

After latent diffusion's autoencoder (https://arxiv.org/abs/2112.10752), VQGAN's adaptive weight
(https://arxiv.org/abs/2012.09841) and LeCam regularisation (https://arxiv.org/abs/2104.03310).

Shapes: B videos, C channels, T H W frames and size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from attrs import define, field, frozen
from attrs.validators import ge, in_
from einops import rearrange
from torch import Tensor, nn

from opensora.core.errors import ConfigError, ShapeError
from opensora.models.vae.posterior import Posterior

__all__ = [
    "DiscriminatorLoss",
    "DiscriminatorLossType",
    "DiscriminatorTerms",
    "GeneratorLoss",
    "GeneratorLossType",
    "LeCamEMA",
    "ReconstructionLoss",
    "ReconstructionTerms",
    "adaptive_weight",
    "gradient_penalty",
]

GeneratorLossType = Literal["hinge", "non-saturating"]
DiscriminatorLossType = Literal["hinge", "vanilla", "non-saturating"]


class ReconstructionTerms(NamedTuple):
    """What `ReconstructionLoss` gives for each video; their means over B are the published numbers."""

    nll: Tensor
    """[B], of all elements, divided by T."""
    weighted_nll: Tensor
    """[B], the same times ``nll_weights``."""
    weighted_kl: Tensor
    """[B]; 0 without a posterior."""


class ReconstructionLoss(nn.Module):
    """Absolute difference and LPIPS under a Laplace distribution of width exp(logvar), and KL divergence.

    It is summed over pixels, so that it grows with the resolution, as do learning rates that were tuned with it.
    """

    def __init__(
        self,
        *,
        logvar_init: float = 0.0,
        perceptual_loss_weight: float | None = 0.1,
        kl_loss_weight: float | None = 1e-6,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        """Set it up.

        Args:
            logvar_init: Where ``logvar``, a parameter, starts.
            perceptual_loss_weight: Of ``perceptual`` against the absolute difference; None or 0: off.
            kl_loss_weight: Of the divergence; None or 0: off.
            perceptual: LPIPS or the like: two batches of frames [B*T, 3, H, W] -> [B*T, 1, 1, 1].
        """
        super().__init__()
        self.logvar = nn.Parameter(torch.tensor(float(logvar_init)))
        self.perceptual_loss_weight = perceptual_loss_weight or 0.0
        self.kl_loss_weight = kl_loss_weight or 0.0
        self.perceptual = perceptual

    def forward(
        self,
        video: Tensor,
        reconstruction: Tensor,
        posterior: Posterior | None = None,
        *,
        nll_weights: Tensor | None = None,
        no_perceptual: bool = False,
    ) -> ReconstructionTerms:
        """The terms of each video.

        Args:
            video: [B, C, T, H, W], pixels or latents.
            reconstruction: The same.
            nll_weights: Broadcasts to [B*T, C, H, W].
            no_perceptual: Leave LPIPS out: for latents.

        Raises:
            ShapeError: The two differ in shape, or LPIPS is asked for other than 1 or 3 channels.
        """
        if video.shape != reconstruction.shape:
            raise ShapeError(f"The reconstruction is {list(reconstruction.shape)}, the video {list(video.shape)}.")
        frames, rebuilt = (rearrange(each.float(), "b c t h w -> (b t) c h w") for each in (video, reconstruction))
        difference = (frames - rebuilt).abs()
        if self.perceptual_loss_weight and not no_perceptual:
            difference = difference + self.perceptual_loss_weight * self._perceptual(frames, rebuilt)
        nll = difference / self.logvar.exp() + self.logvar
        weighted = nll if nll_weights is None else nll_weights * nll
        kl = video.new_zeros(len(video))
        if posterior is not None and self.kl_loss_weight:
            kl = self.kl_loss_weight * posterior.kl()
        return ReconstructionTerms(_per_video(nll, len(video)), _per_video(weighted, len(video)), kl)

    def _perceptual(self, frames: Tensor, rebuilt: Tensor) -> Tensor:
        """One value a frame, [B*T, 1, 1, 1]."""
        if self.perceptual is None:
            raise ConfigError("perceptual_loss_weight is set, but there is no LPIPS. Load it, or set the weight to 0.")
        if frames.shape[1] == 1:
            frames, rebuilt = (each.expand(-1, 3, -1, -1) for each in (frames, rebuilt))
        return self.perceptual(frames, rebuilt).float()


def _per_video(values: Tensor, batch: int) -> Tensor:
    """[B*T, C, H, W] -> [B]: the sum over C, H and W, the mean over T."""
    return values.sum((1, 2, 3)).reshape(batch, -1).mean(1)


@frozen(kw_only=True)
class GeneratorLoss:
    """What the autoencoder gets for reconstructions that pass for real."""

    discriminator_factor: float = 1.0
    """Weight of all of it."""
    discriminator_start: int = 50001
    """Step from which it counts."""
    generator_factor: float = 0.5
    """Against the reconstruction loss, once their gradients are made equally large."""
    generator_loss_type: GeneratorLossType = field(default="non-saturating", validator=in_(("hinge", "non-saturating")))
    """hinge: the mean logit; non-saturating: cross entropy against "real"."""

    def __call__(
        self, fake_logits: Tensor, nll: Tensor, last_layer: Tensor, *, step: int, is_training: bool = True
    ) -> Tensor:
        """The weighted loss.

        Args:
            fake_logits: Of reconstructions, with gradients to ``last_layer``.
            nll: Reconstruction loss, a scalar with gradients to ``last_layer``.
            last_layer: The weight by which the two are balanced: that of the decoder's last convolution.
            step: Counts from 0.
            is_training: Otherwise missing gradients make the weight 0.
        """
        loss = -fake_logits.mean() if self.generator_loss_type == "hinge" else F.softplus(-fake_logits).mean()
        factor = _factor(self.discriminator_factor, self.discriminator_start, step)
        try:
            weight = adaptive_weight(nll, loss, last_layer) * self.generator_factor
        except RuntimeError:
            if is_training:
                raise
            weight = torch.zeros_like(loss)
        return weight * factor * loss


def adaptive_weight(nll: Tensor, loss: Tensor, last_layer: Tensor) -> Tensor:
    """How much larger the gradient of ``nll`` is than that of ``loss``, in [0, 1e4]; detached."""
    (nll_gradient,) = torch.autograd.grad(nll, last_layer, retain_graph=True)
    (gradient,) = torch.autograd.grad(loss, last_layer, retain_graph=True)
    return (nll_gradient.norm() / (gradient.norm() + 1e-4)).clamp(0.0, 1e4).detach()


class DiscriminatorTerms(NamedTuple):
    """What `DiscriminatorLoss` gives; the loss is their sum."""

    adversarial: Tensor
    lecam: Tensor
    gradient_penalty: Tensor


@frozen(kw_only=True)
class DiscriminatorLoss:
    """What the discriminator gets for telling real from rebuilt."""

    discriminator_factor: float = 1.0
    """Weight of the adversarial term."""
    discriminator_start: int = 50001
    """Step from which that term counts."""
    discriminator_loss_type: DiscriminatorLossType = field(
        default="non-saturating", validator=in_(("hinge", "vanilla", "non-saturating"))
    )
    """vanilla and non-saturating are the same here."""
    lecam_loss_weight: float | None = None
    """Of LeCam regularisation; None or 0: off."""
    gradient_penalty_loss_weight: float | None = None
    """Of the gradient penalty; None or 0: off."""

    def is_active(self, step: int) -> bool:
        """Whether there is anything to learn in a step, counted from 0."""
        counts = _factor(self.discriminator_factor, self.discriminator_start, step)
        return bool(counts or self.lecam_loss_weight or self.gradient_penalty_loss_weight)

    def __call__(
        self,
        real_logits: Tensor,
        fake_logits: Tensor,
        *,
        step: int,
        ema: LeCamEMA | None = None,
        real: Tensor | None = None,
    ) -> DiscriminatorTerms:
        """The weighted terms.

        Args:
            real_logits: Of real videos.
            fake_logits: Of reconstructions.
            step: Counts from 0.
            ema: What logits have been; needed by LeCam.
            real: The real videos, with ``requires_grad``; needed by the gradient penalty.

        Raises:
            ConfigError: ``ema`` or ``real`` is needed and missing.
        """
        if self.discriminator_loss_type == "hinge":
            adversarial = 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())
        else:
            adversarial = 0.5 * (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean())
        adversarial = adversarial * _factor(self.discriminator_factor, self.discriminator_start, step)
        lecam = penalty = real_logits.new_zeros(())
        if self.lecam_loss_weight:
            if ema is None:
                raise ConfigError("lecam_loss_weight is set: LeCam needs the running means of logits (ema).")
            lecam = self.lecam_loss_weight * ema.distance(real_logits, fake_logits)
        if self.gradient_penalty_loss_weight:
            if real is None:
                raise ConfigError("gradient_penalty_loss_weight is set: it needs the real videos (real).")
            penalty = self.gradient_penalty_loss_weight * gradient_penalty(real, real_logits)
        return DiscriminatorTerms(adversarial, lecam, penalty)


def gradient_penalty(real: Tensor, logits: Tensor) -> Tensor:
    """Mean of (||d logits / d real|| - 1)^2 over samples (https://arxiv.org/abs/1704.00028, on real ones alone)."""
    (gradient,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()


@define
class LeCamEMA:
    """Running means of the discriminator's logits. They start at 0."""

    decay: float = field(default=0.999, validator=ge(0))
    """Weight of the past at each update."""
    real: Tensor = field(factory=lambda: torch.zeros(()))
    fake: Tensor = field(factory=lambda: torch.zeros(()))

    def distance(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """How far logits of either kind have gone beyond the other kind's running mean, squared."""
        real_excess = F.relu(real_logits.mean() - self.fake.to(real_logits.device))
        fake_excess = F.relu(self.real.to(fake_logits.device) - fake_logits.mean())
        return real_excess.square() + fake_excess.square()

    def update(self, real: Tensor | float, fake: Tensor | float) -> None:
        """Take the mean logits of one more step."""
        self.real = self.real * self.decay + torch.as_tensor(real).detach().cpu() * (1 - self.decay)
        self.fake = self.fake * self.decay + torch.as_tensor(fake).detach().cpu() * (1 - self.decay)


def _factor(factor: float, start: int, step: int) -> float:
    return 0.0 if step < start else factor
