"""Small grammars: parts of a text with their columns, and messages that point at one."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

_BEFORE, _AFTER = 60, 40
_INDENT = " " * 4


def pointed(message: str, text: str, column: int) -> str:
    """The message, under it the text, and under that a caret at ``column`` (from 0; the text's length is its end).

    Of a long text the surroundings are shown. What can't be printed is shown as a blank.
    """
    begin, end = max(0, column - _BEFORE), column + _AFTER
    before = f"{'...' if begin else ''}{_printable(text[begin:column])}"
    after = f"{_printable(text[column:end])}{'...' if end < len(text) else ''}"
    return f"{message}\n{_INDENT}{before}{after}\n{_INDENT}{' ' * _terminal_width(before)}^"


def quoted(text: str) -> str:
    """A text in quotes, cut to a readable length; for messages."""
    return f'"{_printable(text if len(text) <= 40 else f"{text[:37]}...")}"'


def parts_of(text: str, separator: str, *, offset: int = 0) -> Iterator[tuple[int, str]]:
    """(column, part) of a text that is split at a separator, without the blanks around each part.

    Args:
        offset: The column at which ``text`` itself starts. An empty part has the column at which something is missing.
    """
    for part in text.split(separator):
        stripped = part.strip()
        yield offset + (part.index(stripped) if stripped else 0), stripped
        offset += len(part) + len(separator)


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _terminal_width(text: str) -> int:
    """Columns that a terminal gives to it: two to wide letters, none to accents that combine."""
    marks = sum(unicodedata.category(letter) in ("Mn", "Me") for letter in text)
    return len(text) - marks + sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
