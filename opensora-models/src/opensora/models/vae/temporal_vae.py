"""The temporal autoencoder of Open-Sora 1.2: shortens videos in time with causal 3-D convolutions, after MAGVIT-v2.

It works on the latents of an image autoencoder, or on pixels. Causal means that a frame's latents depend on earlier frames
only (but for the normalisation, which runs over the whole clip), so an image is a video of one frame.
MAGVIT-v2: https://arxiv.org/abs/2310.05737.

Shapes: B batch, C channels, T frames, t latent frames, H W size (the same before and after), f factor in time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from attrs import field, frozen
from attrs.validators import deep_iterable, gt, min_len, optional
from einops import rearrange
from torch import Tensor, nn

from opensora.core.components import preset
from opensora.core.errors import ConfigError, ShapeError
from opensora.core.protocols import Size
from opensora.core.randomness import Draws
from opensora.core.weights import load_weights
from opensora.models.vae._streaming import check_channels, check_num_frames
from opensora.models.vae._tiling import norm_act_conv
from opensora.models.vae.posterior import Posterior

__all__ = [
    "CausalConv3d",
    "Decoder",
    "DoubleFrames",
    "Encoder",
    "ResBlock",
    "TemporalVAE",
    "TemporalVAESpec",
    "TemporalVAE_SD",
]

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {"swish": F.silu, "relu": F.relu}


@frozen(kw_only=True)
class TemporalVAESpec:
    """Options of `TemporalVAE`."""

    from_pretrained: str | None = None
    """Weights: file, folder, checkpoint or hub id; those of a whole `VideoAutoencoderPipeline` will do. None: random ones."""
    in_out_channels: int = field(default=4, validator=gt(0))
    """Channels of the video: 4 for latents of an image autoencoder, 3 for pixels."""
    latent_embed_dim: int = field(default=4, validator=gt(0))
    """Channels between encoder and decoder on one side and the 1x1 convolutions around the latents on the other."""
    embed_dim: int = field(default=4, validator=gt(0))
    """Channels of the latents."""
    filters: int = field(default=128, validator=gt(0))
    """Width of the first level."""
    num_res_blocks: int = field(default=4, validator=gt(0))
    """Residual blocks of each level, and of the middle."""
    channel_multipliers: tuple[int, ...] = field(
        default=(1, 2, 2, 4), validator=[min_len(1), deep_iterable(member_validator=gt(0))]
    )
    """Width of each level, in ``filters``."""
    temporal_downsample: tuple[bool, ...] = (True, True, False)
    """After which levels but the last the number of frames is halved."""
    num_groups: int = field(default=32, validator=gt(0))
    """Groups of channels that are normalised together."""
    activation_fn: Literal["swish", "relu"] = "swish"
    """The nonlinearity."""
    tile_size: int | None = field(default=None, validator=optional(gt(0)))
    """Layers work on tiles of so many entries a side: less memory, for the same result but for rounding. None: whole."""

    def __attrs_post_init__(self) -> None:
        if len(self.temporal_downsample) != len(self.channel_multipliers) - 1:
            raise ConfigError(
                f"temporal_downsample has {len(self.temporal_downsample)} entries and channel_multipliers "
                f"{len(self.channel_multipliers)}; it needs one less than these: one between two levels each."
            )
        if odd := [width for width in self.widths if width % self.num_groups]:
            raise ConfigError(f"num_groups is {self.num_groups}, which doesn't divide the width {odd[0]} of a level.")

    @property
    def widths(self) -> list[int]:
        """Channels of each level."""
        return [self.filters * multiplier for multiplier in self.channel_multipliers]


class CausalConv3d(nn.Module):
    """A convolution that sees this frame and earlier ones. Outside there are zeros."""

    def __init__(self, width: int, out_width: int, kernel: int, *, time_stride: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.frames_before = kernel - time_stride
        self.conv = nn.Conv3d(
            width, out_width, kernel, stride=(time_stride, 1, 1), padding=(0, kernel // 2, kernel // 2), bias=bias
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, C', T / time_stride, H, W]."""
        return self.conv(F.pad(x, (0, 0, 0, 0, self.frames_before, 0)) if self.frames_before else x)


