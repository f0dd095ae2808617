"""The one function through which every model attends. What computes it is chosen from outside, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor

__all__ = ["Kernel", "attention", "current_kernel", "sdpa", "use_kernel"]

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(query, key, value, mask) -> output, shaped as in `attention`; a component of kind ``attention``."""


def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Torch's scaled dot product attention, which chooses among its own kernels (flash and memory-efficient among them)."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


_kernels: list[Kernel] = [sdpa]  # the last one serves; no ContextVar, since backward recomputes blocks in other threads


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention with scale 1 / sqrt(D).

    Args:
        query: [B, H, N, D].
        key: [B, H, L, D].
        value: [B, H, L, D].
        mask: Bool with four axes, broadcastable to [B, H, N, L]; True = attend. None: attend to all. Each row needs one True.

    Returns:
        [B, H, N, D].
    """
    return _kernels[-1](query, key, value, mask)


def current_kernel() -> Kernel:
    """What computes attention now: for kernels that stand around another."""
    return _kernels[-1]


@contextmanager
def use_kernel(kernel: Kernel) -> Iterator[None]:
    """Let ``kernel`` compute all attention inside the block, in every thread."""
    _kernels.append(kernel)
    try:
        yield
    finally:
        _kernels.pop()
