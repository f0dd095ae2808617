"""Tensors of which each process holds a part: torch's DTensors, and plain tensors, handled alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["Like", "TensorPath", "is_sharded", "map_tensors", "own_part", "shard_like"]

TensorPath = tuple[str | int, ...]
"""Where a tensor stands in nested dicts and lists."""
Like = Callable[[TensorPath, torch.Size], Tensor | None]
"""Of a saved tensor's place and whole shape: a tensor that is dealt out as this one is to be; None: it stays whole."""


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "to_local")


def own_part(tensor: Tensor) -> Tensor:
    """This process's part, in the same memory; a plain tensor itself."""
    local = getattr(tensor, "to_local", None)
    return tensor if local is None else cast("Tensor", local())


def shard_like(whole: Tensor, like: Tensor) -> Tensor:
    """This process's part of a tensor that all processes have, as a DTensor that is dealt out as another one is.

    Without communication; the memory is not shared with ``whole``.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).clone()


def map_tensors(value: Any, change: Callable[[TensorPath, Tensor], Any], path: TensorPath = ()) -> Any:
    """The same nested dicts, lists and tuples with each tensor in them changed."""
    if isinstance(value, Tensor):
        return change(path, value)
    if isinstance(value, dict):
        return {key: map_tensors(each, change, (*path, key)) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return type(value)(map_tensors(each, change, (*path, index)) for index, each in enumerate(value))  # type: ignore[call-arg]
    return value
