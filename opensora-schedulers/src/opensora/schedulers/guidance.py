"""Classifier-free guidance: a denoiser made of a denoiser, so that no sampler knows of it.

Sources: Ho and Salimans, https://arxiv.org/abs/2207.12598, eq. 6, with scale = 1 + w; Kynkäänniemi et al.,
https://arxiv.org/abs/2404.07724 (in an interval); Lin et al., https://arxiv.org/abs/2305.08891, section 3.4 (rescaled).

Shapes: B batch, C latent channels, T H W latent frames and size.
"""

from __future__ import annotations

import logging
import math
from functools import cached_property
from typing import Any
from weakref import ref

import torch
from attrs import define, field, frozen
from attrs.validators import ge, gt, le, optional
from torch import Tensor

from opensora.core.conditioning import Conditioning
from opensora.core.errors import ConfigError, ShapeError
from opensora.core.protocols import Denoiser

__all__ = ["Guidance", "GuidanceSpec", "guide", "rescale_guidance"]

log = logging.getLogger(__name__)

_SLACK = 1e-6
"""Of an interval's ends: a float32 timestep of 300 is a little more than 0.3 of 1000."""


def _check_scale(instance: Any, attribute: Any, scale: float) -> None:
    if not 0 <= scale < math.inf:
        raise ConfigError(
            f"The guidance scale (cfg_scale) is {scale:g}; it must be a number from 0 up. 1 is no guidance."
        )


def _check_interval(instance: Any, attribute: Any, interval: tuple[float, float] | None) -> None:
    if interval is None:
        return
    low, high = interval
    if not 0 <= low < high <= 1:
        raise ConfigError(
            f"cfg_interval is ({low:g}, {high:g}); it must be two rising shares of the way in [0, 1], the end of little "
            "noise first, such as (0.2, 0.8). None guides at all steps."
        )


@frozen(kw_only=True)
class GuidanceSpec:
    """Options of classifier-free guidance, that all schedulers have."""

    cfg_scale: float = field(default=4.0, validator=_check_scale)
    """Classifier-free guidance: 1 is off and takes half the time; usual are 4 to 7, more follows the prompt closer."""
    cfg_channel: int | None = field(default=None, validator=optional(gt(0)))
    """How many leading channels are guided; None: all of the latents'. Open-Sora 1.0 and its configs use 3 of 4."""
    cfg_interval: tuple[float, float] | None = field(default=None, validator=_check_interval)
    """Guide between these shares of num_timesteps only, 0 being data, 1 noise: (0.2, 0.8). Other steps take half the time. At
    low noise guidance overdoes more than it decides; at high noise it costs variety. None: always."""
    cfg_rescale: float = field(default=0.0, validator=[ge(0), le(1)])
    """Against overexposed results of a high cfg_scale: how far the guided prediction is scaled back to the spread of the
    conditional one. 0 is off, 0.7 usual, 1 all the way."""
    cfg_batched: bool | None = None
    """True: both halves of guidance in one call of the denoiser. False: in two calls, with half the memory. None: in one,
    and in two as soon as the memory does not suffice."""


def guide(denoiser: Denoiser, spec: GuidanceSpec, *, num_timesteps: int) -> Guidance:
    """``denoiser`` under the guidance that ``spec`` asks for.

    Args:
        num_timesteps: The scale of the timesteps that the denoiser is told.
    """
    return Guidance(
        denoiser,
        scale=spec.cfg_scale,
        channels=spec.cfg_channel,
        interval=spec.cfg_interval,
        rescale=spec.cfg_rescale,
        batched=spec.cfg_batched,
        num_timesteps=num_timesteps,
    )


@frozen(eq=False)
class _Branches:
    """The conditions of both halves of guidance."""

    positive: Conditioning
    """[B]"""
    null: Conditioning
    """[B], with the negative text, or the null."""

    @cached_property
    def joined(self) -> Conditioning:
        """[2B], conditional first."""
        return Conditioning.cat([self.positive, self.null])


