"""The loop that samples: through given noise levels, by a solver's weights, with given frames left in place.

Shapes: B batch, C latent channels, T H W latent frames and size, S steps between S + 1 levels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from attrs import frozen
from torch import Tensor

from opensora.core.conditioning import Conditioning
from opensora.core.errors import ConfigError, ShapeError
from opensora.core.protocols import Denoiser, SampleState
from opensora.core.randomness import Draws
from opensora.schedulers._frames import FramePlan, load_mask, split_channels
from opensora.schedulers.solvers import Levels, StepWeights

__all__ = ["Foresee", "Sampler", "from_clean", "from_noise", "from_velocity", "resume"]


class Foresee(Protocol):
    """Turns what a denoiser predicts into the clean latents that it stands for."""

    def __call__(self, prediction: Tensor, latents: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """[B, C, T, H, W], from prediction and latents of that shape, and the level's shares [B, 1, 1, 1, 1]."""
        ...


def from_velocity(prediction: Tensor, latents: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Of a denoiser that predicts clean - noise, for a flow: alpha + sigma = 1."""
    return latents + sigma * prediction


def from_noise(prediction: Tensor, latents: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Of a denoiser that predicts the noise."""
    return (latents - sigma * prediction) / alpha


def from_clean(prediction: Tensor, latents: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Of a denoiser that predicts just them."""
    return prediction


@frozen(kw_only=True, eq=False)
class Sampler:
    """Goes from noise to data, for schedulers whose denoiser predicts one thing at each level."""

    levels: Levels
    weights: StepWeights
    """What a solver makes of ``levels``."""
    foresee: Foresee
    """What the denoiser's prediction stands for."""

    @torch.no_grad()
    def sample(
        self,
        denoiser: Denoiser,
        noise: Tensor,
        conditioning: Conditioning,
        *,
        draws: Draws,
        frame_mask: Tensor | None = None,
        after: SampleState | None = None,
    ) -> Iterator[SampleState]:
        """See `Scheduler.sample`.

        A frame of mask r stays as given, bit for bit, until the timestep has come down to that share of the first. It is then
        noised to that timestep with the draw "join <step>" and denoised with the rest; a solver goes on from there as if the
        denoiser had always foreseen what it does then. Solvers that add noise draw "step <step>". ``SampleState.timestep`` is
        the largest of the batch.

        Raises:
            ShapeError: The denoiser's output does not fit the latents, ``frame_mask`` is not [B, T], or ``after`` is of
                another shape.
            ConfigError: ``frame_mask`` leaves [0, 1], or ``after`` is of a run of another number of steps.
        """
        levels, weights = self.levels.on(noise.device), self.weights.on(noise.device)
        first, latents = resume(after, noise, num_steps=levels.num_steps)
        frames = self._plan_frames(load_mask(frame_mask, noise), conditioning, noise)
        memory = () if after is None else after.memory

        def foresee(latents: Tensor, level: int, step: int) -> Tensor:
            timestep = levels.timesteps[level].expand(len(latents))
            prediction, _ = split_channels(denoiser(latents, timestep, frames.conditioning[step]), latents)
            denoised = self.foresee(prediction, latents, levels.alphas[level], levels.sigmas[level])
            return frames.keep(step, denoised, latents)

        for step in range(first, levels.num_steps):
            if (joins := frames.joins[step]) is not None:
                fresh = draws.normal(f"join {step}", latents.shape[1:])
                latents = torch.where(joins, levels.alphas[step] * latents + levels.sigmas[step] * fresh, latents)
            denoised = foresee(latents, step, step)
            if joins is not None:
                memory = tuple(torch.where(joins, denoised, past) for past in memory)
            predictions = (denoised, *memory)
            updated = frames.keep(step, weights.sum(step, latents, predictions), latents)
            if weights.again is not None and weights.is_twice[step]:
                ahead = foresee(updated, step + 1, step)
                updated = frames.keep(step, weights.again.sum(step, latents, (ahead, *predictions)), latents)
            if weights.noise is not None and weights.is_noisy[step]:
                fresh = draws.normal(f"step {step}", latents.shape[1:])
                updated = frames.keep(step, updated + weights.noise[step] * fresh, latents)
            latents, memory = updated, predictions[: weights.num_remembered]
            yield SampleState(
                step=step,
                num_steps=levels.num_steps,
                timestep=self.levels.timesteps[step].max().item(),
                latents=latents,
                denoised=denoised,
                memory=memory,
            )

    def _plan_frames(self, mask: Tensor | None, conditioning: Conditioning, noise: Tensor) -> FramePlan:
        if mask is None:
            return FramePlan.free(conditioning, self.levels.num_steps)
        # A millionth of slack: a float32 0.95 is a little less than 0.95 and yet means the step at 0.95 of the way.
        shares = self.levels.timesteps[:-1] / self.levels.timesteps[:1]  # [S, B]
        active = (mask + 1e-6 >= shares[:, :, None]) & (mask > 0)  # [S, B, T]
        was_active = torch.cat([(mask == 1)[None], active[:-1]])
        return FramePlan.masked(conditioning, joins=active & ~was_active, noisy=active, moves=active, like=noise)


def resume(after: SampleState | None, noise: Tensor, *, num_steps: int) -> tuple[int, Tensor]:
    """The step with which a sampler begins, and the float32 latents that it begins with.

    Raises:
        ConfigError: ``after`` is of a run of another number of steps.
        ShapeError: ``after`` and ``noise`` differ in shape.
    """
    if after is None:
        return 0, noise.float()
    if after.num_steps != num_steps:
        raise ConfigError(
            f"Can't go on after step {after.step + 1} of {after.num_steps}: this scheduler takes {num_steps} steps. "
            f"Set num_sampling_steps={after.num_steps}."
        )
    if after.latents.shape != noise.shape:
        raise ShapeError(f"The state to go on from holds {list(after.latents.shape)}; noise is {list(noise.shape)}.")
    return after.step + 1, after.latents