class ResBlock(nn.Module):
    """Two causal convolutions beside a shortcut."""

    def __init__(self, width: int, out_width: int, spec: TemporalVAESpec) -> None:
        super().__init__()
        self.spec = spec
        self.norm1 = nn.GroupNorm(spec.num_groups, width)
        self.conv1 = CausalConv3d(width, out_width, 3, bias=False)
        self.norm2 = nn.GroupNorm(spec.num_groups, out_width)
        self.conv2 = CausalConv3d(out_width, out_width, 3, bias=False)
        self.conv3 = CausalConv3d(width, out_width, 1, bias=False) if width != out_width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, C', T, H, W]."""
        h = _norm_act_conv(x, self.norm1, self.spec, self.conv1)
        return _norm_act_conv(h, self.norm2, self.spec, self.conv2, skip=x, shortcut=self.conv3)


class DoubleFrames(CausalConv3d):
    """Each frame becomes two."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 2 * width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, C, 2T, H, W]."""
        return rearrange(super().forward(x), "b (c s) t h w -> b c (t s) h w", s=2)


def _level(width: int, out_width: int, spec: TemporalVAESpec) -> nn.ModuleList:
    """The residual blocks of one level."""
    widths = [width, *[out_width] * spec.num_res_blocks]
    return nn.ModuleList(ResBlock(before, after, spec) for before, after in pairwise(widths))


