"""Averaged weights: what sampling uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from attrs import field, frozen
from attrs.validators import and_, ge, lt
from torch import Tensor, nn

from opensora.core.adapters import kept
from opensora.core.errors import CheckpointError
from opensora.core.hookspecs import hook
from opensora.core.sharding import own_part

if TYPE_CHECKING:
    from opensora.core.pipelines.loop import LoopRun, Update

__all__ = ["EMA", "EMASpec"]


@frozen(kw_only=True)
class EMASpec:
    """Exponential moving average of the trained weights, in float32."""

    decay: float = field(default=0.9999, validator=and_(ge(0), lt(1)))
    """Weight of the past at each step."""
    warmup: bool = True
    """At first average over the steps there are: the decay is at most (1 + step) / (10 + step)."""


class EMA:
    """``ema = decay * ema + (1 - decay) * weights`` after each step; buffers and frozen parameters are copied when saving."""

    Spec = EMASpec

    def __init__(self, spec: EMASpec) -> None:
        self.spec = spec
        self.averages: dict[str, Tensor] = {}
        self.has_history = False
        self._weights: list[nn.Parameter] = []

    @hook(tryfirst=True)
    def train_start(self, run: LoopRun) -> None:
        """Start from the weights as they are, unless a checkpoint brought averages."""
        if not self.averages:
            self.averages = {name: each.detach().float().clone() for name, each in trained(run).items()}
        self._weights = list(trained(run).values())  # in the order of the averages
        run.ema = self

    @hook(tryfirst=True)
    def step_end(self, run: LoopRun, update: Update) -> None:
        """Move the averages towards the weights; a step that was left out moves nothing."""
        if update.is_left_out:
            return
        warming = self.spec.warmup and not self.has_history
        decay = min(self.spec.decay, (1 + update.step) / (10 + update.step)) if warming else self.spec.decay
        weights = [own_part(parameter.detach()) for parameter in self._weights]
        averages = [own_part(average) for average in self.averages.values()]
        torch._foreach_lerp_(averages, weights, 1 - decay)

    @hook
    def save_tensors(self, run: LoopRun) -> Mapping[str, Mapping[str, Tensor]]:
        """What the checkpoint holds of the network, with averages in place of weights, so that it loads like any other."""
        return {"ema": {**kept(run.module, run.module.state_dict()), **self.averages}}

    @hook
    def restore_tensors(self, run: LoopRun, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take the averages back.

        Raises:
            CheckpointError: The checkpoint has none, or of another model.
        """
        saved = tensors.get("ema", {})
        if missing := [name for name in trained(run) if name not in saved]:
            raise CheckpointError(
                f"The checkpoint has no averaged weights for {missing[0]} and {len(missing) - 1} more. "
                "It was trained with ema_decay = 0; set that, or start from its weights with model.from_pretrained."
            )
        self.averages = {name: saved[name].to(each.device, torch.float32) for name, each in trained(run).items()}
        self.has_history = run.spec.start_from_scratch  # then steps count from 0, but the averages are not young

    @contextmanager
    def applied(self, denoiser: nn.Module) -> Iterator[None]:
        """Put the averages into ``denoiser`` for the length of the block."""
        with _changing():
            parameters = dict(denoiser.named_parameters())
            weights = {name: own_part(parameters[name].detach()) for name in self.averages}
            before = {name: weight.clone() for name, weight in weights.items()}
            for name, average in self.averages.items():
                weights[name].copy_(own_part(average))
        try:
            yield
        finally:
            with _changing():
                for name, weight in before.items():
                    weights[name].copy_(weight)


@contextmanager
def _changing() -> Iterator[None]:
    """Where weights may be changed, even if samples are being made: parts of DTensors can't be had in inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def trained(run: LoopRun) -> dict[str, nn.Parameter]:
    """The network's parameters that are trained."""
    return {name: each for name, each in run.module.named_parameters() if each.requires_grad}
