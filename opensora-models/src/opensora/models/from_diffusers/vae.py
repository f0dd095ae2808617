"""Autoencoders of diffusers, with the scale and shift of latents that their own pipelines apply.

    vae = dict(type="diffusers", from_pretrained="Wan-AI/Wan2.1-T2V-1.3B-Diffusers")

Shapes: B batch, C latent channels, T H W frames and size, T' H' W' latent frames and size.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import attrs
import torch
from attrs import field, frozen
from einops import rearrange
from torch import Tensor, nn

from opensora.core.errors import ConfigError, ShapeError
from opensora.core.protocols import Size
from opensora.core.randomness import Draws
from opensora.models._pretrained import reading
from opensora.models.from_diffusers._sources import (
    build_class,
    describe,
    diffusers_class,
    read_part,
    split_hub_id,
)

__all__ = ["DiffusersVAE", "DiffusersVAESpec"]

log = logging.getLogger(__name__)
_SUBFOLDER = "vae"


@frozen(kw_only=True)
class DiffusersVAESpec:
    """Options of `DiffusersVAE`."""

    from_pretrained: str | None = None
    """Folder or hub id, of a whole pipeline or of its autoencoder. None: random weights, for tests."""
    subfolder: str | None = None
    """Folder within from_pretrained. None: its top if config.json is there, else "vae"."""
    class_name: str | None = None
    """The diffusers class, such as "AutoencoderKLWan". None: from_pretrained says."""
    config: dict[str, Any] = field(factory=dict)
    """Arguments of the class, in place of those of from_pretrained or of the class's defaults."""
    enable_tiling: bool | dict[str, Any] = False
    """Encode and decode in tiles: less memory for large videos, slightly other values. A dict has the sizes that the class's
    enable_tiling takes."""
    enable_slicing: bool = False
    """Encode and decode the samples of a batch one by one: less memory, the same values."""


@frozen(kw_only=True)
class _Grid:
    """How a class divides a video."""

    frames: int = 1
    """Frames of a latent frame. More than 1: the first frame has one of its own."""
    chunk: int = 1
    """Frames after the first come in multiples of this."""
    side: int = 8
    """Pixels of a latent's height and width."""


def _grid_cogvideox(module: Any) -> _Grid:
    frames = int(module.config.temporal_compression_ratio)
    # Two latent frames are decoded at a time, besides the first.
    return _Grid(frames=frames, chunk=2 * frames, side=2 ** (len(module.config.block_out_channels) - 1))


def _grid_wan(module: Any) -> _Grid:
    config = module.config
    frames = 2 ** sum(config.temperal_downsample)
    return _Grid(frames=frames, chunk=frames, side=2 ** (len(config.dim_mult) - 1) * (config.get("patch_size") or 1))


def _grid_declared(module: Any) -> _Grid:
    frames = int(module.temporal_compression_ratio)
    return _Grid(frames=frames, chunk=frames, side=int(module.spatial_compression_ratio))


def _grid_image(module: Any) -> _Grid:
    channels = module.config.get("block_out_channels") or module.config.get("encoder_block_out_channels")
    return _Grid(side=2 ** (len(channels) - 1))


VIDEO_CLASSES = {
    "AutoencoderKLCogVideoX": _grid_cogvideox,
    "AutoencoderKLWan": _grid_wan,
    "AutoencoderKLLTXVideo": _grid_declared,
    "AutoencoderKLMochi": _grid_declared,
    "AutoencoderKLHunyuanVideo": _grid_declared,
}
"""Classes that take [B, 3, T, H, W]."""

IMAGE_CLASSES = {
    "AutoencoderKL": _grid_image,
    "AutoencoderKLTemporalDecoder": _grid_image,
    "AutoencoderDC": _grid_image,
    "AutoencoderTiny": _grid_image,
}
"""Classes that encode frames by themselves."""


