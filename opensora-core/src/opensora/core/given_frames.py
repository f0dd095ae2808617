"""Frames of references put into a sample's latents, with the mask that tells a scheduler which they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from opensora.core.errors import ShapeError
from opensora.core.mask_strategy import FrameEdit, place_edits

__all__ = ["apply_edits"]


def apply_edits(
    latents: Tensor,
    references: Sequence[Tensor],
    edits: Iterable[FrameEdit],
    *,
    align: int | None = None,
    names: Sequence[str] = (),
) -> tuple[Tensor, Tensor]:
    """The latents of one sample with the given frames in place, and their frame mask. A later edit overwrites an earlier.

    Args:
        latents: [C, T, H, W], the noise to start from. Not modified.
        references: Latents of each, [C, T', H, W], of any length T'.
        edits: Those of one round; see `edits_of_round`.
        align: Move starts to multiples of this many latent frames.
        names: Of the references, for messages.

    Returns:
        [C, T, H, W] like ``latents``, and [T] float32: 1 where a frame is generated, an edit's ratio where it is given.

    Raises:
        ConfigError: A reference is missing, or a start is outside of it or of the sample.
        ShapeError: A reference has another size.
    """
    result, mask = latents.clone(), torch.ones(latents.shape[1], device=latents.device)
    frames = [reference.shape[1] for reference in references]
    for one in place_edits(edits, frames, target_frames=latents.shape[1], align=align, names=names):
        reference = references[one.reference]
        _check_size(reference, latents, one.reference, names)
        target = slice(one.target_start, one.target_start + one.length)
        result[:, target] = reference[:, one.reference_start : one.reference_start + one.length]
        mask[target] = one.edit_ratio
    return result, mask


def _check_size(reference: Tensor, latents: Tensor, index: int, names: Sequence[str]) -> None:
    (channels, _, *sides), (wanted_channels, _, *wanted_sides) = reference.shape, latents.shape
    if (channels, sides) != (wanted_channels, wanted_sides):
        name = f" ({names[index]})" if index < len(names) else ""
        raise ShapeError(
            f"Reference {index}{name} has latents of shape {list(reference.shape)}, the sample {list(latents.shape)}: "
            "all but the frames must be equal."
        )
