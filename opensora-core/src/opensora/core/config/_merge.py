"""Configs put over one another, with the places where their keys were set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from opensora.core.config._origins import KeyPath

_DELETE = "_delete_"


def own_copy(value: Any) -> Any:
    """A copy in which no dict or list stands twice; ranges become lists, which have a place in configs."""
    if isinstance(value, dict):
        return {key: own_copy(part) for key, part in value.items()}
    if isinstance(value, list | range):
        return [own_copy(part) for part in value]
    if type(value) is tuple:
        return tuple(map(own_copy, value))
    return value


def merge(
    base: Mapping[Any, Any],
    change: Mapping[Any, Any],
    path: KeyPath,
    base_locations: Mapping[KeyPath, str],
    change_locations: Mapping[KeyPath, str],
    locations: dict[KeyPath, str],
) -> dict[Any, Any]:
    """``change`` over ``base``: dicts merge key by key unless they say ``_delete_=True``. Fills ``locations``."""
    merged: dict[Any, Any] = {}
    for key in {**base, **change}:
        where = (*path, str(key))
        if key == _DELETE:
            continue
        if key not in change:
            merged[key] = base[key]
            locations.update(_located(base[key], where, base_locations))
        elif isinstance(change[key], dict):
            below = base.get(key)
            if not isinstance(below, dict) or change[key].get(_DELETE):
                below = {}
            if where in change_locations:
                locations[where] = change_locations[where]
            merged[key] = merge(below, change[key], where, base_locations, change_locations, locations)
        else:
            merged[key] = change[key]
            locations.update(_located(change[key], where, change_locations))
    return merged


def _located(value: Any, path: KeyPath, locations: Mapping[KeyPath, str]) -> Iterator[tuple[KeyPath, str]]:
    """The known locations of a value and of all within."""
    if path in locations:
        yield path, locations[path]
    if isinstance(value, dict | list | tuple):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _located(part, (*path, str(key)), locations)
