"""Data parallelism: every process holds the whole denoiser and a share of the batch, and gradients are averaged.

Source: Li et al., PyTorch Distributed, https://arxiv.org/abs/2006.15704.
"""

from __future__ import annotations

import atexit
import gc
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from inspect import signature
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from attrs import field, frozen
from attrs.validators import gt
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from opensora.core.accelerator import Accelerator, DtypeName
from opensora.core.errors import ConfigError, MachineError

__all__ = ["DDP", "DDPSpec"]

T = TypeVar("T")
CPU = torch.device("cpu")
_RENAMED = "forward_sync_buffers" in signature(DistributedDataParallel).parameters  # in torch 2.13
KEEP_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if _RENAMED else "broadcast_buffers": False}
HOW_TO_START = (
    "Start with: opensora-run --nproc N config.py, or torchrun --nproc-per-node N -m opensora.core.run config.py"
)


_VERY_LONG = timedelta(days=365)
"""For waiting without a limit."""


@frozen(kw_only=True)
class DDPSpec:
    """Options of `DDP`."""

    find_unused_parameters: bool = False
    """Look in each step for parameters that were not used. Needed when there are any; costs a little time."""
    timeout_s: float = field(default=1800.0, validator=gt(0))
    """How long a process waits for the others, for example while one of them writes a checkpoint."""


class DDP(Accelerator):
    """One process per device, as torchrun starts them, with gradients averaged over all.

    Flags and objects go over gloo, from CPU to CPU, so that asking each step whether to stop doesn't wait for a GPU.
    """

    Spec = DDPSpec

    def __init__(self, spec: DDPSpec, *, device: str | None = None, dtype: DtypeName = "auto") -> None:
        """Read this process's place from the environment; the others are joined on ``__enter__``.

        Args:
            spec: The options.
            device: ``cuda`` or None is the GPU of this process's number on its machine; None without GPUs is the CPU.
            dtype: As `Accelerator`.

        Raises:
            MachineError: Not started by torchrun, or this process has no GPU of its own.
        """
        place = read_place(os.environ)
        super().__init__(spec, device=own_device(device, place.local_rank), dtype=dtype)
        self.rank, self.world_size = place.rank, place.world_size
        self._replicas: list[DistributedDataParallel] = []

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
            self._patient = dist.new_group(backend="gloo", timeout=_VERY_LONG)
        except dist.DistError as error:
            raise MachineError(_joining_failed(str(error), os.environ)) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        """Wait for the others, unless something went wrong, and leave them."""
        try:
            if kind is None:
                self.barrier()
        finally:
            self._replicas.clear()
            gc.collect()
            dist.destroy_process_group()

    def prepare(self, module: nn.Module) -> Callable[..., Any]:
        """As `Accelerator.prepare`. All processes get the main one's weights.

        Raises:
            ConfigError: When called: the step before did not use all parameters, and ``find_unused_parameters`` is off.
        """
        replica = DistributedDataParallel(
            module.to(self.device),
            **KEEP_BUFFERS,  # they are tables of positions and the like, the same everywhere
            gradient_as_bucket_view=True,
            find_unused_parameters=self.spec.find_unused_parameters,
        )
        self._replicas.append(replica)
        run_replica = self._autocast(partial(self._run_replica, len(self._replicas) - 1))

        def call(*inputs: Any) -> Any:
            try:
                return run_replica(*inputs)
            except RuntimeError as error:
                if "find_unused_parameters=True" in str(error):
                    raise ConfigError(_unused_parameters(str(error), module)) from error
                raise

        return call

    def _run_replica(self, index: int, *inputs: Any) -> Any:
        # Found by its number, so that nobody outside holds a replica and leaving can let go of it.
        return self._replicas[index](*inputs)

    @contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        """As `Accelerator.micro_step`."""
        with ExitStack() as stack:
            for replica in () if last else self._replicas:
                stack.enter_context(replica.no_sync())
            yield

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
        raise MachineError(f'accelerator "ddp" found no {", ".join(missing)} in the environment. {HOW_TO_START}')
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


def _joining_failed(reason: str, environment: Mapping[str, str]) -> str:
    address, port = environment["MASTER_ADDR"], environment["MASTER_PORT"]
    if "EADDRINUSE" in reason or "address already in use" in reason.lower():
        return f"Port {port} on {address} is in use by another program. Choose another: --port, or MASTER_PORT."
    return f"Can't join the other processes at {address}:{port}: {reason.strip().partition(chr(10))[0]}"


def _unused_parameters(reason: str, module: nn.Module) -> str:
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    indices = re.search(r"rank \d+: ([\d ]+)", reason)
    unused = ", ".join(names[int(index)] for index in indices[1].split()) if indices else "some parameters"
    return (
        f"The last step did not use {unused}, so their gradients can't be averaged. "
        'Freeze them, or set accelerator = dict(type="ddp", find_unused_parameters=True).'
    )
