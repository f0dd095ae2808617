"""Rectified flow: straight paths between data and noise, learned as a velocity and followed by Euler steps.

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
from attrs.validators import ge, gt, in_
from torch import Tensor

from opensora.core.conditioning import Conditioning
from opensora.core.errors import ConfigError, ShapeError
from opensora.core.protocols import Denoiser, SampleState
from opensora.core.randomness import Draws
from opensora.schedulers._frames import FramePlan, keep_given, load_mask, masked_mean, split_channels
from opensora.schedulers.guidance import guide

__all__ = ["RectifiedFlow", "RectifiedFlowSpec", "shift_timestep"]


@frozen(kw_only=True)
class RectifiedFlowSpec:
    """Options of `RectifiedFlow`."""

    num_sampling_steps: int = field(default=10, validator=gt(0))
    """Euler steps. The cost of sampling grows with it; usual are 10 to 50, 30 in Open-Sora 1.2."""
    num_timesteps: int = field(default=1000, validator=gt(0))
    """Scale of the timesteps that the denoiser is told. Pretrained models want 1000."""
    cfg_scale: float = field(default=4.0, validator=ge(0))
    """Classifier-free guidance: 1 is off and takes half the time; usual are 4 to 7, more follows the prompt closer."""
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
    transform_scale: float = field(default=1.0, validator=gt(0))
    """Further factor of the timestep transform in training; above 1 means more noise. In sampling it is always 1."""

    def __attrs_post_init__(self) -> None:
        if self.use_discrete_timesteps and self.sample_method == "logit-normal":
            raise ConfigError(
                'sample_method="logit-normal" draws fractional timesteps, so it excludes use_discrete_timesteps=True. '
                'Drop one of them, or use sample_method="uniform".'
            )


def shift_timestep(
    timestep: Tensor, *, num_pixels: Tensor, num_frames: Tensor, scale: float = 1.0, num_timesteps: int = 1000
) -> Tensor:
    """Move timesteps towards noise for larger videos, which keep more signal at the same noise level.

    Each sample is treated by itself. Lengths count in latent frames of the Open-Sora 1.2 autoencoder, 5 for each whole
    17 frames; an image, and a video that is too short to fill a chunk of 17, counts as one latent frame.

    Args:
        timestep: [..., B], in [0, num_timesteps]. Not modified; the result has its dtype, and the same ends.
        num_pixels: [B], height times width, before the autoencoder. 512 x 512 leaves timesteps of images as they are.
        num_frames: [B], before the autoencoder.
        scale: Further factor of the shift.
        num_timesteps: N.

    Source: Stable Diffusion 3, https://arxiv.org/abs/2403.03206, eq. 23; time besides space: Open-Sora 1.2.
    """
    latent_frames = (num_frames // 17 * 5).clamp(min=1)
    shift = (num_pixels / 512**2).sqrt() * latent_frames.sqrt() * scale
    u = timestep / num_timesteps
    # Over r u + (1 - u), not 1 + (r - 1) u: the same, but exactly 1 at u = 1, so that mask 1 joins at the first step.
    return shift * u / (shift * u + (1 - u)) * num_timesteps


class RectifiedFlow:
    """Rectified flow with classifier-free guidance and given frames. The loss is the velocity's mean squared error."""

    Spec = RectifiedFlowSpec

    def __init__(self, spec: RectifiedFlowSpec) -> None:
        """Nothing is computed before it is asked for."""
        self.spec = spec
        self.num_timesteps = spec.num_timesteps

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
        return masked_mean((velocity - (latents - noise)).square(), conditioning.frame_mask)

    @torch.no_grad()
    def sample(
        self,
        denoiser: Denoiser,
        noise: Tensor,
        conditioning: Conditioning,
        *,
        draws: Draws,
        frame_mask: Tensor | None = None,
    ) -> Iterator[SampleState]:
        """Euler steps from noise to data, see `Scheduler.sample`.

        A frame of mask r stays as given, bit for bit, until the timestep has come down to r N. It is then noised to
        that timestep with the draw "join <step>" and denoised with the rest. ``SampleState.timestep`` is the largest of
        the batch.

        Raises:
            ShapeError: As `loss`, or ``frame_mask`` is not [B, T].
            ConfigError: ``frame_mask`` leaves [0, 1].
        """
        denoiser = guide(denoiser, self.spec.cfg_scale)
        timesteps = self.sampling_timesteps(conditioning, batch=len(noise))  # [S + 1, B]
        frames = self._plan_frames(load_mask(frame_mask, noise), timesteps, conditioning, noise)
        t = timesteps.to(noise.device, torch.float32)
        strides = ((timesteps[:-1] - timesteps[1:]) / self.num_timesteps).to(noise.device, torch.float32)
        latents = noise.float()
        for step in range(self.spec.num_sampling_steps):
            if (joins := frames.joins[step]) is not None:
                fresh = draws.normal(f"join {step}", latents.shape[1:])
                latents = torch.where(joins, self.add_noise(latents, fresh, t[step]), latents)
            velocity, _ = split_channels(denoiser(latents, t[step], frames.conditioning[step]), latents)
            denoised = frames.keep(step, latents + velocity * _per_sample(t[step] / self.num_timesteps), latents)
            latents = frames.keep(step, latents + velocity * _per_sample(strides[step]), latents)
            yield SampleState(
                step=step,
                num_steps=self.spec.num_sampling_steps,
                timestep=timesteps[step].max().item(),
                latents=latents,
                denoised=denoised,
            )

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
        return self._shift(timesteps[:, None].expand(-1, batch), conditioning, scale=1.0)

    def _shift(self, timestep: Tensor, conditioning: Conditioning, scale: float) -> Tensor:
        if not self.spec.use_timestep_transform:
            return timestep
        height, width, num_frames = conditioning.height, conditioning.width, conditioning.num_frames
        if height is None or width is None or num_frames is None:
            raise ShapeError(
                "use_timestep_transform=True needs the videos' size: height, width and num_frames in the conditioning. "
                "Give them, or set use_timestep_transform=False."
            )
        height, width, num_frames = (size.to(timestep) for size in (height, width, num_frames))
        return shift_timestep(
            timestep, num_pixels=height * width, num_frames=num_frames, scale=scale, num_timesteps=self.num_timesteps
        )

    def _plan_frames(
        self, mask: Tensor | None, timesteps: Tensor, conditioning: Conditioning, noise: Tensor
    ) -> FramePlan:
        if mask is None:
            return FramePlan.free(conditioning, self.spec.num_sampling_steps)
        # A millionth of slack: a float32 0.95 is a little less than 0.95 and yet means the step at exactly 0.95 N.
        active = (mask + 1e-6 >= timesteps[:-1, :, None] / self.num_timesteps) & (mask > 0)  # [S, B, T]
        was_active = torch.cat([(mask == 1)[None], active[:-1]])
        return FramePlan.masked(conditioning, joins=active & ~was_active, noisy=active, moves=active, like=noise)


def _per_sample(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1, 1)
