"""Recipes: what makes a sample again, stored in the sample's file and beside it.

A recipe is a JSON object with a whole number ``version``; what else it holds is the pipeline's affair. It is kept in the tag
``comment`` of an mp4, a gif or a png, as ``recipe.json`` in a folder of frames, and, for people to read, in ``name.json``
beside any of them. Equal recipes give equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
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
    complaints: list[DataError] = []
    for place in _places(path):
        try:
            text = _text_in(place)
            if text is not None:
                return _parse(place, text)
        except DataError as error:
            complaints.append(error)
    if complaints:
        raise complaints[0]
    if not path.exists():
        raise DataError(f"{path} is missing; a result of sampling, or its recipe (.json), was expected.")
    raise DataError(f"{path} has no recipe, neither in it nor beside it in {recipe_path(path).name}.")


def _places(path: Path) -> list[Path]:
    """Files that may hold the recipe, the best first."""
    candidates = [path / "recipe.json" if path.is_dir() else path]
    if path.suffix.lower() != ".json":
        candidates.append(recipe_path(path))
    return [candidate for candidate in candidates if candidate.is_file()]


def _text_in(place: Path) -> str | None:
    """What a ``.json`` holds, or the tag ``comment`` of an image or a video; None if that is a remark of another program."""
    if place.suffix.lower() == ".json":
        try:
            return place.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{place} can't be read: {error}.") from error
    from opensora.core.frame_sources import open_frames  # imports torch

    with open_frames(place) as source:
        comment = source.info.metadata.get("comment", "")
    return comment if comment.lstrip().startswith("{") else None


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
