"""The image autoencoder of latent diffusion (https://arxiv.org/abs/2112.10752), applied frame by frame.

Shapes: B batch, C latent channels, T frames, H W size, h w latent size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from attrs import field, frozen
from attrs.validators import gt, optional
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from einops import rearrange
from torch import Tensor, nn

from opensora.core.errors import ShapeError
from opensora.core.interop import Interop
from opensora.core.protocols import Size
from opensora.core.randomness import Draws
from opensora.models._pretrained import expand_home, reading
from opensora.models.vae._interop import IMAGE_VAE, own_keys
from opensora.models.vae._streaming import Video, check_channels, chunks, join
from opensora.models.vae._tiling import double_size_conv, norm_act_conv
from opensora.models.vae.posterior import Posterior

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

    from_pretrained: str = field(converter=expand_home)
    """Folder or hub id of a diffusers AutoencoderKL, such as "stabilityai/sd-vae-ft-ema"."""
    micro_batch_size: int | None = field(default=None, validator=optional(gt(0)))
    """Frames that go through the network at a time. Fewer take less memory, for the same result. None: all (streams: one)."""
    tile_size: int | None = field(default=None, validator=optional(gt(0)))
    """Layers work on tiles of so many entries a side: less memory, for the same result but for rounding. None: whole."""
    cache_dir: str | None = None
    """Where downloads are kept. None: the hub's own cache."""
    local_files_only: bool = False
    """Never download."""
    subfolder: str | None = None
    """Folder within the repository: "vae" in that of a whole pipeline."""


class VideoAutoencoderKL(nn.Module):
    """Each frame becomes C latent channels at an eighth of its height and width. Frozen, in eval mode."""

    Spec: ClassVar[type] = VideoAutoencoderKLSpec
    interop: ClassVar[Interop] = IMAGE_VAE
    network: ClassVar[Any] = AutoencoderKL
    published: ClassVar[Mapping[str, Any]] = STABLE_DIFFUSION
    memory_options: ClassVar[Sequence[str]] = ("micro_batch_size", "tile_size")

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
            "image autoencoder",
            spec.from_pretrained,
            key="vae.from_pretrained",
            local_files_only=spec.local_files_only,
            meta=meta,
        ):
            self.module: Any = self._build_empty() if meta else self._read()
        self.module.overflows_in_fp16 = self.module.config.force_upcast  # as SDXL's does: fp16 leaves it in float32
        self.latent_channels: int = self.module.config.latent_channels
        self.factor = 2 ** (len(self.module.config.block_out_channels) - 1)
        if spec.tile_size:
            _work_in_tiles(self.module, spec.tile_size)
        self.requires_grad_(False).eval()

    def encode(self, video: Tensor, *, draws: Draws | None = None) -> Tensor:
        """[B, 3, T, H, W] in [-1, 1] -> float32 [B, C, T, h, w]. ``draws`` samples the posterior; None takes its mean."""
        check_channels(video, 3, what="Videos")
        num_frames = video.shape[2]
        return join(self._iter_encode(video, draws, self.spec.micro_batch_size or num_frames), num_frames)

    def iter_encode(self, video: Video, *, draws: Draws | None = None) -> Iterator[Tensor]:
        """`encode` in pieces of time, as they are asked for. ``video`` may itself come in pieces [B, 3, t, H, W]."""
        return self._iter_encode(video, draws, self.spec.micro_batch_size or 1)

    def moments(self, video: Tensor) -> dict[str, Tensor]:
        """[B, 3, T, H, W] in [-1, 1] -> ``mean`` and ``logvar`` [B, C, T, h, w], of which `latents_of` draws."""
        return self.encode_distribution(video).moments()

    def latents_of(self, moments: Mapping[str, Tensor], draws: Draws) -> Tensor:
        """What `encode` draws from the video that has these moments."""
        posterior = Posterior(moments["mean"], moments["logvar"])
        return SCALE * posterior.at(_noise(draws, posterior.mean, 0))

    def encode_distribution(self, video: Tensor) -> Posterior:
        """[B, 3, T, H, W] -> the posterior of [B, C, T, h, w], before the factor 0.18215 that `encode` applies.

        Raises:
            ShapeError: No RGB video, or too small.
        """
        check_channels(video, 3, what="Videos")
        _, _, frames, height, width = video.shape
        self.latent_size((frames, height, width))
        return Posterior.of_moments(self._per_frame(self._moments, video))

    def decode(self, latents: Tensor, *, num_frames: int) -> Tensor:
        """[B, C, T, h, w] -> float32 [B, 3, num_frames, 8h, 8w].

        Raises:
            ShapeError: Other channels, or fewer frames than ``num_frames``.
        """
        return join(self._iter_decode(latents, num_frames, self.spec.micro_batch_size or num_frames), num_frames)

    def iter_decode(self, latents: Tensor, *, num_frames: int) -> Iterator[Tensor]:
        """`decode` in pieces of time, as they are asked for, so that memory doesn't grow with the length."""
        return self._iter_decode(latents, num_frames, self.spec.micro_batch_size or 1)

    @staticmethod
    def adapt_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Takes the network's keys with and without ``module.`` before them, and those of old releases of diffusers."""
        return own_keys(state)

    def latent_size(self, size: Size) -> Size:
        """(T, h, w): height and width divided by the factor (8), rounded down; that many pixels come back.

        Raises:
            ShapeError: Too small for a single latent.
        """
        frames, height, width = size
        if frames < 1:
            raise ShapeError(f"{frames} frames are no video. Nearest that fits: 1.")
        if min(height, width) < self.factor:
            nearest = f"{max(height, self.factor)}x{max(width, self.factor)}"
            raise ShapeError(f"{height}x{width} is too small for this autoencoder. Nearest that fits: {nearest}.")
        return frames, height // self.factor, width // self.factor

    def _iter_encode(self, video: Video, draws: Draws | None, piece_frames: int) -> Iterator[Tensor]:
        start = 0
        for piece in chunks(video, piece_frames):
            posterior = self.encode_distribution(piece)
            yield SCALE * (posterior.mean if draws is None else posterior.at(_noise(draws, posterior.mean, start)))
            start += piece.shape[2]

    def _iter_decode(self, latents: Tensor, num_frames: int, piece_frames: int) -> Iterator[Tensor]:
        check_channels(latents, self.latent_channels, what="Latents")
        if not 0 < num_frames <= latents.shape[2]:
            raise ShapeError(
                f"{latents.shape[2]} latent frames can't give {num_frames} frames. Nearest that fits: {latents.shape[2]}."
            )
        return map(self._decode_piece, chunks(latents[:, :, :num_frames], piece_frames))

    def _decode_piece(self, latents: Tensor) -> Tensor:
        return self._per_frame(self._pixels, latents)

    def _per_frame(self, function: Callable[[Tensor], Tensor], video: Tensor) -> Tensor:
        """``function``, which takes [N, C, H, W], of each frame, with so many frames at a time as configured; float32."""
        frames = rearrange(video, "b c t h w -> (b t) c h w")
        parts = torch.split(frames, self.spec.micro_batch_size or len(frames))
        done = torch.cat([function(part.to(self.module.dtype)).float() for part in parts])
        return rearrange(done, "(b t) c h w -> b c t h w", b=len(video))

    def _moments(self, frames: Tensor) -> Tensor:
        return self.module.encode(frames).latent_dist.parameters

    def _pixels(self, latents: Tensor) -> Tensor:
        return self.module.decode(latents / SCALE).sample

    def _read(self) -> Any:
        return self.network.from_pretrained(
            self.spec.from_pretrained,
            subfolder=self.spec.subfolder,
            cache_dir=self.spec.cache_dir,
            local_files_only=self.spec.local_files_only,
            low_cpu_mem_usage=False,  # True warns where accelerate is not installed
            torch_dtype=torch.float32,
        )

    def _build_empty(self) -> Any:
        folder = Path(self.spec.from_pretrained)
        is_here = folder.is_dir()
        config = self.network.load_config(folder, subfolder=self.spec.subfolder) if is_here else self.published
        where = torch.empty(()).device  # torch.get_default_device() of 2.5 doesn't know `with torch.device("meta")`
        return self.network.from_config(config).to(where)  # some of its tensors are always on the CPU


