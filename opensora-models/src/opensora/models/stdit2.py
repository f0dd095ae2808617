"""STDiT-2, the spatial-temporal diffusion transformer of Open-Sora 1.1 (its report: docs/report_02.md upstream).

Any number of frames and any size: positions are sines in space, scaled to the size of the video, and rotations in time. Size
and aspect ratio modulate the spatial half of a block, length and frame rate its temporal half.

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
from opensora.models._layers.positions import RotaryEmbedding, grid_coordinates, sincos_2d
from opensora.models._layers.remembered import remembered

__all__ = ["STDiT2", "STDiT2Block", "STDiT2Spec", "STDiT2_XL_2"]


@frozen(kw_only=True)
class STDiT2Spec:
    """Options of `STDiT2`. The defaults are those of STDiT2-XL/2.

    The published weights of Open-Sora 1.1 need input_sq_size = 512, qk_norm and qk_norm_legacy.
    """

    input_sq_size: int = field(default=32, validator=gt(0))
    """Side of a square video, in pixels, whose tokens are one position unit apart; larger videos are denser."""
    patch_size: tuple[int, int, int] = (1, 2, 2)
    """Latent frames, height and width that make one token. Sizes that don't divide are padded and cropped."""
    hidden_size: int = field(default=1152, validator=gt(0))
    """Width of the blocks; a multiple of 12 and of twice the number of heads."""
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
    qk_norm: bool = False
    """Normalise queries and keys, which keeps training stable in half precision."""
    qk_norm_legacy: bool = False
    """Normalise them after the rotation by position, as the weights of Open-Sora 1.1 were trained, not before it."""
    freeze: Literal["not_temporal", "text"] | None = field(default=None, validator=in_(("not_temporal", "text", None)))
    """"not_temporal" trains the temporal attention alone, "text" keeps the attention to the text as it is."""

    def __attrs_post_init__(self) -> None:
        if self.hidden_size % (2 * self.num_heads) or self.hidden_size % 12:
            raise ConfigError(
                f"hidden_size {self.hidden_size} must be a multiple of 12 and of twice num_heads ({2 * self.num_heads})."
            )
        if min(self.patch_size) < 1:
            raise ConfigError(f"patch_size {self.patch_size} must be three numbers of at least 1.")


class STDiT2Block(nn.Module):
    """Attention in a frame, attention along time, attention to the text, feed-forward layer."""

    def __init__(self, spec: STDiT2Spec, *, drop_path: float) -> None:
        super().__init__()
        width, heads, rotate_first = spec.hidden_size, spec.num_heads, spec.qk_norm_legacy
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.scale_shift_table_temporal = nn.Parameter(torch.randn(3, width) / width**0.5)
        self.attn = SelfAttention(width, heads, qk_norm=spec.qk_norm)
        self.attn_temp = SelfAttention(width, heads, qk_norm=spec.qk_norm, rotate_first=rotate_first)
        self.cross_attn = CrossAttention(width, heads)
        self.mlp = FeedForward(width, int(width * spec.mlp_ratio), width)
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        text_mask: Tensor | None,
        t_spatial: Tensor,
        t_temporal: Tensor,
        rotations: Tensor,
    ) -> Tensor:
        """One block.

        Args:
            x: [B, T, S, D]; the result is like it.
            text: [B, L, D].
            text_mask: [B, 1, 1, L].
            t_spatial: [B, T or 1, 1, 6D].
            t_temporal: [B, T or 1, 1, 3D].
            rotations: Of queries and keys along time, see `RotaryEmbedding`.
        """
        modulation = (self.scale_shift_table.flatten() + t_spatial).chunk(6, dim=-1)  # [B, T or 1, 1, D] each
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        shift_temp, scale_temp, gate_temp = (self.scale_shift_table_temporal.flatten() + t_temporal).chunk(3, dim=-1)

        y = self.attn(modulated_norm(x, shift_attn, scale_attn))
        x = add_gated(x, self.drop_path(gate_attn), y)

        y = modulated_norm(x, shift_temp, scale_temp)
        y = self.attn_temp(y.transpose(1, 2), rotations).transpose(1, 2)
        x = add_gated(x, self.drop_path(gate_temp), y)

        x = x + self.cross_attn(x, text, text_mask)

        y = self.mlp(modulated_norm(x, shift_mlp, scale_mlp))
        return add_gated(x, self.drop_path(gate_mlp), y)


