"""DiT, the diffusion transformer of Peebles and Xie (https://arxiv.org/abs/2212.09748), for images and short videos.

All tokens attend to each other, and each block is scaled, shifted and gated by a vector that says timestep and class (or
caption). A model has one size, for which its position tables are made.

Shapes: B batch, C latent channels, T H W latent frames and size (T again for token frames), S tokens a frame, N = T * S,
D width.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import torch
from attrs import Attribute, field, frozen
from attrs.validators import and_, ge, gt, in_, le
from torch import Tensor, nn

from opensora.core.components import preset
from opensora.core.conditioning import Conditioning
from opensora.core.errors import ConfigError
from opensora.core.interop import Interop
from opensora.core.protocols import Size
from opensora.core.sequence import SequencePlan
from opensora.models import _interop
from opensora.models._key_maps import adapt_dit
from opensora.models._layers.attention import SelfAttention
from opensora.models._layers.conditions import required
from opensora.models._layers.embedders import CaptionEmbedder, LabelEmbedder, NumberEmbedder
from opensora.models._layers.feed_forward import FeedForward
from opensora.models._layers.final_layers import FinalLayer
from opensora.models._layers.modulation import add_gated, modulated_norm
from opensora.models._layers.patches import PatchEmbed3D, token_grid, unpatchify
from opensora.models._layers.positions import spatial_table, temporal_table
from opensora.models._layers.sizes import check_size, whole_patches

__all__ = [
    "DiT",
    "DiTBlock",
    "DiTSpec",
    "DiT_B_2",
    "DiT_B_4",
    "DiT_B_8",
    "DiT_L_2",
    "DiT_L_4",
    "DiT_L_8",
    "DiT_S_2",
    "DiT_S_4",
    "DiT_S_8",
    "DiT_XL_2",
    "DiT_XL_2x2",
    "DiT_XL_4",
    "DiT_XL_8",
]


def _check_condition(_: object, attribute: Attribute[Any], value: str) -> None:
    if value != "text" and not re.fullmatch(r"label_[1-9]\d*", value):
        raise ConfigError(f'{attribute.name} must be "text" or "label_" and the number of classes, not "{value}".')


@frozen(kw_only=True)
class DiTSpec:
    """Options of `DiT`. The defaults are those of DiT-XL/2."""

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
    """Share of training samples whose class or caption is dropped, so that classifier-free guidance has an unconditional
    model. With 0 a model of class labels has no null class at all."""
    learn_sigma: bool = True
    """Predict variance values too, as the second half of the output channels."""
    condition: str = field(default="text", validator=_check_condition)
    """"text" for one pooled vector a caption (clip), "label_1000" for 1000 classes (text encoder "classes")."""
    no_temporal_pos_emb: bool = False
    """Leave out the position of a frame: for images. Latte has it all the same."""
    frequency_shift: int = field(default=0, validator=in_((0, 1)))
    """0: the timestep's frequencies are those of DiT's own code. 1: those that diffusers' DiTTransformer2DModel computes, for
    weights that were trained with it; they differ enough to change the output."""

    def __attrs_post_init__(self) -> None:
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ConfigError(
                f"hidden_size {self.hidden_size} must be a multiple of 4 and of num_heads ({self.num_heads})."
            )
        if min(self.patch_size) < 1 or self.patch_size[1] != self.patch_size[2]:
            raise ConfigError(f"patch_size {self.patch_size} must be three numbers of at least 1, the last two equal.")

    @property
    def num_classes(self) -> int | None:
        """None for text."""
        return None if self.condition == "text" else int(self.condition.removeprefix("label_"))


class DiTBlock(nn.Module):
    """Attention and feed-forward layer, both modulated by the conditioning vector (adaLN-Zero)."""

    def __init__(self, spec: DiTSpec) -> None:
        super().__init__()
        width = spec.hidden_size
        self.attn = SelfAttention(width, spec.num_heads)
        self.mlp = FeedForward(width, int(width * spec.mlp_ratio), width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """``x`` [B, N, D], ``c`` [B, D] -> like ``x``."""
        modulation = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)  # [B, 1, D] each
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        x = add_gated(x, gate_attn, self.attn(modulated_norm(x, shift_attn, scale_attn)))
        return add_gated(x, gate_mlp, self.mlp(modulated_norm(x, shift_mlp, scale_mlp)))


class DiT(nn.Module):
    """Predicts noise (and variance values) of square latents of one size from class labels or one text vector.

    Conditions it reads: labels, or text_embedding [B, 1, width]; dropped.
    """

    Spec: ClassVar[type] = DiTSpec
    interop: ClassVar[Interop] = _interop.DIT
    sequence_plan: ClassVar[SequencePlan] = SequencePlan(full=("blocks.*.attn",))
    title: ClassVar[str] = "DiT"
    """What messages call it."""
    pos_embed_spatial: Tensor
    pos_embed_temporal: Tensor

    def __init__(
        self,
        spec: DiTSpec,
        *,
        latent_channels: int,
        latent_size: Size | None,
        text_width: int | None,
        text_length: int | None = None,
    ) -> None:
        """``text_width`` and ``text_length`` are those of the text encoder; None for class labels.

        Raises:
            ConfigError: The text encoder is not of the kind that ``spec.condition`` names.
            ShapeError: ``latent_size`` is not square, not a multiple of the patch, or None (clips of different sizes).
        """
        super().__init__()
        _check_text_encoder(self.title, spec, text_width, text_length)
        latent_size = whole_patches(latent_size, spec.patch_size, model=self.title, square=True)
        self.spec = spec
        self.condition_dropout = spec.class_dropout_prob
        self.patch_size = spec.patch_size
        self.latent_size = latent_size
        frames, side, _ = token_grid(latent_size, spec.patch_size)
        width = spec.hidden_size
        out_channels = latent_channels * (2 if spec.learn_sigma else 1)

        self.x_embedder = PatchEmbed3D(spec.patch_size, latent_channels, width)
        self.register_buffer("pos_embed_spatial", spatial_table(width, side, side)[None])
        self.register_buffer("pos_embed_temporal", temporal_table(width, frames)[None])
        self.t_embedder = NumberEmbedder(width, frequency_shift=spec.frequency_shift)
        self.y_embedder: LabelEmbedder | CaptionEmbedder
        if text_width is None:
            self.y_embedder = LabelEmbedder(spec.num_classes or 0, width, has_null=spec.class_dropout_prob > 0)
        else:
            self.y_embedder = CaptionEmbedder(text_width, width, num_tokens=1)
        self.blocks = nn.ModuleList(self.build_block(index) for index in range(spec.depth))
        self.final_layer = FinalLayer(width, torch.Size(spec.patch_size).numel() * out_channels)

        self._initialize()

    def build_block(self, index: int) -> DiTBlock:
        """The block at that depth."""
        return DiTBlock(self.spec)

    def forward(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """See `opensora.core.protocols.Denoiser`: [B, C, T, H, W] and [B] -> [B, C or 2C, T, H, W] float32.

        Raises:
            ShapeError: The latents are not of the size that this model was built for.
        """
        x = self.embed_patches(latents)  # [B, T, S, D]
        c = self.t_embedder(timestep) + self.embed_condition(conditioning)  # [B, D]
        frames, tokens = x.shape[1:3]
        x = x.flatten(1, 2)  # [B, N, D]
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c).unflatten(1, (frames, tokens))
        return unpatchify(x, self.patch_size, self.latent_size).float()

    def embed_patches(self, latents: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, T, S, D], positions added."""
        x = self.embed_frames(latents)
        return x if self.spec.no_temporal_pos_emb else x + self.pos_embed_temporal[:, :, None]

    def embed_frames(self, latents: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, T, S, D], positions in the frame added."""
        check_size(latents, self.latent_size)
        return self.x_embedder(latents.to(self.x_embedder.proj.weight.dtype)) + self.pos_embed_spatial

    def embed_condition(self, conditioning: Conditioning) -> Tensor:
        """[B, D]."""
        if isinstance(self.y_embedder, LabelEmbedder):
            return self.y_embedder(required(conditioning, "labels", self.title), conditioning.dropped)
        return self.y_embedder(required(conditioning, "text_embedding", self.title), conditioning.dropped).squeeze(1)

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn a published checkpoint of DiT (or Latte) into this model's keys and shapes, whatever size it was trained at.

        Position tables are this model's own, since they follow from its size.
        """
        is_text = isinstance(self.y_embedder, CaptionEmbedder)
        tables = {"pos_embed_spatial": self.pos_embed_spatial, "pos_embed_temporal": self.pos_embed_temporal}
        return adapt_dit(state, text_length=1 if is_text else None) | tables

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.detach().flatten(1))
        nn.init.zeros_(self.x_embedder.get_parameter("proj.bias"))
        small = ["t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight"]
        if isinstance(self.y_embedder, CaptionEmbedder):
            small += ["y_embedder.y_proj.fc1.weight", "y_embedder.y_proj.fc2.weight"]
        for name in small:
            nn.init.normal_(self.get_parameter(name), std=0.02)
        # Each block starts as the identity, and the output as zero.
        for layer in (*self.blocks, self.final_layer):
            nn.init.zeros_(layer.get_parameter("adaLN_modulation.1.weight"))
        nn.init.zeros_(self.final_layer.linear.weight)


