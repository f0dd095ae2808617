"""Where a module is, without importing it or the packages around it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path


def find_module(name: str) -> ModuleSpec | None:
    """The spec of a dotted name, as the import system would find it; `importlib.util.find_spec` imports the parents."""
    search: Sequence[str] | None = None
    spec: ModuleSpec | None = None
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        spec = _find(".".join(parts[:depth]), search)
        if spec is None:
            return None
        search = list(spec.submodule_search_locations or ())
    return spec


def find_folders(name: str) -> list[Path]:
    """The folders of a package, empty if there is no such package."""
    spec = find_module(name)
    return [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []


def _find(name: str, search: Sequence[str] | None) -> ModuleSpec | None:
    if name in sys.modules and (spec := getattr(sys.modules[name], "__spec__", None)) is not None:
        return spec  # type: ignore[no-any-return]
    for finder in sys.meta_path:
        find_spec = getattr(finder, "find_spec", None)
        spec = find_spec(name, search) if find_spec else None
        if spec is not None:
            return spec  # type: ignore[no-any-return]
    return None
