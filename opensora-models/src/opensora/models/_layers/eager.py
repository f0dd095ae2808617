"""Whether a shortcut may be taken that only plain, immediate execution allows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from opensora.core.rehearsal import is_rehearsed, num_observers


def runs_plainly(*tensors: Tensor) -> bool:
    """Ordinary tensors, and nobody who looks on: no compiler, transform, counter of operations or automatic cast.

    A rehearsal of such a step takes the same paths.
    """
    return (
        not torch.compiler.is_compiling()
        and all(type(tensor) in (Tensor, nn.Parameter) or is_rehearsed(tensor) for tensor in tensors)
        and not tensors[0].is_meta
        and not torch.is_autocast_enabled(tensors[0].device.type)
        and torch._C._len_torch_dispatch_stack() == num_observers()
        and torch._C._functorch.peek_interpreter_stack() is None
    )
