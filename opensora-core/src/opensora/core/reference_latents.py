"""Frames that a video starts from, as latents: of references, and of the round before.

Shapes: C latent channels, T H W frames and size in pixels, t latent frames.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import attrs
import torch
from attrs import field, frozen
from attrs.validators import ge
from torch import Tensor

from opensora.core.errors import ConfigError, ShapeError
from opensora.core.mask_strategy import FrameEdit, edits_of_round, place_edits
from opensora.core.protocols import Size, VideoAutoencoder
from opensora.core.references import load_reference
from opensora.core.requests import Request

if TYPE_CHECKING:
    from opensora.core.pipelines.sample_spec import SampleSpec

__all__ = ["Overlap", "ReferenceLatents"]

log = logging.getLogger(__name__)
_USUAL_LENGTH = 5  # latent frames: as published


@frozen(kw_only=True)
class Overlap:
    """How many latent frames a round takes from the one before, or from a video that it goes on from."""

    length: int | None = None
    """Latent frames. None: a quarter of the video's, at most 5; whole chunks where the autoencoder has them."""
    edit_ratio: float = field(default=0.0, validator=ge(0))
    """How far they may change: 0 keeps them."""
    align: int | None = None
    """To whose multiples frames are moved; None: the autoencoder's chunk, if it has one."""

    @classmethod
    def of(cls, spec: SampleSpec) -> Overlap:
        """What a config says of it."""
        return cls(length=spec.condition_frame_length, edit_ratio=spec.condition_frame_edit, align=spec.align)

    def alignment(self, vae: VideoAutoencoder) -> int | None:
        """``align``, or the number of latent frames that the autoencoder decodes together and apart from all others."""
        return self.align or getattr(vae, "latent_chunk", None)

    def latent_frames(self, vae: VideoAutoencoder, size: Size) -> int:
        """The length, for videos of ``size`` (T, H, W)."""
        if self.length is not None:
            return self.length
        usual = max(1, min(_USUAL_LENGTH, vae.latent_size(size)[0] // 4))
        chunk = self.alignment(vae) or 1
        return -(-usual // chunk) * chunk

    def frames(self, vae: VideoAutoencoder, size: Size) -> int:
        """How many frames in pixels that length stands for, at the beginning of a video of ``size``.

        Raises:
            ConfigError: It is no whole number of the autoencoder's chunks, or none is left to go on with.
        """
        wanted, chunk = self.latent_frames(vae, size), self.alignment(vae) or 1
        total = vae.latent_size(size)[0]
        if wanted >= total:
            raise ConfigError(
                f"condition_frame_length is {wanted}, but a round of {size[0]} frames has {total} latent frames, so that "
                "nothing would be new. Take a smaller number, or more frames."
            )
        fitting = (
            []
            if wanted % chunk
            else [frames for frames in range(1, size[0]) if _latent_frames(vae, frames, size) == wanted]
        )
        if not fitting:
            below, above = wanted // chunk * chunk or chunk, -(-wanted // chunk) * chunk
            raise ConfigError(
                f"condition_frame_length is {wanted}, but this autoencoder decodes {chunk} latent frames together. "
                f"Nearest: {below}{f' and {above}' if above != below else ''}."
            )
        return max(fitting)


def _latent_frames(vae: VideoAutoencoder, frames: int, size: Size) -> int | None:
    try:
        return vae.latent_size((frames, *size[1:]))[0]
    except ShapeError:
        return None  # a length that this autoencoder can't do


@frozen(kw_only=True, eq=False)
class ReferenceLatents:
    """What one request starts from."""

    latents: Sequence[Tensor]
    """[C, t, h, w] of each reference."""
    edits: Sequence[FrameEdit]
    """Where they go, in all rounds."""
    sources: Sequence[str]
    """Paths or addresses, for messages."""

    @classmethod
    def load(cls, request: Request, vae: VideoAutoencoder, device: torch.device, overlap: Overlap) -> ReferenceLatents:
        """Read and encode the request's references.

        Raises:
            DataError: A file can't be read.
            ShapeError: The autoencoder can't encode what is in one.
            ConfigError: What is asked of them makes no sense.
        """
        if not request.given:
            return cls(latents=[], edits=[], sources=[])
        sources, edits = request.given.resolve(overlap.latent_frames(vae, request.size), loop=request.loop)
        # -1 is the last of these, and stays so when the round before is added to them
        edits = [attrs.evolve(edit, reference=edit.reference % len(sources)) for edit in edits]
        _, height, width = request.size
        latents = []
        for index, source in enumerate(sources):
            starts = {edit.reference_start for edit in edits if edit.reference == index}
            frames = _frames_needed(starts, vae, request.size, overlap.alignment(vae))
            reference = load_reference(source, height=height, width=width, fps=request.frame_fps, frames=frames)
            for note in reference.notes:
                log.info("%s: %s", request.path.name, note)
            from_end = bool(starts) and max(starts) < 0
            latents.append(_encode(vae, reference.video.to(device), source, from_end=from_end))
        loaded = cls(latents=latents, edits=edits, sources=sources)
        loaded.check(vae.latent_size(request.size)[0], overlap.alignment(vae), rounds=request.loop)
        return loaded

    def check(self, latent_frames: int, align: int | None, *, rounds: int) -> None:
        """See that all frames that are asked for are there; warn of a reference that is shorter than asked.

        Args:
            latent_frames: Of the video.
            align: To whose multiples frames are moved.
            rounds: How many there are.

        Raises:
            ConfigError: A start lies outside of a reference or of the video.
        """
        frames = [each.shape[1] for each in self.latents]
        for round_ in range(rounds):
            edits = edits_of_round(self.edits, round_)
            for one in place_edits(edits, frames, target_frames=latent_frames, align=align, names=self.sources):
                if one.num_missing:
                    log.warning(
                        "%s is shorter than asked: %d latent frames of it are used, %d more were wanted and are generated",
                        self.sources[one.reference],
                        one.length,
                        one.num_missing,
                    )


def _frames_needed(starts: Collection[int], vae: VideoAutoencoder, size: Size, chunk: int | None) -> slice:
    """What of a reference is used, so that a long one is not held whole.

    Where all is counted from its end, the autoencoder's chunks are too: its last frames must not be left in half a chunk.

    Args:
        starts: Latent frames, negative from the end.
        size: (T, H, W) of the video that it is used for.
        chunk: Latent frames that are encoded together.
    """
    if not starts:
        return slice(0, 1)  # it is there to be counted
    if set(starts) == {0}:
        return slice(0, size[0])
    if max(starts) >= 0:
        return slice(None)
    latents = -(min(starts) // (chunk or 1)) * (chunk or 1)
    fitting = [frames for frames in range(1, 2 * size[0] + 1) if _latent_frames(vae, frames, size) == latents]
    if not fitting:
        return slice(None)
    return slice(-max(fitting if chunk else [*fitting, size[0]]), None)


@torch.inference_mode()
def _encode(vae: VideoAutoencoder, video: Tensor, source: str, *, from_end: bool) -> Tensor:
    """[3, T, H, W] -> [C, t, h, w]: the mean of the posterior, so that a reference is no matter of chance.

    Args:
        from_end: Of a length that the autoencoder can't do, leave out the first frames, not the last.

    Raises:
        ShapeError: It can do none.
    """
    size = (video.shape[1], video.shape[2], video.shape[3])
    usable = next((frames for frames in range(size[0], 0, -1) if _latent_frames(vae, frames, size) is not None), None)
    if usable is None:
        raise ShapeError(f"{source}: the autoencoder can't encode {size[0]} frames of {size[1]} x {size[2]}.")
    if usable < size[0]:
        log.info(
            "%s: the autoencoder takes the %s %d of its %d frames",
            source,
            "last" if from_end else "first",
            usable,
            size[0],
        )
    return vae.encode(video[None, :, -usable:] if from_end else video[None, :, :usable])[0]
