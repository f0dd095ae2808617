"""What a training step takes, known before it is made: the step itself is rehearsed, from encoders to averaged weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace, TracebackType
from typing import Any, Self

import attrs
import torch
from attrs import frozen
from torch import Tensor, nn

from opensora.core.accelerator import DTYPES, Accelerator, SingleSpec, choose_device, choose_dtype
from opensora.core.blocks import checkpoint_activations, iter_blocks, offloading
from opensora.core.composing import Parts, build_parts
from opensora.core.conditioning import Conditioning
from opensora.core.hooking import build_hooks
from opensora.core.hooks.ema import EMA, EMASpec
from opensora.core.optimization import build_optimizer
from opensora.core.pipelines.encoder_cost import EncoderCosts, ValuelessDraws
from opensora.core.pipelines.train_spec import TrainSpec
from opensora.core.protocols import Size
from opensora.core.rehearsal import Moment, Rehearsal
from opensora.core.shares import Shares
from opensora.core.trainable import adapt

__all__ = ["StepCost", "StepRehearsal", "build_on_meta", "encoder_costs", "iter_lists", "target_dtype"]

_BACKWARD = ("backward", "end of backward")
"""Two phases: activations go as gradients come, so that the peak is at the one end or at the other."""


@frozen(kw_only=True)
class StepCost:
    """What one process needs for a training step of one micro-batch. Memory is in bytes."""

    size: Size
    """(T, H, W) of the videos, in pixels."""
    batch_size: int
    held: Mapping[str, int]
    """By category, between steps: parameters, optimizer, average, encoders."""
    gradients: int
    saved: int
    """What the denoiser's layers save for backward: unique storages, without parameters."""
    host: int
    """In the CPU's memory, if activations are kept there."""
    peaks: Mapping[str, Moment]
    """By phase: video encoder, text encoder, forward, backward, optimizer."""
    flops: int
    """Forward and backward, with what is computed twice."""
    encoder_flops: int

    @property
    def peak(self) -> int:
        """The most that is needed at any moment."""
        return max(moment.bytes for moment in self.peaks.values())

    @property
    def worst_phase(self) -> str:
        """Where that is."""
        return max(self.peaks, key=lambda name: self.peaks[name].bytes)


def build_on_meta(spec: TrainSpec, size: Size | None, **ready: Any) -> Parts:
    """All parts of a training config on the meta device, changed by the hooks that change the denoiser.

    Args:
        size: (T, H, W) that all clips have; None if they differ.
        ready: Parts that exist already, as `build_parts` takes them.

    Raises:
        ComponentError, ConfigError: See `build_parts`.
    """
    parts = build_parts(spec, size_of=lambda: size, meta=True, **ready)
    adapt(parts.denoiser, build_hooks(spec.default_hooks(), spec.hooks, without=spec.without_hooks), spec)
    return parts


