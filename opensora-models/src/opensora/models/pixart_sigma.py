"""PixArt-Sigma, the diffusion transformer of Chen et al. (https://arxiv.org/abs/2403.04692), for images up to 4K.

PixArt-alpha for any size, with longer captions, and optionally with norms of queries and keys and with attention to a coarser
image in some layers.

Shapes: as in `opensora.models.pixart`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from attrs import field, frozen
from attrs.validators import ge, in_
from torch import Tensor

from opensora.core.components import preset
from opensora.core.errors import ConfigError
from opensora.core.interop import Interop
from opensora.core.protocols import Size
from opensora.core.sequence import SequencePlan
from opensora.models import _interop
from opensora.models._layers.attention import SelfAttention
from opensora.models._layers.compressed_attention import CompressedAttention
from opensora.models._layers.patches import token_grid
from opensora.models.pixart import PixArt, PixArtBlock, PixArtSpec

__all__ = ["KVCompression", "PixArtSigma", "PixArtSigmaBlock", "PixArtSigmaSpec", "PixArtSigma_XL_2"]


@frozen(kw_only=True)
class KVCompression:
    """Which layers attend to fewer keys and values, and how these are made. Images only."""

    sampling: Literal["conv", "ave", "uniform", "uniform_every"] | None = field(
        default=None, validator=in_(("conv", "ave", "uniform", "uniform_every", None))
    )
    """"conv" learns an average of each window of tokens, "uniform" and "ave" take its first token, "uniform_every" each n-th
    token in reading order. None: no compression."""
    scale_factor: float = field(default=1, validator=ge(1))
    """Side of a window, in tokens; n. 2 makes a quarter of the keys (half with "uniform_every"); 1 is no compression."""
    kv_compress_layer: tuple[int, ...] = ()
    """Blocks that do it, counted from 0. The paper's: the last half."""

    def __attrs_post_init__(self) -> None:
        if self.scale_factor != int(self.scale_factor):
            raise ConfigError(f"kv_compress_config.scale_factor must be a whole number, not {self.scale_factor}.")

    def ratio(self, block: int) -> int:
        """Side of the windows in that block; 1 where there is no compression."""
        return int(self.scale_factor) if self.sampling and block in self.kv_compress_layer else 1


@frozen(kw_only=True)
class PixArtSigmaSpec(PixArtSpec):
    """Options of `PixArtSigma`. The defaults are those of PixArt-Sigma-XL/2."""

    qk_norm: bool = False
    """Normalise queries and keys, which keeps training stable in half precision."""
    kv_compress_config: KVCompression | None = None
    """Attention to fewer keys and values. None: to all."""

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        layers = self.kv_compress_config.kv_compress_layer if self.kv_compress_config else ()
        if absent := [layer for layer in layers if not 0 <= layer < self.depth]:
            raise ConfigError(
                f"kv_compress_config.kv_compress_layer has {', '.join(map(str, absent))}; "
                f"the model's {self.depth} blocks are 0 to {self.depth - 1}."
            )


class PixArtSigmaBlock(PixArtBlock):
    """PixArt's block, whose attention may be to a coarser image."""

    def attend(self, x: Tensor, grid: Size) -> Tensor:
        """[B, N, D] -> the same."""
        return self.attn(x, grid) if isinstance(self.attn, CompressedAttention) else self.attn(x)


class PixArtSigma(PixArt):
    """Predicts noise (and variance values) of latents of any size from text. It is not told the size in pixels.

    Conditions it reads: text_embedding, text_mask, dropped.
    """

    Spec: ClassVar[type] = PixArtSigmaSpec
    interop: ClassVar[Interop] = _interop.PIXART_SIGMA
    title: ClassVar[str] = "PixArt-Sigma"
    any_size: ClassVar[bool] = True
    spec: PixArtSigmaSpec

    def build_block(self, index: int, *, drop_path: float) -> PixArtSigmaBlock:
        """The block at that depth, once it is known to do the size that the model is built for.

        Raises:
            ShapeError: It does not.
        """
        spec = self.spec
        compression = spec.kv_compress_config or KVCompression()
        ratio = compression.ratio(index)
        attn: SelfAttention | CompressedAttention
        if compression.sampling is None or ratio == 1:
            attn = SelfAttention(spec.hidden_size, spec.num_heads, qk_norm=spec.qk_norm)
        else:
            attn = CompressedAttention(
                spec.hidden_size, spec.num_heads, qk_norm=spec.qk_norm, sampling=compression.sampling, ratio=ratio
            )
            attn.check_grid(token_grid(self.latent_size, self.patch_size))
        return PixArtSigmaBlock(spec, attn=attn, drop_path=drop_path)

    @property
    def sequence_plan(self) -> SequencePlan:
        """Compression needs all tokens of an image, so that whole images are dealt out for it, as frames are elsewhere."""
        compressed: list[str] = []
        full: list[str] = []
        for index, block in enumerate(self.blocks):
            kind = compressed if isinstance(block.attn, CompressedAttention) else full
            kind.append(f"blocks.{index}.attn")
        return SequencePlan(spatial=tuple(compressed), full=tuple(full))


PixArtSigma_XL_2 = preset(
    PixArtSigma, "PixArtSigma_XL_2", depth=28, hidden_size=1152, patch_size=(1, 2, 2), num_heads=16
)