class DiffusersVAE(nn.Module):
    """Calls the wrapped class, ``self.module``, as its own pipeline would. Frozen, in eval mode."""

    Spec: ClassVar[type] = DiffusersVAESpec
    memory_options: ClassVar[Sequence[str]] = ("enable_slicing",)
    pixel_dtype: torch.dtype | None = None
    """Of what is encoded; None: that of the weights."""

    def __init__(self, spec: DiffusersVAESpec, *, meta: bool = False) -> None:
        """Read the weights.

        Args:
            spec: Options.
            meta: Read none, for a look at shapes.

        Raises:
            ConfigError: The class is unknown, is not among those that can be driven, or can't be built or tiled as asked.
            WeightsError: They can't be found, downloaded or read.
        """
        super().__init__()
        self.spec = spec
        options = {**attrs.asdict(spec), "noise_schedule": None}
        part = describe(options, usual_subfolder=_SUBFOLDER, subfolder=spec.subfolder, key="vae")
        cls = diffusers_class(part.class_name, part="Autoencoder", key="vae")
        grids = {**VIDEO_CLASSES, **IMAGE_CLASSES}
        if cls.__name__ not in grids:
            raise ConfigError(f"{cls.__name__} can't be driven. Autoencoders that can: {', '.join(grids)}.")
        self.is_image = cls.__name__ in IMAGE_CLASSES
        if spec.from_pretrained is None or meta:
            if not meta:
                log.warning("vae.from_pretrained is not set: %s has random weights", cls.__name__)
            self.module: Any = build_class(cls, part.config, own=spec.config, key="vae")
        else:
            self.module = _read(cls, spec)
        if meta:
            self.module.to("meta")  # some classes make parameters out of numbers
        if cls.__name__ == "AutoencoderKLMochi":  # waves of up to 128 a unit want float32 pixels in any precision
            waves = self.module.encoder.fourier_features
            waves.register_forward_hook(lambda _, __, output: output.to(self.module.dtype))
            self.pixel_dtype = torch.float32
        self.grid: _Grid = grids[cls.__name__](self.module)
        self.latent_channels: int = self.module.config.get("latent_channels") or self.module.config["z_dim"]
        _save_memory(self.module, spec)
        self.requires_grad_(False).eval()

    def encode(self, video: Tensor, *, draws: Draws | None = None) -> Tensor:
        """[B, 3, T, H, W] in [-1, 1] -> float32 [B, C, T', H', W'].

        ``draws`` samples the posterior, where the class has one; None takes its mean.

        Raises:
            ShapeError: See `latent_size`.
        """
        moments = self.moments(video)
        if "latents" in moments:
            return moments["latents"]
        if draws is None:
            return (moments["mean"] - moments["shift"]) * moments["scale"]
        return self.latents_of(moments, draws)

    def moments(self, video: Tensor) -> dict[str, Tensor]:
        """``mean`` and ``std`` [B, C, T', H', W'] of the posterior, shift and scale; or ``latents``, if the class has none.

        Raises:
            ShapeError: See `latent_size`.
        """
        self.latent_size(tuple(video.shape[2:]))  # type: ignore[arg-type]  # three of them
        pixels = rearrange(video, "b c t h w -> (b t) c h w") if self.is_image else video
        encoded = self.module.encode(pixels.to(self.pixel_dtype or self.module.dtype))
        shift, scale = self._normalization()
        if (posterior := getattr(encoded, "latent_dist", None)) is None:
            latents = self._to_video(encoded.latents if hasattr(encoded, "latents") else encoded.latent, len(video))
            return {"latents": (latents - shift) * scale}
        mean, std = (self._to_video(each, len(video)) for each in (posterior.mean, posterior.std))
        scaling = {"shift": shift, "scale": scale}
        return {"mean": mean, "std": std} | {
            name: torch.as_tensor(each).reshape(1, -1, 1, 1, 1).expand(len(video), -1, 1, 1, 1)
            for name, each in scaling.items()
        }

    def latents_of(self, moments: Mapping[str, Tensor], draws: Draws) -> Tensor:
        """What `encode` draws from the video that has these moments."""
        mean = moments["mean"]
        noise = draws.normal("posterior", mean.shape[1:]).to(mean.device)
        return (torch.addcmul(mean, moments["std"], noise) - moments["shift"]) * moments["scale"]

    def decode(self, latents: Tensor, *, num_frames: int) -> Tensor:
        """[B, C, T', H', W'] -> float32 [B, 3, num_frames, H, W]."""
        shift, scale = self._normalization()
        latents = (latents / scale + shift).to(self.module.dtype)
        return self._decode(latents)[:, :, :num_frames].float()

    def latent_size(self, size: Size) -> Size:
        """(T', H', W').

        Raises:
            ShapeError: The class can't encode this size; the message names the nearest that it can.
        """
        frames, side = self.grid.frames, self.grid.side
        nearest = (
            1 + round((size[0] - 1) / self.grid.chunk) * self.grid.chunk,
            *(max(1, round(length / side)) * side for length in size[1:]),
        )
        if tuple(size) != nearest:
            given, best = ("x".join(map(str, each)) for each in (size, nearest))
            rule = "" if self.grid.chunk == 1 else f"1 + a multiple of {self.grid.chunk} frames and "
            raise ShapeError(
                f"{type(self.module).__name__} can't encode {given} (frames x height x width): it takes {rule}"
                f"sides that are multiples of {side}. Nearest: {best}."
            )
        return 1 + (size[0] - 1) // frames, size[1] // side, size[2] // side

    def _decode(self, latents: Tensor) -> Tensor:
        if not self.is_image:
            told = {"temb": latents.new_zeros(len(latents))} if self.module.config.get("timestep_conditioning") else {}
            video: Tensor = self.module.decode(latents, **told).sample
            return video
        frames = rearrange(latents, "b c t h w -> (b t) c h w")
        lengths = {"num_frames": latents.shape[2]} if type(self.module).__name__.endswith("TemporalDecoder") else {}
        return self._to_video(self.module.decode(frames, **lengths).sample, len(latents))

    def _to_video(self, frames: Tensor, batch: int) -> Tensor:
        return rearrange(frames, "(b t) c h w -> b c t h w", b=batch).float() if self.is_image else frames.float()

    def _normalization(self) -> tuple[Tensor, Tensor]:
        """Shift and scale, [C, 1, 1, 1] each or scalars: what the denoiser sees is (latents - shift) * scale."""
        config, device = self.module.config, next(self.module.parameters()).device
        own = dict(self.module.named_buffers(recurse=False))  # LTX has them with its weights, others in the config
        mean = _first(own.get("latents_mean"), config.get("latents_mean"), config.get("shift_factor"), 0.0)
        std = _first(own.get("latents_std"), config.get("latents_std"), 1.0)
        mean, std = (torch.as_tensor(each, dtype=torch.float32, device=device).flatten() for each in (mean, std))
        return mean.view(-1, 1, 1, 1), _first(config.get("scaling_factor"), 1.0) / std.view(-1, 1, 1, 1)


