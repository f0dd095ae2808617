"""Improved denoising diffusion: noise is predicted, its variance learned, and taken away step by step.

Sources: Ho et al., DDPM, https://arxiv.org/abs/2006.11239; Nichol and Dhariwal, improved DDPM,
https://arxiv.org/abs/2102.09672 (learned variance, fewer steps); Song et al., DDIM, https://arxiv.org/abs/2010.02502.

Shapes: B batch, C latent channels, T H W latent frames and size, N steps after respacing. Step 0 is next to the data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from attrs import field, frozen
from attrs.validators import and_, ge, gt, in_, le, optional
from torch import Tensor

from opensora.core.conditioning import Conditioning
from opensora.core.errors import ConfigError, ShapeError
from opensora.core.protocols import Denoiser, SampleState
from opensora.core.randomness import Draws
from opensora.schedulers._frames import FramePlan, keep_given, load_mask, masked_mean, split_channels
from opensora.schedulers.guidance import Guidance, GuidanceSpec, guide
from opensora.schedulers.loss_weights import DIFFUSION_WEIGHTS, diffusion_weights
from opensora.schedulers.noise_schedules import BETAS, NoiseSchedule, kept_steps, respaced_betas
from opensora.schedulers.sampling import resume

__all__ = ["IDDPM", "IDDPMSpec", "Posterior"]


@frozen(kw_only=True)
class IDDPMSpec(GuidanceSpec):
    """Options of `IDDPM`."""

    num_sampling_steps: int | None = field(default=None, validator=optional(gt(0)))
    """Steps that are kept, evenly spaced: short for timestep_respacing="<number>". Usual for sampling are 50 to 250."""
    timestep_respacing: str | None = None
    """Steps that are kept: counts per section ("10,15,20") or one stride ("ddim50"). None or "": all of them."""
    noise_schedule: Literal["linear", "squaredcos_cap_v2"] = field(default="linear", validator=in_(tuple(BETAS)))
    """How noise grows over the steps. Pretrained models want linear."""
    use_kl: bool = False
    """Train on the full variational bound; wins over rescale_learned_sigmas."""
    rescale_learned_sigmas: bool = False
    """Weigh the bound, which teaches the variance, by N / 1000."""
    loss_weighting: Literal["none", "min-snr"] = field(default="none", validator=in_(DIFFUSION_WEIGHTS))
    """What each timestep counts in the error. min-snr: as the error of the clean latents would count, but no more than at
    signal to noise ratio min_snr_gamma. The bound that teaches the variance is not weighted."""
    min_snr_gamma: float = field(default=5.0, validator=gt(0))
    """Of min-snr; 5 is usual."""
    predict_xstart: bool = False
    """The denoiser predicts clean latents instead of the noise."""
    learn_sigma: bool = True
    """The denoiser returns variance values in a second half of its channels (its pred_sigma)."""
    sigma_small: bool = False
    """Without learn_sigma: the lower bound of the variance instead of the upper one."""
    diffusion_steps: int = field(default=1000, validator=gt(0))
    """Steps before respacing. Pretrained models want 1000."""
    ddim_eta: float | None = field(default=None, validator=optional(and_(ge(0), le(1))))
    """Sample with DDIM, better with few steps: 0 adds no noise on the way, 1 adds about as much as DDPM. None: DDPM."""

    def __attrs_post_init__(self) -> None:
        if self.num_sampling_steps is not None and self.timestep_respacing is not None:
            raise ConfigError(
                f"num_sampling_steps={self.num_sampling_steps} and timestep_respacing={self.timestep_respacing!r} "
                "exclude each other. Keep one of them."
            )
        if self.loss_weighting != "none" and self.use_kl:
            raise ConfigError(
                f'loss_weighting="{self.loss_weighting}" weighs the error, which use_kl=True has not. Drop one.'
            )
        if not self.kept_steps():
            raise ConfigError(f"timestep_respacing={self.timestep_respacing!r} keeps no step.")
        BETAS[self.noise_schedule](self.diffusion_steps)

    def kept_steps(self) -> list[int]:
        """The steps of the base process that are used, in ascending order; what the denoiser is told."""
        sections = self.timestep_respacing if self.num_sampling_steps is None else str(self.num_sampling_steps)
        return kept_steps(self.diffusion_steps, sections or "")


@frozen(eq=False)
class Posterior:
    """The denoiser's belief about the latents one step nearer to the data: a normal, [B, C, T, H, W]."""

    mean: Tensor
    log_variance: Tensor
    """Of the mean's shape, or one that broadcasts to it."""
    denoised: Tensor
    """The clean latents that it foresees."""


