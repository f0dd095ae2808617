"""Denoising in progress: a batch of videos on its way from noise to latents, to be watched, stopped, forked and changed.

    denoising = pipeline.start("a wave")
    for state in denoising:
        if state.step == 10:
            denoising.guidance_scale = 2.0
            other = denoising.fork(seeds=[7])
    latents = denoising.latents

Shapes: B batch, C latent channels, T H W latent frames and size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Self

import attrs
import torch
from attrs import define, field
from torch import Tensor

from opensora.core.attention import Kernel, sdpa, use_kernel
from opensora.core.conditioning import Conditioning
from opensora.core.errors import ConfigError
from opensora.core.hooking import Hooks
from opensora.core.protocols import Denoiser, SampleState, Scheduler
from opensora.core.randomness import Draws, SampleDraws, SampleKey

__all__ = ["Denoising"]


@define(kw_only=True, eq=False)
class Denoising:
    """An iterator over the states of one batch. Each step is made when it is asked for, so leaving the loop stops it.

    Raises:
        ConfigError: There is to be a guidance scale, but it is negative, or the scheduler's guidance has none.
    """

    scheduler: Scheduler
    guided: Denoiser
    """The denoiser under guidance."""
    denoiser: Denoiser
    """What the scheduler calls: ``guided``, inside the wrappers of hooks."""
    noise: Tensor
    """[B, C, T, H, W] standard normal, with the clean latents of given frames."""
    conditioning: Conditioning
    frame_mask: Tensor | None = None
    """[B, T] in [0, 1]: 1 is generated, 0 kept as given. None: all are generated."""
    keys: Sequence[SampleKey]
    """[B]: where each video's random numbers come from."""
    hooks: Hooks
    kernel: Kernel = sdpa
    """What computes attention."""
    state: SampleState | None = None
    """Of the last step that was made; None before the first."""
    _scale: float | None = field(default=None, alias="guidance_scale")
    _steps: Iterator[SampleState] | None = field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        if self._scale is not None:
            _check_guidance_scale(self.guided, self._scale)

    @property
    def draws(self) -> Draws:
        """Where the random numbers of the steps come from."""
        return SampleDraws(self.keys, self.noise.device)

    @property
    def guidance_scale(self) -> float:
        """The scale of classifier-free guidance; it may be changed between steps.

        Raises:
            ConfigError: When changing it: the scheduler's guidance has no scale, or the new one is negative.
        """
        return float(getattr(self.guided, "scale", 1.0)) if self._scale is None else self._scale

    @guidance_scale.setter
    def guidance_scale(self, scale: float) -> None:
        _check_guidance_scale(self.guided, scale)
        self._scale = scale

    @property
    def latents(self) -> Tensor:
        """[B, C, T, H, W] where denoising stands: after the last step, the result."""
        return self.noise if self.state is None else self.state.latents

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> SampleState:
        if self._is_done:
            raise StopIteration
        steps, self._steps = self._steps or self._begin(), None  # after an error, the next call tries the step again
        with torch.inference_mode(), use_kernel(self.kernel), self._scaled():
            self.hooks.denoising_step(denoising=self)
            self.state = next(steps)
        if not self._is_done:
            self._steps = steps
        return self.state

    @property
    def _is_done(self) -> bool:
        return self.state is not None and self.state.step + 1 >= self.state.num_steps

    def _begin(self) -> Iterator[SampleState]:
        """The steps that are left."""
        return self.scheduler.sample(
            self.denoiser,
            self.noise,
            self.conditioning,
            draws=self.draws,
            frame_mask=self.frame_mask,
            after=self.state,
        )

    def finish(self) -> Tensor:
        """Make the steps that are left, and return the latents."""
        for _ in self:
            pass
        return self.latents

    def fork(self, *, guidance_scale: float | None = None, seeds: Sequence[int] | None = None) -> Denoising:
        """Another denoising that goes on from where this one stands; both go on independently of each other.

        Args:
            guidance_scale: None: as here.
            seeds: [B], for the noise of the steps that are left, where the scheduler adds any. None: as here.

        Raises:
            ConfigError: The scale can't be had, or there aren't as many seeds as videos.
        """
        scale = self._scale if guidance_scale is None else guidance_scale
        keys = self.keys
        if seeds is not None:
            if len(seeds) != len(keys):
                raise ConfigError(f"There are {len(seeds)} seeds for {len(keys)} videos. Give one a video.")
            keys = [attrs.evolve(key, seed=seed) for key, seed in zip(keys, seeds, strict=True)]
        return attrs.evolve(self, guidance_scale=scale, keys=keys)

    @contextmanager
    def _scaled(self) -> Iterator[None]:
        """Lets the guidance, which others share, have this one's scale."""
        if self._scale is None:
            yield
            return
        before = self.guided.scale  # type: ignore[attr-defined]  # _check_guidance_scale has looked
        self.guided.scale = self._scale  # type: ignore[attr-defined]
        try:
            yield
        finally:
            self.guided.scale = before  # type: ignore[attr-defined]


def _check_guidance_scale(guided: Denoiser, scale: float) -> None:
    """Check that a guided denoiser can have this scale.

    Raises:
        ConfigError: It is negative, or the denoiser has none.
    """
    if not scale >= 0:
        raise ConfigError(f"guidance_scale is {scale}; it must be 0 or more.")
    if not hasattr(guided, "scale"):
        raise ConfigError("This scheduler's guidance has no scale that could be changed.")
