"""What a model class can say about its attention, so that one video can be spread over several processes.

A class that has an attribute ``sequence_plan`` can be run with sequence parallelism. Its code knows nothing of that: tokens
are dealt out, exchanged and gathered from outside, by the accelerator.

Of tokens [B, ..., N, D], axis N is dealt out: of all tokens of a video, or, where a model keeps frames apart, [B, T, S, D],
of the S positions in a frame, each with all its frames. What works on each token by itself (norms, feed-forward layers,
attention to the text) and attention along frames need nothing. What looks at several tokens of axis N is named here.
"""

from __future__ import annotations

from collections.abc import Mapping

from attrs import field, frozen

__all__ = ["SequencePlan"]


@frozen(kw_only=True)
class SequencePlan:
    """See the module's docstring. Modules are named as in ``named_modules()``, ``*`` standing for anything.

    A block and an attention module take the tokens as their first argument, by position, and return tokens alone.
    """

    blocks: tuple[str, ...] = ("blocks",)
    """Lists of blocks. Tokens are dealt out before the first of the first list, and are shares up to the last of the last."""
    spatial: tuple[str, ...] = ()
    """Self-attention along N whose leading axes are sequences that don't see each other, such as batch and frames. Whole
    sequences are dealt out while it runs, and tokens again behind it, so what is within doesn't matter. What else it is given
    must be the same for all sequences."""
    full: tuple[str, ...] = ()
    """Self-attention along N that ends in `opensora.core.attention.attention`, without a mask. Heads are dealt out while the
    kernel runs: four times the exchange, but it is shared evenly however few the sequences."""
    alongside: Mapping[str, int] = field(factory=dict)
    """Parameters of the blocks' ``forward`` that are by token too, such as rotations, and the axis of their tokens."""
    head: str | None = "final_layer"
    """The layer behind the blocks that works on each token by itself and makes it small, [B, ..., N, D] to [B, ..., N, O]:
    what it returns is gathered. None: what the last block returns."""
