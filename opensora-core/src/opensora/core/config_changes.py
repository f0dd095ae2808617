"""What differs between the config of a checkpoint and the one that goes on from it, and whether it may."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from attrs import frozen

__all__ = ["Change", "find_changes", "plain"]

_ABSENT = object()


@frozen
class Change:
    """One option that is another now."""

    key: str
    """Dotted."""
    then: str
    now: str
    is_missing: bool = False
    """Whether one of the two has no such key at all: they are of other versions, or of other components."""

    def __str__(self) -> str:
        return f"{self.key}: {self.then} -> {self.now}"

    def is_of(self, keys: frozenset[str]) -> bool:
        """Whether the option is one of ``keys``, or within one."""
        parts = self.key.split(".")
        return any(".".join(parts[:length]) in keys for length in range(1, len(parts) + 1))

    def is_within(self, components: Collection[str]) -> bool:
        """Whether it is an option of one of these components, and not of something in it."""
        component, _, option = self.key.partition(".")
        return component in components and bool(option) and "." not in option


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """A config's values as they come back from JSON."""
    made: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return made


def find_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Options that differ, in the order of the config; both as `plain` makes them."""
    return list(_compare((), then, now))


def _compare(path: tuple[str, ...], then: Any, now: Any) -> Iterator[Change]:
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys((*then, *now)):
            yield from _compare((*path, key), then.get(key, _ABSENT), now.get(key, _ABSENT))
    elif then != now:
        yield Change(".".join(path), _shown(then), _shown(now), is_missing=_ABSENT in (then, now))


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "not set"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
