"""The position-wise network of a block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora.models._layers.linear import Linear


class FeedForward(nn.Module):
    """Linear, GELU (tanh approximation), linear."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., out]."""
        hidden = self.fc1(x)
        if torch.is_grad_enabled():
            return self.fc2(F.gelu(hidden, approximate="tanh"))
        return self.fc2(torch.ops.aten.gelu_(hidden, approximate="tanh"))  # in place: this is where memory peaks