class StepRehearsal:
    """Rehearses steps of a training config, for any size and batch size; a context manager.

    Deep networks whose blocks are alike are rehearsed with a few of them, twice: each block adds the same.
    """

    def __init__(
        self,
        spec: TrainSpec,
        parts: Parts,
        shares: Shares | None = None,
        *,
        encoders: EncoderCosts | None = None,
        exact: bool = False,
    ) -> None:
        """Nothing is rehearsed yet.

        Args:
            spec: Of the config.
            parts: On the meta device.
            shares: What part of each category one process holds; None: all.
            encoders: Of these parts, to use again what is known of them.
            exact: Rehearse all blocks.
        """
        shares = shares or Shares()
        self.encoders = encoders or encoder_costs(spec, parts)
        depths = [] if exact else _short_depths(parts.denoiser, spec.grad_checkpoint)
        self._depth = max((len(each) for each in iter_lists(parts.denoiser)), default=0)
        networks = [_shorten(parts.denoiser, depth) for depth in depths or [self._depth]]
        self._depths = depths or [self._depth]
        self._steps = [_Step(spec, attrs.evolve(parts, denoiser=each), shares) for each in networks]

    def __enter__(self) -> Self:
        """Allocate, without memory, what lasts from step to step."""
        for step in self._steps:
            with step.rehearsal:
                step.prepare()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Forget it."""
        self._steps.clear()

    def step(self, size: Size, batch_size: int) -> StepCost:
        """What a step of ``batch_size`` videos of (T, H, W) takes.

        Raises:
            ShapeError: The autoencoder or the denoiser can't do this size.
        """
        costs = []
        for step in self._steps:
            with step.rehearsal:
                costs.append(step.make(size, batch_size))
        cost = costs[0]
        if len(costs) > 1:
            short, longer = self._depths
            cost = _extrapolate(costs[0], costs[1], (self._depth - short) / (longer - short))
        return self._with_encoders(cost)

    def _with_encoders(self, cost: StepCost) -> StepCost:
        """Their weights, which are there all the time, and their work, which comes before the denoiser's."""
        video, text = self.encoders.video(cost.size, cost.batch_size), self.encoders.text(cost.batch_size)
        weights = {"encoders": self.encoders.weights}
        held = {**cost.held, **weights}
        moments = {
            "video encoder": {**held, "activations": video.bytes},
            "text encoder": {**held, "activations": text.bytes},
            **{name: {**moment.held, **weights} for name, moment in cost.peaks.items()},
        }
        return attrs.evolve(
            cost,
            held=held,
            peaks={name: Moment(bytes=sum(each.values()), held=each) for name, each in moments.items()},
            encoder_flops=video.flops + text.flops,
        )


