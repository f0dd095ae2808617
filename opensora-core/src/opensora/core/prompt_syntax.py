"""What a prompt may say besides its text: references as JSON at its end, and a text for each round of a long video.

    a cat {"reference_path": "cat.png", "mask_strategy": "0"}
    |0|a seed|2|a flower opens

The syntax is that of Open-Sora 1.1 and 1.2; what it leaves open is an error here that points at the place.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from attrs import frozen

from opensora.core._pointing import parts_of, pointed, quoted
from opensora.core.errors import ConfigError, did_you_mean

__all__ = [
    "Rounds",
    "check_rounds",
    "is_url",
    "join_references",
    "parse_rounds",
    "print_rounds",
    "split_references",
    "split_suffix",
]

_SUFFIX_KEYS = ("reference_path", "mask_strategy")


def split_suffix(prompt: str) -> tuple[str, dict[str, str]]:
    """A prompt without the JSON object at its end, and what that says: ``reference_path`` and ``mask_strategy``.

    The JSON starts at the first ``{``; blanks before it stay with the text. A key that isn't there is as the run says, an
    empty text is none. A list of paths is joined; see `join_references`.

    Raises:
        ConfigError: From the first ``{`` on there is something else.
    """
    brace = prompt.find("{")
    if brace < 0:
        return prompt, {}
    _check_json(prompt, brace)
    values: dict[str, str] = {}
    for member in _members(prompt, brace):
        if member.key not in _SUFFIX_KEYS:
            hint = did_you_mean(member.key, _SUFFIX_KEYS) or f" It may have {' and '.join(_SUFFIX_KEYS)}."
            message = f"prompt: {quoted(member.key)} is no key of a prompt's JSON.{hint}"
            raise ConfigError(pointed(message, prompt, member.key_column))
        values[member.key] = _text_of(member, prompt)
    return prompt[:brace], values


def _text_of(member: _Member, prompt: str) -> str:
    """The value of a member; a list of paths is joined."""
    value = member.value
    if isinstance(value, str):
        return value
    message = f"prompt: {member.key} must be a text, not {quoted(member.written)}."
    if value is None:
        message = f"prompt: {member.key} can't be null. Leave it out for what the run says, or give a text."
    elif isinstance(value, list) and member.key == "reference_path" and all(isinstance(each, str) for each in value):
        try:
            return join_references(value)
        except ConfigError as error:
            message = f"prompt: {error}"
    raise ConfigError(pointed(message, prompt, member.value_column))


def _check_json(prompt: str, brace: int) -> None:
    """Raise unless all from the brace on is one JSON object."""
    try:
        _, end = json.JSONDecoder().raw_decode(prompt, brace)
    except (ValueError, RecursionError) as error:
        reason, column = "it holds too much", brace
        if isinstance(error, json.JSONDecodeError):
            reason, column = f"{error.msg[:1].lower()}{error.msg[1:]}", error.pos
        message = f'prompt: a "{{" starts the JSON at a prompt\'s end, which is wrong here: {reason}.'
        raise ConfigError(pointed(f"{message} Text can't hold braces.", prompt, column)) from None
    rest = prompt[end:].lstrip()
    if rest:
        message = "prompt: text goes on after its JSON. Put it before."
        raise ConfigError(pointed(message, prompt, len(prompt) - len(rest)))


@frozen
class _Member:
    key: str
    key_column: int
    value: object
    value_column: int
    written: str
    """The value as it stands in the text."""


def _members(text: str, brace: int) -> Iterator[_Member]:
    """Keys and values of a correct JSON object, and where they stand."""
    decoder, between = json.JSONDecoder(), re.compile(r"[\s,:]*")
    column = _end(between, text, brace + 1)
    while text[column] != "}":
        key, end = decoder.raw_decode(text, column)
        value_column = _end(between, text, end)
        value, end = decoder.raw_decode(text, value_column)
        yield _Member(key, column, value, value_column, text[value_column:end])
        column = _end(between, text, end)


def _end(pattern: re.Pattern[str], text: str, column: int) -> int:
    match = pattern.match(text, column)
    assert match is not None  # it matches nothing, too
    return match.end()


@frozen
class Rounds:
    """The texts of a prompt by round: one for all, or a programme that `print_rounds` shows as ``|0|a|2|b``.

    Raises:
        ConfigError: It couldn't be printed and parsed again: ``|`` in a text, or starts that don't rise from 0.
    """

    texts: tuple[str, ...]
    """In a programme without blanks around."""
    starts: tuple[int, ...] | None = None
    """The round from which each text holds, until the next one does; None: one text for all rounds."""

    def __attrs_post_init__(self) -> None:
        if self.starts is None:
            is_right = len(self.texts) == 1 and not self.texts[0].startswith("|0|")
        else:
            rises = self.starts[:1] == (0,) and all(start < after for start, after in pairwise(self.starts))
            is_right = rises and len(self.texts) == len(self.starts)
            is_right = is_right and all("|" not in text and text == text.strip() for text in self.texts)
        if not is_right:
            raise ConfigError(
                f"Rounds can't have the texts {quoted(', '.join(self.texts))} from rounds {self.starts}: "
                'rounds rise from 0, with one text each, and a text can\'t hold "|".'
            )

    def at(self, loop: int) -> str:
        """The text of a round, counted from 0."""
        return self.texts[0 if self.starts is None else bisect_right(self.starts, loop) - 1]

    def map(self, function: Callable[[str], str]) -> Rounds:
        """The same rounds with every text changed.

        Raises:
            ConfigError: The new text holds a ``|``, in a programme.
        """
        texts = map(function, self.texts)
        return Rounds(tuple(texts) if self.starts is None else tuple(text.strip() for text in texts), self.starts)


def parse_rounds(text: str) -> Rounds:
    """Rounds of a programme, which starts with exactly ``|0|``; any other text holds for all rounds.

    Raises:
        ConfigError: The programme is malformed; the message points at the place.
    """
    if not text.startswith("|0|"):
        return Rounds((text,))
    parts = list(parts_of(text[1:], "|", offset=1))
    starts: list[int] = []
    for column, number in parts[::2]:
        if not (number.isdecimal() and len(number) < 10):
            found = quoted(number) if number else "nothing"
            message = f'prompt: after a "|" comes the number of a round, not {found}. Texts can\'t hold "|".'
            raise ConfigError(pointed(message, text, column))
        if starts and int(number) <= starts[-1]:
            message = f"prompt: round {number} comes after round {starts[-1]}. Write rounds in rising order, each once."
            raise ConfigError(pointed(message, text, column))
        starts.append(int(number))
    if len(parts) % 2:
        raise ConfigError(pointed(f'prompt: round {starts[-1]} has no text. Write "|" and it.', text, len(text)))
    return Rounds(tuple(part for _, part in parts[1::2]), tuple(starts))


def print_rounds(rounds: Rounds) -> str:
    """The text that `parse_rounds` reads as these rounds."""
    if rounds.starts is None:
        return rounds.texts[0]
    return "".join(f"|{start}|{text}" for start, text in zip(rounds.starts, rounds.texts, strict=True))


def check_rounds(rounds: Rounds, loop: int) -> None:
    """Refuse texts for rounds that aren't made.

    Args:
        loop: How many there are.

    Raises:
        ConfigError: A text starts at a later round; the message points at it.
    """
    column = 1
    for start, text in zip(rounds.starts or (), rounds.texts, strict=False):
        if start >= loop:
            message = f"prompt: round {start} of {loop} is none; they count from 0. Raise loop, or leave this text out."
            raise ConfigError(pointed(message, print_rounds(rounds), column))
        column += len(f"{start}|{text}|")


def split_references(text: str | None) -> list[str]:
    """Paths and URLs of a ``;``-separated list, without the blanks around them; of None or a blank text none.

    Raises:
        ConfigError: An entry is empty, or holds what no path can; the message points at the place.
    """
    if text is None or not text.strip():
        return []
    paths = []
    for column, path in parts_of(text, ";"):
        if not path:
            raise ConfigError(pointed('reference_path: a path is empty. Separate paths with one ";".', text, column))
        if bad := re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", path):
            message = f"reference_path: character {ord(bad[0]):#x} can't be part of a path."
            raise ConfigError(pointed(message, text, column + bad.start()))
        paths.append(path)
    return paths


def join_references(paths: Sequence[str]) -> str:
    """The text that `split_references` reads as these paths.

    Raises:
        ConfigError: A path is empty or holds a ``;``, or blanks around.
    """
    for path in paths:
        if not path or ";" in path or path != path.strip():
            raise ConfigError(f'reference_path: {quoted(path)} is no path: empty, with ";", or with blanks around.')
    return ";".join(paths)


def is_url(path: str) -> bool:
    """Whether it is to be downloaded: http, https or ftp."""
    return re.fullmatch(r"(https?|ftp)://[^\s/]\S*", path, re.IGNORECASE) is not None
