"""What of a prompt a text encoder does not read, and how to say so."""

from __future__ import annotations

from opensora.core.protocols import TextEncoder

__all__ = ["cut_off", "describe_cut", "max_tokens"]

_SHOWN_WORDS = 6
_SHOWN_CHARACTERS = 40
"""What is shown of either end of a long cut; of words at most so many characters too."""
_LONGEST_WORD = 60
"""Text whose words are longer on average is written without blanks: characters are counted instead."""


def cut_off(encoder: TextEncoder, prompt: str) -> str:
    """The end of ``prompt`` that ``encoder`` does not read, as it reads it; "" if it reads all, or has no way to tell."""
    ask = getattr(encoder, "cut_off", None)
    return str(ask(prompt)) if ask else ""


def max_tokens(encoder: TextEncoder) -> int:
    """Tokens that ``encoder`` reads of a prompt at most: its ``max_length``, unless it makes one vector of them."""
    return int(getattr(encoder, "max_tokens", encoder.max_length))


def describe_cut(prompt: str, cut: str, *, max_tokens: int, which: str = "prompt") -> str:
    """A sentence on what of a prompt is cut: how much of how much, and its first and last words.

    Args:
        prompt: As the user wrote it, or what was made of that.
        cut: Its end, from `cut_off`; not empty.
        max_tokens: The limit.
        which: How to name the prompt, such as ``prompt 3``.
    """
    words = cut.split()
    if len(cut) > _LONGEST_WORD * len(words):
        number, total, unit = len(cut), len(prompt), "character"
        shown = _ends(cut)
    else:
        number, total, unit = len(words), len(prompt.split()), "word"
        first, last = (" ".join(part) for part in (words[:_SHOWN_WORDS], words[-_SHOWN_WORDS:]))
        shown = " ".join(words) if len(words) <= 2 * _SHOWN_WORDS else f"{_ends(first)} ... {_ends(last)}"
    total = max(total, number)  # cleaning may take a long word apart
    amount = f"{number:,} of {total:,} {unit}{'s' if total > 1 else ''}"
    does_not, are = ("doesn't", "is") if number == 1 else ("don't", "are")
    return f'{which}: {amount} {does_not} fit the text encoder\'s {max_tokens:,} tokens and {are} cut: "{shown}"'


def _ends(text: str) -> str:
    return text if len(text) <= 2 * _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}...{text[-_SHOWN_CHARACTERS:]}"
