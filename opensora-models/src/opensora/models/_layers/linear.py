"""Linear layers, with the fastest matrix product that torch has for the machine."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora.models._layers.eager import runs_plainly

SMALLEST = 2**17
"""Weights below this are left to `F.linear`, whose call costs less."""


class Linear(nn.Linear):
    """`nn.Linear` that in float32 on a CPU calls oneDNN, as torch does by itself in half precision only.

    Where the two were compared (AMD EPYC, AVX-512, 2 threads), oneDNN did 210 GFLOP/s and MKL, torch's own choice, 185.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if not _suits_onednn(x, self.weight):
            return F.linear(x, self.weight, self.bias)
        if torch.is_grad_enabled():
            return _OneDNN.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return _product(x, self.weight, self.bias)


def gelu_of(layer: nn.Module, x: Tensor) -> Tensor:
    """GELU (tanh approximation) of ``layer(x)``, without a second copy of it in memory when gradients are off."""
    if torch.is_grad_enabled():
        return F.gelu(layer(x), approximate="tanh")
    if (
        type(layer) is Linear
        and _suits_onednn(x, layer.weight)
        and not (layer._forward_hooks or layer._forward_pre_hooks)
    ):
        return _product(x, layer.weight, layer.bias, "gelu", "tanh")
    return torch.ops.aten.gelu_(layer(x), approximate="tanh")


class _OneDNN(torch.autograd.Function):
    """The product with its derivatives; the op itself has none."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _product(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            _product(grad, weight.t(), None) if needs_x else None,
            rows.t() @ x.flatten(0, -2) if needs_weight else None,  # here MKL is as fast
            rows.sum(0) if needs_bias else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, then: str = "none", variant: str = "") -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, then, [], variant)


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        _IS_FASTER
        and x.dtype is weight.dtype is torch.float32
        and weight.numel() >= SMALLEST
        and x.is_cpu
        and weight.is_cpu
        and x.dim() > 1
        and runs_plainly(x, weight)
    )


_IS_FASTER = (
    torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
