"""Where each value of a config was written down."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

KeyPath = tuple[str, ...]


def shown_path(path: Path) -> str:
    """The shorter of the path from here and the whole path; for messages."""
    absolute = str(path.absolute())
    try:
        relative = str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return absolute
    return min(relative, absolute, key=len)


class Origins:
    """Remembers the line of each entry of a dict, list or tuple, whatever names the value travels through."""

    def __init__(self) -> None:
        self._entries: dict[int, dict[object, str]] = {}
        self._alive: list[object] = []  # an id stays ours only while its object lives

    def record(self, container: object, entries: Mapping[object, str]) -> None:
        """Note the locations of a container's entries, by key or index."""
        self._entries[id(container)] = dict(entries)
        self._alive.append(container)

    def of(self, container: object) -> Mapping[object, str]:
        """The locations of its entries, as far as they are known."""
        return self._entries.get(id(container), {})

    def paths(self, value: object, path: KeyPath, location: str) -> Iterator[tuple[KeyPath, str]]:
        """(key path, location) of ``value``, which stands at ``location``, and of all within."""
        yield path, location
        if isinstance(value, dict | list | tuple):
            known = self.of(value)
            for key, part in value.items() if isinstance(value, dict) else enumerate(value):
                yield from self.paths(part, (*path, str(key)), known.get(key, location))


def written_paths(node: ast.expr, path: KeyPath, file: str) -> Iterator[tuple[KeyPath, str]]:
    """(key path, location) as far as the source alone tells; for files that are executed as Python."""
    yield path, f"{file}:{node.lineno}"
    match node:
        case ast.Call(func=ast.Name(id="dict"), keywords=keywords):
            entries = [(keyword.arg, keyword.value, keyword.lineno) for keyword in keywords]
        case ast.Dict(keys=keys, values=values):
            entries = [
                (str(key.value) if isinstance(key, ast.Constant) else None, value, value.lineno)
                for key, value in zip(keys, values, strict=True)
            ]
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            entries = [(str(index), element, element.lineno) for index, element in enumerate(elements)]
        case _:
            entries = []
    for key, value, line in entries:
        if key is not None:
            yield from written_paths(value, (*path, key), file)
            yield (*path, key), f"{file}:{line}"
