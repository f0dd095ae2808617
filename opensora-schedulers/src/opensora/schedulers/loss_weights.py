"""What each noise level counts in the loss.

Sources: Hang et al., Efficient Diffusion Training via Min-SNR Weighting, https://arxiv.org/abs/2303.09556 (section 3.4);
Esser et al., Stable Diffusion 3, https://arxiv.org/abs/2403.03206 (CosMap, section 3.1).

Min-SNR weighs the squared error of the clean latents by min(SNR, gamma). What a denoiser predicts determines how that error
follows from its own, and so the weight of its own: with latents = a clean + s noise, SNR = a^2 / s^2,

    clean latents        1                        min(SNR, gamma)
    noise                1 / SNR                  min(1, gamma / SNR)
    velocity of a flow   s^2 (a = 1 - u, s = u)   min(a^2, gamma s^2)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["DIFFUSION_WEIGHTS", "FLOW_WEIGHTS", "diffusion_weights", "flow_weights"]

DIFFUSION_WEIGHTS = ("none", "min-snr")
FLOW_WEIGHTS = ("none", "min-snr", "cosmap")


def diffusion_weights(snr: Tensor, weighting: str, *, gamma: float, predicts_clean: bool) -> Tensor:
    """Of a squared error at signal to noise ratios ``snr``, of that shape.

    Args:
        weighting: Of `DIFFUSION_WEIGHTS`.
        gamma: The largest weight of the clean latents' error.
        predicts_clean: Whether clean latents are predicted, or the noise.
    """
    if weighting == "none":
        return torch.ones_like(snr)
    return snr.clamp(max=gamma) if predicts_clean else (gamma / snr).clamp(max=1)  # without SNR 0 / 0


def flow_weights(u: Tensor, weighting: str, *, gamma: float) -> Tensor:
    """Of a velocity's squared error at ``u`` in [0, 1], 0 the data and 1 the noise, of that shape.

    Args:
        weighting: Of `FLOW_WEIGHTS`.
        gamma: The largest weight of the clean latents' error.
    """
    if weighting == "min-snr":
        return torch.minimum((1 - u).square(), gamma * u.square())
    if weighting == "cosmap":
        return 2 / (math.pi * (1 - 2 * u + 2 * u.square()))
    return torch.ones_like(u)