def _check_text_encoder(model: str, spec: DiTSpec, text_width: int | None, text_length: int | None) -> None:
    if spec.condition == "text" and text_width is None:
        raise ConfigError('model.condition is "text", but the text encoder gives class labels. Try "label_1000".')
    if spec.condition == "text" and text_length not in (None, 1):
        raise ConfigError(
            f"{model} takes one vector a caption; this text encoder gives {text_length} tokens. Use STDiT3 for such text."
        )
    if spec.condition != "text" and text_width is not None:
        raise ConfigError(f'model.condition is "{spec.condition}", but the text encoder gives text. Use "classes".')


DiT_XL_2 = preset(DiT, "DiT_XL_2", depth=28, hidden_size=1152, patch_size=(1, 2, 2), num_heads=16)
DiT_XL_2x2 = preset(DiT, "DiT_XL_2x2", depth=28, hidden_size=1152, patch_size=(2, 2, 2), num_heads=16)
DiT_XL_4 = preset(DiT, "DiT_XL_4", depth=28, hidden_size=1152, patch_size=(1, 4, 4), num_heads=16)
DiT_XL_8 = preset(DiT, "DiT_XL_8", depth=28, hidden_size=1152, patch_size=(1, 8, 8), num_heads=16)
DiT_L_2 = preset(DiT, "DiT_L_2", depth=24, hidden_size=1024, patch_size=(1, 2, 2), num_heads=16)
DiT_L_4 = preset(DiT, "DiT_L_4", depth=24, hidden_size=1024, patch_size=(1, 4, 4), num_heads=16)
DiT_L_8 = preset(DiT, "DiT_L_8", depth=24, hidden_size=1024, patch_size=(1, 8, 8), num_heads=16)
DiT_B_2 = preset(DiT, "DiT_B_2", depth=12, hidden_size=768, patch_size=(1, 2, 2), num_heads=12)
DiT_B_4 = preset(DiT, "DiT_B_4", depth=12, hidden_size=768, patch_size=(1, 4, 4), num_heads=12)
DiT_B_8 = preset(DiT, "DiT_B_8", depth=12, hidden_size=768, patch_size=(1, 8, 8), num_heads=12)
DiT_S_2 = preset(DiT, "DiT_S_2", depth=12, hidden_size=384, patch_size=(1, 2, 2), num_heads=6)
DiT_S_4 = preset(DiT, "DiT_S_4", depth=12, hidden_size=384, patch_size=(1, 4, 4), num_heads=6)
DiT_S_8 = preset(DiT, "DiT_S_8", depth=12, hidden_size=384, patch_size=(1, 8, 8), num_heads=6)
