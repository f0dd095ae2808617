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
        ConfigError: ``without`` names a hook that isn't there.
        ComponentError: A hook is unknown or broken, or has a method that is no hook.
    """
    configs = {config.type: config for config in (*defaults, *chosen)}
    for name in without:
        if configs.pop(name, None) is None:
            raise ConfigError(f'without_hooks: no hook named "{name}" takes part.{did_you_mean(name, configs)}')
    manager = pluggy.PluginManager("opensora")
    manager.add_hookspecs(HookSpecs)
    for config in reversed(configs.values()):  # pluggy calls the last registered first
        manager.register(build("hooks", config), config.type)
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        owners = ", ".join(find("hooks", name).distribution for name in configs if name in str(error))
        raise ComponentError(
            f"{error} (from {owners or 'a hook'}). Hooks and their arguments: docs/plugins.md."
        ) from error
    return manager.hook
