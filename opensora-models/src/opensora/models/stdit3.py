"""STDiT-3, the spatial-temporal diffusion transformer of Open-Sora 1.2 (its report: docs/report_03.md upstream).

Blocks attend along the positions of a frame and along the frames of a position in turns, and each block attends to the text.
Any number of frames and any size: positions are sines in space, scaled to the size of the video, and rotations in time.

Shapes: B batch, C latent channels, T H W latent frames and size (T again for token frames), S tokens a frame, L text tokens,
D width.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from attrs import field, frozen
from attrs.validators import and_, ge, gt, le, lt
from torch import Tensor, nn

from opensora.core.components import preset
from opensora.core.conditioning import Conditioning
from opensora.core.errors import ConfigError, ShapeError
from opensora.core.interop import Interop
from opensora.core.sequence import SequencePlan
from opensora.models import _interop
from opensora.models._key_maps import adapt_stdit3
from opensora.models._layers.attention import CrossAttention, SelfAttention, attended_text
from opensora.models._layers.conditions import required
from opensora.models._layers.embedders import CaptionEmbedder, NumberEmbedder, replace_dropped
from opensora.models._layers.feed_forward import FeedForward
from opensora.models._layers.final_layers import TableFinalLayer
from opensora.models._layers.modulation import DropPath, FrameChoice, add_gated, modulated_norm
from opensora.models._layers.patches import PatchEmbed3D, token_grid, unpatchify
from opensora.models._layers.positions import RotaryEmbedding, grid_coordinates, sincos_2d
from opensora.models._layers.remembered import remembered

__all__ = ["STDiT3", "STDiT3Block", "STDiT3Spec", "STDiT3_3B_2", "STDiT3_XL_2"]


@frozen(kw_only=True)
class STDiT3Spec:
    """Options of `STDiT3`. The defaults are those of STDiT3-XL/2."""

    input_sq_size: int = field(default=512, validator=gt(0))
    """Side of a square video, in pixels, whose tokens are one position unit apart; larger videos are denser."""
    patch_size: tuple[int, int, int] = (1, 2, 2)
    """Latent frames, height and width that make one token. Sizes that don't divide are padded and cropped."""
    hidden_size: int = field(default=1152, validator=gt(0))
    """Width of the blocks; a multiple of 4 and of twice the number of heads."""
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
    drop_path: float = field(default=0.0, validator=and_(ge(0.0), lt(1.0)))
    """Probability of leaving out a branch of the last block in training, linear from 0 at the first. Drawn from torch's
    global generator, which the training loop seeds anew at each step."""
    qk_norm: bool = True
    """Normalise queries and keys, which keeps training stable in half precision."""
    only_train_temporal: bool = False
    """Freeze everything but the temporal blocks."""
    freeze_y_embedder: bool = False
    """Freeze the caption embedder."""
    skip_y_embedder: bool = False
    """The text embedding has been through the caption embedder already (precomputed features). Set freeze_y_embedder too."""

    def __attrs_post_init__(self) -> None:
        if self.hidden_size % (2 * self.num_heads) or self.hidden_size % 4:
            raise ConfigError(
                f"hidden_size {self.hidden_size} must be a multiple of 4 and of twice num_heads ({2 * self.num_heads})."
            )
        if min(self.patch_size) < 1:
            raise ConfigError(f"patch_size {self.patch_size} must be three numbers of at least 1.")


class STDiT3Block(nn.Module):
    """Attention along one axis, attention to the text, feed-forward layer."""

    def __init__(self, spec: STDiT3Spec, *, temporal: bool, drop_path: float) -> None:
        super().__init__()
        width = spec.hidden_size
        self.temporal = temporal
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        self.attn = SelfAttention(width, spec.num_heads, qk_norm=spec.qk_norm)
        self.cross_attn = CrossAttention(width, spec.num_heads)
        self.mlp = FeedForward(width, int(width * spec.mlp_ratio), width)
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: Tensor, text: Tensor, text_mask: Tensor | None, t: Tensor, rotations: Tensor | None = None
    ) -> Tensor:
        """``x`` [B, T, S, D], ``text`` [B, L, D], ``text_mask`` [B, 1, 1, L], ``t`` [B, T or 1, 1, 6D] -> like ``x``."""
        modulation = (self.scale_shift_table.flatten() + t).chunk(6, dim=-1)  # [B, T or 1, 1, D] each
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation

        y = modulated_norm(x, shift_attn, scale_attn)
        y = self.attn(y.transpose(1, 2), rotations).transpose(1, 2) if self.temporal else self.attn(y)
        x = add_gated(x, self.drop_path(gate_attn), y)

        x = x + self.cross_attn(x, text, text_mask)

        y = self.mlp(modulated_norm(x, shift_mlp, scale_mlp))
        return add_gated(x, self.drop_path(gate_mlp), y)


