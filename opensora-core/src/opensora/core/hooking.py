"""Which hooks take part in a run."""

from __future__ import annotations

from collections.abc import Sequence

import pluggy

from opensora.core.components import build, find
from opensora.core.config.structure import ComponentConfig
from opensora.core.errors import ComponentError, ConfigError, did_you_mean
from opensora.core.hookspecs import HookSpecs

__all__ = ["Hooks", "build_hooks"]

Hooks = pluggy.HookRelay
"""Calls a hook in all that take part: ``hooks.step_end(run=run, update=update)``."""


def build_hooks(
    defaults: Sequence[ComponentConfig], chosen: Sequence[ComponentConfig] = (), *, without: Sequence[str] = ()
) -> Hooks:
    """Build hooks and register them; they are called in this order.

    Args:
        defaults: Of the pipeline.
        chosen: From the config; one of the same name replaces the default, others come after.
        without: Names to leave out.

    Raises:
        ConfigError: ``without`` names a hook that isn't there, or ``chosen`` names one twice.
        ComponentError: A hook is unknown or broken, has no hook method, or one that is no hook of that name or arguments.
    """
    names = [config.type for config in chosen]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f'hooks: "{twice}" is listed twice. Each hook takes part once.')
    configs = {config.type: config for config in (*defaults, *chosen)}
    for name in without:
        if configs.pop(name, None) is None:
            raise ConfigError(f'without_hooks: no hook named "{name}" takes part.{did_you_mean(name, configs)}')
    manager = pluggy.PluginManager("opensora")
    manager.add_hookspecs(HookSpecs)
    for config in reversed(configs.values()):  # pluggy calls the last registered first
        _register(manager, config)
    return manager.hook


def _register(manager: pluggy.PluginManager, config: ComponentConfig) -> None:
    """Build a hook and let it take part, if all its hook methods are known."""
    plugin = build("hooks", config)
    try:
        manager.register(plugin, config.type)
        manager.check_pending()
        problem = "" if manager.get_hookcallers(plugin) else "no method is marked with @opensora.core.hook"
        cause: Exception | None = None
    except pluggy.PluginValidationError as error:
        problem, cause = " ".join(str(error).split()), error
    if problem:
        owner = find("hooks", config.type)
        raise ComponentError(
            f'The hook "{config.type}" of {owner.distribution} {owner.version} ({owner.target}) can\'t take part: {problem}. '
            f"Hooks and their arguments: docs/plugins.md."
        ) from cause
