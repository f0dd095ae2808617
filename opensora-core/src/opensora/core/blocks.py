"""What may be done to the blocks of a network from outside: recomputing, compiling, and keeping activations elsewhere.

A block is a member of an ``nn.ModuleList`` that is not itself within one. Parameters and their names stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from opensora.core.rehearsal import on_host

__all__ = ["Checkpointing", "checkpoint_activations", "compile_blocks", "iter_blocks", "offloading"]

Checkpointing = bool | int | Literal["selective"]
"""Which blocks compute their activations again in backward: none, all, every n-th (from the first on), or "selective": all,
but for matrix products and attention, whose results are kept."""

_aten = torch.ops.aten
_EXPENSIVE = (
    _aten.mm,
    _aten.addmm,
    _aten.bmm,
    _aten.baddbmm,
    _aten.convolution,
    _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu,
    _aten._scaled_dot_product_efficient_attention,
    _aten._scaled_dot_product_cudnn_attention,
)


def iter_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The blocks of a network, in the order in which it has them."""
    for child in module.children():
        if isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList):  # lists may hold lists
            yield child
        else:
            yield from iter_blocks(child)


def checkpoint_activations(network: nn.Module, which: Checkpointing = True) -> int:
    """Keep only the inputs of blocks for backward, and compute the rest again: less memory, more time.

    All blocks cost about a third more time; "selective" about a tenth, and saves about half as much.

    Returns:
        How many blocks.
    """
    blocks = list(iter_blocks(network))[:: 1 if isinstance(which, bool | str) else which] if which else []
    options: dict[str, Any] = {"context_fn": _keep_expensive} if which == "selective" else {}
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **options)
    return len(blocks)


def compile_blocks(network: nn.Module) -> int:
    """Have torch compile each block when it is first called; to be asked before `checkpoint_activations`.

    Blocks that are alike share what is compiled. Each further shape is compiled again, once more with shapes left open.

    Returns:
        How many blocks.
    """
    blocks = list(iter_blocks(network))
    for block in blocks:
        block.forward = torch.compile(block.forward)
    return len(blocks)


def offloading(device: torch.device) -> AbstractContextManager[object]:
    """Surrounds a forward pass: what it saves for backward is kept in the CPU's memory, pinned if ``device`` is a GPU.

    As torch's ``save_on_cpu``, but parameters stay: they are on the device anyway. On a CPU it only costs time.
    """
    pin = device.type == "cuda"

    def pack(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
            return tensor
        with on_host():
            kept = torch.empty_like(tensor, device="cpu", pin_memory=pin)
        return tensor.device, kept.copy_(tensor, non_blocking=pin)

    def unpack(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        home, kept = packed
        return kept.to(home, non_blocking=pin, copy=True)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _keep_expensive() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    create: Any = create_selective_checkpoint_contexts
    contexts: tuple[AbstractContextManager[Any], AbstractContextManager[Any]] = create(_policy)
    return contexts


def _policy(context: Any, op: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
    is_expensive: Callable[[Any], bool] = _EXPENSIVE.__contains__
    kept = is_expensive(getattr(op, "overloadpacket", op))
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
