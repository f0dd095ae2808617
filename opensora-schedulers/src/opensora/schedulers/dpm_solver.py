"""DPM-Solver++ and other solvers: the noise-prediction models of `IDDPM`, sampled in few steps.

Source: Lu et al., DPM-Solver++, https://arxiv.org/abs/2211.01095. What a step does is in `opensora.schedulers.solvers`; here
is where steps are taken.

Shapes: B batch, C latent channels, T H W latent frames and size, S steps, N ``diffusion_steps``. alpha and sigma are the
shares of signal and noise, lambda = log(alpha / sigma); it grows towards the data.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from attrs import field, frozen
from attrs.validators import and_, ge, gt, in_, le, optional
from torch import Tensor

from opensora.core.conditioning import Conditioning
from opensora.core.errors import ConfigError
from opensora.core.protocols import Denoiser, SampleState
from opensora.core.randomness import Draws
from opensora.schedulers.guidance import Guidance, GuidanceSpec, guide
from opensora.schedulers.noise_schedules import BETAS
from opensora.schedulers.sampling import Sampler, from_clean, from_noise
from opensora.schedulers.solvers import NOISY_SOLVERS, SOLVERS, Levels, Solver, dpm_solver

__all__ = ["DPMSolver", "DPMSolverSpec", "NoiseCurve"]

_LOWEST_LAMBDA = -5.1
"""Sampling starts no noisier than this. Where there is less signal (the last steps of the cosine schedule), noise tells the
solver nothing about the data."""


@frozen(kw_only=True)
class DPMSolverSpec(GuidanceSpec):
    """Options of `DPMSolver`."""

    num_sampling_steps: int = field(default=20, validator=gt(0))
    """Steps, each with one call of the denoiser, two of heun. Usual are 14 to 20."""
    solver: Literal["euler", "euler-ancestral", "heun", "dpm++2m", "dpm++3m", "dpm++2m-sde", "unipc"] | None = field(
        default=None, validator=optional(in_(tuple(SOLVERS)))
    )
    """How steps are taken. None: by DPM-Solver++ of the given order. unipc is more exact with few steps; euler is DDIM;
    euler-ancestral and dpm++2m-sde add noise on the way."""
    order: Literal[1, 2, 3] = field(default=2, validator=in_((1, 2, 3)))
    """How many predictions a step of DPM-Solver++ looks at. 1 is DDIM without noise; 3 is more exact, less steady under
    strong guidance."""
    eta: float = field(default=1.0, validator=and_(ge(0), le(1)))
    """How much noise euler-ancestral and dpm++2m-sde add: 0 is none."""
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
        if self.solver is not None and self.order != 2:
            raise ConfigError(
                f'order={self.order} is one of DPM-Solver++, but solver="{self.solver}". Set solver=None, or leave order out.'
            )
        if self.solver is None and self.num_sampling_steps < self.order:
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


class DPMSolver:
    """DPM-Solver++ in its multistep form, or another solver, with classifier-free guidance and given frames. Samples only."""

    Spec = DPMSolverSpec

    def __init__(self, spec: DPMSolverSpec) -> None:
        """Compute the noise levels."""
        self.spec = spec
        self.num_timesteps = spec.diffusion_steps
        self.curve = NoiseCurve.from_betas(BETAS[spec.noise_schedule](spec.diffusion_steps))
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
        """There is none.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError('dpm-solver only samples. Train with scheduler.type = "iddpm": it samples the same models.')

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
        """Steps from noise to the least noisy level that the denoiser knows, see `Sampler.sample`.

        Raises:
            ShapeError, ConfigError: As `Sampler.sample`.
        """
        solver: Solver = partial(dpm_solver, order=self.spec.order)
        if self.spec.solver is not None:
            solver = SOLVERS[self.spec.solver]
        levels = self.levels()
        return Sampler(
            levels=levels,
            weights=solver(levels, eta=self.spec.eta),
            foresee=from_clean if self.spec.predict_xstart else from_noise,
        ).sample(denoiser, noise, conditioning, draws=draws, frame_mask=frame_mask, after=after)

    def levels(self) -> Levels:
        """The noise levels that sampling goes through."""
        timesteps = self.sampling_timesteps()
        log_alphas = self.curve.log_alpha(timesteps)
        return Levels(
            timesteps=timesteps[:, None], alphas=log_alphas.exp()[:, None], sigmas=_sigmas(log_alphas)[:, None]
        )

    def sampling_timesteps(self) -> Tensor:
        """Where sampling steps begin, and the 0 where the last one ends: [S + 1] float64 on the CPU."""
        count, ends = self.spec.num_sampling_steps + 1, torch.tensor([self.curve.last, 0], dtype=torch.float64)
        if self.spec.spacing == "time_uniform":
            return torch.linspace(self.curve.last, 0, count, dtype=torch.float64)
        first, last = _lambdas(self.curve.log_alpha(ends)).tolist()
        between = torch.linspace(first, last, count, dtype=torch.float64)[1:-1]
        return torch.cat([ends[:1], self.curve.timestep(between), ends[1:]])


def _sigmas(log_alphas: Tensor) -> Tensor:
    return (-torch.expm1(2 * log_alphas)).sqrt()


def _lambdas(log_alphas: Tensor) -> Tensor:
    return log_alphas - _sigmas(log_alphas).log()