def _read(cls: Any, spec: DiffusersVAESpec) -> Any:
    assert spec.from_pretrained is not None  # checked by the caller
    source, revision, key = spec.from_pretrained, None, "vae"
    _, place = read_part(source, spec.subfolder, usual_subfolder=_SUBFOLDER, key=key)
    if not Path(source).expanduser().is_dir():
        source, _, revision = split_hub_id(source)
    with reading(cls.__name__, source, key="vae.from_pretrained"):
        return cls.from_pretrained(
            str(Path(source).expanduser()) if Path(source).expanduser().is_dir() else source,
            subfolder=place,
            revision=revision,
            low_cpu_mem_usage=False,  # True warns where accelerate is not installed
            torch_dtype=torch.float32,
            **spec.config,
        )


def _save_memory(module: Any, spec: DiffusersVAESpec) -> None:
    tiles = spec.enable_tiling if isinstance(spec.enable_tiling, dict) else {}
    try:
        if spec.enable_tiling is not False:
            module.enable_tiling(**tiles)
        if spec.enable_slicing:
            module.enable_slicing()
    except (AttributeError, TypeError, NotImplementedError) as error:
        raise ConfigError(
            f"{type(module).__name__} can't do that with vae.enable_tiling = {spec.enable_tiling!r}, "
            f"enable_slicing = {spec.enable_slicing}: {error}."
        ) from error


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)
