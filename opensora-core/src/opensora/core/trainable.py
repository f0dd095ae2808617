"""Which parameters of a network are trained: chosen by patterns of their names, whatever the network."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from torch import nn

from opensora.core.errors import ConfigError

if TYPE_CHECKING:
    from opensora.core.hooking import Hooks
    from opensora.core.pipelines.train_spec import TrainSpec

__all__ = ["adapt", "compile_patterns", "match_parameters", "matches", "no_match"]


def adapt(denoiser: nn.Module, hooks: Hooks, spec: TrainSpec) -> None:
    """Let hooks change a denoiser that is going to be trained (``denoiser_built``), and leave it what is to be trained.

    Those are, with ``spec.trainable``, the parameters that it names, and those that hooks have added. Without it, what the
    model and the hooks say.

    Raises:
        ConfigError: A pattern matches nothing.
    """
    if spec.trainable is None:
        hooks.denoiser_built(denoiser=denoiser, spec=spec)
        return
    before = {id(parameter) for parameter in denoiser.parameters()}
    chosen = {id(parameter) for parameter in match_parameters(denoiser, spec.trainable)}  # before hooks rename anything
    hooks.denoiser_built(denoiser=denoiser, spec=spec)
    for parameter in denoiser.parameters():
        if id(parameter) in before:
            parameter.requires_grad_(id(parameter) in chosen)


def match_parameters(module: nn.Module, patterns: Sequence[str]) -> list[nn.Parameter]:
    """Parameters whose name, or the name of a module that they are in, is matched as a whole by one of ``patterns``.

    Raises:
        ConfigError: A pattern is no regular expression, or matches nothing; the message has the nearest names.
    """
    parameters = dict(module.named_parameters())
    found: dict[str, nn.Parameter] = {}
    for text, pattern in zip(patterns, compile_patterns(patterns, key="trainable"), strict=True):
        matched = {name: parameter for name, parameter in parameters.items() if matches(pattern, name)}
        if not matched:
            raise no_match(
                "trainable", text, {path for name in parameters for path in _paths(name)}, "parameter or module"
            )
        found |= matched
    return list(found.values())


def matches(pattern: re.Pattern[str], name: str) -> bool:
    """Whether a dotted name, or that of something that it is in, is matched as a whole."""
    return any(pattern.fullmatch(path) for path in _paths(name))


def _paths(name: str) -> Iterable[str]:
    """A dotted name, and all that it is in: a.b.c, a.b, a."""
    parts = name.split(".")
    return (".".join(parts[:end]) for end in range(len(parts), 0, -1))


def compile_patterns(patterns: Sequence[str], *, key: str) -> list[re.Pattern[str]]:
    """Regular expressions. ``key`` is where they stand in the config, for the message.

    Raises:
        ConfigError: One is none.
    """
    compiled = []
    for text in patterns:
        try:
            compiled.append(re.compile(text))
        except re.error as error:
            raise ConfigError(f'{key}: "{text}" is no regular expression: {error}.') from error
    return compiled


def no_match(key: str, pattern: str, names: Iterable[str], what: str) -> ConfigError:
    """The error for a pattern that matches none of ``names``: it lists the nearest, or the shortest where none is near."""
    known = sorted(names, key=lambda name: (name.count("."), name))
    folded = re.sub(r"[^\w.]+", "", pattern)
    near = difflib.get_close_matches(folded, known, n=4, cutoff=0.4)
    listed = ", ".join(near or known[:8])
    rest = "" if near or len(known) <= 8 else f" and {len(known) - 8} more"
    kind = "Nearest" if near else "There are"
    return ConfigError(f'{key}: no {what} is matched by "{pattern}" as a whole. {kind}: {listed}{rest}.')
