"""Latte-1, the text-to-video model of Ma et al. (https://arxiv.org/abs/2401.03048); LatteTransformer3DModel of diffusers.

PixArt's blocks along the positions of a frame, and between them blocks along the frames of a position that don't see the
text. A model has one size, for which its position tables are made.

Shapes: B batch, C latent channels, T H W latent frames and size (T again for token frames), S tokens a frame, L text tokens,
D width.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from attrs import field, frozen
from attrs.validators import and_, ge, gt, le
from torch import Tensor, nn

from opensora.core.components import preset
from opensora.core.conditioning import Conditioning
from opensora.core.errors import ConfigError
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
from opensora.models._layers.modulation import FrameChoice, add_gated, modulated_norm
from opensora.models._layers.patches import PatchEmbed3D, token_grid, unpatchify
from opensora.models._layers.positions import spatial_table, temporal_table
from opensora.models._layers.remembered import remembered
from opensora.models._layers.sizes import check_size, whole_patches

__all__ = ["LatteT2V", "LatteT2VBlock", "LatteT2VSpec", "LatteT2V_XL_2"]

_ALL_DENOISED = FrameChoice(None, 1)
"""Latte knows no given frames."""


@frozen(kw_only=True)
class LatteT2VSpec:
    """Options of `LatteT2V`. The defaults are those of Latte-1."""

    patch_size: tuple[int, int, int] = (1, 2, 2)
    """Latent frames, height and width that make one token."""
    hidden_size: int = field(default=1152, validator=gt(0))
    """Width of the blocks; a multiple of 4 and of the number of heads."""
    depth: int = field(default=28, validator=gt(0))
    """Number of pairs of a spatial and a temporal block."""
    num_heads: int = field(default=16, validator=gt(0))
    """Attention heads."""
    mlp_ratio: float = field(default=4.0, validator=gt(0))
    """Width of the feed-forward layer over the width of the block."""
    class_dropout_prob: float = field(default=0.1, validator=and_(ge(0), le(1)))
    """Share of training samples whose caption is dropped, so that classifier-free guidance has an unconditional model."""
    pred_sigma: bool = True
    """Predict variance values too, as the second half of the output channels."""
    space_scale: float = field(default=1.0, validator=gt(0))
    """Tokens to a position unit, along height and width."""

    def __attrs_post_init__(self) -> None:
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ConfigError(
                f"hidden_size {self.hidden_size} must be a multiple of 4 and of num_heads ({self.num_heads})."
            )
        if min(self.patch_size) < 1:
            raise ConfigError(f"patch_size {self.patch_size} must be three numbers of at least 1.")


class LatteT2VBlock(nn.Module):
    """Attention along one axis, attention to the text (in spatial blocks), feed-forward layer."""

    def __init__(self, spec: LatteT2VSpec, *, temporal: bool) -> None:
        super().__init__()
        width = spec.hidden_size
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.attn = SelfAttention(width, spec.num_heads)
        self.cross_attn = None if temporal else CrossAttention(width, spec.num_heads)
        self.mlp = FeedForward(width, int(width * spec.mlp_ratio), width)

    def forward(self, x: Tensor, text: Tensor, text_mask: Tensor | None, t: Tensor) -> Tensor:
        """``x`` [B, T, S, D], ``text`` [B, L, D], ``text_mask`` [B, 1, 1, L], ``t`` [B, 1, 1, 6D] -> like ``x``."""
        modulation = (self.scale_shift_table.flatten() + t).chunk(6, dim=-1)  # [B, 1, 1, D] each
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation

        y = modulated_norm(x, shift_attn, scale_attn)
        y = self.attn(y) if self.cross_attn else self.attn(y.transpose(1, 2)).transpose(1, 2)
        x = add_gated(x, gate_attn, y)

        if self.cross_attn:
            x = x + self.cross_attn(x, text, text_mask)

        y = self.mlp(modulated_norm(x, shift_mlp, scale_mlp))
        return add_gated(x, gate_mlp, y)


class LatteT2V(nn.Module):
    """Predicts noise (and variance values) of latent videos of one size from text.

    Conditions it reads: text_embedding, text_mask, dropped.
    """

    Spec: ClassVar[type] = LatteT2VSpec
    interop: ClassVar[Interop] = _interop.LATTE_T2V
    sequence_plan: ClassVar[SequencePlan] = SequencePlan(
        blocks=("spatial_blocks", "temporal_blocks"), spatial=("spatial_blocks.*.attn",)
    )
    pos_embed: Tensor
    pos_embed_temporal: Tensor

    def __init__(
        self,
        spec: LatteT2VSpec,
        *,
        latent_channels: int,
        latent_size: Size | None,
        text_width: int | None,
        text_length: int,
    ) -> None:
        """``text_width`` and ``text_length`` are those of the text encoder.

        Raises:
            ConfigError: The text encoder gives class labels (``text_width`` is None).
            ShapeError: ``latent_size`` is no multiple of the patch, or None (clips of different sizes).
        """
        super().__init__()
        if text_width is None:
            raise ConfigError("LatteT2V is conditioned on text; this text encoder gives class labels. Use t5, say.")
        width = spec.hidden_size
        self.spec = spec
        self.condition_dropout = spec.class_dropout_prob
        self.patch_size = spec.patch_size
        self.latent_size = whole_patches(latent_size, spec.patch_size, model="LatteT2V")
        frames, h, w = token_grid(self.latent_size, spec.patch_size)
        out_channels = latent_channels * (2 if spec.pred_sigma else 1)

        table = spatial_table(width, h, w, scale=spec.space_scale, base_size=math.isqrt(h * w))
        self.register_buffer("pos_embed", table[None])
        self.register_buffer("pos_embed_temporal", temporal_table(width, frames)[None])
        self.x_embedder = PatchEmbed3D(spec.patch_size, latent_channels, width)
        self.t_embedder = NumberEmbedder(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = CaptionEmbedder(text_width, width, text_length)
        self.spatial_blocks = nn.ModuleList(LatteT2VBlock(spec, temporal=False) for _ in range(spec.depth))
        self.temporal_blocks = nn.ModuleList(LatteT2VBlock(spec, temporal=True) for _ in range(spec.depth))
        self.final_layer = TableFinalLayer(width, torch.Size(spec.patch_size).numel() * out_channels)

        self._initialize()

    def forward(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """See `opensora.core.protocols.Denoiser`: [B, C, T, H, W] and [B] -> [B, C or 2C, T, H, W] float32.

        Raises:
            ShapeError: The latents are not of the size that this model was built for.
        """
        check_size(latents, self.latent_size)
        t = self.t_embedder(timestep)  # [B, D]
        t_blocks = self.t_block(t)[:, None, None]  # [B, 1, 1, 6D]
        text, text_mask = self.embed_text(conditioning)  # [B, L, D], [B, 1, 1, L]

        x = self.x_embedder(latents.to(self.x_embedder.proj.weight.dtype)) + self.pos_embed  # [B, T, S, D]
        for index, (spatial, temporal) in enumerate(zip(self.spatial_blocks, self.temporal_blocks, strict=True)):
            x = spatial(x, text, text_mask, t_blocks)
            if index == 0 and x.shape[1] > 1:  # the first temporal block is the first to be told the order of frames
                x = x + self.pos_embed_temporal[:, :, None]
            x = temporal(x, text, text_mask, t_blocks)
        x = self.final_layer(x, t, t, _ALL_DENOISED)
        return unpatchify(x, self.patch_size, self.latent_size).float()

    @remembered("y_embedder")
    def embed_text(self, conditioning: Conditioning) -> tuple[Tensor, Tensor | None]:
        """Text [B, L, D] with dropped captions replaced, and its mask [B, 1, 1, L]. The same at every sampling step."""
        text = self.y_embedder(required(conditioning, "text_embedding", "LatteT2V"), conditioning.dropped)
        return attended_text(text, conditioning.text_mask)

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn a checkpoint of Latte-1, which has diffusers' keys, into this model's keys and shapes.

        Position tables are this model's own, since they follow from its size.
        """
        tables = {"pos_embed": self.pos_embed, "pos_embed_temporal": self.pos_embed_temporal}
        return adapt_pixart(state, text_length=len(self.y_embedder.y_embedding)) | tables

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
        # Text and time have no influence at the start, and the output is zero.
        for block in self.spatial_blocks:
            nn.init.zeros_(block.get_parameter("cross_attn.proj.weight"))
        for block in self.temporal_blocks:
            nn.init.zeros_(block.get_parameter("attn.proj.weight"))
            nn.init.zeros_(block.get_parameter("mlp.fc2.weight"))
        nn.init.zeros_(self.final_layer.linear.weight)


LatteT2V_XL_2 = preset(LatteT2V, "LatteT2V_XL_2", depth=28, hidden_size=1152, patch_size=(1, 2, 2), num_heads=16)
