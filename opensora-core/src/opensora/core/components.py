"""Components: found by name in the metadata of installed distributions, imported when they are used.

A component is a class that a setuptools entry point names. The entry's group is its kind (``opensora.models``), the entry's
name is the ``type=`` of configs (``"STDiT3-XL/2"``). Each class has a ``Spec``, an attrs class of its options, and is built
as ``Class(spec, **keywords)`` with those run-time keywords that its constructor asks for.

Listing and name errors read metadata only. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib import metadata, resources
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
from attrs import frozen

from opensora.core.errors import ComponentError, ConfigError

if TYPE_CHECKING:
    from opensora.core.config.structure import ComponentConfig

__all__ = [
    "KINDS",
    "Component",
    "available",
    "build",
    "construct",
    "find",
    "install_hint",
    "load",
    "preset",
    "refresh",
    "structure_spec",
]

KINDS: Mapping[str, str] = {
    "models": "model",
    "vaes": "VAE",
    "discriminators": "discriminator",
    "text_encoders": "text encoder",
    "prompters": "prompter",
    "schedulers": "scheduler",
    "datasets": "dataset",
    "accelerators": "accelerator",
    "attention": "attention kernel",
    "pipelines": "pipeline",
    "configs": "config folder",
    "hooks": "hook",
    "commands": "command",
}
"""Kinds of components: the last part of the entry-point group, and what messages call one of them."""

T = TypeVar("T")


@frozen(kw_only=True, order=True)
class Component:
    """One entry point of an installed distribution. Nothing has been imported."""

    kind: str
    name: str
    distribution: str
    version: str
    target: str
    """``module:attribute``, or for configs a dotted folder."""


@cache
def _entry_points() -> Any:  # EntryPoints; typeshed gives its old name up to Python 3.11
    return metadata.entry_points()


def refresh() -> None:
    """Forget what was found, so that distributions installed since are seen."""
    importlib.invalidate_caches()
    _entry_points.cache_clear()
    load.cache_clear()


def available(kind: str) -> list[Component]:
    """All installed components of a kind, sorted by name; a name that two distributions claim is there twice."""
    found = []
    for entry in _entry_points().select(group=f"opensora.{_checked(kind)}"):
        distribution, version = (entry.dist.name, entry.dist.version) if entry.dist else ("unknown", "")
        found.append(
            Component(kind=kind, name=entry.name, distribution=distribution, version=version, target=entry.value)
        )
    return sorted(found)


def find(kind: str, name: str) -> Component:
    """The component of that name.

    Args:
        name: As in ``type=``; ``"my-dist:STDiT3-XL/2"`` chooses between distributions that claim the same name.

    Raises:
        ComponentError: No such name (the message has the nearest, or the ``pip install`` line), or two claim it.
    """
    components = available(kind)
    matches = [one for one in components if name == one.name or _is_chosen(one, name)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ComponentError(_duplicate_message(kind, name, matches))
    raise ComponentError(_unknown_message(kind, name, components))


@cache
def load(kind: str, name: str) -> Any:
    """Import the component of that name.

    Raises:
        ComponentError: See `find`; or the import fails (the message has the distribution, the entry and the cause), or what
            it names is no component: not callable, or without an attrs class ``Spec``.
    """
    component = find(kind, name)
    where = f"{component.name} = {component.target} of {component.distribution} {component.version}"
    try:
        loaded = metadata.EntryPoint(component.name, component.target, f"opensora.{kind}").load()
    except (Exception, SystemExit) as error:  # whatever a plugin's import does, it must not take others down
        cause = f"{type(error).__name__}: {error}"
        raise ComponentError(
            f'The {KINDS[kind]} "{name}" can\'t be loaded ({where}): {cause}. Mend or uninstall {component.distribution}.'
        ) from error
    fits, wanted = _FORMS.get(kind, _FORMS[""])
    if not (callable(loaded) and fits(loaded)):
        raise ComponentError(f'"{name}" is no {KINDS[kind]} ({where}): it must be {wanted}. See docs/plugins.md.')
    return loaded


_FORMS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "": (lambda loaded: attrs.has(getattr(loaded, "Spec", object)), "a class with an attrs class `Spec`"),
    "attention": (callable, "a function"),
    "commands": (
        lambda loaded: callable(getattr(loaded, "add_arguments", None)) and callable(getattr(loaded, "run", None)),
        "a class with methods `add_arguments` and `run`",
    ),
}
"""What a component of a kind must be; the first for kinds that are not named."""


def structure_spec(
    kind: str, config: ComponentConfig, *, locations: Mapping[Any, str] | None = None, path: tuple[str, ...] = ()
) -> Any:
    """Check ``config``'s options against the component's ``Spec`` and return that spec.

    Raises:
        ComponentError: See `load`.
        ConfigError: An option is unknown, missing or of the wrong type.
    """
    from opensora.core.config.structure import structure

    return structure(load(kind, config.type).Spec, config.options, locations=locations, path=path)


def build(kind: str, config: ComponentConfig | Mapping[str, Any], **keywords: Any) -> Any:
    """Structure the options, then construct the component. ``config`` may be a plain ``dict(type=..., ...)``.

    Args:
        keywords: Run-time facts; the constructor is given those that it names.

    Raises:
        ComponentError, ConfigError: See `structure_spec`.
    """
    from opensora.core.config.structure import ComponentConfig

    if not isinstance(config, ComponentConfig):
        options = dict(config)
        name = options.pop("type", None)
        if not isinstance(name, str):
            raise ConfigError(f"{config!r} has no type that is a component's name. Write dict(type=..., ...).")
        config = ComponentConfig(type=name, options=options)
    return construct(load(kind, config.type), structure_spec(kind, config), **keywords)


def construct(component: Any, spec: Any, **keywords: Any) -> Any:
    """``component(spec, ...)`` with those of the keywords that its constructor names."""
    named = _named_keywords(component)
    return component(spec, **{name: value for name, value in keywords.items() if named is None or name in named})


def _named_keywords(component: Any) -> set[str] | None:
    """What a constructor names, and its bases' as long as each hands ``**keywords`` on. None: it takes whatever comes."""
    bases = component.__mro__ if inspect.isclass(component) else ()
    named: set[str] = set()
    for constructor in [vars(base)["__init__"] for base in bases if "__init__" in vars(base)] or [component]:
        parameters = inspect.signature(constructor).parameters
        named |= set(parameters)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            return named
    return None


