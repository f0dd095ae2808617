"""What of a text a tokenizer of transformers leaves out."""

from __future__ import annotations

from typing import Any


def beyond(tokenizer: Any, text: str, *, max_length: int) -> str:
    """The end of ``text`` from the first token on that ``truncation`` to ``max_length`` tokens takes away; "" if none is.

    The cut can be inside of a word.
    """
    room = max(0, max_length - tokenizer.num_special_tokens_to_add())
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts = [start for start, _ in tokens["offset_mapping"]]
    return text[starts[room] :].strip() if len(starts) > room else ""
