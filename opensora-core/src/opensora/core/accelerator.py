"""How a training or sampling step runs on the hardware. ``single`` is one process; others subclass it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Self, TypeVar, cast

import torch
from attrs import frozen
from torch import Tensor, nn

from opensora.core.errors import MachineError, UserError
from opensora.core.machine import probe_dtype
from opensora.core.shares import Shares

__all__ = ["Accelerator", "DtypeName", "Single", "SingleSpec", "cast_module", "choose_device", "choose_dtype"]

DtypeName = Literal["auto", "fp32", "fp16", "bf16"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
T = TypeVar("T")
ModuleT = TypeVar("ModuleT", bound=nn.Module)


@frozen(kw_only=True)
class SingleSpec:
    """One process has no options."""


class Accelerator:
    """What a pipeline may ask of the hardware, as one process on one device answers it. The base of all accelerators."""

    Spec: type = SingleSpec
    rank = 0
    world_size = 1
    shards_state = False
    """Whether weights, averages and optimizer state of prepared networks are spread over processes, as torch's DTensors. Then
    each process saves its own, over ``saving_group``."""
    builds_together = False
    """Whether all processes must take part in putting a checkpoint's state together, which the main one then writes."""
    saving_group: Any = None
    """The process group over which a save is agreed on: its own, since a thread may use it while training goes on."""

    def __init__(self, spec: Any, *, device: str | None = None, dtype: DtypeName = "auto") -> None:
        """Choose the device and the precision; nothing is started before ``__enter__``.

        Args:
            spec: Of class ``Spec``.
            device: As torch names it; None takes the first GPU, or else the CPU.
            dtype: Of matrix products; ``auto`` is bf16 where the device computes it well, else fp32.

        Raises:
            MachineError: The device is missing, or can't compute in that dtype.
        """
        self.spec = spec
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)

    @classmethod
    def shares(cls, spec: Any, world_size: int) -> Shares:  # noqa: ARG003  # others ask for them
        """What part of the memory each of ``world_size`` processes holds, for plans; here each holds all."""
        return Shares()

    def __enter__(self) -> Self:
        """Join the other processes, if there are any."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        """Leave the other processes."""

    # ---- running networks

    def prepare(self, module: nn.Module) -> Callable[..., Any]:
        """Move a network to the device and return what the loop calls in its place: its own parameters are trained."""
        return self._autocast(module.to(self.device))

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Take over the optimizer of a prepared network, and return what the loop uses in its place.

        That has ``param_groups``, ``state_dict`` and ``load_state_dict``, whose states are those of the whole parameters, and
        if it is no torch optimizer, the one that it wraps is its attribute ``optim``. A network's weights that were replaced
        in place are taken up by the next ``load_state_dict``.
        """
        return optimizer

    def place(
        self, module: ModuleT, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> ModuleT:
        """Move a module that isn't trained to a device, in half precision if so asked.

        Submodules that say ``overflows_in_fp16 = True`` stay float32 there.

        Args:
            device: None is the accelerator's.
            dtype: None is the accelerator's.
        """
        return cast_module(module, device or self.device, dtype or self.dtype)

    def spread(self, module: nn.Module, *, dtype: torch.dtype) -> None:
        """`place` a network that isn't trained, with its weights spread over all processes: all call it equally often."""
        self.place(module, dtype=dtype)

    def predictor(self, network: Callable[..., Any]) -> Callable[..., Any]:
        """What a sampler calls: the placed network, or a method of it, in mixed precision, without exchange of gradients."""
        return self._autocast(network)

    def _autocast(self, network: Callable[..., Any]) -> Callable[..., Any]:
        enabled, device, dtype = self.dtype is not torch.float32, self.device.type, self.dtype

        def call(*inputs: Any) -> Any:
            with torch.autocast(device, dtype, enabled=enabled):
                return network(*inputs)

        return call

    # ---- one optimizer step

    def micro_step(self, *, last: bool) -> AbstractContextManager[object]:
        """Surrounds forward and backward of one micro-batch; gradients are exchanged in the ``last`` of a step."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of ``loss``."""
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # of torch

    def update(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], *, grad_clip: float
    ) -> float:
        """Clip, step and clear the gradients; a step whose gradients are not finite is left out.

        Args:
            grad_clip: The largest global norm; 0 is unlimited.

        Returns:
            The global 2-norm before clipping; NaN when the step was left out.
        """
        self._scaler.unscale_(optimizer)
        norm = self._clip(parameters, grad_clip or float("inf"))
        if norm_is_finite := bool(norm.isfinite()):
            self._scaler.step(optimizer)
        if self._scaler.is_enabled():
            self._scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return norm.item() if norm_is_finite else float("nan")

    def _clip(self, parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
        return nn.utils.clip_grad_norm_(parameters, limit, foreach=True)

    @property
    def is_scaling(self) -> bool:
        """Whether losses are scaled, so that a step may be left out because the scale is too large, and no harm is done."""
        return self._scaler.is_enabled()

    def scaler_state(self) -> dict[str, Any]:
        """The loss scale of fp16, to be saved; empty for other dtypes."""
        return self._scaler.state_dict()

    def load_scaler_state(self, state: dict[str, Any]) -> None:
        """Restore the loss scale; one saved in another dtype is left out."""
        if state and self._scaler.is_enabled():
            self._scaler.load_state_dict(state)

    # ---- among processes

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and talks."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Whose samples this process works on, of ``data_world_size``: several processes may share theirs."""
        return self.rank

    @property
    def data_world_size(self) -> int:
        """How many shares the samples are dealt out in."""
        return self.world_size

    @property
    def lists_clips(self) -> bool:
        """Whether this process lists what becomes of its training samples: one does of those that share them."""
        return self.rank % (self.world_size // self.data_world_size) == 0

    @property
    def share_size(self) -> int:
        """Processes, neighbours by rank, that must run a network together, and so sample the same videos."""
        return 1

    @property
    def sampling_rank(self) -> int:
        """Whose videos this process samples, of ``sampling_world_size``."""
        return self.rank // self.share_size

    @property
    def sampling_world_size(self) -> int:
        """How many shares the videos to be sampled are dealt out in."""
        return self.world_size // self.share_size

    @property
    def writes_samples(self) -> bool:
        """Whether this process writes files of its samples, and counts them: one does of those that share them."""
        return self.rank % self.share_size == 0

    @property
    def joins_main(self) -> bool:
        """Whether the main process can run a network only together with this one. So it is of itself."""
        return self.sampling_rank == 0

    def mean(self, value: Tensor) -> Tensor:
        """The mean of ``value`` over processes."""
        return value

    def highest(self, value: int) -> int:
        """The highest ``value`` of any process. Cheap, on the CPU: asked before each step."""
        return value

    def broadcast(self, value: T) -> T:
        """The main process's ``value``, in all processes. Any picklable object."""
        return value

    def gather(self, value: T) -> list[T]:
        """Every process's ``value`` in the order of their ranks, in all of them. Any picklable object; for rare use."""
        return [value]

    def barrier(self) -> None:
        """Wait for all processes. One that does not come within the time limit ends the run."""

    def wait(self) -> None:
        """Wait for all processes as long as it takes, where their work differs in length. One that dies ends the run."""

    def from_main(self, function: Callable[[], T]) -> T:
        """What ``function`` returns in the main process, in all of them; a `UserError` there is raised in all of them."""
        outcome: T | UserError | None = None
        if self.is_main:
            try:
                outcome = function()
            except UserError as error:
                outcome = error
        self.wait()  # it may take long
        outcome = self.broadcast(outcome)
        if isinstance(outcome, UserError):
            raise outcome
        return cast("T", outcome)


class Single(Accelerator):
    """One process on one device."""


def cast_module(module: ModuleT, device: torch.device, dtype: torch.dtype) -> ModuleT:
    """Move and cast a module in place; for fp16, what says ``overflows_in_fp16 = True`` becomes float32 instead."""
    wide: set[int] = set()
    if dtype is torch.float16:
        parts = [part for part in module.modules() if getattr(part, "overflows_in_fp16", False)]
        wide = {id(tensor) for part in parts for tensor in (*part.parameters(), *part.buffers())}

    def move(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.to(device)
        return tensor.to(device, torch.float32 if id(tensor) in wide else dtype)

    return module._apply(move)  # type: ignore[no-untyped-call, no-any-return]  # of torch


def choose_device(name: str | None) -> torch.device:
    """The named device, or the best there is.

    Raises:
        MachineError: There is no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise MachineError(f'Device "{name}" can\'t be used: {reason}. What there is: opensora doctor') from error
    return device


def choose_dtype(name: DtypeName, device: torch.device, *, key: str = "dtype") -> torch.dtype:
    """The named dtype if the device computes it. ``key`` is where it was set, for the message.

    Raises:
        MachineError: It doesn't; on some CPUs a bf16 product kills the process, so this is tried in another one.
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    if name != "fp32" and (problem := probe_dtype(device.type, name)):
        raise MachineError(f'{key} "{name}" does not work on {device.type} here: {problem}. Use --{key} fp32.')
    return DTYPES[name]
