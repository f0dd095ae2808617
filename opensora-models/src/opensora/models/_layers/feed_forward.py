"""The position-wise network of a block."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class FeedForward(nn.Module):
    """Linear, GELU (tanh approximation), linear."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., out]."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