def preset(base: type[T], name: str, **defaults: object) -> type[T]:
    """A subclass of a component under a published name, whose ``Spec`` has other defaults; each can still be overridden.

    Args:
        base: The component's class.
        name: The subclass's Python name.
        defaults: Spec fields and their new defaults.
    """
    base_spec = base.Spec  # type: ignore[attr-defined]  # that is what makes it a component
    known = attrs.fields_dict(base_spec)
    fields = {
        key: attrs.field(
            default=value,
            validator=known[key].validator,
            converter=known[key].converter,
            metadata=dict(known[key].metadata),
            type=known[key].type,
            alias=known[key].alias,
            kw_only=True,
        )
        for key, value in defaults.items()
    }
    spec = attrs.make_class(f"{name}Spec", fields, bases=(base_spec,), frozen=True, kw_only=True, slots=True)
    spec.__module__, spec.__doc__ = base_spec.__module__, base_spec.__doc__  # where the types' names are known
    return type(name, (base,), {"Spec": spec, "__module__": base.__module__, "__doc__": base.__doc__})


def install_hint(kind: str, name: str) -> str | None:
    """The ``pip install`` line of the official package that has this component, or None if none has."""
    distribution = _official().get(kind, {}).get(name)
    return f"pip install {distribution}" if distribution else None


@cache
def _official() -> dict[str, dict[str, str]]:
    """{kind: {name: distribution}} of the five official packages, installed or not."""
    text = resources.files("opensora.core").joinpath("official_components.json").read_text(encoding="utf-8")
    official: dict[str, dict[str, str]] = json.loads(text)
    return official


def _checked(kind: str) -> str:
    if kind not in KINDS:
        raise ComponentError(f'"{kind}" is no kind of component. Kinds: {", ".join(KINDS)}.')
    return kind


def _is_chosen(component: Component, name: str) -> bool:
    """Whether ``name`` is ``distribution:name``; distributions compare as pip compares them, ``My_Dist`` like ``my-dist``."""
    distribution, _, rest = name.partition(":")
    return rest == component.name and _normal(distribution) == _normal(component.distribution)


def _normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _duplicate_message(kind: str, name: str, matches: Sequence[Component]) -> str:
    choices = " or ".join(f'type="{one.distribution}:{one.name}"' for one in matches)
    owners = " and ".join(f"{one.distribution} {one.version}" for one in matches)
    number = "Two" if len(matches) == 2 else len(matches)
    return f'{number} distributions have a {KINDS[kind]} named "{name}": {owners}. Choose with {choices}, or uninstall one.'


def _unknown_message(kind: str, name: str, components: Iterable[Component]) -> str:
    message = f'No {KINDS[kind]} is named "{name}".'
    if hint := install_hint(kind, name):
        return f"{message} It is part of a package that is not installed: {hint}"
    names = [component.name for component in components]
    folded = {known.casefold(): known for known in (*names, *_official().get(kind, {}))}
    near = [folded[match] for match in difflib.get_close_matches(name.casefold(), folded, n=3, cutoff=0.5)]
    if near:
        quoted = ", ".join(f'"{one}"' + ("" if one in names else f" ({install_hint(kind, one)})") for one in near)
        message += f" Nearest: {quoted}."
    elif names:
        installed = sorted(set(names))
        rest = f" and {len(installed) - 8} more" if len(installed) > 8 else ""
        message += f" Installed: {', '.join(installed[:8])}{rest}."
    return f"{message} All: opensora plugins --kind {kind}"
