"""The optimizer and its learning rate."""

from __future__ import annotations

import importlib
import inspect
import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import attrs
import torch
from torch import nn

from opensora.core.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from opensora.core.config.structure import ComponentConfig
    from opensora.core.pipelines.train_spec import LoopSpec

__all__ = [
    "LearningRate",
    "build_adamw",
    "build_optimizer",
    "learning_rate_factor",
    "load_optimizer",
    "restore_optimizer",
]

log = logging.getLogger(__name__)

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


def build_optimizer(parameters: Sequence[nn.Parameter], spec: LoopSpec) -> torch.optim.Optimizer:
    """The optimizer that a config names: AdamW, or the class at the import path in ``optimizer.type``.

    Such a class is told ``lr``, and ``weight_decay`` if it knows that; its own options go before.

    Raises:
        ConfigError: No parameter wants gradients, or the class can't be had or refuses its options.
    """
    if spec.optimizer is None or not parameters:
        return build_adamw(
            parameters, lr=spec.lr, betas=spec.adam_betas, eps=spec.adam_eps, weight_decay=spec.weight_decay
        )
    optimizer_class: Any = load_optimizer(spec.optimizer)
    decay = (
        {"weight_decay": spec.weight_decay} if "weight_decay" in inspect.signature(optimizer_class).parameters else {}
    )
    defaults = attrs.fields_dict(type(spec))
    for key in ("adam_betas", "adam_eps", *(() if decay else ("weight_decay",))):
        if getattr(spec, key) != defaults[key].default:
            log.warning(
                "%s is without effect on %s, which takes options from optimizer alone.", key, spec.optimizer.type
            )
    try:
        optimizer: torch.optim.Optimizer = optimizer_class(
            parameters, lr=spec.lr, **{**decay, **spec.optimizer.options}
        )
        return optimizer
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"optimizer {spec.optimizer.type} refuses its options: {error}.") from error


def load_optimizer(config: ComponentConfig) -> type[torch.optim.Optimizer]:
    """Import an optimizer's class, and check the names of its options.

    Raises:
        ConfigError: The path leads to no optimizer, or to one that can't be used here, or an option is unknown.
    """
    module_name, _, name = config.type.rpartition(".")
    if not module_name:
        raise ConfigError(
            f'optimizer.type is "{config.type}"; it must be the import path of a class, such as "torch.optim.SGD".'
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"optimizer.type: {module_name} can't be imported ({error}). Is it installed?") from error
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        names = [
            key
            for key, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
        ]
        raise ConfigError(f"optimizer.type: {module_name} has no optimizer {name}.{did_you_mean(name, names)}")
    parameters = inspect.signature(found).parameters
    _check_options(config, parameters)
    if "lr" not in parameters and not _takes_any(parameters):
        raise ConfigError(f"optimizer {config.type} has no lr, which the schedule sets. Choose another.")
    closure = inspect.signature(found.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ConfigError(
            f"optimizer {config.type} wants to compute the loss several times a step (closure); that can't be done here."
        )
    return found


def _check_options(config: ComponentConfig, parameters: Mapping[str, inspect.Parameter]) -> None:
    own = [name for name in parameters if name not in ("self", "params", "lr")]
    for name in config.options:
        if name in ("params", "lr"):
            raise ConfigError(f"optimizer.{name} is not set here." + (" Set lr of the config." if name == "lr" else ""))
        if name not in own and not _takes_any(parameters):
            near = did_you_mean(name, own) or f" It has: {', '.join(own)}."
            raise ConfigError(f"optimizer.{name} is not an option of {config.type}.{near}")
    given = {*config.options, "weight_decay"}
    needed = [name for name in own if _is_needed(parameters[name]) and name not in given]
    if needed:
        raise ConfigError(
            f"optimizer {config.type} needs {', '.join(needed)}: optimizer = dict(type=..., {needed[0]}=...)."
        )


def _is_needed(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind not in (
        parameter.VAR_KEYWORD,
        parameter.VAR_POSITIONAL,
    )


def _takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def _is_any(value: object, objects: Sequence[object]) -> bool:
    return any(value is each for each in objects)


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's state, but keep its options: the config's count, not the checkpoint's.

    Options are what its constructor takes; whatever else it keeps beside its parameters (step sizes that it has found) is
    state.

    Raises:
        ValueError: The state is of another kind of optimizer, or of other parameters.
    """
    inner = getattr(optimizer, "optim", optimizer)  # what an accelerator has wrapped
    known = inspect.signature(type(inner)).parameters
    options = [
        {key: value for key, value in group.items() if key in known and key != "params"}
        for group in optimizer.param_groups
    ]
    saved = {key for group in state["param_groups"] for key in group}
    off = (None, False)  # options that a newer torch has added
    foreign = [key for group in options for key, value in group.items() if key not in saved and not _is_any(value, off)]
    if foreign:
        raise ValueError(f"its optimizer has no {foreign[0]}: it is of another kind than {type(inner).__name__}")
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)


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
