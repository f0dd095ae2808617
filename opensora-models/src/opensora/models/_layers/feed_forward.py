"""The position-wise network of a block."""

from __future__ import annotations

from torch import Tensor, nn

from opensora.models._layers.linear import Linear, gelu_of


class FeedForward(nn.Module):
    """Linear, GELU (tanh approximation), linear."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., out]."""
        return self.fc2(gelu_of(self.fc1, x))
