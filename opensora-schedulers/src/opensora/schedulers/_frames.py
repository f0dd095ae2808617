"""Given frames: which frames of a video a sampler leaves alone, and the mean of a loss over the others."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from attrs import frozen
from torch import Tensor

from opensora.core.conditioning import Conditioning
from opensora.core.errors import ConfigError, ShapeError

__all__ = ["FramePlan", "keep_given", "load_mask", "masked_mean", "split_channels"]


def masked_mean(values: Tensor, frame_mask: Tensor | None) -> Tensor:
    """[B, C, T, H, W] to the mean of each sample over its True frames, [B]; 0 for a sample without any."""
    frames = values.mean(dim=(1, 3, 4))  # [B, T]
    if frame_mask is None:
        return frames.mean(dim=1)
    return frames.where(frame_mask, 0).sum(dim=1) / frame_mask.sum(dim=1).clamp(min=1)


def keep_given(noised: Tensor, given: Tensor, frame_mask: Tensor | None) -> Tensor:
    """``noised`` where ``frame_mask`` [B, T] is True, ``given`` elsewhere; both [B, C, T, H, W]."""
    return noised if frame_mask is None else torch.where(frame_mask[:, None, :, None, None], noised, given)


def split_channels(output: Tensor, latents: Tensor) -> tuple[Tensor, Tensor | None]:
    """A denoiser's output as float32 (prediction [B, C, ...], variance values [B, C, ...] or None).

    Raises:
        ShapeError: ``output`` has neither C nor 2C channels.
    """
    channels = latents.shape[1]
    if output.shape[1] == channels:
        return output.float(), None
    if output.shape[1] == 2 * channels:
        prediction, variance_values = output.float().chunk(2, dim=1)
        return prediction, variance_values
    raise ShapeError(
        f"The denoiser returns {output.shape[1]} channels for latents of {channels}; "
        f"it must return {channels}, or {2 * channels} with variance values."
    )


def load_mask(frame_mask: Tensor | None, noise: Tensor) -> Tensor | None:
    """The mask of a sampling run, float64 on the CPU; None if it asks for nothing, that is, is 1 everywhere.

    Raises:
        ShapeError: It is not [B, T] of ``noise``.
        ConfigError: A value lies outside [0, 1].
    """
    if frame_mask is None:
        return None
    if frame_mask.shape != noise.shape[:3:2]:
        raise ShapeError(f"frame_mask is {list(frame_mask.shape)}; noise has [B, T] = {list(noise.shape[:3:2])}.")
    mask = frame_mask.detach().to("cpu", torch.float64)
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise ConfigError(
            f"frame_mask must lie in [0, 1], from keep to generate; got {mask.min():g} to {mask.max():g}."
        )
    return None if bool((mask == 1).all()) else mask


@frozen(eq=False)
class FramePlan:
    """What happens to which frames at each of S steps, settled beforehand so that no step waits for the device."""

    conditioning: Sequence[Conditioning]
    """[S]: what the denoiser is told. Steps between which nothing changes share one object (see `Guidance`)."""
    joins: Sequence[Tensor | None]
    """[S]: [B, 1, T, 1, 1] bool, frames that are noised to the step's level before it; None: no frame is."""
    moves: Tensor | None
    """[S, B, 1, T, 1, 1] bool, frames that the step changes. None: all, always."""

    @classmethod
    def free(cls, conditioning: Conditioning, num_steps: int) -> FramePlan:
        """All frames are generated."""
        return cls([conditioning] * num_steps, [None] * num_steps, None)

    @classmethod
    def masked(
        cls, conditioning: Conditioning, *, joins: Tensor, noisy: Tensor, moves: Tensor, like: Tensor
    ) -> FramePlan:
        """From bool [S, B, T] tables on the CPU: as the fields say; ``noisy``: what the denoiser is told to be so."""
        told = [conditioning.replace(frame_mask=noisy[0].to(like.device))]
        for before, now in pairwise(noisy):
            same = torch.equal(before, now)
            told.append(told[-1] if same else conditioning.replace(frame_mask=now.to(like.device)))
        joins_there, moves_there = (table[:, :, None, :, None, None].to(like.device) for table in (joins, moves))
        any_joins = joins.flatten(1).any(dim=1).tolist()
        return cls(told, [row if some else None for row, some in zip(joins_there, any_joins, strict=True)], moves_there)

    def keep(self, step: int, updated: Tensor, latents: Tensor) -> Tensor:
        """``updated`` in the frames that this step changes, ``latents``, bit for bit, in the others."""
        return updated if self.moves is None else torch.where(self.moves[step], updated, latents)
