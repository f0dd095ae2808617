"""Where a module is, without importing it or the packages around it, which `importlib.util.find_spec` would."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path


def has_module(name: str) -> bool:
    """Whether the import system would find a module or package of this dotted name."""
    return _find(name)[0]


def find_folders(name: str) -> list[Path]:
    """The folders of a package, empty if there is no such package."""
    return [Path(folder) for folder in _find(name)[1]]


def _find(name: str) -> tuple[bool, list[str]]:
    """Whether it is there, and its folders if it is a package."""
    search: list[str] | None = None
    parts = name.split(".")
    for depth, part in enumerate(parts, start=1):
        try:
            spec = _find_spec(".".join(parts[:depth]), search)
            if spec is None:
                return False, []
            search = list(spec.submodule_search_locations or ())
        except KeyError:  # a folder without __init__.py looks for its parent among what is imported
            search = [str(folder) for around in search or () if (folder := Path(around, part)).is_dir()]
    return True, search or []


def _find_spec(name: str, search: Sequence[str] | None) -> ModuleSpec | None:
    if name in sys.modules and (spec := getattr(sys.modules[name], "__spec__", None)) is not None:
        return spec  # type: ignore[no-any-return]
    for finder in sys.meta_path:
        find_spec = getattr(finder, "find_spec", None)
        spec = find_spec(name, search) if find_spec else None
        if spec is not None:
            return spec  # type: ignore[no-any-return]
    return None
