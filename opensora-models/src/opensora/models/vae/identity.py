"""No autoencoder at all: the denoiser works on pixels."""

from __future__ import annotations

from typing import ClassVar

from attrs import frozen
from torch import Tensor, nn

from opensora.core.protocols import Size
from opensora.core.randomness import Draws

__all__ = ["IdentityVAE", "IdentityVAESpec"]


@frozen(kw_only=True)
class IdentityVAESpec:
    """`IdentityVAE` has no options."""


class IdentityVAE(nn.Module):
    """Latents are the video, [B, 3, T, H, W]. For small videos and for tests."""

    Spec: ClassVar[type] = IdentityVAESpec
    latent_channels = 3

    def __init__(self, spec: IdentityVAESpec) -> None:
        super().__init__()
        self.spec = spec

    def encode(self, video: Tensor, *, draws: Draws | None = None) -> Tensor:
        """``video`` itself."""
        return video

    def decode(self, latents: Tensor, *, num_frames: int) -> Tensor:
        """The first ``num_frames`` frames of ``latents``."""
        return latents[:, :, :num_frames]

    def latent_size(self, size: Size) -> Size:
        """``size`` itself."""
        return size