class STDiT3(nn.Module):
    """Predicts velocity (and variance values) of a latent video of any size from text, frame rate and size.

    Conditions it reads: text_embedding, text_mask, dropped, frame_mask, fps, height, width. Height and width are those of the
    first sample, since a batch has one size.
    """

    Spec: ClassVar[type] = STDiT3Spec
    interop: ClassVar[Interop] = _interop.STDIT3
    sequence_plan: ClassVar[SequencePlan] = SequencePlan(
        blocks=("spatial_blocks", "temporal_blocks"), spatial=("spatial_blocks.*.attn",)
    )

    def __init__(self, spec: STDiT3Spec, *, latent_channels: int, text_width: int | None, text_length: int) -> None:
        """``text_width`` and ``text_length`` are those of the text encoder.

        Raises:
            ConfigError: The text encoder gives class labels (``text_width`` is None).
        """
        super().__init__()
        if text_width is None:
            raise ConfigError("STDiT3 is conditioned on text; this text encoder gives class labels. Use t5, say.")
        width = spec.hidden_size
        self.spec = spec
        self.condition_dropout = spec.class_dropout_prob
        self.patch_size = spec.patch_size
        self.out_channels = latent_channels * (2 if spec.pred_sigma else 1)

        self.x_embedder = PatchEmbed3D(spec.patch_size, latent_channels, width)
        self.rope = RotaryEmbedding(width // spec.num_heads)
        self.t_embedder = NumberEmbedder(width)
        self.fps_embedder = NumberEmbedder(width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = CaptionEmbedder(text_width, width, text_length)
        rates = torch.linspace(0, spec.drop_path, spec.depth, device="cpu").tolist()
        self.spatial_blocks = nn.ModuleList(STDiT3Block(spec, temporal=False, drop_path=rate) for rate in rates)
        self.temporal_blocks = nn.ModuleList(STDiT3Block(spec, temporal=True, drop_path=rate) for rate in rates)
        self.final_layer = TableFinalLayer(width, torch.Size(spec.patch_size).numel() * self.out_channels)

        self._initialize()
        self._freeze()

    def forward(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """See `opensora.core.protocols.Denoiser`: [B, C, T, H, W] and [B] -> [B, C or 2C, T, H, W] float32."""
        choose = FrameChoice(conditioning.frame_mask, self.patch_size[0])
        t, t_given = self.embed_timestep(timestep, conditioning)  # [B, D] each
        t_blocks = choose(self.project_timestep(t), lambda: self.project_timestep(t_given))  # [B, T or 1, 1, 6D]
        text, text_mask = self.embed_text(conditioning)  # [B, L, D], [B, 1, 1, L]

        x = self.embed_patches(latents, conditioning)  # [B, T, S, D]
        rotations = self.rope(x.shape[1])
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            x = spatial(x, text, text_mask, t_blocks)
            x = temporal(x, text, text_mask, t_blocks, rotations)
        x = self.final_layer(x, t, t_given, choose)
        return unpatchify(x, self.patch_size, latents.shape[2:]).float()

    def embed_timestep(self, timestep: Tensor, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        """Of the timestep [B], and of timestep 0 for frames that are given; both with the frame rate: [B, D] each."""
        fps = self.fps_embedder(required(conditioning, "fps", "STDiT3"))
        return self.t_embedder(timestep) + fps, self.t_embedder(torch.zeros_like(timestep)) + fps

    def project_timestep(self, t: Tensor) -> Tensor:
        """[B, D] -> [B, 1, 1, 6D]: shifts, scales and gates that all blocks share, before each adds its own table."""
        return self.t_block(t)[:, None, None]

    @remembered("y_embedder")
    def embed_text(self, conditioning: Conditioning) -> tuple[Tensor, Tensor | None]:
        """Text [B, L, D] with dropped captions replaced, and its mask [B, 1, 1, L]. The same at every sampling step."""
        embedding = required(conditioning, "text_embedding", "STDiT3")
        if not self.spec.skip_y_embedder:
            text = self.y_embedder(embedding, conditioning.dropped)
        elif embedding.shape[-1] == self.spec.hidden_size:
            text = embedding.to(self.x_embedder.proj.weight.dtype)
            if conditioning.dropped is not None:
                text = replace_dropped(text, self.y_embedder.null(), conditioning.dropped)
        else:
            raise ShapeError(
                f"With skip_y_embedder the text embedding must have the model's width {self.spec.hidden_size}; "
                f"it has {embedding.shape[-1]}."
            )
        return attended_text(text, conditioning.text_mask)

    def embed_patches(self, latents: Tensor, conditioning: Conditioning) -> Tensor:
        """[B, C, T, H, W] -> [B, T, S, D], positions added."""
        x = self.x_embedder(latents.to(self.x_embedder.proj.weight.dtype))
        height, width = (required(conditioning, name, "STDiT3")[0].float() for name in ("height", "width"))
        scale = (height * width).sqrt() / self.spec.input_sq_size
        _, h, w = token_grid(latents.shape[2:], self.patch_size)
        base_size = round((h * w) ** 0.5)
        rows = grid_coordinates(h, scale=scale, base_size=base_size, device=x.device)
        columns = grid_coordinates(w, scale=scale, base_size=base_size, device=x.device)
        return x + sincos_2d(x.shape[-1], rows, columns).to(x.dtype)

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn a published checkpoint (STDiT3, or PixArt-Sigma to start from) into this model's keys and shapes."""
        return adapt_stdit3(state, text_length=len(self.y_embedder.y_embedding))

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.fps_embedder.get_parameter("mlp.0.weight"), std=0.02)
        nn.init.zeros_(self.fps_embedder.get_parameter("mlp.2.weight"))
        # Temporal blocks start as nothing, so that an image model can be trained on into a video model.
        for block in self.temporal_blocks:
            for name in ("attn.proj.weight", "cross_attn.proj.weight", "mlp.fc2.weight"):
                nn.init.zeros_(block.get_parameter(name))

    def _freeze(self) -> None:
        if self.spec.only_train_temporal:
            self.requires_grad_(False)
            self.temporal_blocks.requires_grad_(True)
        if self.spec.freeze_y_embedder:
            self.y_embedder.requires_grad_(False)


STDiT3_XL_2 = preset(STDiT3, "STDiT3_XL_2", depth=28, hidden_size=1152, patch_size=(1, 2, 2), num_heads=16)
STDiT3_3B_2 = preset(STDiT3, "STDiT3_3B_2", depth=28, hidden_size=1872, patch_size=(1, 2, 2), num_heads=26)
