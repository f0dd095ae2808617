"""Files of prompts: text with one a line, or CSV and JSON lines with settings for each prompt.

    prompt,seed,num_frames,image
    a cat,7,2s,
    "a dog, running",,51,dog.png

The same as JSON lines:

    {"prompt": "a cat", "seed": 7, "num_frames": "2s"}
    {"prompt": "a dog, running", "num_frames": 51, "image": "dog.png"}

Which settings there are: `PromptSettings`. A misspelt one is an error with file and line.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn

import attrs
from attrs import field, frozen
from attrs.validators import and_, ge, gt, le, lt, optional

from opensora.core._pointing import pointed, quoted
from opensora.core.config.structure import shown, structure
from opensora.core.errors import ConfigError, DataError, did_you_mean
from opensora.core.mask_strategy import parse_mask_strategy
from opensora.core.prompt_syntax import join_references, split_references
from opensora.core.prompts import read_prompts
from opensora.core.sizes import parse_num_frames

__all__ = ["PromptEntry", "PromptSettings", "read_prompt_file"]

_FINITE = lt(math.inf)


def _read_by(parse: Callable[[Any], object]) -> Callable[[Any, Any, Any], None]:
    """A validator: whatever the parser takes."""

    def validate(instance: object, attribute: object, value: object) -> None:
        if value is not None:
            parse(value)

    return validate


def _check_sides(size: tuple[int, int]) -> None:
    if min(size) < 1:
        raise ConfigError(f"image_size is {size}; both sides must be at least 1.")


def _check_name(name: str) -> None:
    if not name.strip():
        raise ConfigError("name is empty; it is what the file is to be called.")


@frozen(kw_only=True)
class PromptSettings:
    """What one prompt wants to be different. None: as the run says. Names and meanings are those of a sampling config."""

    seed: int | None = None
    num_frames: int | str | None = field(default=None, validator=_read_by(parse_num_frames))
    image_size: tuple[int, int] | None = field(default=None, validator=_read_by(_check_sides))
    """Height and width in pixels."""
    resolution: str | None = None
    aspect_ratio: str | None = None
    fps: float | None = field(default=None, validator=optional(and_(gt(0), _FINITE)))
    negative_prompt: str | None = None
    reference_path: str | None = field(default=None, validator=_read_by(split_references))
    mask_strategy: str | None = field(default=None, validator=_read_by(parse_mask_strategy))
    loop: int | None = field(default=None, validator=optional(gt(0)))
    image: str | None = None
    last_image: str | None = None
    extend: str | None = None
    connect: tuple[str, str] | None = None
    edit: str | None = None
    strength: float | None = field(default=None, validator=optional(and_(gt(0), le(1))))
    cfg_scale: float | None = field(default=None, validator=optional(and_(ge(0), _FINITE)))
    num_sampling_steps: int | None = field(default=None, validator=optional(gt(0)))
    name: str | None = field(default=None, validator=_read_by(_check_name))
    """Of the file, without its ending."""


@frozen
class PromptEntry:
    """A prompt of a file."""

    text: str
    """As written, with its rounds and JSON."""
    settings: PromptSettings
    location: str
    """``file:line``."""


def read_prompt_file(path: Path) -> list[PromptEntry]:
    """The prompts of a .csv file, of one with JSON lines (.jsonl, .ndjson, .json), or of any other as text with one a line.

    Raises:
        DataError: The file can't be read, is empty, or no UTF-8 text.
        ConfigError: A column, key or value is wrong; the message says in which line.
    """
    entries = _READERS.get(path.suffix.lower(), _read_text)(path)
    if not entries:
        raise DataError(f"Prompt file {path} has no prompts.")
    return entries


def _read_text(path: Path) -> list[PromptEntry]:
    return [
        PromptEntry(text, PromptSettings(), f"{path}:{line}") for line, text in enumerate(read_prompts(path), start=1)
    ]


def _read_csv(path: Path) -> list[PromptEntry]:
    rows = _rows(path)
    first, header = next(rows, ("", []))
    if not header:
        raise DataError(f"Prompt file {path} is empty. Its first line names the columns, one of them prompt.")
    _check_names(header, "column", first)
    entries = []
    for location, row in rows:
        if len(row) > len(header):
            raise ConfigError(
                f"The row has {len(row)} fields, the header {len(header)}; the first too many is "
                f'{quoted(row[len(header)])}. Put a text with commas in quotes: "...".',
                location=location,
            )
        cells = zip_longest(header, row, fillvalue="")
        entries.append(_entry({name: _cell_value(name, cell) for name, cell in cells}, location))
    return entries


def _rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(location, fields without blanks around) of each row; blank lines are left out."""
    reader = csv.reader(io.StringIO(_decoded(path), newline=""), strict=True)
    while True:
        location = f"{path}:{reader.line_num + 1}"
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ConfigError(f"The row is no CSV: {error}.", location=location) from error
        if row and not (len(row) == 1 and row[0].isspace()):
            yield location, [cell.strip() for cell in row]


