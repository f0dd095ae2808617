"""STDiT, the spatial-temporal diffusion transformer of Open-Sora 1.0 (its report: docs/report_01.md upstream).

A PixArt-alpha (https://arxiv.org/abs/2310.00426) whose blocks have a second attention, along time, that starts as nothing.
A model has one size, for which its position tables are made.

Shapes: B batch, C latent channels, T H W latent frames and size (T again for token frames), S tokens a frame, L text tokens,
D width.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from attrs import field, frozen
from attrs.validators import and_, ge, gt, in_, le, lt
from torch import Tensor, nn

from opensora.core.components import preset
from opensora.core.conditioning import Conditioning
from opensora.core.errors import ConfigError
from opensora.core.interop import Interop
from opensora.core.protocols import Size
from opensora.core.sequence import SequencePlan
from opensora.models import _interop
from opensora.models._key_maps import adapt_stdit
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

__all__ = ["STDiT", "STDiTBlock", "STDiTSpec", "STDiT_XL_2"]


@frozen(kw_only=True)
class STDiTSpec:
    """Options of `STDiT`. The defaults are those of STDiT-XL/2."""

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
    space_scale: float = field(default=1.0, validator=gt(0))
    """Tokens to a position unit, along height and width. The published weights: 0.5 at 256x256, 1 at 512x512."""
    time_scale: float = field(default=1.0, validator=gt(0))
    """Token frames to a position unit. The published weights: 1 for 16 frames, 2/3 for 64."""
    freeze: Literal["not_temporal", "text"] | None = field(default=None, validator=in_(("not_temporal", "text", None)))
    """"not_temporal" trains the temporal attention alone, "text" keeps the attention to the text as it is."""

    def __attrs_post_init__(self) -> None:
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ConfigError(
                f"hidden_size {self.hidden_size} must be a multiple of 4 and of num_heads ({self.num_heads})."
            )
        if min(self.patch_size) < 1:
            raise ConfigError(f"patch_size {self.patch_size} must be three numbers of at least 1.")


class STDiTBlock(nn.Module):
    """Attention in a frame, attention along time, attention to the text, feed-forward layer."""

    def __init__(self, spec: STDiTSpec, *, drop_path: float) -> None:
        super().__init__()
        width = spec.hidden_size
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.attn = SelfAttention(width, spec.num_heads)
        self.cross_attn = CrossAttention(width, spec.num_heads)
        self.mlp = FeedForward(width, int(width * spec.mlp_ratio), width)
        self.attn_temp = SelfAttention(width, spec.num_heads)
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        text_mask: Tensor | None,
        t: Tensor,
        t_gate: Tensor,
        positions: Tensor | None = None,
    ) -> Tensor:
        """One block.

        Args:
            x: [B, T, S, D]; the result is like it.
            text: [B, L, D].
            text_mask: [B, 1, 1, L].
            t: [B, T or 1, 1, 6D].
            t_gate: [B, 1, 1, D], the gate's part of the timestep. The temporal attention has it in given frames too.
            positions: [T, 1, D], added to what the temporal attention sees.
        """
        modulation = (self.scale_shift_table.flatten() + t).chunk(6, dim=-1)  # [B, T or 1, 1, D] each
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation

        y = self.attn(modulated_norm(x, shift_attn, scale_attn))
        x = add_gated(x, self.drop_path(gate_attn), y)

        y = x if positions is None else x + positions  # neither normed nor modulated
        y = self.attn_temp(y.transpose(1, 2)).transpose(1, 2)
        x = add_gated(x, self.drop_path(self.scale_shift_table[2] + t_gate), y)

        x = x + self.cross_attn(x, text, text_mask)

        y = self.mlp(modulated_norm(x, shift_mlp, scale_mlp))
        return add_gated(x, self.drop_path(gate_mlp), y)


class STDiT(nn.Module):
    """Predicts noise (and variance values) of latent videos of one size from text.

    Conditions it reads: text_embedding, text_mask, dropped, frame_mask.
    """

    Spec: ClassVar[type] = STDiTSpec
    interop: ClassVar[Interop] = _interop.STDIT
    sequence_plan: ClassVar[SequencePlan] = SequencePlan(spatial=("blocks.*.attn",))
    pos_embed: Tensor
    pos_embed_temporal: Tensor

    def __init__(
        self,
        spec: STDiTSpec,
        *,
        latent_channels: int,
        latent_size: Size | None,
        text_width: int | None,
        text_length: int,
    ) -> None:
        """``text_width`` and ``text_length`` are those of the text encoder.

        Raises:
            ConfigError: The text encoder gives class labels (``text_width`` is None).
            ShapeError: ``latent_size`` is not a multiple of the patch, or None (clips of different sizes).
        """
        super().__init__()
        if text_width is None:
            raise ConfigError("STDiT is conditioned on text; this text encoder gives class labels. Use t5, say.")
        latent_size = whole_patches(latent_size, spec.patch_size, model="STDiT", instead="STDiT2 or STDiT3")
        width = spec.hidden_size
        self.spec = spec
        self.condition_dropout = spec.class_dropout_prob
        self.patch_size = spec.patch_size
        self.latent_size = latent_size
        frames, h, w = token_grid(latent_size, spec.patch_size)
        out_channels = latent_channels * (2 if spec.pred_sigma else 1)

        self.register_buffer("pos_embed", spatial_table(width, h, w, scale=spec.space_scale)[None])
        self.register_buffer("pos_embed_temporal", temporal_table(width, frames, scale=spec.time_scale)[None])
        self.x_embedder = PatchEmbed3D(spec.patch_size, latent_channels, width)
        self.t_embedder = NumberEmbedder(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = CaptionEmbedder(text_width, width, text_length)
        rates = torch.linspace(0, spec.drop_path, spec.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(STDiTBlock(spec, drop_path=rate) for rate in rates)
        self.final_layer = TableFinalLayer(width, torch.Size(spec.patch_size).numel() * out_channels)

        self._initialize()
        self._freeze()

    def forward(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """See `opensora.core.protocols.Denoiser`: [B, C, T, H, W] and [B] -> [B, C or 2C, T, H, W] float32.

        Raises:
            ShapeError: The latents are not of the size that this model was built for.
        """
        choose = FrameChoice(conditioning.frame_mask, self.patch_size[0])
        t, t_given = self.t_embedder(timestep), self.t_embedder(torch.zeros_like(timestep))  # [B, D] each
        t_denoised = self.project_timestep(t)
        t_blocks = choose(t_denoised, lambda: self.project_timestep(t_given))  # [B, T or 1, 1, 6D]
        t_gate = t_denoised.chunk(6, dim=-1)[2]  # [B, 1, 1, D]
        text, text_mask = self.embed_text(conditioning)  # [B, L, D], [B, 1, 1, L]

        x = self.embed_patches(latents)  # [B, T, S, D]
        positions = self.pos_embed_temporal[0][:, None]  # [T, 1, D]
        for index, block in enumerate(self.blocks):
            x = block(x, text, text_mask, t_blocks, t_gate, positions if index == 0 else None)
        x = self.final_layer(x, t, t_given, choose)
        return unpatchify(x, self.patch_size, self.latent_size).float()

    def project_timestep(self, t: Tensor) -> Tensor:
        """[B, D] -> [B, 1, 1, 6D]: shifts, scales and gates that all blocks share, before each adds its own table."""
        return self.t_block(t)[:, None, None]

    @remembered("y_embedder")
    def embed_text(self, conditioning: Conditioning) -> tuple[Tensor, Tensor | None]:
        """Text [B, L, D] with dropped captions replaced, and its mask [B, 1, 1, L]. The same at every sampling step."""
        text = self.y_embedder(required(conditioning, "text_embedding", "STDiT"), conditioning.dropped)
        return attended_text(text, conditioning.text_mask)

    def embed_patches(self, latents: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, T, S, D], positions in the frame added."""
        check_size(latents, self.latent_size)
        return self.x_embedder(latents.to(self.x_embedder.proj.weight.dtype)) + self.pos_embed

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn a published checkpoint (STDiT, or PixArt-alpha to start from) into this model's keys and shapes.

        Position tables are this model's own, since they follow from its size and scales. PixArt-alpha has no temporal
        attention: that keeps its initial weights, with which each frame comes out as the image model would make it.
        """
        tables = {"pos_embed": self.pos_embed, "pos_embed_temporal": self.pos_embed_temporal}
        return adapt_stdit(state, text_length=len(self.y_embedder.y_embedding)) | tables

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
        for block in self.blocks:
            for name in ("attn_temp.proj.weight", "cross_attn.proj.weight"):
                nn.init.zeros_(block.get_parameter(name))
        nn.init.zeros_(self.final_layer.linear.weight)

    def _freeze(self) -> None:
        for name, parameter in self.named_parameters():
            if self.spec.freeze == "not_temporal":
                parameter.requires_grad_("attn_temp" in name)
            elif self.spec.freeze == "text" and "cross_attn" in name:
                parameter.requires_grad_(False)


STDiT_XL_2 = preset(STDiT, "STDiT_XL_2", depth=28, hidden_size=1152, patch_size=(1, 2, 2), num_heads=16)
