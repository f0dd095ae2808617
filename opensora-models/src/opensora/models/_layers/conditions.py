"""Reading what a denoiser can't do without."""

from __future__ import annotations

from torch import Tensor

from opensora.core.conditioning import Conditioning
from opensora.core.errors import ShapeError


def required(conditioning: Conditioning, name: str, reader: str) -> Tensor:
    """The condition called ``name``.

    Args:
        reader: The model that asks, for the message.

    Raises:
        ShapeError: It is not given.
    """
    value: Tensor | None = getattr(conditioning, name)
    if value is None:
        raise ShapeError(f"{reader} needs the condition `{name}`, and it is not given. Set Conditioning({name}=...).")
    return value