def _cell_value(name: str, cell: str) -> object:
    """What a cell stands for; None if it is empty, and the text itself if it is none of the kind."""
    if name in _TEXT_NAMES:
        return cell
    try:
        return _CELLS.get(name, str)(cell) if cell else None
    except ValueError:
        return cell  # structuring says what is wrong with it


def _pair(kind: Callable[[str], object], parts: Sequence[str]) -> tuple[object, object]:
    first, second = parts
    return kind(first), kind(second)


_CELLS: Mapping[str, Callable[[str], object]] = {
    **dict.fromkeys(("seed", "num_frames", "loop", "num_sampling_steps"), int),
    **dict.fromkeys(("fps", "strength", "cfg_scale"), float),
    "image_size": lambda cell: _pair(int, re.split(r"\s*x\s*|\s+", cell)),
    "connect": lambda cell: _pair(str, split_references(cell)),
}
"""How cells are read that aren't texts."""


def _read_json_lines(path: Path) -> list[PromptEntry]:
    lines = enumerate(_decoded(path).split("\n"), start=1)
    return [
        _entry(_json_object(line, f"{path}:{number}"), f"{path}:{number}") for number, line in lines if line.strip()
    ]


def _json_object(line: str, location: str) -> dict[str, Any]:
    try:
        value = json.loads(line, object_pairs_hook=_without_repeats, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        reason = f"{error.msg[:1].lower()}{error.msg[1:]}"
        raise ConfigError(pointed(f"The line is no JSON: {reason}.", line, error.pos), location=location) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"The line can't be read as JSON: {error}.", location=location) from None
    if not isinstance(value, dict):
        raise ConfigError(
            f'The line is no JSON object but {quoted(line)}. Write {{"prompt": "..."}}, one a line.', location=location
        )
    _check_names(list(value), "key", location)
    for name, part in value.items():
        _check_plain(name, part, location)
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"the key {quoted(name)} is there twice")
        values[name] = value
    return values


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number that JSON has")


def _check_plain(name: str, value: object, location: str) -> None:
    """Refuse lists of lists, objects, and texts with halves of characters, which no tokenizer and no file name takes."""
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, list | dict):
            raise ConfigError(f"{name} can't hold lists of lists or objects.", location=location)
        if isinstance(part, str) and (half := re.search(r"[\ud800-\udfff]", part)):
            raise ConfigError(f"{name} holds half a character, {half[0]!a}.", location=location)


def _entry(values: Mapping[str, Any], location: str) -> PromptEntry:
    """One prompt of values by their names, those of the text among them."""
    texts = [name for name in _TEXT_NAMES if name in values]
    text = values[texts[0]]
    if not isinstance(text, str):
        raise ConfigError(f"{texts[0]} must be a text, not {shown(text)}.", location=location)
    others = {name: value for name, value in values.items() if name not in texts}
    paths = others.get("reference_path")
    try:
        if isinstance(paths, list) and all(isinstance(each, str) for each in paths):
            others["reference_path"] = join_references(paths)
    except ConfigError as error:
        raise ConfigError(str(error), location=location) from None
    return PromptEntry(text.strip(), structure(PromptSettings, others, locations={(): location}), location)


_TEXT_NAMES = ("prompt", "text")
_NAMES = (*_TEXT_NAMES, *(one.name for one in attrs.fields(PromptSettings)))


def _check_names(names: Sequence[str], what: str, location: str) -> None:
    """Refuse unknown and repeated columns or keys, and a file without texts.

    Raises:
        ConfigError: With the nearest valid name.
    """
    for index, name in enumerate(names):
        if name not in _NAMES:
            hint = did_you_mean(name, _NAMES) or f" There are: {', '.join(_NAMES)}."
            raise ConfigError(f"{quoted(name)} is no {what} of a prompt file.{hint}", location=location)
        if name in names[:index]:
            raise ConfigError(f"The {what} {quoted(name)} is there twice.", location=location)
    if len(set(names) & set(_TEXT_NAMES)) != 1:
        has = "no" if not set(names) & set(_TEXT_NAMES) else "more than one"
        raise ConfigError(f"There is {has} {what} for the prompts. One is called prompt, or text.", location=location)


def _decoded(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"Prompt file {path} can't be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: The prompt file is no UTF-8 text (byte {error.start}).") from error


_READERS = {".csv": _read_csv, **dict.fromkeys((".jsonl", ".ndjson", ".json"), _read_json_lines)}
