"""Between latent videos and tokens.

Shapes: B batch, C channels, D width, T H W latent frames and size, t h w token grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from opensora.core.errors import ShapeError

Patch = tuple[int, int, int]
"""Frames, height and width of a patch, in latents."""


class PatchEmbed3D(nn.Module):
    """Cut a video into patches and map each to a token. Zeros are appended where a patch would be incomplete."""

    def __init__(self, patch_size: Patch, channels: int, width: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        # Holds the weights as published files have them. A convolution whose stride is its kernel is a linear map of
        # patches, and computed as such is twice as fast at full width (and never falls back to a slow 3-D kernel).
        self.proj = nn.Conv3d(channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, video: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, t, h*w, D].

        Raises:
            ShapeError: The video has another number of channels than the weights.
        """
        if video.shape[1] != self.proj.in_channels:
            raise ShapeError(
                f"The latents have {video.shape[1]} channels; this model was built for {self.proj.in_channels}. "
                "Use the autoencoder that it was made for."
            )
        p, q, r = self.patch_size
        frames, height, width = video.shape[2:]
        if frames % p or height % q or width % r:
            video = F.pad(video, (0, -width % r, 0, -height % q, 0, -frames % p))
        patches = rearrange(video, "b c (t p) (h q) (w r) -> b t (h w) (c p q r)", p=p, q=q, r=r)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


def token_grid(size: Sequence[int], patch_size: Patch) -> tuple[int, int, int]:
    """Tokens along time, height and width of latents (T, H, W), incomplete patches included."""
    frames, height, width = (-(-length // patch) for length, patch in zip(size, patch_size, strict=True))
    return frames, height, width


def unpatchify(tokens: Tensor, patch_size: Patch, size: Sequence[int]) -> Tensor:
    """The inverse of cutting into patches: [B, t, h*w, p*q*r*C] (C fastest) -> [B, C, T, H, W], cropped to ``size``."""
    (frames, height, width), (p, q, r) = size, patch_size
    _, h, w = token_grid(size, patch_size)
    video = rearrange(tokens, "b t (h w) (p q r c) -> b c (t p) (h q) (w r)", h=h, w=w, p=p, q=q, r=r)
    return video[:, :, :frames, :height, :width]
