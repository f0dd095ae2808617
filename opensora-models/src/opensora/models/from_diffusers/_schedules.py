"""Diffusion models that keep variance, seen as rectified flow.

With a^2 + s^2 = 1, such a model knows x = a data + s noise and predicts v = a noise - s data. Rectified flow's
z = (1 - u) data + u noise is the same point but for its length, n = sqrt((1 - u)^2 + u^2): x = z / n, with a = (1 - u) / n
and s = u / n. So one is sampled as the other, exactly, at the timestep where its schedule has that a.

Source: v-prediction: Salimans and Ho, https://arxiv.org/abs/2202.00512, appendix D.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler
from torch import Tensor

from opensora.core.errors import ConfigError

COGVIDEOX_2B = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "rescale_betas_zero_snr": True,
    "snr_shift_scale": 3.0,
}
"""The published schedule of CogVideoX-2b; CogVideoX-5b has snr_shift_scale 1."""


def noise_angles(schedule: Mapping[str, Any]) -> Tensor:
    """atan(s / a) at each whole timestep, rising to pi / 2, [N] float32.

    Args:
        schedule: Arguments of diffusers' ``CogVideoXDDIMScheduler``, which has those of its ``DDIMScheduler``.

    Raises:
        ConfigError: It takes no such schedule.
    """
    options = {"snr_shift_scale": 1.0, **schedule}  # other schedulers' files don't name it
    try:
        scheduler: Any = CogVideoXDDIMScheduler
        alphas_cumprod: Tensor = scheduler.from_config(options).alphas_cumprod
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ConfigError(f"model.noise_schedule can't be used ({error}). It is scheduler_config.json's.") from error
    return torch.atan2((1 - alphas_cumprod).clamp(min=0).sqrt(), alphas_cumprod.clamp(min=0).sqrt()).float()


def timestep_at(angle: Tensor, angles: Tensor) -> Tensor:
    """Where a schedule reaches ``angle`` [B], between whole timesteps in proportion; [B] in [0, N - 1]."""
    above = torch.searchsorted(angles, angle).clamp(1, len(angles) - 1)
    low, high = angles[above - 1], angles[above]
    return above - 1 + ((angle - low) / (high - low)).clamp(0, 1)


def scales(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """n, a, s at ``u``."""
    length = ((1 - u).square() + u.square()).sqrt()
    return length, (1 - u) / length, u / length
