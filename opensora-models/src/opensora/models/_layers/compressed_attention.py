"""Self attention with fewer keys and values than queries, of PixArt-Sigma (https://arxiv.org/abs/2403.04692, section 3.2).

Shapes: B batch, N = h * w tokens of an image, M tokens kept, H heads, D width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from opensora.core.attention import attention
from opensora.core.errors import ShapeError
from opensora.core.protocols import Size
from opensora.models._layers.attention import RMSNorm
from opensora.models._layers.linear import Linear
from opensora.models._layers.sizes import format_size

Sampling = Literal["conv", "ave", "uniform", "uniform_every"]
"""How keys and values are reduced. conv: a learned average of each window. uniform: the first token of each window. ave: the
same (the published "average" takes it too), and an incomplete window at the end is left out. uniform_every: each ``ratio``-th
token in reading order."""


class CompressedAttention(nn.Module):
    """Multi-head attention among the tokens of an image, whose keys and values are those of a coarser image."""

    def __init__(self, width: int, num_heads: int, *, qk_norm: bool, sampling: Sampling, ratio: int) -> None:
        """``ratio``: side of the windows of tokens that become one."""
        super().__init__()
        self.num_heads = num_heads
        self.sampling = sampling
        self.ratio = ratio
        self.qkv = Linear(width, 3 * width)
        self.q_norm = RMSNorm(width // num_heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width // num_heads) if qk_norm else nn.Identity()
        self.proj = Linear(width, width)
        if sampling == "conv":
            self.sr = nn.Conv2d(width, width, kernel_size=ratio, stride=ratio, groups=width)
            self.norm = nn.LayerNorm(width)
            nn.init.constant_(self.sr.weight, 1 / ratio**2)
            nn.init.zeros_(self.sr.get_parameter("bias"))

    def forward(self, x: Tensor, grid: Size) -> Tensor:
        """``x`` [B, N, D], its tokens laid out as ``grid`` (1, h, w) -> like ``x``.

        Raises:
            ShapeError: See `check_grid`.
        """
        self.check_grid(grid)
        query, key, value = self.qkv(x).chunk(3, dim=-1)  # [B, N, D] each
        key, value = self.compress(key, grid), self.compress(value, grid)  # [B, M, D] each
        query, key, value = (
            each.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for each in (query, key, value)
        )  # [B, H, N or M, D/H]
        out = attention(self.q_norm(query), self.k_norm(key), value)
        return self.proj(out.transpose(1, 2).flatten(2))

    def compress(self, x: Tensor, grid: Size) -> Tensor:
        """[B, N, D] -> [B, M, D]."""
        r, (_, h, w) = self.ratio, grid
        if self.sampling == "uniform_every":
            return x[:, ::r]
        image = torch.unflatten(x, 1, (h, w))
        if self.sampling == "conv":
            return self.norm(self.sr(image.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2))
        return image[:, : h // r * r : r, : w // r * r : r].flatten(1, 2)

    def check_grid(self, grid: Size) -> None:
        """Check that tokens laid out as ``grid`` (frames, rows, columns) can be reduced.

        Raises:
            ShapeError: There are several frames, or rows and columns (or, all in all, tokens) do not divide.
        """
        frames, h, w = grid
        r, sampling = self.ratio, self.sampling
        if frames != 1:
            raise ShapeError(
                f"Key/value compression is for images; these latents make {frames} token frames. "
                "Use num_frames = 1, or model.kv_compress_config = None."
            )
        too_small = min(h, w) < r and sampling != "uniform_every"
        indivisible = (sampling == "uniform" and (h % r or w % r)) or (sampling == "uniform_every" and h * w % r)
        if too_small or indivisible:
            nearest = [max(r, round(side / r) * r) for side in (h, w)]
            raise ShapeError(
                f'Key/value compression "{sampling}" by {r} does not divide {format_size((h, w))} tokens (height x width). '
                f"Nearest that it does: {format_size(nearest)}."
            )
