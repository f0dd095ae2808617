"""Sizes of models that are built for one size of latents."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from opensora.core.errors import ShapeError
from opensora.core.protocols import Size
from opensora.models._layers.patches import Patch


def whole_patches(
    size: Sequence[int] | None, patch_size: Patch, *, model: str, instead: str = "STDiT3", square: bool = False
) -> Size:
    """``size`` (T, H, W), if a model with one size can be built for it.

    Args:
        size: None: the clips differ in theirs.
        model: What the message calls the model.
        instead: Models that do all sizes.
        square: Whether height and width must be equal.

    Raises:
        ShapeError: They differ, or are no multiple of the patch, or not square; the message names the nearest that is.
    """
    if size is None:
        raise ShapeError(
            f"{model} has one size, and the clips of this dataset differ in theirs. Use {instead}, or one image_size."
        )
    frames, height, width = (
        max(1, round(length / patch)) * patch for length, patch in zip(size, patch_size, strict=True)
    )
    nearest = (frames, height, height if square else width)
    if tuple(size) != nearest:
        raise ShapeError(
            f"{model} needs {'square ' if square else ''}latents in multiples of its patch {format_size(patch_size)}, "
            f"not {format_size(size)} (frames x height x width). Nearest: {format_size(nearest)}."
        )
    return nearest


def check_size(latents: Tensor, size: Size) -> None:
    """Check that ``latents`` [B, C, T, H, W] are of the ``size`` (T, H, W) that a model was built for.

    Raises:
        ShapeError: They are not.
    """
    if tuple(latents.shape[2:]) != size:
        raise ShapeError(
            f"The latents are {format_size(latents.shape[2:])}; this model was built for {format_size(size)} "
            "(frames x height x width) and does no other size. Build it for the size you need."
        )


def format_size(size: Sequence[int]) -> str:
    """(16, 32, 32) -> "16x32x32"."""
    return "x".join(map(str, size))
