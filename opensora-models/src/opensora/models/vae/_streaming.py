"""Videos in pieces of time, so that memory doesn't grow with their length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from attrs import frozen
from torch import Tensor

from opensora.core.errors import ShapeError
from opensora.core.randomness import Draws

Video = Tensor | Iterable[Tensor]
"""[B, C, T, H, W], or pieces [B, C, t, H, W] of it in order."""


def chunks(video: Video, num_frames: int | None) -> Iterator[Tensor]:
    """Pieces of ``num_frames`` frames each, the last maybe shorter, whatever pieces it comes in. None: one piece.

    Raises:
        ShapeError: There is no frame.
    """
    if isinstance(video, Tensor):
        video = [video]
    held, is_empty = torch.empty(0), True
    for piece in video:
        held = torch.cat([held, piece], dim=2) if held.numel() else piece
        while num_frames and held.shape[2] >= num_frames:
            yield held[:, :, :num_frames]
            held, is_empty = held[:, :, num_frames:], False
    if held.numel():
        yield held
    elif is_empty:
        raise ShapeError("This video has no frames. Nearest that fits: 1 frame.")


def join(pieces: Iterable[Tensor], num_frames: int) -> Tensor:
    """One tensor of ``num_frames`` frames. Without gradients it fills as pieces come, and never holds them all beside it."""
    if torch.is_grad_enabled():
        return torch.cat(list(pieces), dim=2)
    whole, start = torch.empty(0), 0
    for piece in pieces:
        if piece.shape[2] == num_frames:
            return piece
        if start == 0:
            whole = piece.new_empty(*piece.shape[:2], num_frames, *piece.shape[3:])
        whole[:, :, start : (start := start + piece.shape[2])] = piece
    return whole


@frozen
class PieceDraws:
    """`Draws` of one piece of a video: each piece has its own, so that the number of pieces needn't be known."""

    draws: Draws
    piece: str
    """Such as "chunk 3"."""

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """See `Draws.normal`."""
        return self.draws.normal(f"{name} of {self.piece}", shape)

    def uniform(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """See `Draws.uniform`."""
        return self.draws.uniform(f"{name} of {self.piece}", shape)

    def integers(self, name: str, high: int, shape: Sequence[int] = ()) -> Tensor:
        """See `Draws.integers`."""
        return self.draws.integers(f"{name} of {self.piece}", high, shape)


def check_channels(tensor: Tensor, channels: int, *, what: str) -> None:
    """Raises ShapeError unless ``tensor`` is [B, channels, T, H, W]."""
    if tensor.ndim != 5:
        raise ShapeError(f"{what} must be [batch, {channels}, frames, height, width], not {list(tensor.shape)}.")
    if tensor.shape[1] != channels:
        raise ShapeError(
            f"{what} have {tensor.shape[1]} channels, and this autoencoder's {channels}. Are they meant for another one?"
        )


def check_num_frames(latents: Tensor, num_frames: int, *, latent_frames: Callable[[int], int], factor: int) -> None:
    """Raises ShapeError unless ``num_frames`` is a length that these latents can have.

    Args:
        latent_frames: How many latent frames so many frames have.
        factor: Frames that a latent frame holds at most.
    """
    length = latents.shape[2]
    if num_frames > 0 and latent_frames(num_frames) == length:
        return
    possible = [frames for frames in range(1, length * factor + 1) if latent_frames(frames) == length]
    nearest = min(possible, key=lambda frames: abs(frames - num_frames), default=None)
    fits = f"Nearest that fits: {nearest}." if nearest else "No number of frames has so many."
    raise ShapeError(f"{length} latent frames are not those of {num_frames} frames of video. {fits}")