class IDDPM:
    """Improved DDPM with classifier-free guidance and given frames."""

    Spec = IDDPMSpec

    def __init__(self, spec: IDDPMSpec) -> None:
        """Compute the noise schedule."""
        self.spec = spec
        kept = spec.kept_steps()
        self.timesteps = torch.tensor(kept)
        """[N] int64, what the denoiser is told at each step: the step's index before respacing."""
        self.schedule = NoiseSchedule.from_betas(respaced_betas(BETAS[spec.noise_schedule](spec.diffusion_steps), kept))
        self.num_timesteps = len(kept)
        alphas_cumprod = self.schedule.alphas_cumprod
        self.error_weights = diffusion_weights(
            alphas_cumprod / (1 - alphas_cumprod),
            spec.loss_weighting,
            gamma=spec.min_snr_gamma,
            predicts_clean=spec.predict_xstart,
        )
        """[N] float64: what the prediction's error counts at each step, see ``loss_weighting``."""
        self.adds_noise = spec.ddim_eta != 0
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
        """The loss that the options ask for, [B]; see `loss_terms`."""
        return self.loss_terms(denoiser, latents, conditioning, draws=draws, timestep=timestep)["loss"]

    def loss_terms(
        self,
        denoiser: Denoiser,
        latents: Tensor,
        conditioning: Conditioning,
        *,
        draws: Draws,
        timestep: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """``loss`` and the parts that it has: ``mse`` of the prediction and ``vb``, the variational bound in bits.

        Each is [B], and 0 for a sample without noised frames. Given frames get the noise level of step 0.

        Draws "timestep" (unless given) and "noise".

        Args:
            timestep: [B], steps in [0, N), after respacing. Fractions are cut off.

        Raises:
            ShapeError: The denoiser's output does not fit the latents, or lacks variance values.

        Source: improved DDPM, eq. 16; rescaled as in its published code.
        """
        if timestep is None:
            timestep = draws.integers("timestep", self.num_timesteps)
        step = timestep.long()
        latents, mask, now = latents.float(), conditioning.frame_mask, self.schedule.at(step)
        noise = draws.normal("noise", latents.shape[1:])
        noised = now.add_noise(latents, noise)
        if mask is not None:
            noised = keep_given(noised, self.schedule.at(0).add_noise(latents, noise), mask)
        output = denoiser(noised, self.timesteps.to(step.device)[step], conditioning)  # [B, C or 2C, T, H, W]
        if self.spec.use_kl:
            bound = self._bound(self.posterior(output, noised, now), latents, noised, step)
            return {"loss": masked_mean(bound, mask) * self.num_timesteps}

        prediction, variance_values = split_channels(output, latents)
        target = latents if self.spec.predict_xstart else noise
        mse = (
            masked_mean((target - prediction).square(), mask) * self.error_weights.to(step.device, torch.float32)[step]
        )
        if not self.spec.learn_sigma or variance_values is None:
            self._check_variance(variance_values)
            return {"loss": mse, "mse": mse}
        # The bound teaches the variance alone: the mean learns more evenly from the error.
        frozen_mean = torch.cat([prediction.detach(), variance_values], dim=1)
        vb = masked_mean(self._bound(self.posterior(frozen_mean, noised, now), latents, noised, step), mask)
        if self.spec.rescale_learned_sigmas:
            vb = vb * (self.num_timesteps / 1000)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def guide(self, denoiser: Denoiser) -> Guidance:
        """The denoiser under classifier-free guidance, see `Guidance`."""
        return guide(denoiser, self.spec, num_timesteps=self.spec.diffusion_steps)

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
        """Ancestral (or DDIM) steps from noise to data, see `Scheduler.sample`. Draws "step <i>", i from 0.

        A frame of mask r stays as given until step r N, where it is noised to that step's level with the draw
        "join <i>" and denoised with the rest. So is a frame of mask 0 at the very last step: it comes back slightly
        changed, as from Open-Sora. ``SampleState.timestep`` counts after respacing.

        Raises:
            ShapeError: As `loss_terms`, ``frame_mask`` is not [B, T], or ``after`` is of another shape.
            ConfigError: ``frame_mask`` leaves [0, 1], or ``after`` is of a run of another number of steps.
        """
        first, latents = resume(after, noise, num_steps=self.num_timesteps)
        frames = self._plan_frames(load_mask(frame_mask, noise), conditioning, noise)
        timesteps = self.timesteps.to(noise.device)
        for i in range(first, self.num_timesteps):
            step = self.num_timesteps - 1 - i
            now = self.schedule.at(step)
            if (joins := frames.joins[i]) is not None:
                fresh = draws.normal(f"join {i}", latents.shape[1:])
                latents = torch.where(joins, now.add_noise(latents, fresh), latents)
            output = denoiser(latents, timesteps[step].expand(len(latents)), frames.conditioning[i])
            posterior = self.posterior(output, latents, now)
            updated, deviation = self._transition(posterior, latents, now)
            if step > 0 and self.spec.ddim_eta != 0:
                updated = updated + deviation * draws.normal(f"step {i}", latents.shape[1:])
            denoised = frames.keep(i, posterior.denoised, latents)
            latents = frames.keep(i, updated, latents)
            yield SampleState(
                step=i, num_steps=self.num_timesteps, timestep=float(step), latents=latents, denoised=denoised
            )

    def posterior(self, output: Tensor, latents: Tensor, now: NoiseSchedule) -> Posterior:
        """What the denoiser's ``output`` says about the previous latents.

        Args:
            output: [B, C or 2C, T, H, W].
            latents: [B, C, T, H, W], what it was given.
            now: ``schedule.at`` the step of the latents.

        Source: DDPM, eq. 7 and 9; improved DDPM, eq. 15.
        """
        prediction, variance_values = split_channels(output, latents)
        self._check_variance(variance_values)
        if self.spec.predict_xstart:
            denoised = prediction
        else:
            denoised = (1 / now.alphas_cumprod).sqrt() * latents - (1 / now.alphas_cumprod - 1).sqrt() * prediction
        if self.spec.learn_sigma and variance_values is not None:
            share = (variance_values + 1) / 2
            log_variance = share * now.betas.log() + (1 - share) * now.posterior_log_variance
        else:
            log_variance = now.posterior_log_variance if self.spec.sigma_small else now.upper_log_variance
        mean = now.posterior_mean_coef1 * denoised + now.posterior_mean_coef2 * latents
        return Posterior(mean, log_variance, denoised)

    def reverse_step(self, output: Tensor, latents: Tensor, step: Tensor) -> Tensor:
        """One DDIM step without noise in the other direction, towards noise: the latents one step further from the data.

        Args:
            output: [B, C or 2C, T, H, W], the denoiser's for these latents.
            latents: [B, C, T, H, W].
            step: [B] int64, where they are, after respacing. From the last step the way leads to noise alone.

        Source: DDIM, https://arxiv.org/abs/2010.02502, section 4.3.
        """
        now = self.schedule.at(step)
        posterior = self.posterior(output, latents, now)
        abar = self.schedule.alphas_cumprod
        abar_next = torch.cat([abar[1:], torch.zeros_like(abar[:1])]).to(step.device, torch.float32)[step]
        abar_next = abar_next.view(-1, 1, 1, 1, 1)
        return abar_next.sqrt() * posterior.denoised + (1 - abar_next).sqrt() * _epsilon(posterior, latents, now)

    def _transition(self, posterior: Posterior, latents: Tensor, now: NoiseSchedule) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the next latents."""
        if self.spec.ddim_eta is None:
            return posterior.mean, (0.5 * posterior.log_variance).exp()
        abar, abar_prev = now.alphas_cumprod, now.alphas_cumprod_prev
        epsilon = _epsilon(posterior, latents, now)
        sigma = self.spec.ddim_eta * ((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)).sqrt()  # DDIM, eq. 16
        return abar_prev.sqrt() * posterior.denoised + (1 - abar_prev - sigma**2).sqrt() * epsilon, sigma  # eq. 12

    def _bound(self, predicted: Posterior, latents: Tensor, noised: Tensor, step: Tensor) -> Tensor:
        """The steps' terms of the variational bound in bits, [B, C, T, H, W]. Source: DDPM, eq. 5."""
        now = self.schedule.at(step)
        mean = now.posterior_mean_coef1 * latents + now.posterior_mean_coef2 * noised
        divergence = _normal_kl(mean, now.posterior_log_variance, predicted.mean, predicted.log_variance)
        surprise = -_discrete_log_likelihood(latents, predicted.mean, 0.5 * predicted.log_variance)
        return torch.where(step.view(-1, 1, 1, 1, 1) == 0, surprise, divergence) / math.log(2)

    def _check_variance(self, variance_values: Tensor | None) -> None:
        if self.spec.learn_sigma and variance_values is None:
            raise ShapeError(
                "learn_sigma=True needs a denoiser that returns variance values, twice the latents' channels. "
                "Set pred_sigma=True in the model, or learn_sigma=False in the scheduler."
            )

    def _plan_frames(self, mask: Tensor | None, conditioning: Conditioning, noise: Tensor) -> FramePlan:
        if mask is None:
            return FramePlan.free(conditioning, self.num_timesteps)
        # The step at which a frame joins. A little more before cutting off: a float32 0.29 of 100 is less than 29.
        joining = (mask * self.num_timesteps + 1e-4).floor()  # [B, T]
        step = torch.arange(self.num_timesteps - 1, -1, -1)[:, None, None]  # [N, 1, 1]
        return FramePlan.masked(
            conditioning, joins=joining == step, noisy=joining > step, moves=joining >= step, like=noise
        )


def _epsilon(posterior: Posterior, latents: Tensor, now: NoiseSchedule) -> Tensor:
    """The noise in ``latents``, if the clean ones are as foreseen."""
    abar = now.alphas_cumprod
    return ((1 / abar).sqrt() * latents - posterior.denoised) / (1 / abar - 1).sqrt()


def _normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """Kullback-Leibler divergence of normals, in nats, elementwise."""
    # In the order in which published losses were summed up: where the variances are equal, only its rounding is left.
    spread = -1.0 + log_variance2 - log_variance1 + (log_variance1 - log_variance2).exp()
    return 0.5 * (spread + (mean1 - mean2).square() * (-log_variance2).exp())


def _discrete_log_likelihood(values: Tensor, mean: Tensor, log_deviation: Tensor) -> Tensor:
    """Log probability of the 2 / 255 wide bin around each value, open at both ends of [-1, 1]. Source: DDPM, eq. 13."""
    precision = (-log_deviation).exp()
    below = _normal_cdf((values - mean - 1 / 255) * precision)
    above = _normal_cdf((values - mean + 1 / 255) * precision)
    mass = torch.where(values < -0.999, above, torch.where(values > 0.999, 1 - below, above - below))
    return mass.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """Cumulative distribution of the standard normal, in the tanh approximation that models were trained with."""
    return 0.5 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())
