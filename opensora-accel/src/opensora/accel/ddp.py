"""Data parallelism: every process holds the whole denoiser and a share of the batch, and gradients are averaged.

Source: Li et al., PyTorch Distributed, https://arxiv.org/abs/2006.15704.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import signature
from typing import Any

from attrs import frozen
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from opensora.accel.processes import Processes, ProcessesSpec
from opensora.core.accelerator import DtypeName
from opensora.core.errors import ConfigError

__all__ = ["DDP", "DDPSpec"]

_RENAMED = "forward_sync_buffers" in signature(DistributedDataParallel).parameters  # in torch 2.13
KEEP_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if _RENAMED else "broadcast_buffers": False}


@frozen(kw_only=True)
class DDPSpec(ProcessesSpec):
    """Options of `DDP`."""

    find_unused_parameters: bool = False
    """Look in each step for parameters that were not used. Needed when there are any; costs a little time."""


class DDP(Processes):
    """Every process holds the whole denoiser; gradients are averaged over all."""

    Spec = DDPSpec

    def __init__(self, spec: DDPSpec, *, device: str | None = None, dtype: DtypeName = "auto") -> None:
        """See `Processes`."""
        super().__init__(spec, device=device, dtype=dtype)
        self._replicas: list[DistributedDataParallel] = []

    def _let_go(self) -> None:
        self._replicas.clear()

    def prepare(self, module: nn.Module) -> Callable[..., Any]:
        """As `Accelerator.prepare`. All processes get the main one's weights.

        Raises:
            ConfigError: See `share_sequence`. When called: the step before did not use all parameters, and
                ``find_unused_parameters`` is off.
        """
        self.share_sequence(module)
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


def _unused_parameters(reason: str, module: nn.Module) -> str:
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    indices = re.search(r"rank \d+: ([\d ]+)", reason)
    unused = ", ".join(names[int(index)] for index in indices[1].split()) if indices else "some parameters"
    return (
        f"The last step did not use {unused}, so their gradients can't be averaged. "
        'Freeze them, or set accelerator = dict(type="ddp", find_unused_parameters=True).'
    )
