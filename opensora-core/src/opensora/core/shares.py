"""What part of a training step's memory one process holds, where several share it."""

from __future__ import annotations

from attrs import field, frozen
from attrs.validators import and_, gt, le

__all__ = ["Shares"]


@frozen(kw_only=True)
class Shares:
    """Parts of each kind of memory, from just above 0 to 1; see `Accelerator.shares`. Used by plans alone."""

    parameters: float = field(default=1.0, validator=and_(gt(0), le(1)))
    """Of the denoiser, between steps."""
    gradients: float = field(default=1.0, validator=and_(gt(0), le(1)))
    """Once they are complete."""
    optimizer: float = field(default=1.0, validator=and_(gt(0), le(1)))
    """Its state, the averaged weights, and what a step of it needs besides."""
    activations: float = field(default=1.0, validator=and_(gt(0), le(1)))
    """Where tokens are spread over processes; of operations too."""
    gathers_blocks: bool = False
    """Whether two blocks' parameters are put together at any moment of forward and backward."""
