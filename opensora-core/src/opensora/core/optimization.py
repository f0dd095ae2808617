"""The optimizer and its learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from opensora.core.errors import ConfigError

__all__ = ["LearningRate", "build_adamw", "learning_rate_factor"]

LearningRate = Literal["constant", "linear", "cosine"]


def learning_rate_factor(step: int, *, warmup_steps: int, max_steps: int, schedule: LearningRate) -> float:
    """What the learning rate is multiplied by at an optimizer step, counted from 0.

    Rises as ``(step + 1) / (warmup_steps + 1)``; then stays, or falls to 0 at ``max_steps`` on a line or half a cosine.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


def build_adamw(
    parameters: Sequence[nn.Parameter], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW (https://arxiv.org/abs/1711.05101), fused into one kernel where the device has it.

    Raises:
        ConfigError: No parameter wants gradients.
    """
    if not parameters:
        raise ConfigError(
            "The model has no parameter to train: all are frozen. Check only_train_temporal and the like."
        )
    fused = {parameter.device.type for parameter in parameters} <= {"cuda", "cpu"}
    return torch.optim.AdamW(parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)
