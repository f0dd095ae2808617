"""The learning rate rises as published; the optimizer is AdamW by its formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from opensora.core import ConfigError
from opensora.core.optimization import build_adamw, learning_rate_factor


def test_warm_up_is_as_published(golden: Callable[[str], Any]) -> None:
    for case in golden("training_misc")["warmup"]:
        rates = [
            case["base_lr"]
            * learning_rate_factor(step, warmup_steps=case["warmup_steps"], max_steps=1000, schedule="constant")
            for step in range(len(case["lr_of_step"]))
        ]
        assert rates == pytest.approx(case["lr_of_step"], rel=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("warmup_steps", [0, 10])
def test_a_schedule_rises_then_falls_to_zero(schedule: str, warmup_steps: int) -> None:
    factors = [
        learning_rate_factor(step, warmup_steps=warmup_steps, max_steps=100, schedule=schedule) for step in range(120)
    ]
    assert factors[:warmup_steps] == sorted(factors[:warmup_steps])
    assert factors[warmup_steps] == 1.0
    assert factors[warmup_steps:] == sorted(factors[warmup_steps:], reverse=True)
    assert factors[(100 + warmup_steps) // 2] == pytest.approx(0.5)
    assert factors[99] > 0
    assert factors[100:] == pytest.approx([0.0] * 20)


def test_a_warm_up_as_long_as_the_run_never_divides_by_zero() -> None:
    factors = [learning_rate_factor(step, warmup_steps=5, max_steps=5, schedule="cosine") for step in range(7)]
    assert all(0 <= factor <= 1 for factor in factors)


def test_adamw_decays_and_steps_by_its_formula() -> None:
    weight = nn.Parameter(torch.tensor([2.0, -1.0]))
    optimizer = build_adamw([weight], lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.5)
    weight.grad = torch.tensor([3.0, -0.01])
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([2 * 0.95 - 0.1, -1 * 0.95 + 0.1]), rtol=1e-4, atol=1e-4)


def test_parameters_of_another_kind_of_device_are_taken_too() -> None:
    weight = nn.Parameter(torch.ones(2, device="meta"))
    assert build_adamw([weight], lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0).param_groups[0]["lr"] == 0.1


def test_a_model_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="no parameter to train"):
        build_adamw([], lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
