"""What all accelerators of several processes share: joining the others, a place among them, and talking to them.

Processes stand in a grid of ``data x sequence``: those of one row share each sample, rows have samples of their own.
"""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from attrs import field, frozen
from attrs.validators import ge, gt
from torch import Tensor, nn

from opensora.core.accelerator import Accelerator, DtypeName, cast_module
from opensora.core.errors import ConfigError, MachineError
from opensora.core.shares import Shares

__all__ = ["Place", "Processes", "ProcessesSpec", "own_device", "read_place"]

T = TypeVar("T")
CPU = torch.device("cpu")
HOW_TO_START = (
    "Start with: opensora-run --nproc N config.py, or torchrun --nproc-per-node N -m opensora.core.run config.py"
)
VERY_LONG = timedelta(days=365)
"""For waiting without a limit."""


@frozen(kw_only=True)
class ProcessesSpec:
    """Options of all accelerators of several processes."""

    sp_size: int = field(default=1, validator=ge(1))
    """Processes that share each sample, its tokens dealt out among them; the number of processes must be a multiple."""
    timeout_s: float = field(default=1800.0, validator=gt(0))
    """How long a process waits for the others, for example while one of them writes a checkpoint."""


class Processes(Accelerator):
    """One process per device, as torchrun starts them. The base of the accelerators that differ in what they exchange.

    Flags and objects go over gloo, from CPU to CPU, so that asking each step whether to stop doesn't wait for a GPU.
    """

    Spec: type = ProcessesSpec
    _row: dist.ProcessGroup
    """The processes that share this one's samples; there once they are joined, if there are others."""

    def __init__(self, spec: Any, *, device: str | None = None, dtype: DtypeName = "auto") -> None:
        """Read this process's place from the environment; the others are joined on ``__enter__``.

        Args:
            spec: The options.
            device: ``cuda`` or None is the GPU of this process's number on its machine; None without GPUs is the CPU.
            dtype: As `Accelerator`.

        Raises:
            ConfigError: The number of processes is no multiple of ``sp_size``.
            MachineError: Not started by torchrun, or this process has no GPU of its own.
        """
        place = read_place(os.environ)
        super().__init__(spec, device=own_device(device, place.local_rank), dtype=dtype)
        self.rank, self.world_size = place.rank, place.world_size
        if self.world_size % spec.sp_size:
            raise ConfigError(
                f"accelerator.sp_size is {spec.sp_size}, but {self.world_size} processes can't be dealt out in groups of so "
                "many. Start a multiple of it."
            )

    @classmethod
    def shares(cls, spec: Any, world_size: int) -> Shares:  # noqa: ARG003  # others need it
        """As `Accelerator.shares`: of the tokens."""
        return Shares(activations=1 / spec.sp_size)

    @property
    def data_rank(self) -> int:
        """As `Accelerator.data_rank`: processes that share their samples have the same."""
        return self.rank // int(self.spec.sp_size)

    @property
    def data_world_size(self) -> int:
        """As `Accelerator.data_world_size`."""
        return self.world_size // int(self.spec.sp_size)

    @property
    def share_size(self) -> int:
        """As `Accelerator.share_size`: processes that share each sample."""
        return int(self.spec.sp_size)

    def __enter__(self) -> Self:
        """Join the other processes.

        Raises:
            MachineError: They can't be reached, or the port is in use.
        """
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        # Gloo's threads abort a process that ends before they do, and replicas, which are part of cycles, keep them.
        # When leaving on an error, its traceback still holds a replica, so once more at the very end.
        atexit.register(gc.collect)
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, timeout=timedelta(seconds=self.spec.timeout_s))
            self._patient = dist.new_group(backend="gloo", timeout=VERY_LONG)
            if self.spec.sp_size > 1:
                limit = timedelta(seconds=self.spec.timeout_s)
                self._row, _ = dist.new_subgroups(self.spec.sp_size, timeout=limit)  # type: ignore[no-untyped-call]  # of torch
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and not _port_is_in_use(str(error)):  # the latter in torch 2.5
                raise
            raise MachineError(_joining_failed(str(error), os.environ)) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        """Wait for the others, unless something went wrong, and leave them."""
        try:
            if kind is None:
                self.barrier()
        finally:
            self._let_go()
            gc.collect()
            dist.destroy_process_group()

    def _let_go(self) -> None:
        """Forget what holds on to the other processes."""

    def share_sequence(self, network: object) -> None:
        """Let processes of one row share the tokens of their samples, if ``sp_size`` says so; see `parallelize_sequence`.

        Args:
            network: A module, or a method of one; to be called before anything is put around it, and again with no effect.

        Raises:
            ConfigError: It can't be done with this network.
        """
        module = network if isinstance(network, nn.Module) else getattr(network, "__self__", None)
        if self.spec.sp_size > 1 and isinstance(module, nn.Module):
            from opensora.accel.sequence_parallel import parallelize_sequence  # imports torch's compiler

            parallelize_sequence(module, self._row)

    def predictor(self, network: Callable[..., Any]) -> Callable[..., Any]:
        """As `Accelerator.predictor`; processes that share their samples must all call it."""
        self.share_sequence(network)
        return super().predictor(network)

    def spread(self, module: nn.Module, *, dtype: torch.dtype) -> None:
        """As `Accelerator.spread`, by torch's ``fully_shard``.

        Raises:
            MachineError: This torch has none.
        """
        from opensora.accel.spreading import spread

        spread(cast_module(module, CPU, dtype), self.device)

    def mean(self, value: Tensor) -> Tensor:
        """As `Accelerator.mean`; ``value`` is not modified."""
        total = value.detach().clone()
        dist.all_reduce(total)  # gloo has no average
        return total / self.world_size

    def highest(self, value: int) -> int:
        """As `Accelerator.highest`."""
        values = torch.tensor(value)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return int(values)

    def broadcast(self, value: T) -> T:
        """As `Accelerator.broadcast`."""
        values = [value if self.is_main else None]
        dist.broadcast_object_list(values, src=0, device=CPU)
        return values[0]  # type: ignore[return-value]  # the main process's value

    def gather(self, value: T) -> list[T]:
        """As `Accelerator.gather`."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._patient)
        return values

    def barrier(self) -> None:
        """As `Accelerator.barrier`."""
        self.highest(0)

    def wait(self) -> None:
        """As `Accelerator.wait`."""
        dist.all_reduce(torch.zeros(1), group=self._patient)


@frozen
class Place:
    """Which of the processes this is."""

    rank: int
    local_rank: int
    world_size: int


def read_place(environment: Mapping[str, str]) -> Place:
    """What torchrun wrote into the environment.

    Raises:
        MachineError: It didn't, or not numbers.
    """
    needed = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in needed if not environment.get(name)]:
        raise MachineError(
            f"An accelerator of several processes found no {', '.join(missing)} in the environment. {HOW_TO_START}"
        )
    try:
        return Place(*(int(environment[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")))
    except ValueError as error:
        raise MachineError(f"RANK, LOCAL_RANK and WORLD_SIZE must be whole numbers: {error}. {HOW_TO_START}") from error


def own_device(name: str | None, local_rank: int) -> str:
    """The device of the process that is number ``local_rank`` on its machine.

    Raises:
        MachineError: There are fewer GPUs, or one GPU is named for all processes.
    """
    if name is not None and name.startswith("cuda:"):
        raise MachineError(
            f'device "{name}" would serve every process. Use device "cuda", which gives each its own GPU, '
            f"and CUDA_VISIBLE_DEVICES={name.removeprefix('cuda:')} to choose among them."
        )
    if (name is not None and name != "cuda") or (name is None and not torch.cuda.is_available()):
        return name or "cpu"
    if (there_are := torch.cuda.device_count()) and local_rank >= there_are:
        raise MachineError(
            f"Process {local_rank + 1} on this machine has no GPU: there are {there_are}. "
            f"Start at most {there_are} with --nproc, or use --device cpu."
        )
    return f"cuda:{local_rank}"


def _port_is_in_use(reason: str) -> bool:
    return "EADDRINUSE" in reason or "address already in use" in reason.lower()


def _joining_failed(reason: str, environment: Mapping[str, str]) -> str:
    address, port = environment["MASTER_ADDR"], environment["MASTER_PORT"]
    if _port_is_in_use(reason):
        return f"Port {port} on {address} is in use by another program. Choose another: --port, or MASTER_PORT."
    return f"Can't join the other processes at {address}:{port}: {reason.strip().partition(chr(10))[0]}"