class Encoder(nn.Module):
    """[B, C, T, H, W] -> [B, 2 latent_embed_dim, T / f, H, W]."""

    def __init__(self, spec: TemporalVAESpec) -> None:
        super().__init__()
        self.spec = spec
        widths, last = [spec.filters, *spec.widths], spec.widths[-1]
        self.conv_in = CausalConv3d(spec.in_out_channels, spec.filters, 3, bias=False)
        self.block_res_blocks = nn.ModuleList(_level(before, after, spec) for before, after in pairwise(widths))
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(width, width, 3, time_stride=2) if halved else nn.Identity()
            for width, halved in zip(spec.widths[:-1], spec.temporal_downsample, strict=True)
        )
        self.res_blocks = _level(last, last, spec)
        self.norm1 = nn.GroupNorm(spec.num_groups, last)
        self.conv2 = CausalConv3d(last, 2 * spec.latent_embed_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Means and log variances, before the last 1x1 convolution."""
        x = self.conv_in(x)
        for blocks, shorten in zip(self.block_res_blocks, [*self.conv_blocks, nn.Identity()], strict=True):
            x = shorten(_through(cast(nn.ModuleList, blocks), x))
        x = _through(self.res_blocks, x)
        return _norm_act_conv(x, self.norm1, self.spec, self.conv2)


class Decoder(nn.Module):
    """[B, latent_embed_dim, t, H, W] -> [B, C, f t, H, W]. Levels are numbered as in the encoder and run backwards."""

    def __init__(self, spec: TemporalVAESpec) -> None:
        super().__init__()
        self.spec = spec
        last = spec.widths[-1]
        self.conv1 = CausalConv3d(spec.latent_embed_dim, last, 3)
        self.res_blocks = _level(last, last, spec)
        self.block_res_blocks = nn.ModuleList(
            _level(before, after, spec) for after, before in zip(spec.widths, [*spec.widths[1:], last], strict=True)
        )
        self.conv_blocks = nn.ModuleList(
            DoubleFrames(width) if doubled else nn.Identity()
            for width, doubled in zip(spec.widths[1:], spec.temporal_downsample, strict=True)
        )
        self.norm1 = nn.GroupNorm(spec.num_groups, spec.widths[0])
        self.conv_out = CausalConv3d(spec.widths[0], spec.in_out_channels, 3)

    def forward(self, z: Tensor) -> Tensor:
        """The video, with what was padded in front of it."""
        x = _through(self.res_blocks, self.conv1(z))
        levels = zip(self.block_res_blocks, [nn.Identity(), *self.conv_blocks], strict=True)
        for blocks, lengthen in reversed(list(levels)):
            x = lengthen(_through(blocks, x))
        return _norm_act_conv(x, self.norm1, self.spec, self.conv_out)


class TemporalVAE(nn.Module):
    """f frames become one, height and width stay. Frozen, in eval mode; `train_parts` changes that."""

    Spec: ClassVar[type] = TemporalVAESpec

    def __init__(self, spec: TemporalVAESpec, *, meta: bool = False) -> None:
        """Builds the network, and reads its weights if there are any.

        Raises:
            WeightsError: They can't be found or read, or don't fit.
        """
        super().__init__()
        self.spec = spec
        self.latent_channels = spec.embed_dim
        self.factor = 2 ** sum(spec.temporal_downsample)
        self.encoder = Encoder(spec)
        self.decoder = Decoder(spec)
        self.quant_conv = CausalConv3d(2 * spec.latent_embed_dim, 2 * spec.embed_dim, 1)
        self.post_quant_conv = CausalConv3d(spec.embed_dim, spec.latent_embed_dim, 1)
        if spec.from_pretrained and not meta:
            load_weights(self, spec.from_pretrained)
        self.requires_grad_(False).eval()

    def encode(self, video: Tensor, *, draws: Draws | None = None) -> Tensor:
        """[B, C, T, H, W] -> float32 [B, embed_dim, ceil(T / f), H, W]. None for ``draws`` takes the posterior's mean."""
        posterior = self.encode_distribution(video)
        return posterior.mode() if draws is None else posterior.sample(draws, name="temporal posterior")

    def moments(self, video: Tensor) -> dict[str, Tensor]:
        """[B, C, T, H, W] -> ``mean`` and ``logvar``, of which `latents_of` draws."""
        return self.encode_distribution(video).moments()

    def latents_of(self, moments: Mapping[str, Tensor], draws: Draws) -> Tensor:
        """What `encode` draws from the video that has these moments."""
        return Posterior(moments["mean"], moments["logvar"]).sample(draws, name="temporal posterior")

    def encode_distribution(self, video: Tensor) -> Posterior:
        """[B, C, T, H, W] -> the posterior of [B, embed_dim, ceil(T / f), H, W].

        Raises:
            ShapeError: Other channels, or nothing to encode.
        """
        check_channels(video, self.spec.in_out_channels, what="Videos")
        _, _, frames, height, width = video.shape
        self.latent_size((frames, height, width))
        missing = -frames % self.factor
        video = F.pad(video.to(self._dtype), (0, 0, 0, 0, missing, 0))
        return Posterior.of_moments(self.quant_conv(self.encoder(video)).float())

    def decode(self, latents: Tensor, *, num_frames: int) -> Tensor:
        """[B, embed_dim, t, H, W] -> float32 [B, C, num_frames, H, W].

        Raises:
            ShapeError: Other channels, or latents of another number of frames.
        """
        check_channels(latents, self.latent_channels, what="Latents")
        check_num_frames(latents, num_frames, latent_frames=self.latent_frames, factor=self.factor)
        decoded = self.decoder(self.post_quant_conv(latents.to(self._dtype)))
        return decoded[:, :, -num_frames:].float()

    def latent_frames(self, num_frames: int) -> int:
        """How many latent frames a clip of so many frames has."""
        return -(-num_frames // self.factor)

    def latent_size(self, size: Size) -> Size:
        """(ceil(T / f), H, W).

        Raises:
            ShapeError: Nothing to encode.
        """
        frames, height, width = size
        if min(size) < 1:
            nearest = f"{max(frames, 1)} frames of {max(height, 1)}x{max(width, 1)}"
            raise ShapeError(f"{frames} frames of {height}x{width} are no video. Nearest that fits: {nearest}.")
        return self.latent_frames(frames), height, width

    def train_parts(self) -> list[nn.Parameter]:
        """Make all of it trainable, and return its parameters."""
        self.requires_grad_(True).train()
        return list(self.parameters())

    @staticmethod
    def adapt_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The temporal part, if these are the weights of a whole `VideoAutoencoderPipeline`."""
        part = "temporal_vae."
        own = {key.removeprefix(part): value for key, value in state.items() if key.startswith(part)}
        return own or state

    @property
    def _dtype(self) -> torch.dtype:
        return self.quant_conv.conv.weight.dtype


def _norm_act_conv(
    x: Tensor,
    norm: nn.GroupNorm,
    spec: TemporalVAESpec,
    conv: CausalConv3d,
    *,
    skip: Tensor | None = None,
    shortcut: nn.Module | None = None,
) -> Tensor:
    """``conv(activation(norm(x)))``, plus ``shortcut(skip)``; in tiles if so configured."""
    activation = ACTIVATIONS[spec.activation_fn]
    if spec.tile_size:
        return norm_act_conv(
            x,
            norm,
            activation,
            conv.conv,
            tile=spec.tile_size,
            frames_before=conv.frames_before,
            skip=skip,
            shortcut=shortcut,
        )
    h = conv(activation(norm(x)))
    return h if skip is None or shortcut is None else h + shortcut(skip)


def _through(blocks: Iterable[nn.Module], x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


TemporalVAE_SD = preset(TemporalVAE, "TemporalVAE_SD", temporal_downsample=(False, True, True))
