"""The strict rules, as hooks of a cattrs converter. Imported when the first config is structured, not before."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import attrs
from cattrs import BaseValidationError, ClassValidationError, Converter, IterableValidationError
from cattrs.errors import AttributeValidationNote, IterableValidationNote

from opensora.core.config._origins import KeyPath
from opensora.core.config.structure import (
    ComponentConfig,
    MissingKeyError,
    UnknownKeyError,
    WrongValueError,
)
from opensora.core.errors import did_you_mean

Hook = Callable[[Any, Any], Any]

_SCALARS: Mapping[Any, tuple[type, ...]] = {
    bool: (bool,),
    int: (int,),
    float: (float, int),
    str: (str,),
    Path: (str, Path),
    type(None): (type(None),),
}
"""The types of values that each type of field takes; a bool counts as an int nowhere."""
_SEQUENCES = (list, Sequence, MutableSequence, Iterable)
_MAPPINGS = (dict, Mapping, MutableMapping)


@cache
def converter() -> Converter:
    """The converter, with a hook for each kind of type that a spec's field may have."""
    made = Converter()
    factories: list[tuple[Callable[[Any], bool], Callable[[Any], Hook]]] = [
        (lambda kind: kind in (Any, object), lambda _: lambda value, _: value),
        (lambda kind: get_origin(kind) is Literal, _literal),
        (lambda kind: get_origin(kind) in (Union, types.UnionType), _union),
        (lambda kind: (get_origin(kind) or kind) in _SEQUENCES, _sequence),
        (lambda kind: (get_origin(kind) or kind) is tuple, _tuple),
        (lambda kind: (get_origin(kind) or kind) in _MAPPINGS, _mapping),
        (lambda kind: isinstance(kind, type) and attrs.has(kind), _attrs),
        (lambda kind: kind is ComponentConfig, _component),
    ]
    for predicate, factory in factories:  # cattrs asks the last first
        made.register_structure_hook_factory(predicate, factory)
    for scalar in _SCALARS:  # cattrs has converting hooks for just these types, which go before all predicates
        made.register_structure_hook(scalar, _scalar(scalar))
    return made


def walk(error: Exception, path: KeyPath) -> Iterator[tuple[KeyPath, Exception]]:
    """(full key path, problem) of each single problem in what the converter raised."""
    if isinstance(error, UnknownKeyError):
        yield (*path, error.key), error
    elif isinstance(error, BaseValidationError):
        for part in error.exceptions:
            yield from walk(part, (*path, *_steps(part)))
    else:
        yield path, error


def _steps(error: Exception) -> list[str]:
    """The key or index at which an error of a group happened, if it belongs to one."""
    notes = getattr(error, "__notes__", ())
    names = [note.name for note in notes if isinstance(note, AttributeValidationNote)]
    return names + [str(note.index) for note in notes if isinstance(note, IterableValidationNote)]


def type_text(kind: Any) -> str:
    """A type in a user's words."""
    arguments = get_args(kind)
    if get_origin(kind) is Literal:
        choices = [f'"{choice}"' if isinstance(choice, str) else repr(choice) for choice in arguments]
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(map(type_text, arguments))
    if kind is type(None):
        return "None"
    if kind is ComponentConfig:
        return "dict(type=..., ...)"
    if isinstance(kind, type) and attrs.has(kind):
        return f"a dict of {kind.__name__}"
    origin = get_origin(kind) or kind
    name = getattr(origin, "__name__", str(origin))
    name = {"Sequence": "list", "Mapping": "dict", "Iterable": "list"}.get(name, name)
    inner = ", ".join("..." if argument is Ellipsis else type_text(argument) for argument in arguments)
    return f"{name}[{inner}]" if inner else str(name)


def _scalar(kind: Any) -> Hook:
    def structure(value: Any, _: Any) -> Any:
        if not isinstance(value, _SCALARS[kind]) or (isinstance(value, bool) and kind is not bool):
            raise WrongValueError(value, type_text(kind))
        return None if value is None else kind(value)

    return structure


def _literal(kind: Any) -> Hook:
    choices = get_args(kind)

    def structure(value: Any, _: Any) -> Any:
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            near = did_you_mean(value, filter(_is_text, choices)) if isinstance(value, str) else ""
            raise WrongValueError(value, type_text(kind), near)
        return value

    return structure


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _union(kind: Any) -> Hook:
    members = get_args(kind)

    def structure(value: Any, _: Any) -> Any:
        fitting = [member for member in members if _fits(value, member)]
        fitting.sort(key=lambda member: member is not type(value))  # 3 for `float | int` stays an int
        for member in fitting[:-1]:
            try:
                return converter().structure(value, member)
            except (BaseValidationError, WrongValueError):
                continue
        if not fitting:
            raise WrongValueError(value, type_text(kind))
        return converter().structure(value, fitting[-1])  # its error is the most telling one

    return structure


