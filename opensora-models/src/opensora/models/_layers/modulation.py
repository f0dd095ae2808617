"""Scale, shift and gate of activations by what the timestep says (adaptive layer norm, https://arxiv.org/abs/2212.09748).

Shapes: B batch, T frames (1 where all frames share a vector), S tokens a frame, D width. Vectors broadcast: [B, T, 1, D] onto
[B, T, S, D], or [B, 1, D] onto [B, N, D].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora.models._layers.eager import runs_plainly

EPSILON = 1e-6


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``norm(x) * (1 + scale) + shift``, where norm is the layer norm over the last axis without learned weights."""
    if torch.is_grad_enabled() and runs_plainly(x, shift, scale) and x.dtype is shift.dtype is scale.dtype:
        return _ModulatedNorm.apply(x, shift, scale)[0]  # type: ignore[no-untyped-call]
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPSILON), 1 + scale)


class _ModulatedNorm(torch.autograd.Function):
    """Computes the norm again on the way back. To keep it would take a tenth of all memory for activations."""

    @staticmethod
    def forward(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normed, mean, inverse_deviation = torch.native_layer_norm(x, x.shape[-1:], None, None, EPSILON)
        return torch.addcmul(shift, normed, 1 + scale, out=normed), mean, inverse_deviation

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, shift, scale = inputs
        _, *statistics = output
        ctx.mark_non_differentiable(*statistics)
        ctx.save_for_backward(x, scale, *statistics)
        ctx.shift_shape = shift.shape

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, scale, mean, inverse_deviation = ctx.saved_tensors
        products = (x - mean).mul_(inverse_deviation).mul_(grad)
        for_norm = torch.mul(grad, 1 + scale)
        for_x, _, _ = torch.ops.aten.native_layer_norm_backward(
            for_norm, x, x.shape[-1:], mean, inverse_deviation, None, None, [True, False, False]
        )
        return for_x, grad.sum_to_size(ctx.shift_shape), products.sum_to_size(scale.shape)


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
