"""Classifier-free guidance: a denoiser made of a denoiser, so that no sampler knows of it.

Source: Ho and Salimans, https://arxiv.org/abs/2207.12598, eq. 6, with scale = 1 + w.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opensora.core.conditioning import Conditioning
from opensora.core.errors import ShapeError
from opensora.core.protocols import Denoiser

__all__ = ["Guidance", "guide"]


def guide(denoiser: Denoiser, scale: float, *, channels: int | None = None) -> Denoiser:
    """``denoiser`` under guidance; at scale 1, where guidance changes nothing, the denoiser itself at half the cost."""
    return denoiser if scale == 1 else Guidance(denoiser, scale=scale, channels=channels)


class Guidance:
    """Calls a denoiser once on [conditional; unconditional] and pushes the prediction away from the unconditional one.

    The two halves are joined once per conditioning, not once per step: as long as a sampler passes the same object, so
    does this, and a denoiser can keep what it made of it.
    """

    def __init__(self, denoiser: Denoiser, *, scale: float, channels: int | None = None) -> None:
        """Wrap a denoiser.

        Args:
            denoiser: Replaces text or labels by its null where ``conditioning.dropped``.
            scale: 1 is the conditional prediction, 0 the unconditional; more follows the prompt more closely.
            channels: How many leading channels are guided. The rest, variance values among them, are the conditional
                ones. None: as many as the latents have.
        """
        self.denoiser = denoiser
        self.scale = scale
        self.channels = channels
        self._joined: tuple[Conditioning, Conditioning] | None = None

    def __call__(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """As `Denoiser.__call__`.

        Raises:
            ShapeError: The conditioning is not of as many samples as the latents, or there are fewer than ``channels``.
        """
        channels = latents.shape[1] if self.channels is None else self.channels
        if channels > latents.shape[1]:
            raise ShapeError(f"Guidance of {channels} channels (cfg_channel), but the latents have {latents.shape[1]}.")
        both = self.denoiser(torch.cat([latents, latents]), timestep.repeat(2), self._join(conditioning, len(latents)))
        conditional, null = both.chunk(2)  # [B, C or 2C, T, H, W] each
        guided = null[:, :channels] + self.scale * (conditional[:, :channels] - null[:, :channels])
        return torch.cat([guided, conditional[:, channels:]], dim=1)

    def _join(self, conditioning: Conditioning, batch: int) -> Conditioning:
        if self._joined is None or self._joined[0] is not conditioning:
            if len(conditioning) != batch:
                raise ShapeError(
                    f"Guidance needs a condition per sample to drop: {batch} latents, {len(conditioning)} conditions. "
                    "Without conditions set cfg_scale = 1."
                )
            self._joined = conditioning, Conditioning.cat([conditioning, conditioning.unconditional()])
        return self._joined[1]