class STDiT2(nn.Module):
    """Predicts noise (and variance values) of a latent video of any size from text, size, length and frame rate.

    Conditions it reads: text_embedding, text_mask, dropped, frame_mask, num_frames, height, width, aspect_ratio, fps. The
    scale of positions follows from height and width of the first sample, since a batch has one size.
    """

    Spec: ClassVar[type] = STDiT2Spec
    interop: ClassVar[Interop] = _interop.STDIT2
    sequence_plan: ClassVar[SequencePlan] = SequencePlan(spatial=("blocks.*.attn",))

    def __init__(self, spec: STDiT2Spec, *, latent_channels: int, text_width: int | None, text_length: int) -> None:
        """``text_width`` and ``text_length`` are those of the text encoder.

        Raises:
            ConfigError: The text encoder gives class labels (``text_width`` is None).
        """
        super().__init__()
        if text_width is None:
            raise ConfigError("STDiT2 is conditioned on text; this text encoder gives class labels. Use t5, say.")
        width = spec.hidden_size
        self.spec = spec
        self.condition_dropout = spec.class_dropout_prob
        self.patch_size = spec.patch_size
        out_channels = latent_channels * (2 if spec.pred_sigma else 1)

        self.x_embedder = PatchEmbed3D(spec.patch_size, latent_channels, width)
        self.rope = RotaryEmbedding(width // spec.num_heads)
        self.t_embedder = NumberEmbedder(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.t_block_temp = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))
        self.csize_embedder = NumberEmbedder(width // 3)
        self.ar_embedder = NumberEmbedder(width // 3)
        self.fl_embedder = NumberEmbedder(width)
        self.fps_embedder = NumberEmbedder(width)
        self.y_embedder = CaptionEmbedder(text_width, width, text_length)
        rates = torch.linspace(0, spec.drop_path, spec.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(STDiT2Block(spec, drop_path=rate) for rate in rates)
        self.final_layer = TableFinalLayer(width, torch.Size(spec.patch_size).numel() * out_channels)

        self._initialize()
        self._freeze()

    def forward(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """See `opensora.core.protocols.Denoiser`: [B, C, T, H, W] and [B] -> [B, C or 2C, T, H, W] float32."""
        choose = FrameChoice(conditioning.frame_mask, self.patch_size[0])
        t, t_given = self.t_embedder(timestep), self.t_embedder(torch.zeros_like(timestep))  # [B, D] each
        size, rate = self.embed_size(conditioning), self.embed_rate(conditioning)  # [B, D] each
        t_spatial = choose(self.project_spatial(t + size), lambda: self.project_spatial(t_given + size))
        t_temporal = choose(self.project_temporal(t + rate), lambda: self.project_temporal(t_given + rate))
        text, text_mask = self.embed_text(conditioning)  # [B, L, D], [B, 1, 1, L]

        x = self.embed_patches(latents, conditioning)  # [B, T, S, D]
        rotations = self.rope(x.shape[1])
        for block in self.blocks:
            x = block(x, text, text_mask, t_spatial, t_temporal, rotations)
        # Given frames are told their size here and others are not: so were the published weights trained.
        x = self.final_layer(x, t, t_given + size, choose)
        return unpatchify(x, self.patch_size, latents.shape[2:]).float()

    def project_spatial(self, t: Tensor) -> Tensor:
        """[B, D] -> [B, 1, 1, 6D]: shifts, scales and gates that all blocks share, before each adds its own table."""
        return self.t_block(t)[:, None, None]

    def project_temporal(self, t: Tensor) -> Tensor:
        """[B, D] -> [B, 1, 1, 3D], the same for the attention along time."""
        return self.t_block_temp(t)[:, None, None]

    def embed_size(self, conditioning: Conditioning) -> Tensor:
        """Height, width and aspect ratio: [B, D], a third of the channels each."""
        height, width, ratio = (required(conditioning, name, "STDiT2") for name in ("height", "width", "aspect_ratio"))
        return torch.cat([self.csize_embedder(height), self.csize_embedder(width), self.ar_embedder(ratio)], dim=-1)

    def embed_rate(self, conditioning: Conditioning) -> Tensor:
        """Number of frames and frame rate: [B, D]."""
        num_frames, fps = (required(conditioning, name, "STDiT2") for name in ("num_frames", "fps"))
        return self.fl_embedder(num_frames) + self.fps_embedder(fps)

    @remembered("y_embedder")
    def embed_text(self, conditioning: Conditioning) -> tuple[Tensor, Tensor | None]:
        """Text [B, L, D] with dropped captions replaced, and its mask [B, 1, 1, L]. The same at every sampling step."""
        text = self.y_embedder(required(conditioning, "text_embedding", "STDiT2"), conditioning.dropped)
        return attended_text(text, conditioning.text_mask)

    def embed_patches(self, latents: Tensor, conditioning: Conditioning) -> Tensor:
        """[B, C, T, H, W] -> [B, T, S, D], positions added."""
        x = self.x_embedder(latents.to(self.x_embedder.proj.weight.dtype))
        height, width = (required(conditioning, name, "STDiT2")[0].float() for name in ("height", "width"))
        scale = (height * width).sqrt() / self.spec.input_sq_size
        _, h, w = token_grid(latents.shape[2:], self.patch_size)
        base_size = round((h * w) ** 0.5)
        rows = grid_coordinates(h, scale=scale, base_size=base_size, device=x.device)
        columns = grid_coordinates(w, scale=scale, base_size=base_size, device=x.device)
        return x + sincos_2d(x.shape[-1], rows, columns).to(x.dtype)

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn a published checkpoint (STDiT2, or PixArt-alpha to start from) into this model's keys and shapes.

        What PixArt-alpha lacks (attention along time, embedders of sizes) keeps its initial weights, with which frames don't
        see each other.
        """
        return adapt_stdit(state, text_length=len(self.y_embedder.y_embedding))

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.detach().flatten(1))
        small = ("t_embedder.mlp.0", "t_embedder.mlp.2", "t_block.1", "t_block_temp.1", "y_embedder.y_proj.fc1",
                 "y_embedder.y_proj.fc2")  # fmt: skip
        for name in small:
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


STDiT2_XL_2 = preset(STDiT2, "STDiT2_XL_2", depth=28, hidden_size=1152, patch_size=(1, 2, 2), num_heads=16)
