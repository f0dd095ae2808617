"""Noise schedules of diffusion models: how much noise each step adds, which steps to take, and what follows from both.

Sources: Ho et al., DDPM, https://arxiv.org/abs/2006.11239; Nichol and Dhariwal, improved DDPM,
https://arxiv.org/abs/2102.09672. N is the number of steps; step 0 is next to the data. All arrays are float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import attrs
import torch
from attrs import frozen
from torch import Tensor

from opensora.core.errors import ConfigError

__all__ = ["BETAS", "NoiseSchedule", "cosine_betas", "kept_steps", "linear_betas", "respaced_betas"]


def linear_betas(num_steps: int) -> Tensor:
    """Variances [N] that rise evenly, scaled so that the end is about as noisy for any N. Source: DDPM, section 4.

    Raises:
        ConfigError: ``num_steps`` is 20 or less, where the last variance would reach 1.
    """
    if num_steps <= 20:
        raise ConfigError(
            f'noise_schedule="linear" needs more than 20 diffusion_steps; got {num_steps}. '
            "For few sampling steps set num_sampling_steps; it thins out a longer schedule."
        )
    scale = 1000 / num_steps
    return torch.linspace(0.0001 * scale, 0.02 * scale, num_steps, dtype=torch.float64)


def cosine_betas(num_steps: int) -> Tensor:
    """Variances [N] under which the signal falls as a squared cosine. Source: improved DDPM, eq. 17."""
    u = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    signal = ((u + 0.008) / 1.008 * math.pi / 2).cos().square()
    return (1 - signal[1:] / signal[:-1]).clamp(max=0.999)


BETAS: Mapping[str, Callable[[int], Tensor]] = MappingProxyType(
    {"linear": linear_betas, "squaredcos_cap_v2": cosine_betas}
)
"""Schedules by the name that configs use."""


def kept_steps(num_steps: int, sections: str | Sequence[int]) -> list[int]:
    """The steps that a respaced process keeps, in ascending order.

    Args:
        num_steps: N, of the process to be thinned out.
        sections: Counts, as numbers or separated by commas: N is cut into as many sections, and of each its count of
            steps is kept, evenly spaced, both ends among them. Or ``"ddim<K>"``: K steps of one whole-numbered stride
            from 0. Empty: every step.

    Raises:
        ConfigError: Not of this form, more steps than a section has, or a K that no stride gives.

    Source: improved DDPM, section 4.
    """
    if isinstance(sections, str):
        if sections.startswith("ddim"):
            return _strided_steps(num_steps, _whole_number(sections.removeprefix("ddim"), sections))
        sections = [_whole_number(count, sections) for count in sections.split(",")] if sections else [num_steps]
    kept: list[int] = []
    start = 0
    for i, count in enumerate(sections):
        size = num_steps // len(sections) + (i < num_steps % len(sections))
        if not 0 <= count <= size:
            raise ConfigError(
                f"Can't keep {count} of the {size} steps in section {i + 1} of {len(sections)} "
                f"(timestep_respacing or num_sampling_steps, of {num_steps} steps)."
            )
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride  # summed up, not multiplied: published models were sampled at these roundings
        start += size
    return sorted(set(kept))


def _strided_steps(num_steps: int, count: int) -> list[int]:
    for stride in range(1, num_steps):
        steps = range(0, num_steps, stride)
        if len(steps) == count:
            return list(steps)
    raise ConfigError(
        f'timestep_respacing="ddim{count}": no stride leaves {count} of {num_steps} steps. Try "{count}".'
    )


def _whole_number(text: str, sections: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ConfigError(
            f'timestep_respacing="{sections}" is not understood: {text!r} is no whole number. '
            'Give counts such as "100" or "10,15,20", or "ddim50".'
        ) from error


def respaced_betas(betas: Tensor, kept: Sequence[int]) -> Tensor:
    """Variances of the process that visits only the steps ``kept``, at the same noise levels.

    Source: improved DDPM, eq. 19.
    """
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)[list(kept)]
    return 1 - alphas_cumprod / _previous(alphas_cumprod)


@frozen(eq=False)
class NoiseSchedule:
    """What follows from the variances beta of N steps: tensors [N], or of `at` one value per sample, or one for all.

    Source: DDPM, eq. 4 and 7; improved DDPM, eq. 15 for the clipped variance.
    """

    betas: Tensor
    """Variance that a step adds."""
    alphas_cumprod: Tensor
    """alpha bar: share of the signal's variance that is left."""
    alphas_cumprod_prev: Tensor
    """alpha bar one step nearer to the data; 1 at step 0."""
    posterior_variance: Tensor
    """beta tilde: variance of the previous latents given the present and the clean ones; 0 at step 0."""
    posterior_log_variance: Tensor
    """Its logarithm, with the value of step 1 at step 0, where it would be minus infinity."""
    posterior_mean_coef1: Tensor
    """Weight of the clean latents in the posterior mean."""
    posterior_mean_coef2: Tensor
    """Weight of the present latents in the posterior mean."""
    upper_log_variance: Tensor
    """log beta, but of the posterior variance of step 1 at step 0: the larger variance of DDPM, section 3.2."""

    @classmethod
    def from_betas(cls, betas: Tensor) -> NoiseSchedule:
        """From variances [N], float64."""
        abar = torch.cumprod(1 - betas, dim=0)
        abar_prev = _previous(abar)
        variance = betas * (1 - abar_prev) / (1 - abar)
        first = variance[1:2] if len(betas) > 1 else betas
        return cls(
            betas=betas,
            alphas_cumprod=abar,
            alphas_cumprod_prev=abar_prev,
            posterior_variance=variance,
            posterior_log_variance=torch.cat([first, variance[1:]]).log(),
            posterior_mean_coef1=betas * abar_prev.sqrt() / (1 - abar),
            posterior_mean_coef2=(1 - abar_prev) * (1 - betas).sqrt() / (1 - abar),
            upper_log_variance=torch.cat([first, betas[1:]]).log(),
        )

    def at(self, step: int | Tensor) -> NoiseSchedule:
        """One step's values, to be multiplied with latents.

        ``step`` as a number gives float64 scalars, as [B] a value per sample: float32 [B, 1, 1, 1, 1] on its device.
        """
        arrays = torch.stack(attrs.astuple(self, recurse=False))
        if isinstance(step, int):
            return NoiseSchedule(*arrays[:, step])
        return NoiseSchedule(*arrays.to(step.device, torch.float32)[:, step, None, None, None, None])

    def add_noise(self, latents: Tensor, noise: Tensor) -> Tensor:
        """``latents`` with as much ``noise`` as they have after this step. Source: DDPM, eq. 4."""
        return self.alphas_cumprod.sqrt() * latents + (1 - self.alphas_cumprod).sqrt() * noise


def _previous(alphas_cumprod: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(alphas_cumprod[:1]), alphas_cumprod[:-1]])
