"""PixArt-alpha, the diffusion transformer of Chen et al. (https://arxiv.org/abs/2310.00426), for images and short videos.

A DiT that attends to the text in each block, and whose blocks share one projection of the timestep, to which each adds a
table of its own. `PixArt` has one size, for which its position tables are made; `PixArtMS` does any and is told which.

Shapes: B batch, C latent channels, T H W latent frames and size (T again for token frames), S tokens a frame, N = T * S,
L text tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from attrs import field, frozen
from attrs.validators import and_, ge, gt, in_, le, lt, optional
from torch import Tensor, nn

from opensora.core.components import preset
from opensora.core.conditioning import Conditioning
from opensora.core.errors import ConfigError, ShapeError
from opensora.core.interop import Interop
from opensora.core.protocols import Size
from opensora.core.sequence import SequencePlan
from opensora.models import _interop
from opensora.models._key_maps import adapt_pixart
from opensora.models._layers.attention import CrossAttention, SelfAttention, attended_text
from opensora.models._layers.conditions import required
from opensora.models._layers.embedders import CaptionEmbedder, NumberEmbedder
from opensora.models._layers.feed_forward import FeedForward
from opensora.models._layers.final_layers import TableFinalLayer
from opensora.models._layers.modulation import DropPath, FrameChoice, add_gated, modulated_norm
from opensora.models._layers.patches import PatchEmbed3D, token_grid, unpatchify
from opensora.models._layers.positions import spatial_table, temporal_table
from opensora.models._layers.remembered import remembered
from opensora.models._layers.sizes import check_size, whole_patches

__all__ = [
    "PixArt",
    "PixArtBlock",
    "PixArtMS",
    "PixArtMSSpec",
    "PixArtMS_XL_2",
    "PixArtSpec",
    "PixArt_1B_2",
    "PixArt_XL_2",
]

_ALL_DENOISED = FrameChoice(None, 1)
"""PixArt knows no given frames."""


@frozen(kw_only=True)
class PixArtSpec:
    """Options of `PixArt`. The defaults are those of PixArt-XL/2."""

    patch_size: tuple[int, int, int] = (1, 2, 2)
    """Latent frames, height and width that make one token."""
    hidden_size: int = field(default=1152, validator=gt(0))
    """Width of the blocks; a multiple of 4 and of the number of heads."""
    depth: int = field(default=28, validator=gt(0))
    """Number of blocks."""
    num_heads: int = field(default=16, validator=gt(0))
    """Attention heads."""
    mlp_ratio: float = field(default=4.0, validator=gt(0))
    """Width of the feed-forward layer over the width of the block."""
    class_dropout_prob: float = field(default=0.1, validator=and_(ge(0), le(1)))
    """Share of training samples whose caption is dropped, so that classifier-free guidance has an unconditional model."""
    pred_sigma: bool = True
    """Predict variance values too, as the second half of the output channels."""
    drop_path: float = field(default=0.0, validator=and_(ge(0.0), lt(1.0)))
    """Probability of leaving out a branch of the last block in training, linear from 0 at the first. Drawn from torch's
    global generator, which the training loop seeds anew at each step."""
    no_temporal_pos_emb: bool = False
    """Leave out the position of a frame: for images."""
    space_scale: float = field(default=1.0, validator=gt(0))
    """Tokens to a position unit, along height and width. The published weights: 1 at 256x256 and 512x512, 2 at 1024x1024,
    4 at 2048x2048."""
    time_scale: float = field(default=1.0, validator=gt(0))
    """Token frames to a position unit."""
    base_size: int | None = field(default=None, validator=optional(gt(0)))
    """Side of square latents, whose tokens are ``1 / space_scale`` position units apart; larger latents are denser. None: of
    as many tokens as the size that the model is built for. The published 2048x2048 weights: 256."""
    freeze: Literal["text"] | None = field(default=None, validator=in_(("text", None)))
    """"text" keeps the attention to the text as it is."""

    def __attrs_post_init__(self) -> None:
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ConfigError(
                f"hidden_size {self.hidden_size} must be a multiple of 4 and of num_heads ({self.num_heads})."
            )
        if min(self.patch_size) < 1:
            raise ConfigError(f"patch_size {self.patch_size} must be three numbers of at least 1.")
        if self.base_size is not None and self.base_size < max(self.patch_size[1:]):
            raise ConfigError(f"base_size {self.base_size} must be at least one patch ({max(self.patch_size[1:])}).")


class PixArtBlock(nn.Module):
    """Attention among all tokens, attention to the text, feed-forward layer."""

    def __init__(self, spec: PixArtSpec, *, attn: nn.Module, drop_path: float) -> None:
        super().__init__()
        width = spec.hidden_size
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.attn = attn
        self.cross_attn = CrossAttention(width, spec.num_heads)
        self.mlp = FeedForward(width, int(width * spec.mlp_ratio), width)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, text: Tensor, text_mask: Tensor | None, t: Tensor, grid: Size) -> Tensor:
        """One block.

        Args:
            x: [B, N, D]; the result is like it.
            text: [B, L, D].
            text_mask: [B, 1, 1, L].
            t: [B, 1, 6D].
            grid: N as token frames, rows and columns.
        """
        modulation = (self.scale_shift_table.flatten() + t).chunk(6, dim=-1)  # [B, 1, D] each
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation

        x = add_gated(x, self.drop_path(gate_attn), self.attend(modulated_norm(x, shift_attn, scale_attn), grid))
        x = x + self.cross_attn(x, text, text_mask)
        return add_gated(x, self.drop_path(gate_mlp), self.mlp(modulated_norm(x, shift_mlp, scale_mlp)))

    def attend(self, x: Tensor, grid: Size) -> Tensor:
        """[B, N, D] -> the same."""
        return self.attn(x)


class PixArt(nn.Module):
    """Predicts noise (and variance values) of latents of one size from text.

    Conditions it reads: text_embedding, text_mask, dropped.
    """

    Spec: ClassVar[type] = PixArtSpec
    interop: ClassVar[Interop] = _interop.PIXART
    title: ClassVar[str] = "PixArt"
    """What messages call it."""
    any_size: ClassVar[bool] = False
    """Whether position tables are made for the size of the latents, or those of the size it was built for are all it has."""
    pos_embed: Tensor
    pos_embed_temporal: Tensor

    def __init__(
        self,
        spec: PixArtSpec,
        *,
        latent_channels: int,
        latent_size: Size | None,
        text_width: int | None,
        text_length: int,
    ) -> None:
        """``text_width`` and ``text_length`` are those of the text encoder.

        Raises:
            ConfigError: The text encoder gives class labels (``text_width`` is None).
            ShapeError: ``latent_size`` is no multiple of the patch, or None (clips of different sizes) where one is needed.
        """
        super().__init__()
        if text_width is None:
            raise ConfigError(
                f"{self.title} is conditioned on text; this text encoder gives class labels. Use t5, say."
            )
        width = spec.hidden_size
        self.spec = spec
        self.condition_dropout = spec.class_dropout_prob
        self.patch_size = spec.patch_size
        self.latent_size = self._own_size(latent_size)
        self.base_size = self._base_tokens()
        out_channels = latent_channels * (2 if spec.pred_sigma else 1)

        spatial, temporal = self.position_tables(self.latent_size)
        self.register_buffer("pos_embed", spatial)
        self.register_buffer("pos_embed_temporal", temporal)
        self.x_embedder = PatchEmbed3D(spec.patch_size, latent_channels, width)
        self.t_embedder = NumberEmbedder(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = CaptionEmbedder(text_width, width, text_length)
        rates = torch.linspace(0, spec.drop_path, spec.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(self.build_block(index, drop_path=rate) for index, rate in enumerate(rates))
        self.final_layer = TableFinalLayer(width, torch.Size(spec.patch_size).numel() * out_channels)

        self._initialize()
        self._freeze()

    def build_block(self, index: int, *, drop_path: float) -> PixArtBlock:
        """The block at that depth."""
        attn = SelfAttention(self.spec.hidden_size, self.spec.num_heads)
        return PixArtBlock(self.spec, attn=attn, drop_path=drop_path)

    @property
    def sequence_plan(self) -> SequencePlan:
        """See `SequencePlan`."""
        return SequencePlan(full=("blocks.*.attn",))

    def forward(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """See `opensora.core.protocols.Denoiser`: [B, C, T, H, W] and [B] -> [B, C or 2C, T, H, W] float32.

        Raises:
            ShapeError: The latents are not of the size that this model was built for, or no multiple of the patch.
        """
        t = self.embed_timestep(timestep, conditioning)  # [B, D]
        t_blocks = self.t_block(t)[:, None]  # [B, 1, 6D]
        text, text_mask = self.embed_text(conditioning)  # [B, L, D], [B, 1, 1, L]

        x = self.embed_patches(latents)  # [B, T, S, D]
        grid = token_grid(latents.shape[2:], self.patch_size)
        frames, tokens = x.shape[1:3]
        x = x.flatten(1, 2)  # [B, N, D]
        for block in self.blocks:
            x = block(x, text, text_mask, t_blocks, grid)
        x = self.final_layer(x[:, None], t, t, _ALL_DENOISED).reshape(len(x), frames, tokens, -1)
        return unpatchify(x, self.patch_size, latents.shape[2:]).float()

    def embed_timestep(self, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """[B] -> [B, D]."""
        return self.t_embedder(timestep)

    @remembered("y_embedder")
    def embed_text(self, conditioning: Conditioning) -> tuple[Tensor, Tensor | None]:
        """Text [B, L, D] with dropped captions replaced, and its mask [B, 1, 1, L]. The same at every sampling step."""
        text = self.y_embedder(required(conditioning, "text_embedding", self.title), conditioning.dropped)
        return attended_text(text, conditioning.text_mask)

    def embed_patches(self, latents: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, T, S, D], positions added."""
        spatial, temporal = self.pos_embed, self.pos_embed_temporal
        if self.any_size and tuple(latents.shape[2:]) != self.latent_size:
            spatial, temporal = (table.to(spatial) for table in self.position_tables(latents.shape[2:]))
        else:
            check_size(latents, self.latent_size)
        x = self.x_embedder(latents.to(self.x_embedder.proj.weight.dtype)) + spatial
        return x if self.spec.no_temporal_pos_emb else x + temporal[:, :, None]

    def position_tables(self, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Over positions [1, S, D] and over frames [1, T, D], for latents of ``size`` (T, H, W).

        Raises:
            ShapeError: ``size`` is no multiple of the patch.
        """
        spec = self.spec
        frames, h, w = token_grid(whole_patches(size, self.patch_size, model=self.title), self.patch_size)
        spatial = spatial_table(spec.hidden_size, h, w, scale=spec.space_scale, base_size=self.base_size)
        return spatial[None], temporal_table(spec.hidden_size, frames, scale=spec.time_scale)[None]

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn a published checkpoint (PixArt-alpha or -Sigma) into this model's keys and shapes, whatever its size.

        Position tables are this model's own, since they follow from its size and scales.
        """
        tables = {"pos_embed": self.pos_embed, "pos_embed_temporal": self.pos_embed_temporal}
        return adapt_pixart(state, text_length=len(self.y_embedder.y_embedding)) | tables

    def _own_size(self, size: Size | None) -> Size:
        """The size of the stored tables."""
        if size is not None or not self.any_size:
            return whole_patches(size, self.patch_size, model=self.title, instead="PixArtMS or STDiT3")
        if self.spec.base_size is None:
            raise ShapeError(
                f"{self.title} measures positions by one size, and the clips of this dataset differ in theirs. Set "
                "model.base_size to that size (64 latents are 512 pixels, say), or give one image_size."
            )
        frames, *patch = self.patch_size
        height, width = (self.spec.base_size // side * side for side in patch)
        return frames, height, width

    def _base_tokens(self) -> int:
        """Tokens along a side of the square by whose size positions are measured."""
        if self.spec.base_size is not None:
            return self.spec.base_size // self.patch_size[1]
        _, h, w = token_grid(self.latent_size, self.patch_size)
        return math.isqrt(h * w)

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.detach().flatten(1))
        for name in (
            "t_embedder.mlp.0",
            "t_embedder.mlp.2",
            "t_block.1",
            "y_embedder.y_proj.fc1",
            "y_embedder.y_proj.fc2",
        ):
            nn.init.normal_(self.get_parameter(f"{name}.weight"), std=0.02)
        # Text has no influence at the start, and the output is zero.
        for block in self.blocks:
            nn.init.zeros_(block.get_parameter("cross_attn.proj.weight"))
        nn.init.zeros_(self.final_layer.linear.weight)

    def _freeze(self) -> None:
        if self.spec.freeze == "text":
            for block in self.blocks:
                block.get_submodule("cross_attn").requires_grad_(False)


@frozen(kw_only=True)
class PixArtMSSpec(PixArtSpec):
    """Options of `PixArtMS`. The defaults are those of PixArtMS-XL/2."""

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        if self.hidden_size % 3:
            raise ConfigError(
                f"hidden_size {self.hidden_size} must be a multiple of 3: height, width and aspect ratio share it."
            )


class PixArtMS(PixArt):
    """PixArt for latents of any size ("multi-scale"), which is told the size in pixels.

    Conditions it reads: text_embedding, text_mask, dropped, height, width, aspect_ratio.
    """

    Spec: ClassVar[type] = PixArtMSSpec
    interop: ClassVar[Interop] = _interop.PIXART_MS
    title: ClassVar[str] = "PixArtMS"
    any_size: ClassVar[bool] = True

    def __init__(
        self,
        spec: PixArtMSSpec,
        *,
        latent_channels: int,
        latent_size: Size | None,
        text_width: int | None,
        text_length: int,
    ) -> None:
        """See `PixArt`. ``latent_size`` None (clips of different sizes) needs a ``base_size``."""
        super().__init__(
            spec,
            latent_channels=latent_channels,
            latent_size=latent_size,
            text_width=text_width,
            text_length=text_length,
        )
        self.csize_embedder = NumberEmbedder(spec.hidden_size // 3)
        self.ar_embedder = NumberEmbedder(spec.hidden_size // 3)

    def embed_timestep(self, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Of the timestep [B], and of height, width and aspect ratio: [B, D]."""
        height, width, ratio = (
            required(conditioning, name, self.title) for name in ("height", "width", "aspect_ratio")
        )
        sizes = self.csize_embedder(torch.stack([height, width], dim=-1)).flatten(1)  # [B, 2D/3]
        return self.t_embedder(timestep) + torch.cat([sizes, self.ar_embedder(ratio)], dim=-1)


PixArt_XL_2 = preset(PixArt, "PixArt_XL_2", depth=28, hidden_size=1152, patch_size=(1, 2, 2), num_heads=16)
PixArt_1B_2 = preset(PixArt, "PixArt_1B_2", depth=28, hidden_size=1872, patch_size=(1, 2, 2), num_heads=26)
PixArtMS_XL_2 = preset(PixArtMS, "PixArtMS_XL_2", depth=28, hidden_size=1152, patch_size=(1, 2, 2), num_heads=16)