class _Step:
    """One network, its optimizer and its rehearsal."""

    def __init__(self, spec: TrainSpec, parts: Parts, shares: Shares) -> None:
        self.spec, self.parts, self.shares = spec, parts, shares
        self.rehearsal = Rehearsal(
            {
                "parameters": shares.parameters,
                "gradients": shares.gradients,
                "optimizer": shares.optimizer,
                "average": shares.optimizer,
                "of the optimizer": shares.optimizer,
                "activations": shares.activations,
            }
        )
        self.dtype = target_dtype(spec)

    def prepare(self) -> None:
        """Give the parts tensors, and make a step that allocates the optimizer's."""
        denoiser = self.parts.denoiser.train()
        self.rehearsal.fake(denoiser, "parameters")
        checkpoint_activations(denoiser, self.spec.grad_checkpoint)
        self.accelerator = _Rehearsed(self.dtype)
        self.predict = self.accelerator.prepare(denoiser)
        self.parameters = [each for each in denoiser.parameters() if each.requires_grad]
        self.optimizer = build_optimizer(self.parameters, self.spec)
        with self.rehearsal.counting_as("optimizer"):
            for each in self.parameters:
                each.grad = torch.zeros_like(each)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.average = self._begin_average()
        later = [parameter for blocks in iter_lists(denoiser) for parameter in blocks[1:].parameters()]
        self.later = {id(parameter) for parameter in later if parameter.requires_grad}
        watched: list[Any] = list(self.parameters)
        for each in watched:
            each.register_post_accumulate_grad_hook(self._note_gradient)

    def make(self, size: Size, batch_size: int) -> StepCost:
        """See `StepRehearsal.step`; without the encoders."""
        rehearsal = self.rehearsal
        rehearsal.reset()
        rehearsal.begin("inputs")
        held = {name: amount for name, amount in rehearsal.held.items() if amount and name != "activations"}
        latents, conditioning = self._inputs(size, batch_size)
        saved: dict[int, int] = {}
        rehearsal.begin("forward")
        with self._autograd_hooks(saved):
            losses = self.parts.scheduler.loss(self.predict, latents, conditioning, draws=ValuelessDraws(batch_size))
            loss = losses.sum() / batch_size
        host = rehearsal.held["host"]
        del latents, conditioning, losses
        rehearsal.begin("backward")
        self.missing = len(self.later)
        self.accelerator.backward(loss)
        del loss
        gradients = rehearsal.held["gradients"]
        rehearsal.begin("optimizer")
        with rehearsal.counting_as("of the optimizer"):
            self.accelerator.update(self.optimizer, self.parameters, grad_clip=self.spec.grad_clip)
            if self.average:
                self.average.step_end(run=None, update=SimpleNamespace(is_left_out=False, step=1))  # type: ignore[arg-type]
        flops = rehearsal.flops
        return StepCost(
            size=size,
            batch_size=batch_size,
            held=held,
            gradients=gradients,
            saved=round(self.shares.activations * sum(saved.values())),
            host=round(self.shares.activations * host),
            peaks=self._with_gathered(rehearsal.peaks),
            flops=round(self.shares.activations * sum(flops[phase] for phase in ("forward", *_BACKWARD))),
            encoder_flops=0,
        )

    def _note_gradient(self, parameter: nn.Parameter) -> None:
        self.rehearsal.count_as("gradients", parameter.grad)
        if id(parameter) in self.later:
            self.missing -= 1
            if not self.missing:  # what is left are the first blocks, and what is before them
                self.rehearsal.begin(_BACKWARD[1])

    def _begin_average(self) -> EMA | None:
        if not self.spec.ema_decay:
            return None
        average = EMA(EMASpec(decay=self.spec.ema_decay))
        with self.rehearsal.counting_as("average"):
            average.train_start(run=SimpleNamespace(module=self.parts.denoiser))  # type: ignore[arg-type]  # all it needs
        return average

    def _inputs(self, size: Size, batch_size: int) -> tuple[Tensor, Conditioning]:
        """What the encoders leave for the scheduler."""
        vae = self.parts.vae
        latents = torch.empty(batch_size, vae.latent_channels, *vae.latent_size(size))
        conditioning = self._told(batch_size)
        numbers = {
            name: torch.empty(batch_size)
            for name in ("fps", "height", "width", "num_frames", "latent_frames", "aspect_ratio")
        }
        conditioning = conditioning.replace(**numbers)
        if getattr(self.parts.denoiser, "condition_dropout", 0.0):
            conditioning = conditioning.replace(dropped=torch.empty(batch_size, dtype=torch.bool))
        if self.spec.mask_ratios:
            mask = torch.empty(batch_size, latents.shape[2], dtype=torch.bool)
            conditioning = conditioning.replace(frame_mask=mask)
        return latents, conditioning

    def _told(self, batch_size: int) -> Conditioning:
        """As the text encoder gives it, for prompts of full length."""
        encoder: Any = self.parts.text_encoder
        if encoder.width is None:
            return Conditioning(labels=torch.empty(batch_size, dtype=torch.int64))
        weights = encoder.parameters() if isinstance(encoder, nn.Module) else ()
        has_weights = any(each.is_floating_point() for each in weights)
        dtype = self.dtype if has_weights else torch.float32
        return Conditioning(
            text_embedding=torch.empty(batch_size, encoder.max_length, encoder.width, dtype=dtype),
            text_mask=torch.empty(batch_size, encoder.max_length, dtype=torch.bool),
        )

    @contextmanager
    def _autograd_hooks(self, saved: dict[int, int]) -> Iterator[None]:
        """Count what is saved for backward and, if so configured, keep it in the CPU's memory."""
        own = {each.untyped_storage()._cdata for each in self.parts.denoiser.parameters()}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                saved[storage._cdata] = storage.nbytes()
            return tensor.detach()  # not the tensor: one that its own node saves would never be freed

        offloaded = offloading(torch.device("cpu")) if self.spec.offload else nullcontext()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), offloaded:
            yield

    def _with_gathered(self, peaks: Mapping[str, Moment]) -> dict[str, Moment]:
        """With the blocks that are put together for the moment, where parameters lie in parts."""
        extra = 0
        if self.shares.gathers_blocks:
            blocks = [sum(each.numel() for each in block.parameters()) for block in iter_blocks(self.parts.denoiser)]
            extra = 2 * max(blocks, default=0) * self.dtype.itemsize  # the next is fetched while one computes
        found = dict(peaks)
        for name in ("forward", *_BACKWARD) if extra else ():
            moment = found[name]
            found[name] = Moment(bytes=moment.bytes + extra, held={**moment.held, "gathered": extra})
        return found


