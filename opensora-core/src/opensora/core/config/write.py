"""Write a config back as the Python file that it could have been."""

from __future__ import annotations

import keyword
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opensora.core.errors import ConfigError
from opensora.core.run_folder import write_atomically

__all__ = ["format_config", "format_value", "write_config"]

_WIDTH = 120
_INDENT = "    "


def write_config(path: Path, values: Mapping[str, Any], header: str) -> None:
    """Write ``values`` to ``path``, whole or not at all, so that `evaluate` reads equal values back.

    Args:
        header: The file's docstring: what it is and how to run it.

    Raises:
        ConfigError: A value has no form in a config, such as a function.
        MachineError: The file can't be written.
    """
    write_atomically(path, format_config(values, header))


def format_config(values: Mapping[str, Any], header: str) -> str:
    """The text that `write_config` writes."""
    lines = [f"{_docstring(header)}\n"]
    for key, value in values.items():
        if not _is_name(key) or key.startswith("_"):
            raise ConfigError(f"{key!r} can't be a key of a config: it is no name, or starts with an underscore.")
        try:
            lines.append(f"{key} = {format_value(value, used=len(key) + 3)}\n")
        except ConfigError as error:
            raise ConfigError(f"{key} can't be written to a config: {error}") from None
    return "".join(lines)


def format_value(value: Any, *, used: int = 0, indent: str = "") -> str:
    """A value as Python source; over several lines if it doesn't fit into one.

    Args:
        used: Characters that stand before it in its line.
        indent: Of its line.

    Raises:
        ConfigError: It is or holds something other than dicts, lists, tuples, strings, numbers, paths and None.
    """
    short = _one_line(value)
    if used + len(indent) + len(short) <= _WIDTH or not (isinstance(value, dict | list | tuple) and value):
        return short
    inner = indent + _INDENT
    if isinstance(value, dict):
        named = _all_names(value)
        opening, closing = ("dict(", ")") if named else ("{", "}")
        heads = [f"{key}=" if named else f"{_one_line(key)}: " for key in value]
        parts = list(value.values())
    else:
        opening, closing = ("[", "]") if isinstance(value, list) else ("(", ")")
        heads, parts = [""] * len(value), list(value)
    rows = [
        f"{inner}{head}{format_value(part, used=len(head) + 1, indent=inner)},\n"
        for head, part in zip(heads, parts, strict=True)
    ]
    return f"{opening}\n{''.join(rows)}{indent}{closing}"


def _one_line(value: Any) -> str:
    match value:
        case None | bool() | int() | str():
            return _quoted(value) if isinstance(value, str) else repr(value)
        case float():
            return repr(value) if math.isfinite(value) else f'float("{value}")'
        case dict() if _all_names(value):
            return f"dict({', '.join(f'{key}={_one_line(part)}' for key, part in value.items())})"
        case dict():
            return f"{{{', '.join(f'{_one_line(key)}: {_one_line(part)}' for key, part in value.items())}}}"
        case list():
            return f"[{', '.join(map(_one_line, value))}]"
        case tuple():
            return f"({', '.join(map(_one_line, value))}{',' if len(value) == 1 else ''})"
        case Path():
            return _quoted(str(value))
        case _:
            raise ConfigError(f"{value!r:.80} is of type {type(value).__name__}, which has no form in a config.")


def _quoted(text: str) -> str:
    """In double quotes where that needs no more escapes than Python's own choice."""
    written = repr(text)
    return f'"{written[1:-1]}"' if written[0] == "'" and '"' not in written and "\\'" not in written else written


def _docstring(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
    escaped = "".join(char if char == "\n" or char.isprintable() else ascii(char)[1:-1] for char in escaped)
    return f'"""{escaped}\n"""' if escaped.endswith('"') else f'"""{escaped}"""'


def _all_names(value: Mapping[Any, Any]) -> bool:
    return all(_is_name(key) for key in value)


def _is_name(key: object) -> bool:
    # normalized identifiers alone: Python reads other spellings of a letter as that letter
    return isinstance(key, str) and key.isidentifier() and key.isascii() and not keyword.iskeyword(key)
