"""Scale, shift and gate of activations by what the timestep says (adaptive layer norm, https://arxiv.org/abs/2212.09748).

Shapes: B batch, T frames (1 where all frames share a vector), S tokens a frame, D width. Vectors broadcast: [B, T, 1, D] onto
[B, T, S, D], or [B, 1, D] onto [B, N, D].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def layer_norm(x: Tensor) -> Tensor:
    """Layer norm over the last axis without learned weights."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``x * (1 + scale) + shift`` in one pass over ``x``."""
    return torch.addcmul(shift, x, 1 + scale)


def add_gated(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """``x + gate * branch`` in one pass over ``x``."""
    return torch.addcmul(x, gate, branch)


class FrameChoice:
    """Chooses per frame between what holds for the timestep and what holds for timestep 0.

    Frames that are given (image to video, video continuation) are clean, so they are treated as having timestep 0. This is
    the one place where models know about that.
    """

    def __init__(self, frame_mask: Tensor | None, patch_frames: int) -> None:
        """``frame_mask`` as in `Conditioning`, [B, latent frames]. A token is given if all the frames it covers are."""
        if frame_mask is not None and patch_frames > 1:
            padded = F.pad(frame_mask, (0, -frame_mask.shape[1] % patch_frames))
            frame_mask = torch.unflatten(padded, 1, (-1, patch_frames)).any(dim=-1)
        self._denoised = None if frame_mask is None else frame_mask[:, :, None, None]  # [B, T, 1, 1]

    def __call__(self, denoised: Tensor, given: Callable[[], Tensor]) -> Tensor:
        """[B, T, ., D]: ``denoised`` or, in given frames, what ``given`` returns. It is called only if there can be any."""
        return denoised if self._denoised is None else torch.where(self._denoised, denoised, given())


class DropPath(nn.Module):
    """Leave a residual branch out for whole samples in training, by zeroing its gate (https://arxiv.org/abs/1603.09382).

    Draws from torch's global generator, as dropout does.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, gate: Tensor) -> Tensor:
        """[B, ...] -> the same; gates that stay are scaled up to keep the mean."""
        if not self.training or self.probability == 0:
            return gate
        keep = 1 - self.probability
        kept = torch.empty(len(gate), *[1] * (gate.dim() - 1), dtype=gate.dtype, device=gate.device).bernoulli_(keep)
        return gate * kept / keep
