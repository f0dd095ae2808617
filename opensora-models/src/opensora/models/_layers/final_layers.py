"""From tokens to the numbers of a patch.

Shapes: B batch, T frames, S tokens a frame, D width, O numbers a patch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from opensora.models._layers.modulation import FrameChoice, modulated_norm


class FinalLayer(nn.Module):
    """DiT's: shift and scale come from the conditioning vector by a linear layer."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """``x`` [B, ..., D], ``c`` [B, D] -> [B, ..., O]."""
        modulation = self.adaLN_modulation(c)
        shift, scale = modulation.reshape(len(x), *[1] * (x.dim() - 2), -1).chunk(2, dim=-1)
        return self.linear(modulated_norm(x, shift, scale))


class TableFinalLayer(nn.Module):
    """PixArt's and STDiT's: shift and scale are a learned table plus the timestep embedding."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.linear = nn.Linear(width, out)

    def forward(self, x: Tensor, t: Tensor, t_given: Tensor, choose: FrameChoice) -> Tensor:
        """``x`` [B, T, S, D]; embeddings [B, D] of the timestep and of timestep 0 -> [B, T, S, O].

        Given frames are modulated twice, by the timestep and then by timestep 0: so were the published weights trained.
        """
        x = self._modulate(x, t)
        return self.linear(choose(x, lambda: self._modulate(x, t_given)))

    def _modulate(self, x: Tensor, t: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + t[:, None, None, None]).unbind(dim=-2)  # [B, 1, 1, D] each
        return modulated_norm(x, shift, scale)
