"""Layers that work on large frames tile by tile, for less memory.

A layer's input and output are there as a whole; what lies between (normalised, activated, padded, enlarged) only ever for one
tile. Tiles see the same neighbours and the same statistics of the whole frame as without, so the result is the same
but for rounding. That matters: normalising each tile by itself, which would save more, shifts colours and blurs edges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor, nn

Conv = nn.Conv2d | nn.Conv3d


@frozen
class Tile:
    """One tile, and what of its neighbourhood a 3x3 convolution sees."""

    own: tuple[slice, slice]
    """Rows and columns of the tile."""
    seen: tuple[slice, slice]
    """Those and one more on each side, as far as there is one."""
    zeros: tuple[int, int, int, int]
    """Where there is none: left, right, top, bottom, as `F.pad` takes them."""


def norm_act_conv(
    x: Tensor,
    norm: nn.GroupNorm,
    activation: Callable[[Tensor], Tensor],
    conv: Conv,
    *,
    tile: int,
    frames_before: int = 0,
    skip: Tensor | None = None,
    shortcut: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """``conv(activation(norm(x)))``, plus ``shortcut(skip)``.

    Args:
        x: [B, C, (T,) H, W].
        conv: Of kernel 1 or 3 and stride 1 in height and width, padded to keep the size.
        tile: Side of a tile.
        frames_before: Zeros that are put before the first frame.
        skip: Without gradients and shortcut, the sum takes its place: nobody needs the input of a residual block any more.
        shortcut: Pointwise. None: nothing but the sum.
    """
    scale, shift = _affine(x, norm)
    is_free = isinstance(shortcut, nn.Identity | None) and not torch.is_grad_enabled()

    def function(tile: Tile) -> Tensor:
        h = activation(torch.addcmul(shift, x[..., *tile.seen].to(scale.dtype), scale).to(x.dtype))
        y = _conv(F.pad(h, (*tile.zeros, *([frames_before, 0] if x.ndim == 5 else []))), conv)
        return y if skip is None else y + (shortcut or nn.Identity())(skip[..., *tile.own])

    return _assemble(function, x, tile, margin=conv.kernel_size[-1] // 2, into=skip if is_free else None)


def double_size_conv(x: Tensor, conv: nn.Conv2d, *, tile: int) -> Tensor:
    """``conv``, of kernel 3, of ``x`` [B, C, H, W] enlarged to [B, C, 2H, 2W]."""

    def function(tile: Tile) -> Tensor:
        large = F.interpolate(x[..., *tile.seen], scale_factor=2.0, mode="nearest")
        return _conv(F.pad(large, [1 if side else -1 for side in tile.zeros]), conv)  # of what is seen, one too many

    return _assemble(function, x, tile, margin=1, enlarge=2)


def _assemble(
    function: Callable[[Tile], Tensor],
    x: Tensor,
    tile: int,
    *,
    margin: int,
    enlarge: int = 1,
    into: Tensor | None = None,
) -> Tensor:
    """The results for all tiles of ``x`` in their places; in those of ``into``, if that is given."""
    height, width = x.shape[-2:]
    whole = torch.empty(0) if into is None else into
    for each in _tiles(height, width, tile, margin):
        part = function(each)
        if not whole.numel():
            whole = part.new_empty(*part.shape[:-2], height * enlarge, width * enlarge)
        rows, columns = (slice(side.start * enlarge, side.stop * enlarge) for side in each.own)
        whole[..., rows, columns] = part
    return whole


def _tiles(height: int, width: int, tile: int, margin: int) -> Iterator[Tile]:
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            bottom, right = min(top + tile, height), min(left + tile, width)
            yield Tile(
                own=(slice(top, bottom), slice(left, right)),
                seen=(
                    slice(max(top - margin, 0), min(bottom + margin, height)),
                    slice(max(left - margin, 0), min(right + margin, width)),
                ),
                zeros=(
                    margin * (left == 0),
                    margin * (right == width),
                    margin * (top == 0),
                    margin * (bottom == height),
                ),
            )


def _conv(x: Tensor, conv: Conv) -> Tensor:
    """``conv`` without its padding."""
    function = F.conv2d if isinstance(conv, nn.Conv2d) else F.conv3d
    return function(x, conv.weight, conv.bias, stride=conv.stride)


def _affine(x: Tensor, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """Float32 scale and shift, each [B, C, (1,) 1, 1], that normalise the whole of ``x``."""
    batch, channels = x.shape[:2]
    groups = x.reshape(batch * norm.num_groups, -1).chunk(8)  # so that float32 copies are made in turn
    moments = [torch.var_mean(group.float(), dim=1, correction=0) for group in groups]
    var, mean = (torch.cat(each).view(batch, norm.num_groups, 1) for each in zip(*moments, strict=True))
    weight, bias = (each.float().view(1, norm.num_groups, -1) for each in (norm.weight, norm.bias))
    scale = weight * torch.rsqrt(var + norm.eps)
    shape = (batch, channels, *[1] * (x.ndim - 2))
    return scale.reshape(shape), (bias - mean * scale).reshape(shape)
