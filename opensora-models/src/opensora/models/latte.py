"""Latte, the latent diffusion transformer for video of Ma et al. (https://arxiv.org/abs/2401.03048), its variant 1.

A DiT whose blocks attend in turns along the positions of a frame and along the frames of a position. Weights, options and
conditions are DiT's.

Shapes: B batch, C latent channels, T H W latent frames and size (T again for token frames), S tokens a frame, N = T * S,
D width.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from opensora.core.components import preset
from opensora.core.conditioning import Conditioning
from opensora.core.interop import Interop
from opensora.core.sequence import SequencePlan
from opensora.models import _interop
from opensora.models._layers.modulation import add_gated, modulated_norm
from opensora.models._layers.patches import unpatchify
from opensora.models.dit import DiT, DiTBlock, DiTSpec

__all__ = ["Latte", "LatteBlock", "Latte_XL_2", "Latte_XL_2x2"]


class LatteBlock(DiTBlock):
    """DiT's block, with attention along one axis."""

    def __init__(self, spec: DiTSpec, *, temporal: bool) -> None:
        super().__init__(spec)
        self.temporal = temporal

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """``x`` [B, T, S, D], ``c`` [B, D] -> like ``x``."""
        modulation = self.adaLN_modulation(c)[:, None, None].chunk(6, dim=-1)  # [B, 1, 1, D] each
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation

        y = modulated_norm(x, shift_attn, scale_attn)
        y = self.attn(y.transpose(1, 2)).transpose(1, 2) if self.temporal else self.attn(y)
        x = add_gated(x, gate_attn, y)

        return add_gated(x, gate_mlp, self.mlp(modulated_norm(x, shift_mlp, scale_mlp)))


class Latte(DiT):
    """Predicts noise (and variance values) of square latent videos of one size from class labels or one text vector.

    Conditions it reads: labels, or text_embedding [B, 1, width]; dropped.
    """

    title: ClassVar[str] = "Latte"
    interop: ClassVar[Interop] = _interop.LATTE
    sequence_plan: ClassVar[SequencePlan] = SequencePlan(spatial=("blocks.*[02468].attn",))  # of every second block

    def build_block(self, index: int) -> LatteBlock:
        """Every second block is temporal."""
        return LatteBlock(self.spec, temporal=index % 2 == 1)

    def forward(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """See `opensora.core.protocols.Denoiser`: [B, C, T, H, W] and [B] -> [B, C or 2C, T, H, W] float32.

        Raises:
            ShapeError: The latents are not of the size that this model was built for.
        """
        x = self.embed_frames(latents)  # [B, T, S, D]
        c = self.t_embedder(timestep) + self.embed_condition(conditioning)  # [B, D]
        for index, block in enumerate(self.blocks):
            if index == 1:  # the first temporal block is the first to be told the order of frames
                x = x + self.pos_embed_temporal[:, :, None]
            x = block(x, c)
        x = self.final_layer(x, c)
        return unpatchify(x, self.patch_size, self.latent_size).float()


Latte_XL_2 = preset(Latte, "Latte_XL_2", depth=28, hidden_size=1152, patch_size=(1, 2, 2), num_heads=16)
Latte_XL_2x2 = preset(Latte, "Latte_XL_2x2", depth=28, hidden_size=1152, patch_size=(2, 2, 2), num_heads=16)