@define(eq=False)
class Guidance:
    """Calls a denoiser with and without the condition, and pushes the prediction away from the latter.

    Where guidance changes nothing, at scale 1 or outside the interval, only the conditional half is run. The conditions of
    both halves are made once per conditioning, not once per step: as long as a sampler passes the same object, so does this,
    and a denoiser can keep what it made of it. They are let go with that object.
    """

    denoiser: Denoiser
    """Replaces text or labels by its null where ``conditioning.dropped``."""
    scale: float = field(kw_only=True, validator=_check_scale)
    """1 is the conditional prediction, 0 the unconditional; more follows the prompt more closely. May be changed."""
    channels: int | None = field(default=None, kw_only=True)
    """How many leading channels are guided. The rest, variance values among them, are the conditional ones. None: as many as
    the latents have."""
    interval: tuple[float, float] | None = field(default=None, kw_only=True, validator=_check_interval)
    """The shares of ``num_timesteps`` between which guidance is on, both ends included. None: always."""
    rescale: float = field(default=0.0, kw_only=True)
    """See `rescale_guidance`."""
    batched: bool | None = field(default=None, kw_only=True)
    """Whether both halves are run in one call; None: until the memory does not suffice, which is logged."""
    num_timesteps: int = field(default=1000, kw_only=True)
    """The scale of the timesteps."""
    _kept: tuple[ref[Conditioning], _Branches] | None = field(default=None, init=False)

    def __call__(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """As `Denoiser.__call__`.

        Raises:
            ShapeError: The conditioning is not of as many samples as the latents, or there are fewer than ``channels``.
        """
        branches = self._branches(conditioning)
        inside = self._inside(timestep)  # [B], or None for all; only an interval makes a step wait for the device
        if self.scale == 1 or (inside is not None and not inside.any()):
            return self.denoiser(latents, timestep, branches.positive)
        self._check(latents, conditioning)
        prediction, null = self._predict(latents, timestep, branches)  # [B, C or 2C, T, H, W] each
        channels = latents.shape[1] if self.channels is None else self.channels
        conditional = prediction[:, :channels]
        guided = null[:, :channels] + self.scale * (conditional - null[:, :channels])
        if self.rescale:
            guided = rescale_guidance(guided, conditional, self.rescale, frame_mask=conditioning.frame_mask)
        if inside is not None:
            guided = torch.where(inside[:, None, None, None, None], guided, conditional)
        return torch.cat([guided, prediction[:, channels:]], dim=1)

    def _inside(self, timestep: Tensor) -> Tensor | None:
        """Which samples are within the interval; they differ where each has timesteps of its own."""
        if self.interval is None:
            return None
        low, high = self.interval
        share = timestep / self.num_timesteps
        return (share >= low - _SLACK) & (share <= high + _SLACK)

    def _predict(self, latents: Tensor, timestep: Tensor, branches: _Branches) -> tuple[Tensor, Tensor]:
        """Conditional prediction and null prediction."""
        if self.batched is not False:
            try:
                both = self.denoiser(torch.cat([latents, latents]), timestep.repeat(2), branches.joined)
                conditional, null = both.chunk(2)
                return conditional, null
            except torch.OutOfMemoryError:
                if self.batched:
                    raise
            # Beyond the handler, where what the failed call held is free again.
            self.batched, self._kept = False, None
            branches = _Branches(branches.positive, branches.null)
            log.warning(
                "Not enough memory to guide %d samples in one call. From now on it takes two, as with cfg_batched=False.",
                len(latents),
            )
        conditional = self.denoiser(latents, timestep, branches.positive)
        return conditional, self.denoiser(latents, timestep, branches.null)

    def _branches(self, conditioning: Conditioning) -> _Branches:
        if self._kept is None or self._kept[0]() is not conditioning:
            owner = ref(self)  # lest the two hold each other

            def forget(dead: ref[Conditioning]) -> None:
                guidance = owner()
                if guidance is not None and guidance._kept is not None and guidance._kept[0] is dead:
                    guidance._kept = None

            # Copies, even where nothing is changed: the object itself, kept here, would never be let go.
            branches = _Branches(conditioning.positive(), conditioning.unconditional())
            self._kept = ref(conditioning, forget), branches
        return self._kept[1]

    def _check(self, latents: Tensor, conditioning: Conditioning) -> None:
        if self.channels is not None and self.channels > latents.shape[1]:
            raise ShapeError(
                f"Guidance of {self.channels} channels (cfg_channel), but the latents have {latents.shape[1]}."
            )
        if len(conditioning) != len(latents):
            raise ShapeError(
                f"Guidance needs a condition per sample to drop: {len(latents)} latents, {len(conditioning)} conditions. "
                "Without conditions set cfg_scale = 1."
            )


def rescale_guidance(guided: Tensor, conditional: Tensor, share: float, *, frame_mask: Tensor | None = None) -> Tensor:
    """Scale each sample's guided prediction towards the spread of the conditional one, which guidance exceeds.

    Args:
        guided: [B, C, T, H, W].
        conditional: As ``guided``.
        share: How far, from 0 (not at all) to 1.
        frame_mask: [B, T] bool: what is predicted in frames that are given (False) does not count.

    Source: Lin et al., https://arxiv.org/abs/2305.08891, eq. 15 and 16.
    """
    factor = _spread(conditional, frame_mask) / _spread(guided, frame_mask).clamp(min=1e-12)
    return guided * (1 - share + share * factor)


def _spread(prediction: Tensor, frame_mask: Tensor | None) -> Tensor:
    """Standard deviation of each sample, [B, 1, 1, 1, 1]."""
    axes = (1, 2, 3, 4)
    if frame_mask is None:
        return prediction.std(dim=axes, keepdim=True, correction=0)
    counts = frame_mask[:, None, :, None, None].expand_as(prediction)
    total = counts.sum(dim=axes, keepdim=True).clamp(min=1)
    mean = prediction.where(counts, 0).sum(dim=axes, keepdim=True) / total
    return ((prediction - mean).square().where(counts, 0).sum(dim=axes, keepdim=True) / total).sqrt()
