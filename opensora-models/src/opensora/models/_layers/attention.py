"""Attention among tokens, and of tokens to text. Both end in `opensora.core.attention.attention`.

Shapes: B batch (times frames or positions, where attention is along one axis), N tokens, L text tokens, H heads, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from opensora.core.attention import attention
from opensora.core.rehearsal import is_rehearsed
from opensora.models._layers.linear import Linear
from opensora.models._layers.positions import rotate
from opensora.models._layers.remembered import remembered


class RMSNorm(nn.Module):
    """Divide by the root mean square of the last axis, computed in float32 (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, any strides: the result has the layout of ``x``."""
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight.to(x.dtype)


class SelfAttention(nn.Module):
    """Multi-head attention among the tokens of the second last axis."""

    def __init__(
        self, width: int, num_heads: int, *, qkv_bias: bool = True, qk_norm: bool = False, rotate_first: bool = False
    ) -> None:
        """``rotate_first``: rotary embedding before the norms of query and key, as the Open-Sora 1.1 weights need it."""
        super().__init__()
        self.num_heads = num_heads
        self.rotate_first = rotate_first
        self.qkv = Linear(width, 3 * width, bias=qkv_bias)
        self.q_norm = RMSNorm(width // num_heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width // num_heads) if qk_norm else nn.Identity()
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, rotations: Tensor | None = None) -> Tensor:
        """[..., N, D] -> the same; the leading axes are the batch. ``rotations`` [N, D/H/2]: see `RotaryEmbedding`."""
        *batch, length, width = x.shape
        qkv = self.qkv(x.reshape(-1, length, width))
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, N, D/H] each
        query, key = self._place(query, self.q_norm, rotations), self._place(key, self.k_norm, rotations)
        out = attention(query, key, value).transpose(1, 2)
        return self.proj(out.reshape(*batch, length, width))

    def _place(self, x: Tensor, norm: nn.Module, rotations: Tensor | None) -> Tensor:
        if rotations is None:
            return norm(x)
        return norm(rotate(x, rotations)) if self.rotate_first else rotate(norm(x), rotations)


class CrossAttention(nn.Module):
    """Multi-head attention of tokens to the text of their own sample."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = Linear(width, width)
        self.kv_linear = Linear(width, 2 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        """``x`` [B, ..., D], ``text`` [B, L, D], ``mask`` [B, 1, 1, L] bool as in `attention_mask` -> like ``x``."""
        key, value = self.project_text(text)
        query = self.q_linear(x).flatten(1, -2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        out = attention(query, key, value, mask).transpose(1, 2)
        return self.proj(out.reshape(x.shape))

    @remembered("kv_linear")
    def project_text(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of [B, L, D], each [B, H, L, D/H]. From one sampling step to the next they are remembered.

        That takes twice the memory of the text for each block: 150 MB for STDiT3-XL/2 with 2 x 300 tokens in half precision.
        """
        key, value = self.kv_linear(text).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return key, value


def attended_text(text: Tensor, text_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Text [B, L, ...] without the padding at the end that no sample attends to, and its mask as attention takes it.

    The result is the same as with all of it, for less work. No mask is left if the prompts are equally long, as those of one
    prompt with and without guidance are.

    Args:
        text_mask: [B, L], True where there is a token. A prompt without a single token attends to all its padding.
    """
    mask = attention_mask(text_mask)
    if mask is None or not _is_readable(mask):
        return text, mask
    length = int(mask.flatten(1).any(dim=0).nonzero()[-1]) + 1 if len(mask) else text.shape[1]
    mask = mask[..., :length]
    return text[:, :length].contiguous(), None if mask.all() else mask  # a view would keep the padding in memory


def _is_readable(mask: Tensor) -> bool:
    """Whether its values may be looked at. In training on a GPU that would make each step wait for the one before it."""
    if mask.is_meta or is_rehearsed(mask) or torch.compiler.is_compiling():
        return False
    return mask.device.type == "cpu" or not torch.is_grad_enabled()


def attention_mask(text_mask: Tensor | None) -> Tensor | None:
    """[B, L] -> [B, 1, 1, L], as attention takes it. A prompt without a single token attends to its padding."""
    if text_mask is None:
        return None
    present = text_mask.bool()
    return (present | ~present.any(dim=1, keepdim=True))[:, None, None]
