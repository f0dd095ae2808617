"""What a weights file looks like: of which architecture it is, and of which size, from its keys and shapes alone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

from attrs import frozen
from torch import Tensor, nn

from opensora.models._diffusers_keys import from_diffusers
from opensora.models._key_maps import NULL_CAPTION, PATCH_WEIGHT

LABELS = "y_embedder.embedding_table.weight"
_NORMS = re.compile(r"\.(q|k)_norm\.")


@frozen(kw_only=True)
class ModelShape:
    """Sizes that keys and shapes of a denoiser tell."""

    channels: int | None
    patch: tuple[int, ...]
    width: int | None
    depth: int
    outputs: int | None
    """Output channels over latent channels."""
    mlp_ratio: float | None
    classes: int | None
    text_width: int | None
    text_length: int | None
    has_norms: bool

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> ModelShape:
        """``state`` in this project's keys, patch weights as in any layout."""
        patch = state.get(PATCH_WEIGHT)
        blocks = {int(found[1]) for key in state if (found := re.match(r"(?:spatial_)?blocks\.(\d+)\.", key))}
        hidden = next((len(state[key]) for key in state if key.endswith("blocks.0.mlp.fc1.weight")), None)
        out = state.get("final_layer.linear.weight")
        text = state.get("y_embedder.y_proj.fc1.weight")
        side = () if patch is None else (1,) * (5 - patch.dim()) + tuple(patch.shape[2:])
        return cls(
            channels=None if patch is None else patch.shape[1],
            patch=side,
            width=None if patch is None else len(patch),
            depth=len(blocks),
            outputs=None if out is None or patch is None else len(out) // math.prod(side) // patch.shape[1],
            mlp_ratio=None if patch is None or hidden is None else hidden / len(patch),
            classes=len(state[LABELS]) - 1 if LABELS in state else None,
            text_width=None if text is None else text.shape[1],
            text_length=len(state[NULL_CAPTION]) if NULL_CAPTION in state else None,
            has_norms=any(_NORMS.search(key) for key in state),
        )


@frozen
class Kind:
    """What a file looks like."""

    title: str
    type: str | None = None
    """The model type that takes it; None: it is no denoiser of this package."""


def recognise(state: Mapping[str, Tensor]) -> Kind | None:
    """What the keys of a file tell. The more special comes first."""
    if kind := next((kind for pattern, kind in _OTHERS if any(re.match(pattern, key) for key in state)), None):
        return kind
    state = from_diffusers(dict(state))
    return next((kind(state) for pattern, kind in _DENOISERS if any(re.match(pattern, key) for key in state)), None)


_OTHERS = [
    (r"(encoder|decoder)\.block\.\d+\.layer\.|shared\.weight$", Kind("a T5 text encoder")),
    (r"text_model\.", Kind("a CLIP text encoder")),
    (r"(spatial|temporal)_vae\.", Kind('the autoencoder of Open-Sora 1.2 (vae type "OpenSoraVAE_V1_2")')),
    (r"(module\.)?(encoder|decoder)\.conv_in\.", Kind('an image autoencoder (vae type "VideoAutoencoderKL")')),
    (r"model\.diffusion_model\.|down_blocks\.\d+\.resnets\.", Kind("a U-Net of Stable Diffusion")),
]


def _class_conditioned(state: Mapping[str, Tensor]) -> Kind:
    name = "Latte" if "temp_embed" in state else "DiT"
    condition = f"label_{len(state[LABELS]) - 1}" if LABELS in state else "text"
    also = " (or Latte)" if name == "DiT" and "pos_embed" not in state else ""
    return Kind(f'{name}{also} with condition "{condition}"', f"{name}-XL/2")


def _captioned(state: Mapping[str, Tensor]) -> Kind:
    is_sigma = NULL_CAPTION in state and len(state[NULL_CAPTION]) > 120
    return Kind("PixArt-Sigma", "PixArt-Sigma-XL/2") if is_sigma else Kind("PixArt-alpha", "PixArt-XL/2")


def _stdit2_or_3(state: Mapping[str, Tensor]) -> Kind:
    if any(key.startswith("spatial_blocks.") for key in state):
        return Kind("STDiT3 (Open-Sora 1.2)", "STDiT3-XL/2")
    return Kind("STDiT2 (Open-Sora 1.1)", "STDiT2-XL/2")


_DENOISERS: list[tuple[str, Callable[[Mapping[str, Tensor]], Kind]]] = [
    (r"fps_embedder\.", _stdit2_or_3),
    (r"temporal_blocks\.", lambda _: Kind("Latte for text (Latte-1)", "LatteT2V-XL/2")),
    (r"blocks\.\d+\.attn_temp\.", lambda _: Kind("STDiT (Open-Sora 1.0)", "STDiT-XL/2")),
    (r"blocks\.\d+\.adaLN_modulation\.", _class_conditioned),
    (r"csize_embedder\.", lambda _: Kind("PixArt-alpha at many sizes", "PixArtMS-XL/2")),
    (r"blocks\.\d+\.cross_attn\.", _captioned),
]


def diagnose(model: nn.Module, state: Mapping[str, Tensor], *, types: tuple[str, ...]) -> str:
    """Why ``state`` does not fit ``model``, whose own files are those of ``types``."""
    kind = recognise(state)
    if kind is None:
        return ""
    if kind.type is None:
        return f"This looks like {kind.title}, not like a denoiser."
    if kind.type not in types:
        return f'This looks like {kind.title}; for that, use model type "{kind.type}".'
    return " ".join(_differences(model, ModelShape.of(from_diffusers(dict(state))), kind))


def _differences(model: nn.Module, theirs: ModelShape, kind: Kind) -> list[str]:
    ours = ModelShape.of(model.state_dict())
    found = [f"This looks like {kind.title}, of another size or make:"]
    if theirs.channels != ours.channels:
        found.append(
            f"it is for {theirs.channels} latent channels and the VAE has {ours.channels} (use the one it was trained with);"
        )
    if theirs.text_width != ours.text_width:
        found.append(
            f"its text is {theirs.text_width} wide and the text encoder's {ours.text_width} (None: class labels);"
        )
    if (theirs.depth, theirs.width) != (ours.depth, ours.width):
        found.append(
            f"it has {theirs.depth} blocks of width {theirs.width}, this model {ours.depth} of width {ours.width} "
            "(a larger model starts from a smaller one's weights with model.grow = True);"
        )
    if theirs.outputs != ours.outputs:
        found.append("one predicts variance values (learn_sigma, pred_sigma) and the other not;")
    if theirs.has_norms != ours.has_norms:
        found.append(f"it {'has' if theirs.has_norms else 'lacks'} norms of queries and keys (qk_norm);")
    return [] if len(found) == 1 else [*found[:-1], f"{found[-1].removesuffix(';')}."]
