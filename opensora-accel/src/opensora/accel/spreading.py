"""Networks that are not trained, with their weights spread over processes: text encoders of several gigabytes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from opensora.core.blocks import iter_blocks
from opensora.core.errors import MachineError

__all__ = ["spread"]


def spread(module: nn.Module, device: torch.device) -> None:
    """Leave in each process its part of every weight; a block is put together for its forward pass, and let go after.

    Processes must call the module equally often, each with inputs of its own.

    Args:
        module: On the CPU, in the dtypes that it is to compute in.
        device: Where it is to compute, in each process.

    Raises:
        MachineError: This torch has no ``fully_shard``.
    """
    from torch.distributed import fsdp

    if not hasattr(fsdp, "fully_shard"):
        raise MachineError(f"text_encoder.shard needs torch 2.6 or newer; this is {torch.__version__}. Leave it out.")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    module.requires_grad_(False)
    for part in module.modules():
        if getattr(part, "overflows_in_fp16", False):  # float32 among halves: one exchange has one dtype
            fsdp.fully_shard(part, mesh=mesh)
    for block in iter_blocks(module):
        fsdp.fully_shard(block, mesh=mesh)
    fsdp.fully_shard(module, mesh=mesh)
    module.register_forward_hook(_let_go)


def _let_go(module: Any, inputs: object, output: object) -> None:
    """The outermost keeps its weights for a backward pass, which does not come."""
    module.reshard()
