"""The learning rate rises as published; the optimizer is AdamW by its formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from opensora.core import ConfigError
from opensora.core.config.structure import ComponentConfig, structure
from opensora.core.optimization import (
    build_adamw,
    build_optimizer,
    learning_rate_factor,
    load_optimizer,
    restore_optimizer,
)
from opensora.core.pipelines.train_spec import LoopSpec


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


def loop_spec(**values: object) -> LoopSpec:
    return structure(LoopSpec, {"model": {"type": "x"}, "dataset": {"type": "y"}, **values})


def weights() -> list[nn.Parameter]:
    return [nn.Parameter(torch.tensor([2.0, -1.0]))]


def step(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.tensor([3.0, -0.01])
    optimizer.step()


def test_without_a_choice_it_is_adamw_with_its_keys() -> None:
    optimizer = build_optimizer(weights(), loop_spec(adam_betas=[0.8, 0.9], adam_eps=1e-6, weight_decay=0.1, lr=0.5))
    assert type(optimizer) is torch.optim.AdamW
    (group,) = optimizer.param_groups
    assert (group["betas"], group["eps"], group["weight_decay"], group["lr"]) == ((0.8, 0.9), 1e-6, 0.1, 0.5)


def test_an_optimizer_is_chosen_by_its_import_path() -> None:
    choice = {"type": "torch.optim.SGD", "momentum": 0.5}
    optimizer = build_optimizer(weights(), loop_spec(optimizer=choice, lr=0.1, weight_decay=0.5))
    assert type(optimizer) is torch.optim.SGD
    step(optimizer)
    step(optimizer)
    decayed = torch.tensor([2.0, -1.0])
    momentum = torch.zeros(2)
    for _ in range(2):
        momentum = 0.5 * momentum + torch.tensor([3.0, -0.01]) + 0.5 * decayed
        decayed = decayed - 0.1 * momentum
    torch.testing.assert_close(optimizer.param_groups[0]["params"][0].detach(), decayed)


def test_options_of_the_choice_go_before_keys() -> None:
    choice = {"type": "torch.optim.RMSprop", "weight_decay": 0.25}
    assert build_optimizer(weights(), loop_spec(optimizer=choice)).param_groups[0]["weight_decay"] == 0.25


def test_keys_without_effect_are_named(caplog: pytest.LogCaptureFixture) -> None:
    choice = {"type": "torch.optim.SGD"}
    build_optimizer(weights(), loop_spec(optimizer=choice, adam_eps=1e-6))
    assert [record.getMessage() for record in caplog.records] == [
        "adam_eps is without effect on torch.optim.SGD, which takes options from optimizer alone."
    ]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"type": "SGD"}, "must be the import path of a class"),
        ({"type": "torch.optim.SGDD"}, 'torch.optim has no optimizer SGDD. Did you mean "SGD"'),
        ({"type": "torch.optim.lr_scheduler"}, "no optimizer lr_scheduler"),
        ({"type": "no_such_package.Lion"}, "no_such_package can't be imported"),
        ({"type": "os.system"}, "os has no optimizer system"),
        (
            {"type": "torch.optim.SGD", "momentun": 0.9},
            'optimizer.momentun is not an option of torch.optim.SGD. Did you mean "mo',
        ),
        ({"type": "torch.optim.SGD", "lr": 0.9}, "Set lr of the config"),
        ({"type": "torch.optim.LBFGS"}, "several times a step"),
    ],
)
def test_what_is_no_optimizer_is_refused(choice: dict[str, object], message: str) -> None:
    options = {key: value for key, value in choice.items() if key != "type"}
    with pytest.raises(ConfigError, match="optimizer") as caught:
        load_optimizer(ComponentConfig(type=str(choice["type"]), options=options))
    assert message in str(caught.value)


def test_what_an_optimizer_refuses_is_the_users_mistake() -> None:
    with pytest.raises(ConfigError, match=r"torch.optim.SGD refuses its options: Invalid momentum value: -1"):
        build_optimizer(weights(), loop_spec(optimizer={"type": "torch.optim.SGD", "momentum": -1.0}))


def test_state_comes_back_and_options_stay_the_configs() -> None:
    choice = {"type": "torch.optim.SGD", "momentum": 0.5}
    saved = build_optimizer(weights(), loop_spec(optimizer=choice))
    step(saved)
    other = build_optimizer(weights(), loop_spec(optimizer={**choice, "momentum": 0.9, "nesterov": True}))
    restore_optimizer(other, saved.state_dict())
    (parameter,) = other.param_groups[0]["params"]
    assert torch.equal(other.state[parameter]["momentum_buffer"], torch.tensor([3.0, -0.01]))
    assert (other.param_groups[0]["momentum"], other.param_groups[0]["nesterov"]) == (0.9, True)


class FindsItsRate(torch.optim.SGD):
    """Keeps a number in its groups that is no option."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr=lr)
        self.param_groups[0]["found"] = 1.0


def test_what_an_optimizer_has_found_is_state() -> None:
    saved, other = FindsItsRate(weights()), FindsItsRate(weights())
    saved.param_groups[0]["found"] = 7.0
    restore_optimizer(other, saved.state_dict())
    assert other.param_groups[0]["found"] == 7.0


def test_the_state_of_another_kind_is_refused() -> None:
    state = build_optimizer(weights(), loop_spec()).state_dict()
    with pytest.raises(ValueError, match="of another kind than SGD"):
        restore_optimizer(torch.optim.SGD(weights(), momentum=0.5), state)
