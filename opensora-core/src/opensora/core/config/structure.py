"""From the dicts of a config to attrs specs, strictly: nothing unknown, nothing missing, nothing converted by guess.

    spec = structure(TrainSpec, config.values, locations=config.locations)

All mistakes are reported at once, each with its place and, for a misspelt key, the nearest valid one:

    config.py:14: model.depht is not a field of STDiT3Spec. Did you mean "depth"?
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
from attrs import field, frozen

from opensora.core.config._spec_fields import SpecField, spec_fields
from opensora.core.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from opensora.core.config._origins import KeyPath

__all__ = ["ComponentConfig", "SpecField", "locate", "spec_fields", "structure", "unstructure"]

T = TypeVar("T")


@frozen
class ComponentConfig:
    """``dict(type=..., **options)``: which component, and options that its own ``Spec`` will check."""

    type: str
    options: dict[str, Any] = field(factory=dict)


def structure(
    cls: type[T],
    values: Mapping[str, Any],
    *,
    locations: Mapping[KeyPath, str] | None = None,
    path: KeyPath = (),
) -> T:
    """Check ``values`` against an attrs class and return an instance.

    A list serves as a tuple and the reverse, an int as a float. None goes unchecked to a field that has a converter.

    Args:
        locations: Where each key path was set; see `Config.locations`.
        path: The key path of ``values`` itself, for messages and ``locations``.

    Raises:
        ConfigError: One line for each mistake.
    """
    from opensora.core.config._structuring import converter, walk

    try:
        return converter().structure(dict(values), cls)
    except Exception as error:  # cattrs passes on whatever a validator or converter raised
        problems = list(walk(error, path))
        if not all(isinstance(problem, _MENDABLE) for _, problem in problems):
            raise
        raise _config_error(problems, locations or {}) from error


def locate(locations: Mapping[KeyPath, str], path: KeyPath) -> str | None:
    """``file:line`` of a key path, or of the nearest thing around it."""
    return next((locations[path[:end]] for end in range(len(path), -1, -1) if path[:end] in locations), None)


def unstructure(value: Any) -> Any:
    """The inverse of `structure`: attrs instances become dicts, as configs write them."""
    if isinstance(value, ComponentConfig):
        return {"type": value.type, **unstructure(value.options)}
    if attrs.has(type(value)):
        fields = (one for one in attrs.fields(type(value)) if one.init)
        return {one.alias: unstructure(getattr(value, one.name)) for one in fields}
    if isinstance(value, Mapping):
        return {key: unstructure(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(unstructure, value))
    return str(value) if isinstance(value, Path) else value


class UnknownKeyError(Exception):
    """A key that the class has no field for."""

    def __init__(self, key: str, cls: type) -> None:
        super().__init__(key)
        self.key, self.cls = key, cls

    def say(self, path: str) -> str:
        """The message, for the full key path."""
        names = [one.alias for one in attrs.fields(self.cls) if one.init]
        listed = (
            f"It has: {', '.join(names[:12])}{', ...' if len(names) > 12 else '.'}" if names else "It has no options."
        )
        hint = did_you_mean(self.key, names) or f" {listed}"
        helper = "" if "." in path or hint.startswith(" Did") else " Names of helpers start with an underscore."
        return f"{path} is not a field of {self.cls.__name__}.{hint}{helper}"


class MissingKeyError(Exception):
    """A field without default that isn't given."""

    def __init__(self, wanted: str) -> None:
        super().__init__(wanted)
        self.wanted = wanted

    def say(self, path: str) -> str:
        """The message, for the full key path."""
        return f"{path} is missing. It must be {self.wanted}."


class WrongValueError(Exception):
    """A value of the wrong type, length or choice."""

    def __init__(self, value: object, wanted: str, hint: str = "") -> None:
        super().__init__(value, wanted)
        self.value, self.wanted, self.hint = value, wanted, hint

    def say(self, path: str) -> str:
        """The message, for the full key path."""
        return f"{path} must be {self.wanted}, not {shown(self.value)}.{self.hint}"


_NOT = r", not \1"
_MENDABLE = (UnknownKeyError, MissingKeyError, WrongValueError, ValueError, TypeError, LookupError)


def shown(value: object) -> str:
    """A value with its type, cut to a readable length."""
    text = f'"{value}"' if isinstance(value, str) else repr(value)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return text if value is None or isinstance(value, bool) else f"{text} ({type(value).__name__})"


def _config_error(problems: list[tuple[KeyPath, Exception]], locations: Mapping[KeyPath, str]) -> ConfigError:
    found = [(_say(path, problem), locate(locations, path)) for path, problem in problems]
    if len(found) == 1:
        return ConfigError(found[0][0], location=found[0][1])
    return ConfigError("\n".join(str(ConfigError(message, location=location)) for message, location in found))


def _say(path: KeyPath, problem: Exception) -> str:
    full = ".".join(path)
    if isinstance(problem, UnknownKeyError | MissingKeyError | WrongValueError):
        return problem.say(full)
    text = str(problem.args[0] if problem.args else problem)
    if isinstance(problem, ConfigError) or not full:
        return text
    ours = re.match(rf"'{re.escape(path[-1])}' (.*)", text, re.DOTALL)  # attrs: 'depth' must be > 0: -1
    if not ours:
        return f"{full}: {text}"
    return f"{full} {re.sub(': ([^:]*)$', _NOT, ours[1])}."
