"""``pyramid-broadcast``: what attention returned at one sampling step serves the next few, too.

    hooks = [dict(type="pyramid-broadcast")]

In the middle of sampling, attention's outputs hardly change from step to step: least to the text, more along time, most in
space. So each is computed at every sixth, fourth and second step. Nothing is measured and no error is bounded, see
`opensora.accel.step_cache` for that.

Source: Zhao et al., Pyramid Attention Broadcast, https://arxiv.org/abs/2408.12588. The defaults are those for Open-Sora.

It works for denoisers whose blocks have attention modules ``attn``, ``attn_temp`` and ``cross_attn`` in ``blocks`` (STDiT,
STDiT2), or ``attn`` and ``cross_attn`` in ``spatial_blocks`` and ``temporal_blocks`` (STDiT3, Latte's text-to-video model).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import torch
from attrs import define, field, frozen
from attrs.validators import ge
from torch import Tensor, nn

from opensora.accel._common import check_run, check_scheduler, total
from opensora.core.conditioning import Conditioning
from opensora.core.errors import ConfigError
from opensora.core.hookspecs import hook

if TYPE_CHECKING:
    from opensora.core.denoising import Denoising
    from opensora.core.pipelines.sample_loop import SampleRun
    from opensora.core.pipelines.sample_spec import SampleSpec

__all__ = ["PyramidBroadcast", "PyramidBroadcastSpec"]

log = logging.getLogger(__name__)

Axis = Literal["spatial", "temporal", "cross"]
AXES: tuple[Axis, ...] = ("spatial", "temporal", "cross")


@frozen(kw_only=True)
class PyramidBroadcastSpec:
    """Options of `PyramidBroadcast`. Of a step with two evaluations, as Heun's, each counts."""

    spatial_every: int = field(default=2, validator=ge(1))
    """Attention within frames is computed at every n-th step, and its output used again in between. 1: at each."""
    temporal_every: int = field(default=4, validator=ge(1))
    """The same for attention along time."""
    cross_every: int = field(default=6, validator=ge(1))
    """The same for attention to the text."""
    window: tuple[float, float] = (0.45, 0.93)
    """Timesteps between which that is done, as shares of num_timesteps: 0 is data, 1 noise."""

    def __attrs_post_init__(self) -> None:
        low, high = self.window
        if not 0 <= low < high <= 1:
            raise ConfigError(
                f"window is ({low:g}, {high:g}); it must be two rising shares in [0, 1], such as (0.45, 0.93)."
            )
        if self.spatial_every == self.temporal_every == self.cross_every == 1:
            raise ConfigError(
                "Nothing would be reused: spatial_every, temporal_every and cross_every are all 1. "
                "Raise one of them, or leave pyramid-broadcast out."
            )

    def every(self, axis: Axis) -> int:
        """At how many steps attention along this axis is computed once."""
        return {"spatial": self.spatial_every, "temporal": self.temporal_every, "cross": self.cross_every}[axis]


@define(eq=False)
class _Stream:
    """Evaluations that follow one another: of one denoising, under the same conditions. Both halves of guidance may be one,
    or one each.
    """

    evaluation: int = -1
    """Number of the one under way."""
    is_inside: bool = False
    """Whether it lies in the window."""
    outputs: dict[nn.Module, tuple[int, Tensor]] = field(factory=dict)
    """Of attention modules, with the evaluation that computed them."""


