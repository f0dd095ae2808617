"""What a spec's source says about its fields, for ``--help`` and the config reference."""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache
from typing import Any

import attrs
from attrs import frozen

__all__ = ["SpecField", "spec_fields"]


@frozen
class SpecField:
    """One field of a spec, for people to read."""

    name: str
    type: str
    """As written in the source."""
    default: str | None
    """As a config would write it; None for a field that must be given."""
    help: str
    """The string under the field, in one line."""


@cache
def spec_fields(cls: type) -> tuple[SpecField, ...]:
    """The fields of an attrs class, in order, inherited ones included."""
    written: dict[str, tuple[str, str]] = {}
    for base in reversed(cls.__mro__):
        written.update({name: texts for name, texts in _written_fields(base).items() if texts != ("", "")})
    fields = []
    for one in attrs.fields(cls):
        if one.init:
            annotation, text = written.get(one.name, ("", ""))
            annotation = annotation or getattr(one.type, "__name__", str(one.type))
            fields.append(SpecField(one.alias, annotation, _default_text(one), text))
    return tuple(fields)


def _written_fields(cls: type) -> dict[str, tuple[str, str]]:
    """{field: (annotation, string under it)} as far as the class has a source."""
    if cls is object:
        return {}
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):  # made by a function, such as a preset
        return {}
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    found = {}
    for index, statement in enumerate(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            below = body[index + 1] if index + 1 < len(body) else None
            found[statement.target.id] = (ast.unparse(statement.annotation), _string(below))
    return found


def _string(statement: ast.stmt | None) -> str:
    match statement:
        case ast.Expr(value=ast.Constant(value=str() as text)):
            return " ".join(text.split())
        case _:
            return ""


def _default_text(one: attrs.Attribute[Any]) -> str | None:
    from opensora.core.config.structure import unstructure
    from opensora.core.config.write import format_value

    if one.default is attrs.NOTHING:
        return None
    default: Any = one.default
    if isinstance(default, attrs.Factory):  # type: ignore[arg-type]  # to type checkers it is a function
        if default.takes_self:
            return "..."
        default = default.factory()
    return format_value(unstructure(default))
