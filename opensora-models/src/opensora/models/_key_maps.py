"""Published checkpoints of denoisers, turned into the keys and shapes of the models here.

Each step takes and returns a plain state dict, and is told by the keys and shapes themselves whether it applies, never by a
file's name. Tensors are shared with the input where nothing changes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from opensora.models._diffusers_keys import State, from_diffusers, table_of

log = logging.getLogger(__name__)

PATCH_WEIGHT = "x_embedder.proj.weight"
NULL_CAPTION = "y_embedder.y_embedding"


def adapt_dit(state: State, *, text_length: int | None) -> State:
    """DiT of Peebles and Xie (images), Latte, or Open-Sora's or diffusers' of either.

    ``text_length`` None: a model of class labels.
    """
    state = lift_patch_weight(drop_tables(from_diffusers(state), ("pos_embed", "pos_embed_temporal", "temp_embed")))
    return state if text_length is None else fit_null_caption(state, text_length)


def adapt_pixart(state: State, *, text_length: int) -> State:
    """PixArt-alpha, PixArt-Sigma, or Open-Sora's or diffusers' of either."""
    if table_of(state) is not None:
        state = add_null_caption(from_diffusers(state))
    return fit_null_caption(lift_patch_weight(drop_tables(state, ("pos_embed", "pos_embed_temporal"))), text_length)


def adapt_stdit(state: State, *, text_length: int) -> State:
    """STDiT and STDiT2, or PixArt-alpha, whose blocks lack the attention along time."""
    return adapt_pixart(state, text_length=text_length)


def adapt_stdit3(state: State, *, text_length: int) -> State:
    """STDiT3, or PixArt-alpha and PixArt-Sigma, whose blocks become the spatial ones."""
    return rename_image_blocks(adapt_pixart(state, text_length=text_length))


def drop_tables(state: State, names: Iterable[str]) -> State:
    """Leave out position tables, which a model computes for its own size and scale."""
    unwanted = set(names)
    return {key: value for key, value in state.items() if key not in unwanted}


def lift_patch_weight(state: State) -> State:
    """Patch weights of an image model, [D, C, h, w], become those of single frames, [D, C, 1, h, w]."""
    weight = state.get(PATCH_WEIGHT)
    return state if weight is None or weight.dim() != 4 else {**state, PATCH_WEIGHT: weight.unsqueeze(2)}


def add_null_caption(state: State) -> State:
    """Zeros, one token long, where there is none: diffusers leaves it out."""
    first = state.get("y_embedder.y_proj.fc1.weight")
    if first is None or NULL_CAPTION in state:
        return state
    log.warning(
        "These weights have no null caption (diffusers' pipelines embed an empty prompt instead); zeros stand in for it. "
        "Guidance will differ from theirs."
    )
    return {**state, NULL_CAPTION: first.new_zeros(1, first.shape[1])}


def fit_null_caption(state: State, text_length: int) -> State:
    """Cut the null caption [L, width] to ``text_length`` tokens, or repeat its last token."""
    caption = state.get(NULL_CAPTION)
    if caption is None or len(caption) == text_length:
        return state
    return {**state, NULL_CAPTION: caption[[min(token, len(caption) - 1) for token in range(text_length)]]}


def rename_image_blocks(state: State) -> State:
    """``blocks.0`` of an image model is ``spatial_blocks.0`` of STDiT3."""
    return {f"spatial_{key}" if key.startswith("blocks.") else key: value for key, value in state.items()}
