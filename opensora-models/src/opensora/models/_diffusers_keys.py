"""Keys of the diffusers classes of DiT, PixArt and Latte, and those of the models here, one made into the other.

Both directions only rename, split and join tensors, so a model comes back bit for bit. diffusers splits the projections of
attention that are one matrix here, and gives each block of a DiT its own copy of the embedders.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count

import torch
from attrs import field, frozen
from torch import Tensor

from opensora.core.errors import WeightsError

State = dict[str, Tensor]
_ENDS = ("", ".weight", ".bias")

_ATTENTION = {"attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"), "attn.proj": ("attn1.to_out.0",)}
_TEXT = {
    "cross_attn.q_linear": ("attn2.to_q",),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
    "cross_attn.proj": ("attn2.to_out.0",),
}
_FEED_FORWARD = {"mlp.fc1": ("ff.net.0.proj",), "mlp.fc2": ("ff.net.2",)}


@frozen(kw_only=True)
class KeyTable:
    """Names of modules (or tensors) here, and in diffusers."""

    outside: Mapping[str, str]
    """Of what is there once."""
    lists: Mapping[str, str]
    """Of the lists of blocks."""
    inside: Mapping[str, tuple[str, ...]]
    """Of what each block has. Several names: their rows, one below the other, are the matrix here."""
    copied: Mapping[str, str] = field(factory=dict)
    """Of what is there once here, and in each block there."""

    def modules(self, depth: int) -> Iterator[tuple[str, tuple[str, ...]]]:
        """(name here, names there), but for what is copied."""
        for here, there in self.outside.items():
            yield here, (there,)
        for block in range(depth):
            for here, there in self.lists.items():
                for name, parts in self.inside.items():
                    yield f"{here}.{block}.{name}", tuple(f"{there}.{block}.{part}" for part in parts)


DIT = KeyTable(
    outside={
        "x_embedder.proj": "pos_embed.proj",
        "final_layer.adaLN_modulation.1": "proj_out_1",
        "final_layer.linear": "proj_out_2",
    },
    lists={"blocks": "transformer_blocks"},
    inside=_ATTENTION | _FEED_FORWARD | {"adaLN_modulation.1": ("norm1.linear",)},
    copied={
        "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
        "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
    },
)
_PIXART_OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "final_layer.scale_shift_table": "scale_shift_table",
    "final_layer.linear": "proj_out",
}
_PIXART_INSIDE = _ATTENTION | _TEXT | _FEED_FORWARD | {"scale_shift_table": ("scale_shift_table",)}
PIXART = KeyTable(
    outside=_PIXART_OUTSIDE
    | {
        "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
        "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
        "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
        "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
    },
    lists={"blocks": "transformer_blocks"},
    inside=_PIXART_INSIDE,
)
LATTE_T2V = KeyTable(
    outside=_PIXART_OUTSIDE,
    lists={"spatial_blocks": "transformer_blocks", "temporal_blocks": "temporal_transformer_blocks"},
    inside=_PIXART_INSIDE,
)


def table_of(state: Mapping[str, Tensor]) -> KeyTable | None:
    """That of the diffusers class whose keys these look like, or None: they are no such class's."""
    if "transformer_blocks.0.norm1.linear.weight" in state and "proj_out_1.weight" in state:
        return DIT
    if "adaln_single.linear.weight" not in state:
        return None
    return LATTE_T2V if any(key.startswith("temporal_transformer_blocks.") for key in state) else PIXART


def from_diffusers(state: State) -> State:
    """Own keys. Those that have no counterpart stay as they are; a state of any other layout comes back as it is.

    Raises:
        WeightsError: Copies that should be equal differ.
    """
    table = table_of(state)
    if table is None:
        return state
    left = dict(state)
    own: State = {}
    depth = next(block for block in count() if f"transformer_blocks.{block}.attn1.to_q.weight" not in state)
    for here, there in table.modules(depth):
        for end in _ENDS:
            if all(name + end in left for name in there):
                parts = [left.pop(name + end) for name in there]
                own[here + end] = parts[0] if len(parts) == 1 else torch.cat(parts)
    for here, copy in table.copied.items():
        for end in _ENDS:
            names = [f"transformer_blocks.{block}.{copy}{end}" for block in range(depth)]
            if copies := [left.pop(name) for name in names if name in left]:
                own[here + end] = _one_of(copies, names[0])
    return own | left


def to_diffusers(state: State, table: KeyTable) -> State:
    """Keys of diffusers, each tensor on its own.

    Raises:
        WeightsError: A tensor has no place there.
    """
    left = dict(state)
    theirs: State = {}
    depth = next(block for block in count() if f"{next(iter(table.lists))}.{block}.attn.qkv.weight" not in state)
    for here, there in table.modules(depth):
        for end in _ENDS:
            if (tensor := left.pop(here + end, None)) is not None:
                names = [name + end for name in there]
                theirs |= dict(zip(names, tensor.chunk(len(names)), strict=True))
    for here, copy in table.copied.items():
        for end in _ENDS:
            if (tensor := left.pop(here + end, None)) is not None:
                theirs |= {f"transformer_blocks.{block}.{copy}{end}": tensor for block in range(depth)}
    if left:
        raise WeightsError(
            f"diffusers' class has no place for {len(left)} tensors of this model: {', '.join(list(left)[:6])}."
        )
    return theirs


def _one_of(copies: list[Tensor], name: str) -> Tensor:
    first = copies[0]
    if any(other is not first and not torch.equal(other, first) for other in copies):
        raise WeightsError(
            f"The blocks of this DiT have embedders that differ ({name} and its like), as diffusers' training leaves them. "
            'The models here have one for all blocks; use type "diffusers" for such weights.'
        )
    return first
