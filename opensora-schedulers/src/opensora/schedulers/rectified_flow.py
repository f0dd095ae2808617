"""Rectified flow: straight paths between data and noise, learned as a velocity and followed step by step.

Sources: Liu et al., https://arxiv.org/abs/2209.03003 (paths, loss); Esser et al., Stable Diffusion 3,
https://arxiv.org/abs/2403.03206 (logit-normal timesteps, eq. 19; shift by size, eq. 23).

Shapes: B batch, C latent channels, T H W latent frames and size, S steps, N ``num_timesteps``. With u = timestep / N,
u = 0 is data and u = 1 is noise; velocity = data - noise points towards the data.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from attrs import field, frozen
from attrs.validators import and_, ge, gt, in_, le
from torch import Tensor

from opensora.core.conditioning import Conditioning
from opensora.core.errors import ConfigError, ShapeError
from opensora.core.protocols import Denoiser, SampleState
from opensora.core.randomness import Draws
from opensora.schedulers._frames import keep_given, masked_mean, split_channels
from opensora.schedulers.guidance import Guidance, GuidanceSpec, guide
from opensora.schedulers.loss_weights import FLOW_WEIGHTS, flow_weights
from opensora.schedulers.sampling import Sampler, from_velocity
from opensora.schedulers.solvers import NOISY_SOLVERS, SOLVERS, Levels

__all__ = ["RectifiedFlow", "RectifiedFlowSpec", "published_latent_frames", "shift_for_size", "shift_timestep"]


@frozen(kw_only=True)
class RectifiedFlowSpec(GuidanceSpec):
    """Options of `RectifiedFlow`."""

    num_sampling_steps: int = field(default=10, validator=gt(0))
    """Steps of the solver. The cost of sampling grows with it; usual are 10 to 50, 30 in Open-Sora 1.2."""
    solver: Literal["euler", "euler-ancestral", "heun", "dpm++2m", "dpm++3m", "dpm++2m-sde", "unipc"] = field(
        default="euler", validator=in_(tuple(SOLVERS))
    )
    """How steps are taken. euler as in Open-Sora; unipc is more exact at the same cost; heun takes two calls a step;
    euler-ancestral and dpm++2m-sde add noise on the way."""
    eta: float = field(default=1.0, validator=and_(ge(0), le(1)))
    """How much noise euler-ancestral and dpm++2m-sde add: 0 is none."""
    sampling_shift: float = field(default=1.0, validator=gt(0))
    """Above 1, sampling takes shorter steps at high noise and longer ones near the data. 2 or 3 is better with few steps if
    most is decided at high noise."""
    num_timesteps: int = field(default=1000, validator=gt(0))
    """Scale of the timesteps that the denoiser is told. Pretrained models want 1000."""
    use_discrete_timesteps: bool = False
    """Whole-numbered timesteps, in training and sampling."""
    use_timestep_transform: bool = False
    """Move timesteps towards noise for larger and longer videos, in training and sampling."""
    sample_method: Literal["uniform", "logit-normal"] = field(
        default="uniform", validator=in_(("uniform", "logit-normal"))
    )
    """How training draws timesteps: evenly, or more often in the middle, where the task is harder."""
    loc: float = 0.0
    """Mean of the normal behind logit-normal; above 0 means more noise."""
    scale: float = field(default=1.0, validator=gt(0))
    """Standard deviation of the normal behind logit-normal."""
    loss_weighting: Literal["none", "min-snr", "cosmap"] = field(default="none", validator=in_(FLOW_WEIGHTS))
    """What each timestep counts in the loss. min-snr: as the error of the clean latents would count, but no more than at
    signal to noise ratio min_snr_gamma; cosmap: more in the middle, up to 1.27, and 0.64 at both ends."""
    min_snr_gamma: float = field(default=5.0, validator=gt(0))
    """Of min-snr; 5 is usual."""
    transform_scale: float = field(default=1.0, validator=gt(0))
    """Further factor of the timestep transform in training; above 1 means more noise. In sampling it is always 1."""

    def __attrs_post_init__(self) -> None:
        if self.use_discrete_timesteps and self.sample_method == "logit-normal":
            raise ConfigError(
                'sample_method="logit-normal" draws fractional timesteps, so it excludes use_discrete_timesteps=True. '
                'Drop one of them, or use sample_method="uniform".'
            )
        if self.use_discrete_timesteps and self.num_sampling_steps > self.num_timesteps:
            raise ConfigError(
                f"num_sampling_steps={self.num_sampling_steps} is more than there are whole-numbered timesteps "
                f"(num_timesteps={self.num_timesteps}). Take fewer steps, or set use_discrete_timesteps=False."
            )


def shift_timestep(timestep: Tensor, shift: Tensor | float, *, num_timesteps: int = 1000) -> Tensor:
    """Move timesteps towards noise.

    Args:
        timestep: [..., B], in [0, num_timesteps]. Not modified; the result has its dtype, and the same ends.
        shift: [B], or one for all. 1 is none; above 1, steps become shorter at noise and longer at the data.
        num_timesteps: N.

    Source: Stable Diffusion 3, https://arxiv.org/abs/2403.03206, eq. 23.
    """
    u = timestep / num_timesteps
    # Over r u + (1 - u), not 1 + (r - 1) u: the same, but exactly 1 at u = 1, so that mask 1 joins at the first step.
    return shift * u / (shift * u + (1 - u)) * num_timesteps


def shift_for_size(num_pixels: Tensor, latent_frames: Tensor) -> Tensor:
    """The shift for larger and longer videos, which keep more signal at the same noise level, [B].

    Args:
        num_pixels: [B], height times width, before the autoencoder. 1 frame of 512 x 512 pixels is not shifted.
        latent_frames: [B], behind the autoencoder.

    Source: Stable Diffusion 3, section 5.3.2; time besides space: Open-Sora 1.2.
    """
    return (num_pixels / 512**2).sqrt() * latent_frames.sqrt()


def published_latent_frames(num_frames: Tensor) -> Tensor:
    """Latent frames of the Open-Sora 1.2 autoencoder, 5 for each whole 17 frames, [B].

    An image, and a video that is too short to fill a chunk of 17, counts as one.
    """
    return (num_frames // 17 * 5).clamp(min=1)


class RectifiedFlow:
    """Rectified flow with classifier-free guidance and given frames. The loss is the velocity's weighted error, squared."""

    Spec = RectifiedFlowSpec

    def __init__(self, spec: RectifiedFlowSpec) -> None:
        """Nothing is computed before it is asked for."""
        self.spec = spec
        self.num_timesteps = spec.num_timesteps
        self.adds_noise = spec.solver in NOISY_SOLVERS and spec.eta > 0
        """Whether steps draw fresh noise."""

    def loss(
        self,
        denoiser: Denoiser,
        latents: Tensor,
        conditioning: Conditioning,
        *,
        draws: Draws,
        timestep: Tensor | None = None,
    ) -> Tensor:
        """Mean squared error of the predicted velocity, [B]; a sample without noised frames gets 0.

        Draws "timestep" (unless given) and "noise". A given ``timestep`` is used as it is, without the transform.

        Raises:
            ShapeError: The timestep transform is on and the conditioning holds no size, or the denoiser's output
                does not fit.
        """
        if timestep is None:
            timestep = self.draw_timestep(draws, conditioning)
        latents = latents.float()
        noise = draws.normal("noise", latents.shape[1:])
        noised = keep_given(self.add_noise(latents, noise, timestep), latents, conditioning.frame_mask)
        velocity, _ = split_channels(denoiser(noised, timestep, conditioning), latents)  # [B, C, T, H, W]
        error = masked_mean((velocity - (latents - noise)).square(), conditioning.frame_mask)
        return error * self.loss_weights(timestep)

    def loss_weights(self, timestep: Tensor) -> Tensor:
        """What the velocity's error counts at ``timestep`` [B], in [0, N]."""
        u = timestep / self.num_timesteps
        return flow_weights(u, self.spec.loss_weighting, gamma=self.spec.min_snr_gamma)

    def guide(self, denoiser: Denoiser) -> Guidance:
        """The denoiser under classifier-free guidance, see `Guidance`."""
        return guide(denoiser, self.spec, num_timesteps=self.num_timesteps)

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
        """Steps from noise to data, see `Sampler.sample`.

        Raises:
            ShapeError: The timestep transform is on and the conditioning holds no size, or as `Sampler.sample`.
            ConfigError: As `Sampler.sample`.
        """
        levels = self.levels(conditioning, batch=len(noise))
        weights = SOLVERS[self.spec.solver](levels, eta=self.spec.eta)
        return Sampler(levels=levels, weights=weights, foresee=from_velocity).sample(
            denoiser, noise, conditioning, draws=draws, frame_mask=frame_mask, after=after
        )

    def levels(self, conditioning: Conditioning, *, batch: int) -> Levels:
        """The noise levels that sampling goes through, for ``batch`` samples."""
        timesteps = self.sampling_timesteps(conditioning, batch=batch)
        u = timesteps / self.num_timesteps
        return Levels(timesteps=timesteps, alphas=1 - u, sigmas=u)

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """The point at ``timestep`` [B] of the straight path from ``latents`` to ``noise``, both [B, C, T, H, W]."""
        u = _per_sample(timestep / self.num_timesteps)
        return (1 - u) * latents + u * noise

    def draw_timestep(self, draws: Draws, conditioning: Conditioning) -> Tensor:
        """Training timesteps [B], float32 in [0, N], from the draw "timestep"."""
        if self.spec.use_discrete_timesteps:
            timestep = draws.integers("timestep", self.num_timesteps).float()
        elif self.spec.sample_method == "uniform":
            timestep = draws.uniform("timestep") * self.num_timesteps
        else:
            logit = self.spec.loc + self.spec.scale * draws.normal("timestep", (1,)).squeeze(1)
            timestep = logit.sigmoid() * self.num_timesteps
        return self._shift(timestep, conditioning, self.spec.transform_scale)

    def sampling_timesteps(self, conditioning: Conditioning, *, batch: int) -> Tensor:
        """Where sampling steps begin, N first, and the 0 where the last one ends: [S + 1, B] float64 on the CPU."""
        steps = self.spec.num_sampling_steps
        timesteps = (1 - torch.arange(steps + 1, dtype=torch.float64) / steps) * self.num_timesteps
        if self.spec.use_discrete_timesteps:
            timesteps = timesteps.round()
        return self._shift(timesteps[:, None].expand(-1, batch), conditioning, self.spec.sampling_shift)

    def _shift(self, timestep: Tensor, conditioning: Conditioning, factor: float) -> Tensor:
        """Shift ``timestep`` [..., B] by ``factor`` and, if that is asked for, by size."""
        if not self.spec.use_timestep_transform:
            return timestep if factor == 1 else shift_timestep(timestep, factor, num_timesteps=self.num_timesteps)
        height, width, frames = conditioning.height, conditioning.width, conditioning.latent_frames
        if frames is None and conditioning.num_frames is not None:
            frames = published_latent_frames(conditioning.num_frames)
        if height is None or width is None or frames is None:
            raise ShapeError(
                "use_timestep_transform=True needs the videos' size: height, width and num_frames in the conditioning. "
                "Give them, or set use_timestep_transform=False."
            )
        height, width, frames = (size.to(timestep) for size in (height, width, frames))
        return shift_timestep(
            timestep, shift_for_size(height * width, frames) * factor, num_timesteps=self.num_timesteps
        )


def _per_sample(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1, 1)
