"""What the command line changes in a config: the field's short flags, and any key by its dotted path.

--cfg-scale 4 --prompt "a wave" "a cat"      # flags of the table below
--model.depth 12 --log_every=5               # any key; a Python literal, or else text
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from attrs import frozen

from opensora.core.config._flags import FLAGS, Flag, Group
from opensora.core.config._origins import KeyPath
from opensora.core.config.evaluate import Config, evaluate_literal
from opensora.core.errors import ConfigError, did_you_mean

__all__ = [
    "FLAGS",
    "Flag",
    "Override",
    "add_flags",
    "apply_flags",
    "apply_overrides",
    "flag_groups",
    "given_flags",
    "parse_bool",
    "split_overrides",
]


@frozen
class Override:
    """One key that the command line sets."""

    flag: str
    """As typed: ``--model.depth``."""
    path: KeyPath
    value: Any


def split_overrides(arguments: Sequence[str], known: Collection[str]) -> tuple[list[str], list[Override]]:
    """Take ``--key value`` and ``--key=value`` of all keys that are no known flag out of the arguments.

    Args:
        known: Flags that the parser knows, such as ``--seed``.

    Returns:
        The other arguments, and the overrides in order.

    Raises:
        ConfigError: A key has no value.
    """
    others: list[str] = []
    overrides: list[Override] = []
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        position += 1
        flag, equals, text = argument.partition("=")
        if not _is_key_flag(flag) or flag in known:
            others.append(argument)
            continue
        if not equals:
            if position == len(arguments) or arguments[position].startswith("--"):
                raise ConfigError(f"{flag} needs a value.{did_you_mean(flag, known)}")
            text = arguments[position]
            position += 1
        overrides.append(Override(flag, tuple(flag[2:].split(".")), evaluate_literal(text)))
    return others, overrides


def _is_key_flag(text: str) -> bool:
    return re.fullmatch(r"--[^\W\d][\w-]*(\.[\w/:-]+)*", text) is not None


def apply_overrides(config: Config, overrides: Iterable[Override]) -> Config:
    """The config with keys set by path. Dicts on the way are made where they are missing.

    Raises:
        ConfigError: A path leads through something that has no keys, or to a list entry that isn't there.
    """
    values: Any = config.values
    locations = dict(config.locations)
    for override in overrides:
        values, path = _with(values, override.path, override)
        for key in [key for key in locations if key[: len(path)] == path]:
            del locations[key]
        locations[path] = override.flag
    return Config(values, locations, config.path)


def _with(container: Any, path: KeyPath, override: Override) -> tuple[Any, KeyPath]:
    """A copy of ``container`` with ``path`` set, and the path with its keys as they are spelled there."""
    if not path:
        return override.value, ()
    match container:
        case None:
            return _with({}, path, override)
        case dict():
            key = _spelled(container, path[0])
            below, inner = _with(container.get(key), path[1:], override)
            return {**container, key: below}, (str(key), *inner)
        case list() | tuple():
            items = list(container)
            if not (path[0].isdecimal() and int(path[0]) < len(items)):
                raise ConfigError(
                    f"{_spot(path, override)} has no entry {path[0]}; it has {len(items)}, counted from 0",
                    location=override.flag,
                )
            index = int(path[0])
            items[index], inner = _with(items[index], path[1:], override)
            return type(container)(items), (path[0], *inner)
        case _:
            raise ConfigError(
                f"{_spot(path, override)} is {container!r:.60}, which has no key {path[0]}", location=override.flag
            )


def _spelled(container: Mapping[Any, Any], key: str) -> Any:
    """The key of a dict that is meant: numbers may be its keys, and on the command line ``-`` serves for ``_``."""
    if key in container:
        return key
    if key.isdecimal() and any(isinstance(known, int) for known in container):
        return int(key)
    underscored = key.replace("-", "_")
    return underscored if underscored.isidentifier() else key


def _spot(path: KeyPath, override: Override) -> str:
    return ".".join(override.path[: len(override.path) - len(path)])


def flag_groups(pipeline: str) -> frozenset[Group]:
    """Which flags a pipeline takes: all that train share theirs, and ``replay``; ``stages`` takes any, others sampling's."""
    if pipeline == "stages":
        return frozenset(("all", "training", "sampling"))
    return frozenset(("all", "training" if pipeline.startswith(("train", "replay")) else "sampling"))