class PyramidBroadcast:
    """Uses outputs of attention again at the sampling steps that follow."""

    Spec = PyramidBroadcastSpec

    def __init__(self, spec: PyramidBroadcastSpec) -> None:
        """Nothing happens before there is a denoiser."""
        self.spec = spec
        self.computed = dict.fromkeys(AXES, 0)
        """Calls of attention modules, in this process."""
        self.reused = dict.fromkeys(AXES, 0)
        self._streams: WeakKeyDictionary[Denoising, WeakKeyDictionary[Conditioning, _Stream]] = WeakKeyDictionary()
        self._own: WeakKeyDictionary[Conditioning, _Stream] | None = None
        self._stream: _Stream | None = None
        self._num_timesteps = 1000

    # ---- hooks

    @hook
    def denoiser_built(self, denoiser: nn.Module, spec: SampleSpec) -> None:
        """Stand before its attention modules. Nothing of that is in its state dict.

        Raises:
            ConfigError: It has none that are known, or see `check_run`.
        """
        check_run("pyramid-broadcast", spec, others=("step-cache",))
        for axis, module in attention_modules(denoiser):
            module.forward = partial(self._attend, axis, module, module.forward)
        denoiser.register_forward_pre_hook(self._evaluate)

    @hook
    def denoising_step(self, denoising: Denoising) -> None:
        """Know whose the next evaluations are."""
        check_scheduler("pyramid-broadcast", denoising.scheduler)
        self._own = self._streams.setdefault(denoising, WeakKeyDictionary())
        self._num_timesteps = denoising.scheduler.num_timesteps

    @hook
    def sample_end(self, run: SampleRun) -> None:
        """Let go of what was kept, and say if it was good for nothing."""
        self._own = self._stream = None
        self._streams.clear()
        if not any(self.reused.values()) and any(self.computed.values()):
            log.warning(
                "pyramid-broadcast: nothing was reused. Too few steps lie in the window (%g, %g) of the way.",
                *self.spec.window,
            )

    @hook
    def sample_report(self, run: SampleRun) -> Mapping[str, object]:
        """Calls of attention modules, computed and reused in all processes."""
        counts = total(run.accelerator, *self.computed.values(), *self.reused.values())
        computed, reused = (dict(zip(AXES, map(round, half), strict=True)) for half in (counts[:3], counts[3:]))
        return {"pyramid_broadcast": {"attention_computed": computed, "attention_reused": reused}}

    # ---- calls

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # of torch
    def _evaluate(self, denoiser: nn.Module, inputs: tuple[Any, ...]) -> None:
        """The denoiser is about to be evaluated."""
        _, timestep, conditioning = inputs
        self._stream = None
        if self._own is None or torch.is_grad_enabled():
            return
        stream = self._own.setdefault(conditioning, _Stream())
        low, high = self.spec.window
        stream.evaluation += 1
        stream.is_inside = low < timestep.max().item() / self._num_timesteps < high
        if not stream.is_inside:
            stream.outputs.clear()
        self._stream = stream

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # of torch
    def _attend(
        self, axis: Axis, module: nn.Module, forward: Callable[..., Tensor], *inputs: Any, **named: Any
    ) -> Tensor:
        """An attention module is called."""
        stream = self._stream
        if stream is not None and stream.is_inside and module in stream.outputs:
            computed_at, output = stream.outputs[module]
            if stream.evaluation - computed_at < self.spec.every(axis):
                self.reused[axis] += 1
                return output
        output = forward(*inputs, **named)
        self.computed[axis] += 1
        if stream is not None and stream.is_inside and self.spec.every(axis) > 1:
            stream.outputs[module] = stream.evaluation, output
        return output


def attention_modules(denoiser: nn.Module) -> list[tuple[Axis, nn.Module]]:
    """All attention modules of a denoiser's blocks, with the axis that each attends along.

    Raises:
        ConfigError: The denoiser has no such blocks.
    """
    found = [(axis, module) for axis, module in _iter_attention(denoiser) if isinstance(module, nn.Module)]
    if {axis for axis, _ in found} == set(AXES):
        return found
    has = ", ".join(name for name, _ in denoiser.named_children()) or "none"
    raise ConfigError(
        f'hooks: "pyramid-broadcast" needs a denoiser with attention in space, in time and to the text, as STDiT, STDiT2 '
        f"and STDiT3. {type(denoiser).__name__} has not, as far as can be told from its parts: {has}."
    )


def _iter_attention(denoiser: nn.Module) -> Iterator[tuple[Axis, Any]]:
    for block in _members(denoiser, "blocks"):
        yield "spatial", getattr(block, "attn", None)
        yield "temporal", getattr(block, "attn_temp", None)
        yield "cross", getattr(block, "cross_attn", None)
    halves: dict[Axis, str] = {"spatial": "spatial_blocks", "temporal": "temporal_blocks"}
    for axis, name in halves.items():
        for block in _members(denoiser, name):
            yield axis, getattr(block, "attn", None)
            yield "cross", getattr(block, "cross_attn", None)


def _members(denoiser: nn.Module, name: str) -> list[nn.Module]:
    blocks = getattr(denoiser, name, None)
    return list(blocks) if isinstance(blocks, nn.ModuleList) else []
