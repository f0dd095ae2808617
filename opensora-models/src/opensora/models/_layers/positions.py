"""Where a token is: sine and cosine tables that are added, and rotations of queries and keys.

Shapes: B batch, H heads, N tokens along the attended axis, D width (of a head, for rotations), h w token grid.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def sincos_1d(width: int, positions: Tensor) -> Tensor:
    """Sines, then cosines of ``positions`` [N] at width/2 frequencies from 1 down to 1/10000: [N, width], in their dtype."""
    half = width // 2
    omega = 10000 ** -(torch.arange(half, dtype=positions.dtype, device=positions.device) / half)
    angles = positions[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def sincos_2d(width: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Table for a grid with the given coordinates: [h*w, width]; the first half of the channels tells the column.

    Only h + w rows of sines are computed, so that a table costs no more than a copy.
    """
    h, w = len(rows), len(columns)
    column_part = sincos_1d(width // 2, columns)[None, :].expand(h, w, -1)
    row_part = sincos_1d(width // 2, rows)[:, None].expand(h, w, -1)
    return torch.cat([column_part, row_part], dim=-1).flatten(0, 1)


def grid_coordinates(
    length: int,
    *,
    scale: float | Tensor = 1.0,
    base_size: int | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Coordinates 0, 1, 2, .. of tokens, divided by ``scale`` and stretched as if there were ``base_size`` of them: [N].

    Args:
        scale: A 0-d tensor keeps a size that is only known on the device from having to be read back.
        base_size: None leaves the spacing as it is.
    """
    coordinates = torch.arange(length, dtype=torch.float32, device=device) / scale
    return coordinates if base_size is None else coordinates * base_size / length


def spatial_table(width: int, h: int, w: int, *, scale: float = 1.0, base_size: int | None = None) -> Tensor:
    """Fixed table of a model that knows its size, [h*w, width]: computed in float64, returned in float32."""
    rows = grid_coordinates(h, scale=scale, base_size=base_size).double()
    columns = grid_coordinates(w, scale=scale, base_size=base_size).double()
    return sincos_2d(width, rows, columns).float()


def temporal_table(width: int, num_frames: int, *, scale: float = 1.0) -> Tensor:
    """Fixed table over frames, [num_frames, width]: computed in float64, returned in float32."""
    return sincos_1d(width, torch.arange(num_frames, dtype=torch.float64) / scale).float()


class RotaryEmbedding(nn.Module):
    """Angles by which queries and keys turn with their position (RoFormer, https://arxiv.org/abs/2104.09864, eq. 34)."""

    def __init__(self, head_width: int) -> None:
        super().__init__()
        self.freqs = nn.Parameter(rotary_frequencies(head_width), requires_grad=False)

    def forward(self, length: int) -> Tensor:
        """Rotations of positions 0 .. length-1: [N, D/2] complex64."""
        freqs: Tensor = self.freqs
        if freqs.dtype != torch.float32:  # rounded when the model was cast: late frames would be off by 0.1 radians
            freqs = rotary_frequencies(2 * len(freqs), device=freqs.device)
        angles = torch.arange(length, dtype=torch.float32, device=freqs.device)[:, None] * freqs
        return torch.polar(torch.ones_like(angles), angles)


def rotary_frequencies(head_width: int, *, device: torch.device | None = None) -> Tensor:
    """Radians a position, from 1 down to 1/10000: [D/2] float32."""
    exponents = torch.arange(0, head_width, 2, dtype=torch.float32, device=device) / head_width
    return 1.0 / 10000**exponents


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Turn neighbouring channels (2i, 2i+1) of [B, H, N, D] by ``rotations`` [N, D/2], in float32.

    As complex numbers, one pass over memory: on a CPU eight times faster than with halves picked apart.
    """
    pairs = torch.view_as_complex(torch.unflatten(x.float(), -1, (-1, 2)))
    return torch.view_as_real(pairs * rotations).flatten(-2).to(x.dtype)