def iter_lists(network: nn.Module) -> Iterator[nn.ModuleList]:
    """The lists that hold the network's blocks."""
    blocks = set(map(id, iter_blocks(network)))
    for module in network.modules():
        if isinstance(module, nn.ModuleList) and any(id(child) in blocks for child in module):
            yield module


def _short_depths(network: nn.Module, which: bool | int | str) -> list[int]:
    """Two numbers of blocks that tell what any number takes; none if blocks differ, or there are few of them."""
    lists = list(iter_lists(network))
    period = which if type(which) is int else 1
    depths = {len(each) for each in lists}
    if len(depths) != 1 or not all(_are_alike(each) for each in lists):
        return []
    (depth,) = depths
    if len(lists) > 1 and period > 1:  # the n-th are counted through all lists
        return []
    short = (
        2 * period + depth % period
    )  # with fewer, the first blocks are the last ones, where backward's other peak is
    return [short, short + period] if depth > short + period else []


def _are_alike(blocks: nn.ModuleList) -> bool:
    """Whether they have the same layers with the same parameters, of which the same are trained."""
    kinds = {
        (
            tuple(type(each) for each in block.modules()),
            tuple((name, each.shape, each.requires_grad) for name, each in block.named_parameters()),
        )
        for block in blocks
    }
    return len(kinds) == 1


def _shorten(network: nn.Module, depth: int) -> nn.Module:
    """A copy, on the meta device, with the first so many blocks of each list."""
    short = copy.deepcopy(network)
    for blocks in list(iter_lists(short)):
        del blocks[depth:]
    return short


def _extrapolate(short: StepCost, longer: StepCost, factor: float) -> StepCost:
    """Each number on the line through two."""

    def line(one: int, other: int) -> int:
        return round(one + factor * (other - one))

    def lines(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
        return {name: line(one.get(name, 0), other.get(name, 0)) for name in {**one, **other}}

    moments = {name: lines(one.held, longer.peaks[name].held) for name, one in short.peaks.items()}
    peaks = {name: Moment(bytes=sum(each.values()), held=each) for name, each in moments.items()}
    numbers: dict[str, Any] = {
        name: line(getattr(short, name), getattr(longer, name)) for name in ("gradients", "saved", "host", "flops")
    }
    return attrs.evolve(short, held=lines(short.held, longer.held), peaks=peaks, **numbers)


def encoder_costs(spec: TrainSpec, parts: Parts) -> EncoderCosts:
    """Of the config's encoders; a text encoder that the config keeps on the CPU takes nothing of the device."""
    is_apart = spec.text_encoder.options.get("device") == "cpu" and spec.device != "cpu"
    return EncoderCosts(parts, target_dtype(spec), counts_text=not is_apart)


def target_dtype(spec: TrainSpec) -> torch.dtype:
    """The precision that the run would have; one that this machine can't compute in can still be planned for."""
    return choose_dtype("auto", choose_device(spec.device)) if spec.dtype == "auto" else DTYPES[spec.dtype]


class _Rehearsed(Accelerator):
    """One process on the CPU, in any precision."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(SingleSpec(), device="cpu", dtype="fp32")
        self.dtype = dtype

    def prepare(self, module: nn.Module) -> Callable[..., Any]:
        """It is where it belongs already."""
        return self._autocast(module)
