"""The image autoencoder of latent diffusion (https://arxiv.org/abs/2112.10752), applied frame by frame.

Shapes: B batch, C latent channels, T frames, H W size, h w latent size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from attrs import field, frozen
from attrs.validators import gt, optional
from diffusers import AutoencoderKL
from einops import rearrange
from torch import Tensor, nn

from opensora.core.errors import ShapeError
from opensora.core.protocols import Size
from opensora.core.randomness import Draws
from opensora.models._pretrained import reading

__all__ = ["VideoAutoencoderKL", "VideoAutoencoderKLSpec"]

SCALE = 0.18215
"""Brings latents of Stable Diffusion's autoencoder to unit variance. Open-Sora uses it for the SDXL autoencoder too."""

STABLE_DIFFUSION = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
"""What Stable Diffusion's and SDXL's autoencoders have in common."""


@frozen(kw_only=True)
class VideoAutoencoderKLSpec:
    """Options of `VideoAutoencoderKL`."""

    from_pretrained: str
    """Folder or hub id of a diffusers AutoencoderKL, such as "stabilityai/sd-vae-ft-ema"."""
    micro_batch_size: int | None = field(default=None, validator=optional(gt(0)))
    """Frames that go through the network at a time; fewer take less memory. None: all. Doesn't change the result."""
    cache_dir: str | None = None
    """Where downloads are kept. None: the hub's own cache."""
    local_files_only: bool = False
    """Never download."""
    subfolder: str | None = None
    """Folder within the repository: "vae" in that of a whole pipeline."""


class VideoAutoencoderKL(nn.Module):
    """Each frame becomes C latent channels at an eighth of its height and width. Frozen, in eval mode."""

    Spec: ClassVar[type] = VideoAutoencoderKLSpec

    def __init__(self, spec: VideoAutoencoderKLSpec, *, meta: bool = False) -> None:
        """Reads the weights.

        Args:
            spec: Options.
            meta: Read none, for a look at shapes; without a folder to look into, those of Stable Diffusion's autoencoder.

        Raises:
            WeightsError: They can't be found, downloaded or read.
        """
        super().__init__()
        self.spec = spec
        with reading(
            "image autoencoder", spec.from_pretrained, key="vae.from_pretrained", local_files_only=spec.local_files_only
        ):
            self.module: Any = _build_empty(spec) if meta else _read(spec)
        self.latent_channels: int = self.module.config.latent_channels
        self.factor = 2 ** (len(self.module.config.block_out_channels) - 1)
        self.requires_grad_(False).eval()

    def encode(self, video: Tensor, *, draws: Draws | None = None) -> Tensor:
        """[B, 3, T, H, W] in [-1, 1] -> float32 [B, C, T, h, w]. ``draws`` samples the posterior; None takes its mean."""
        frames = rearrange(video, "b c t h w -> (b t) c h w")
        posteriors = [self.module.encode(part).latent_dist for part in self._micro_batches(frames)]
        latents = self._to_video(torch.cat([posterior.mean.float() for posterior in posteriors]), len(video))
        if draws is not None:
            std = self._to_video(torch.cat([posterior.std.float() for posterior in posteriors]), len(video))
            latents = torch.addcmul(latents, std, draws.normal("posterior", latents.shape[1:]).to(latents.device))
        return latents * SCALE

    def decode(self, latents: Tensor, *, num_frames: int) -> Tensor:
        """[B, C, T, h, w] -> float32 [B, 3, num_frames, 8h, 8w]."""
        frames = rearrange(latents[:, :, :num_frames] / SCALE, "b c t h w -> (b t) c h w")
        decoded = [self.module.decode(part).sample for part in self._micro_batches(frames)]
        return self._to_video(torch.cat(decoded).float(), len(latents))

    def latent_size(self, size: Size) -> Size:
        """(T, h, w): height and width divided by the factor (8), rounded down; that many pixels come back.

        Raises:
            ShapeError: Too small for a single latent.
        """
        frames, height, width = size
        if min(height, width) < self.factor:
            nearest = f"{max(height, self.factor)}x{max(width, self.factor)}"
            raise ShapeError(f"{height}x{width} is too small for this autoencoder. Nearest that fits: {nearest}.")
        return frames, height // self.factor, width // self.factor

    def _micro_batches(self, frames: Tensor) -> tuple[Tensor, ...]:
        return torch.split(frames.to(self.module.dtype), self.spec.micro_batch_size or len(frames))

    @staticmethod
    def _to_video(frames: Tensor, batch: int) -> Tensor:
        return rearrange(frames, "(b t) c h w -> b c t h w", b=batch)


def _read(spec: VideoAutoencoderKLSpec) -> Any:
    return AutoencoderKL.from_pretrained(  # type: ignore[no-untyped-call]  # diffusers has no types
        spec.from_pretrained,
        subfolder=spec.subfolder,
        cache_dir=spec.cache_dir,
        local_files_only=spec.local_files_only,
        low_cpu_mem_usage=False,  # True warns where accelerate is not installed
        torch_dtype=torch.float32,
    )


def _build_empty(spec: VideoAutoencoderKLSpec) -> Any:
    folder = Path(spec.from_pretrained)
    config = AutoencoderKL.load_config(folder, subfolder=spec.subfolder) if folder.is_dir() else STABLE_DIFFUSION
    return AutoencoderKL.from_config(config)  # type: ignore[no-untyped-call]