def apply_flags(config: Config, given: Mapping[str, Any], pipeline: str) -> Config:
    """The config with the values of short flags in the keys that they stand for.

    Args:
        given: Flag, such as ``--lr``, to its value; only those that the command line has.
        pipeline: Which one will run.

    Raises:
        ConfigError: A flag has no use in this pipeline, or the config lacks the component that it sets a key of.
    """
    overrides: list[Override] = []
    for flag in (flag for flag in FLAGS if flag.name in given):
        if flag.group not in flag_groups(pipeline):
            raise ConfigError(f'{flag.name} is a flag for {flag.group}; the pipeline "{pipeline}" has no use for it.')
        for dotted in (*flag.paths, *flag.also):
            path = tuple(dotted.split("."))
            if len(path) == 1 or config.values.get(path[0]) is not None:
                overrides.append(Override(flag.name, path, given[flag.name]))
            elif dotted not in flag.also:
                raise ConfigError(f"{flag.name} sets {dotted}, but the config has no {path[0]}.")
    changed = {override.path[0] for override in overrides}
    replaced = {key for flag in FLAGS if flag.name in given for key in flag.replaces} - changed
    kept = {key: value for key, value in config.values.items() if key not in replaced}
    return apply_overrides(config.part(kept, config.locations), overrides)


def add_flags(parser: argparse.ArgumentParser, defaults: Mapping[str, str]) -> None:
    """Add the table's flags to a parser, in groups. What isn't given leaves no attribute behind.

    Args:
        defaults: Dotted key to what it is without the flag, for the help.
    """
    titles: dict[Group, str] = {"all": "for all pipelines", "sampling": "for sampling", "training": "for training"}
    for group, title in titles.items():
        section = parser.add_argument_group(title)
        for flag in (flag for flag in FLAGS if flag.group == group):
            default = defaults.get(flag.paths[0])
            text = f"{flag.help} [{default}]" if default is not None else flag.help
            section.add_argument(
                flag.name, help=text.replace("%", "%%"), default=argparse.SUPPRESS, **_PARSING[flag.kind]
            )


def given_flags(arguments: argparse.Namespace) -> dict[str, Any]:
    """The table's flags among parsed arguments: ``{"--lr": 1e-4}``."""
    found = vars(arguments)
    names = {flag.name: flag.name[2:].replace("-", "_") for flag in FLAGS}
    return {flag: found[name] for flag, name in names.items() if name in found}


def parse_bool(text: str) -> bool:
    """yes/true/t/y/1 or no/false/f/n/0, in any case.

    Raises:
        ArgumentTypeError: Anything else.
    """
    folded = text.casefold()
    if folded in ("yes", "true", "t", "y", "1"):
        return True
    if folded in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f'must be yes or no (true/false, t/f, y/n, 1/0), not "{text}"')


def _parse_frames(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _parse_mark(text: str) -> bool | str:
    try:
        return parse_bool(text)
    except argparse.ArgumentTypeError:
        return text


def _parse_number(kind: type[int] | type[float], words: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f'must be {words}, not "{text}"') from None

    return parse


_INT, _FLOAT = _parse_number(int, "a whole number"), _parse_number(float, "a number")
_PARSING: Mapping[str, dict[str, Any]] = {
    "int": {"type": _INT, "metavar": "N"},
    "float": {"type": _FLOAT, "metavar": "X"},
    "str": {"metavar": "TEXT"},
    "bool": {"type": parse_bool, "metavar": "YES|NO"},
    "switch": {"action": "store_true"},
    "strs": {"nargs": "+", "metavar": "TEXT"},
    "pair": {"nargs": 2, "metavar": ("FROM", "TO")},
    "mark": {"type": _parse_mark, "metavar": "YES|NO|PNG"},
    "every": {"type": _INT, "nargs": "?", "const": 5, "metavar": "N"},
    "size": {"type": _INT, "nargs": 2, "metavar": ("HEIGHT", "WIDTH")},
    "frames": {"type": _parse_frames, "metavar": "N"},
}