def _noise(draws: Draws, like: Tensor, start: int) -> Tensor:
    """Noise shaped like ``like``, drawn for each frame from ``start`` on by itself, whatever pieces the video comes in."""
    _, channels, length, height, width = like.shape
    frames = [draws.normal(f"posterior of frame {start + t}", (channels, height, width)) for t in range(length)]
    return torch.stack(frames, dim=2)


def _work_in_tiles(network: nn.Module, tile: int) -> None:
    """From now on the large layers of diffusers' autoencoders work on tiles of so many entries a side."""
    part: Any
    for part in network.modules():
        if isinstance(part, ResnetBlock2D):
            part.forward = partial(_res_block, part, tile)  # type: ignore[method-assign]  # of this one
        elif isinstance(part, Upsample2D):
            part.forward = partial(_upsample, part, tile)  # type: ignore[method-assign]  # of this one
        elif hasattr(part, "conv_norm_out"):  # an encoder or decoder: its last three layers become one
            part.conv_out.forward = partial(
                norm_act_conv, norm=part.conv_norm_out, activation=F.silu, conv=part.conv_out, tile=tile
            )
            part.conv_norm_out.forward = part.conv_act.forward = _unchanged


def _unchanged(x: Tensor) -> Tensor:
    return x


def _res_block(block: Any, tile: int, x: Tensor, temb: None = None) -> Tensor:
    h = norm_act_conv(x, block.norm1, block.nonlinearity, block.conv1, tile=tile)
    return norm_act_conv(
        h, block.norm2, block.nonlinearity, block.conv2, tile=tile, skip=x, shortcut=block.conv_shortcut
    )


def _upsample(block: Any, tile: int, x: Tensor, output_size: None = None) -> Tensor:
    return double_size_conv(x, block.conv, tile=tile)
