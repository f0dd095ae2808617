"""Recipes: what makes a sample again, stored in the sample's file and beside it.

A recipe is a JSON object with a whole number ``version``; what else it holds is the pipeline's affair. It is kept in the tag
``comment`` of an mp4, a gif or a png, as ``recipe.json`` in a folder of frames, and, for people to read, in ``name.json``
beside any of them. Equal recipes give equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from opensora.core.errors import DataError
from opensora.core.run_folder import make_folder, write_atomically

__all__ = ["RECIPE_VERSION", "read_recipe", "recipe_path", "recipe_text", "write_recipe"]

RECIPE_VERSION = 1
"""The newest that this code reads, and the one it writes."""

_FILE_ENDINGS = (".mp4", ".gif", ".png")


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """One line of ASCII, for the ``comment`` of a file's metadata.

    Raises:
        TypeError, ValueError: It isn't JSON: it holds an object, or a number that is not finite.
    """
    return json.dumps(recipe, sort_keys=True, allow_nan=False)


def recipe_path(path: str | Path) -> Path:
    """``name.json`` beside the result ``name.mp4``, or beside the folder ``name``."""
    path = Path(path)
    return path.with_name((path.stem if path.suffix.lower() in _FILE_ENDINGS else path.name) + ".json")


def write_recipe(path: str | Path, recipe: Mapping[str, Any]) -> Path:
    """Write ``name.json`` beside the result ``path``, whole or not at all; missing folders are made.

    Raises:
        TypeError, ValueError: It isn't JSON.
        MachineError: It can't be written.
    """
    beside = recipe_path(path)
    make_folder(beside.parent)
    text = json.dumps(recipe, sort_keys=True, allow_nan=False, indent=1, ensure_ascii=False)
    # half a character, as an argument in another encoding leaves it, becomes its JSON escape
    write_atomically(beside, text.encode("utf-8", "backslashreplace").decode())
    return beside


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The recipe of a result: what the file itself holds, or else what lies beside it; or that of a ``.json``.

    Raises:
        DataError: There is none, or it is cut short, no recipe, or of a newer version.
    """
    path = Path(path)
    complaint: DataError | None = None
    for place, text in _iter_texts(path):
        try:
            return _parse(place, text)
        except DataError as error:
            complaint = complaint or error
    if complaint is not None:
        raise complaint
    if not path.exists():
        raise DataError(f"{path} is missing; a result of sampling or its recipe (.json) was expected.")
    raise DataError(f"{path} has no recipe, neither in it nor beside it in {recipe_path(path).name}.")


def _iter_texts(path: Path) -> Iterator[tuple[Path, str]]:
    """(where, text) of what may be the recipe, the best first."""
    if path.suffix.lower() == ".json":
        if path.is_file():
            yield path, _read(path)
        return
    if (inside := path / "recipe.json").is_file():
        yield inside, _read(inside)
    elif path.is_file() and (comment := _comment(path)).lstrip().startswith("{"):  # others write comments of their own
        yield path, comment
    if (beside := recipe_path(path)).is_file():
        yield beside, _read(beside)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} can't be read: {error}.") from error


def _comment(path: Path) -> str:
    """The tag ``comment`` of any image or video; empty if there is none, or the file can't be read."""
    from opensora.core.frame_sources import open_frames  # imports torch

    try:
        with open_frames(path) as source:
            return source.info.metadata.get("comment", "")
    except DataError:
        return ""


def _parse(place: Path, text: str) -> dict[str, Any]:
    try:
        recipe = json.loads(text)
    except ValueError as error:
        raise DataError(f"The recipe in {place} is cut short or damaged: {error}.") from error
    except RecursionError as error:
        raise DataError(f"{place} holds no recipe: it is nested too deeply.") from error
    version = recipe.get("version") if isinstance(recipe, dict) else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise DataError(f'{place} holds no recipe: that is a JSON object with a whole number "version".')
    if version > RECIPE_VERSION:
        raise DataError(
            f"The recipe in {place} is of version {version}, and this opensora-core reads up to {RECIPE_VERSION}. "
            "Install a newer one."
        )
    return dict(recipe)