def _fits(value: object, kind: Any) -> bool:
    """Whether a value has the outer form of a type, so that what's wrong inside is worth reporting."""
    origin = get_origin(kind) or kind
    if origin in _SCALARS:
        return isinstance(value, _SCALARS[origin]) and (origin is bool or not isinstance(value, bool))
    if origin is Literal:
        return type(value) in {type(choice) for choice in get_args(kind)}
    if origin is tuple or origin in _SEQUENCES:
        return isinstance(value, list | tuple)
    if origin in _MAPPINGS or attrs.has(origin):
        return isinstance(value, Mapping) or (isinstance(origin, type) and isinstance(value, origin))
    return True


def _sequence(kind: Any) -> Hook:
    (inner,) = get_args(kind) or (Any,)

    def structure(value: Any, _: Any) -> list[Any]:
        if not isinstance(value, list | tuple):
            raise WrongValueError(value, type_text(kind))
        return _items(((index, part, inner) for index, part in enumerate(value)), kind)

    return structure


def _tuple(kind: Any) -> Hook:
    inner = get_args(kind)
    repeated = not inner or inner[-1] is Ellipsis

    def structure(value: Any, _: Any) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple) or not (repeated or len(value) == len(inner)):
            raise WrongValueError(value, type_text(kind))
        kinds = [inner[0] if inner else Any] * len(value) if repeated else inner
        numbered = zip(range(len(value)), value, kinds, strict=True)
        return tuple(_items(numbered, kind))

    return structure


def _mapping(kind: Any) -> Hook:
    key_kind, inner = get_args(kind) or (Any, Any)

    def structure(value: Any, _: Any) -> dict[Any, Any]:
        if not isinstance(value, Mapping):
            raise WrongValueError(value, type_text(kind))
        keys = _items(((key, key, key_kind) for key in value), kind)
        return dict(zip(keys, _items(((key, part, inner) for key, part in value.items()), kind), strict=True))

    return structure


def _items(items: Iterable[tuple[Any, Any, Any]], kind: Any) -> list[Any]:
    """Structure (index or key, value, type) one by one; the errors of all become one group."""
    structured, errors = [], []
    for index, value, inner in items:
        try:
            structured.append(converter().structure(value, inner))
        except Exception as error:
            error.add_note(IterableValidationNote("", index, inner))
            errors.append(error)
    if errors:
        raise IterableValidationError(f"in {kind}", errors, kind)
    return structured


def _attrs(cls: Any) -> Hook:
    attrs.resolve_types(cls)
    fields: dict[str, attrs.Attribute[Any]] = {one.alias: one for one in attrs.fields(cls) if one.init}

    def structure(value: Any, _: Any) -> Any:
        if not isinstance(value, Mapping):
            raise WrongValueError(value, type_text(cls))
        errors: list[Exception] = [UnknownKeyError(str(key), cls) for key in value if key not in fields]
        parts: dict[str, Any] = {}
        for name, one in fields.items():
            kind = Any if one.type is None else one.type
            try:
                if name in value:
                    raw = value[name]
                    parts[name] = raw if raw is None and one.converter else converter().structure(raw, kind)
                elif one.default is attrs.NOTHING:
                    raise MissingKeyError(type_text(kind))
            except Exception as error:
                errors.append(_noted(error, name))
        if errors:
            raise ClassValidationError(f"in {cls.__name__}", errors, cls)
        return _construct(cls, parts)

    return structure


def _construct(cls: Any, parts: dict[str, Any]) -> Any:
    try:
        return cls(**parts)
    except (TypeError, ValueError, LookupError) as error:
        errors = _validator_errors(cls, parts) or [error]
        raise ClassValidationError(f"in {cls.__name__}", errors, cls) from error


def _validator_errors(cls: Any, parts: dict[str, Any]) -> list[Exception]:
    """What each field's validator has to say; attrs itself stops at the first, and names no field."""
    errors: list[Exception] = []
    for one in attrs.fields(cls):
        if one.alias not in parts or not (one.validator or one.converter):
            continue
        try:
            value = one.converter(parts[one.alias]) if one.converter else parts[one.alias]
            if one.validator:
                bare = object.__new__(cls)  # most validators don't look at the instance
                one.validator(bare, one, value)
        except (TypeError, ValueError, LookupError) as error:
            errors.append(_noted(error, one.alias))
        except AttributeError:
            continue  # this one does, and needs the other fields: the error of the whole will do
    return errors


def _noted(error: Exception, name: str) -> Exception:
    error.add_note(AttributeValidationNote("", name, None))
    return error


def _component(_: Any) -> Hook:
    def structure(value: Any, _: Any) -> ComponentConfig:
        if isinstance(value, ComponentConfig):
            return value
        if not isinstance(value, Mapping):
            raise WrongValueError(value, type_text(ComponentConfig))
        options = dict(value)
        try:
            if "type" not in options:
                raise MissingKeyError("a component's name; see opensora plugins")
            name = options.pop("type")
            if not isinstance(name, str):
                raise WrongValueError(name, "a component's name")
        except (MissingKeyError, WrongValueError) as error:
            raise ClassValidationError("in a component", [_noted(error, "type")], ComponentConfig) from None
        return ComponentConfig(name, options)

    return structure
