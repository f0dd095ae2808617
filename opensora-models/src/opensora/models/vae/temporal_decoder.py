"""The image autoencoder with a decoder that sees neighbouring frames, of Stable Video Diffusion (https://arxiv.org/abs/2311.15127).

Shapes: B batch, C latent channels, T frames, H W size, h w latent size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from attrs import field, frozen
from attrs.validators import gt, optional
from diffusers import AutoencoderKLTemporalDecoder
from einops import rearrange
from torch import Tensor

from opensora.models._pretrained import expand_home
from opensora.models.vae._streaming import join
from opensora.models.vae.image_vae import SCALE, STABLE_DIFFUSION, VideoAutoencoderKL, VideoAutoencoderKLSpec

__all__ = ["VideoAutoencoderKLTemporalDecoder", "VideoAutoencoderKLTemporalDecoderSpec"]


@frozen(kw_only=True)
class VideoAutoencoderKLTemporalDecoderSpec(VideoAutoencoderKLSpec):
    """Options of `VideoAutoencoderKLTemporalDecoder`."""

    from_pretrained: str = field(converter=expand_home)
    """Folder or hub id of a diffusers AutoencoderKLTemporalDecoder."""
    micro_frame_size: int | None = field(default=None, validator=optional(gt(0)))
    """Frames that are decoded together. Fewer take less memory but see fewer neighbours: another result. None: all."""


class VideoAutoencoderKLTemporalDecoder(VideoAutoencoderKL):
    """Encodes frame by frame, decodes all frames together. Frozen, in eval mode."""

    Spec: ClassVar[type] = VideoAutoencoderKLTemporalDecoderSpec
    network: ClassVar[Any] = AutoencoderKLTemporalDecoder
    published: ClassVar[Mapping[str, Any]] = {
        key: value for key, value in STABLE_DIFFUSION.items() if key != "up_block_types"
    }
    spec: VideoAutoencoderKLTemporalDecoderSpec

    def decode(self, latents: Tensor, *, num_frames: int) -> Tensor:
        """[B, C, T, h, w] -> float32 [B, 3, num_frames, 8h, 8w].

        Raises:
            ShapeError: Other channels, or fewer frames than ``num_frames``.
        """
        return join(self.iter_decode(latents, num_frames=num_frames), num_frames)

    def iter_decode(self, latents: Tensor, *, num_frames: int) -> Iterator[Tensor]:
        """`decode` in pieces of ``micro_frame_size`` frames, as they are asked for."""
        return self._iter_decode(latents, num_frames, self.spec.micro_frame_size or num_frames)

    def _decode_piece(self, latents: Tensor) -> Tensor:
        batch, _, num_frames, _, _ = latents.shape
        frames = rearrange(latents, "b c t h w -> (b t) c h w").to(self.module.dtype)
        decoded = self.module.decode(frames / SCALE, num_frames=num_frames).sample.float()
        return rearrange(decoded, "(b t) c h w -> b c t h w", b=batch)
