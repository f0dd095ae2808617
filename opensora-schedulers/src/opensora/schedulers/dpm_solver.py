"""DPM-Solver++: the noise-prediction models of `IDDPM`, sampled in few steps and without drawing noise.

Source: Lu et al., DPM-Solver++, https://arxiv.org/abs/2211.01095. The latents follow an ordinary differential equation whose
only unknown is the course of the clean latents that the denoiser foresees; the last few of these tell where it goes on.

Shapes: B batch, C latent channels, T H W latent frames and size, S steps, N ``diffusion_steps``. alpha and sigma are the
shares of signal and noise, lambda = log(alpha / sigma); it grows towards the data.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from attrs import field, frozen
from attrs.validators import ge, gt, in_
from torch import Tensor

from opensora.core.conditioning import Conditioning
from opensora.core.errors import ConfigError
from opensora.core.protocols import Denoiser, SampleState
from opensora.core.randomness import Draws
from opensora.schedulers._frames import FramePlan, load_mask, split_channels
from opensora.schedulers.guidance import guide
from opensora.schedulers.noise_schedules import BETAS

__all__ = ["DPMSolver", "DPMSolverSpec", "NoiseCurve", "step_weights"]

_LOWEST_LAMBDA = -5.1
"""Sampling starts no noisier than this. Where there is less signal (the last steps of the cosine schedule), noise tells the
solver nothing about the data."""
_FEW_STEPS = 10
"""With fewer steps than these the last ones are of a lower order: they are long, and extrapolation goes wrong."""


@frozen(kw_only=True)
class DPMSolverSpec:
    """Options of `DPMSolver`."""

    num_sampling_steps: int = field(default=20, validator=gt(0))
    """Steps, each with one call of the denoiser. Usual are 14 to 20."""
    cfg_scale: float = field(default=4.0, validator=ge(0))
    """Classifier-free guidance: 1 is off and takes half the time; usual are 4 to 7, more follows the prompt closer."""
    order: Literal[1, 2, 3] = field(default=2, validator=in_((1, 2, 3)))
    """How many predictions a step looks at. 1 is DDIM without noise; 3 is more exact, less steady under strong guidance."""
    spacing: Literal["time_uniform", "logSNR"] = field(
        default="time_uniform", validator=in_(("time_uniform", "logSNR"))
    )
    """Where steps are taken: evenly in time, as in Open-Sora, or in lambda, where orders above 1 are worth more."""
    noise_schedule: Literal["linear", "squaredcos_cap_v2"] = field(default="linear", validator=in_(tuple(BETAS)))
    """How noise grows over the steps that the denoiser was trained on. Pretrained models want linear."""
    predict_xstart: bool = False
    """The denoiser predicts clean latents instead of the noise."""
    diffusion_steps: int = field(default=1000, validator=gt(1))
    """Steps that the denoiser was trained on. Pretrained models want 1000."""

    def __attrs_post_init__(self) -> None:
        if self.num_sampling_steps < self.order:
            raise ConfigError(
                f"num_sampling_steps={self.num_sampling_steps} is too few for order={self.order}, which looks at as many "
                f"predictions. Take more steps, or set order={self.num_sampling_steps}."
            )
        BETAS[self.noise_schedule](self.diffusion_steps)


@frozen(eq=False)
class NoiseCurve:
    """Noise levels between the steps of a diffusion process too: log alpha is linear from one to the next."""

    log_alphas: Tensor
    """[N] float64, from the data to the noise; without the end beyond `_LOWEST_LAMBDA`."""

    @classmethod
    def from_betas(cls, betas: Tensor) -> NoiseCurve:
        """From variances [N], float64."""
        log_alphas = 0.5 * torch.log1p(-betas).cumsum(dim=0)
        return cls(log_alphas[_lambdas(log_alphas) >= _LOWEST_LAMBDA])

    @property
    def last(self) -> int:
        """The noisiest timestep."""
        return len(self.log_alphas) - 1

    def log_alpha(self, timestep: Tensor) -> Tensor:
        """Of timesteps in [0, last], any shape: float64 of that shape."""
        below = timestep.long().clamp(max=self.last - 1)
        low, high = self.log_alphas[below], self.log_alphas[below + 1]
        return low + (timestep - below) * (high - low)

    def timestep(self, lambdas: Tensor) -> Tensor:
        """Where the curve has these values of lambda, any shape; the nearest end if it has them nowhere."""
        log_alphas = -0.5 * F.softplus(-2 * lambdas.double())
        above = torch.searchsorted(-self.log_alphas, -log_alphas).clamp(1, self.last)
        low, high = self.log_alphas[above - 1], self.log_alphas[above]
        return (above - 1 + (log_alphas - low) / (high - low)).clamp(0, self.last)


def step_weights(lambdas: Sequence[float], order: int) -> list[float]:
    """What a step adds of the predictions, newest first, over the alpha that it leads to.

    The predicted clean latents, as a function of lambda, are taken for the polynomial through the last ``order`` of them,
    and the solution's integral for that is exact (order 2: its midpoint form).

    Args:
        lambdas: Of the last ``order`` predictions, oldest first, and of where the step leads.
        order: 1, 2 or 3.

    Source: DPM-Solver++, section 4, with algorithm 2 for order 2.
    """
    *past, now, target = lambdas
    h = target - now
    gain = -math.expm1(-h)  # integral of exp(u - h) over u = 0 .. h
    if order == 1:
        return [gain]
    if order == 2:
        slope = 0.5 * h / (now - past[-1])
        return [gain * (1 + slope), -gain * slope]
    linear, square = h - gain, h * h - 2 * (h - gain)  # integrals of u exp(u - h), u^2 exp(u - h)
    a, b = past[-1] - now, past[-2] - now  # where the polynomial is pinned, besides u = 0
    return [
        (square - (a + b) * linear + a * b * gain) / (a * b),
        (square - b * linear) / (a * (a - b)),
        (square - a * linear) / (b * (b - a)),
    ]


class DPMSolver:
    """DPM-Solver++ in its multistep form, with classifier-free guidance and given frames. Samples only."""

    Spec = DPMSolverSpec

    def __init__(self, spec: DPMSolverSpec) -> None:
        """Compute the noise levels."""
        self.spec = spec
        self.num_timesteps = spec.diffusion_steps
        self.curve = NoiseCurve.from_betas(BETAS[spec.noise_schedule](spec.diffusion_steps))

    def loss(
        self,
        denoiser: Denoiser,
        latents: Tensor,
        conditioning: Conditioning,
        *,
        draws: Draws,
        timestep: Tensor | None = None,
    ) -> Tensor:
        """There is none.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError('dpm-solver only samples. Train with scheduler.type = "iddpm": it samples the same models.')

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
        """Steps from noise to the least noisy level that the denoiser knows, see `Scheduler.sample`.

        A frame of mask r stays as given, bit for bit, until the timestep has come down to that share of the first. It is then
        noised to that timestep with the draw "join <step>" and denoised with the rest, starting at order 1. Nothing else is
        drawn.

        Raises:
            ShapeError: The denoiser's output does not fit the latents, or ``frame_mask`` is not [B, T].
            ConfigError: ``frame_mask`` leaves [0, 1].
        """
        denoiser = guide(denoiser, self.spec.cfg_scale)
        timesteps = self.sampling_timesteps()  # [S + 1]
        log_alphas = self.curve.log_alpha(timesteps)
        alphas, sigmas, lambdas = log_alphas.exp().tolist(), _sigmas(log_alphas).tolist(), _lambdas(log_alphas).tolist()
        frames = self._plan_frames(load_mask(frame_mask, noise), timesteps, conditioning, noise)
        t = timesteps.to(noise.device, torch.float32)
        latents = noise.float()
        predictions: deque[Tensor] = deque(maxlen=self.spec.order)  # newest first
        for step in range(self.spec.num_sampling_steps):
            if (joins := frames.joins[step]) is not None:
                fresh = alphas[step] * latents + sigmas[step] * draws.normal(f"join {step}", latents.shape[1:])
                latents = torch.where(joins, fresh, latents)
            output = denoiser(latents, t[step].expand(len(latents)), frames.conditioning[step])
            denoised = self._denoised(output, latents, alphas[step], sigmas[step])
            if joins is not None:  # no course to go on with: as if the denoiser had foreseen the same before
                predictions = deque((torch.where(joins, denoised, past) for past in predictions), self.spec.order)
            predictions.appendleft(denoised)
            order = self.order_at(step)
            weights = step_weights(lambdas[step + 1 - order : step + 2], order)
            updated = sigmas[step + 1] / sigmas[step] * latents
            for weight, prediction in zip(weights, predictions, strict=False):
                updated = updated + alphas[step + 1] * weight * prediction
            denoised = frames.keep(step, denoised, latents)
            latents = frames.keep(step, updated, latents)
            yield SampleState(
                step=step,
                num_steps=self.spec.num_sampling_steps,
                timestep=timesteps[step].item(),
                latents=latents,
                denoised=denoised,
            )

    def sampling_timesteps(self) -> Tensor:
        """Where sampling steps begin, and the 0 where the last one ends: [S + 1] float64 on the CPU."""
        count, ends = self.spec.num_sampling_steps + 1, torch.tensor([self.curve.last, 0], dtype=torch.float64)
        if self.spec.spacing == "time_uniform":
            return torch.linspace(self.curve.last, 0, count, dtype=torch.float64)
        first, last = _lambdas(self.curve.log_alpha(ends)).tolist()
        between = torch.linspace(first, last, count, dtype=torch.float64)[1:-1]
        return torch.cat([ends[:1], self.curve.timestep(between), ends[1:]])

    def order_at(self, step: int) -> int:
        """Order of a step: as many predictions as there are, and fewer at the end of few steps."""
        steps_left = self.spec.num_sampling_steps - step
        return min(self.spec.order, step + 1, steps_left if self.spec.num_sampling_steps < _FEW_STEPS else step + 1)

    def _denoised(self, output: Tensor, latents: Tensor, alpha: float, sigma: float) -> Tensor:
        """The clean latents that the denoiser's ``output`` stands for."""
        prediction, _ = split_channels(output, latents)
        return prediction if self.spec.predict_xstart else (latents - sigma * prediction) / alpha

    def _plan_frames(
        self, mask: Tensor | None, timesteps: Tensor, conditioning: Conditioning, noise: Tensor
    ) -> FramePlan:
        if mask is None:
            return FramePlan.free(conditioning, self.spec.num_sampling_steps)
        # A millionth of slack: a float32 0.95 is a little less than 0.95 and yet means the step at 0.95 of the way.
        levels = (timesteps[:-1] / timesteps[0])[:, None, None]  # [S, 1, 1]
        active = (mask + 1e-6 >= levels) & (mask > 0)  # [S, B, T]
        was_active = torch.cat([(mask == 1)[None], active[:-1]])
        return FramePlan.masked(conditioning, joins=active & ~was_active, noisy=active, moves=active, like=noise)


def _sigmas(log_alphas: Tensor) -> Tensor:
    return (-torch.expm1(2 * log_alphas)).sqrt()


def _lambdas(log_alphas: Tensor) -> Tensor:
    return log_alphas - _sigmas(log_alphas).log()
