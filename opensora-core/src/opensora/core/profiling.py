"""Names for the parts of a step in traces of torch's profiler. They cost nothing while nothing is traced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

__all__ = ["marked", "tracing"]

_NOTHING: AbstractContextManager[None] = nullcontext()
_tracers = 0


def marked(name: str) -> AbstractContextManager[object]:
    """Surrounds a part of a step, which traces then show by this name."""
    return torch.profiler.record_function(name) if _tracers else _NOTHING


@contextmanager
def tracing() -> Iterator[None]:
    """Let `marked` note its names inside."""
    global _tracers  # noqa: PLW0603  # one switch for the process, as torch's profiler is one for the process
    _tracers += 1
    try:
        yield
    finally:
        _tracers -= 1
