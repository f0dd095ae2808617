"""Keys of Open-Sora's own configs that have become something else here."""

from __future__ import annotations

import logging
from typing import Any

from opensora.core.config.evaluate import Config
from opensora.core.config.structure import locate
from opensora.core.errors import ConfigError

__all__ = ["modernize"]

log = logging.getLogger(__name__)

_MODEL_KEYS = (
    "enable_flash_attn",
    "enable_flashattn",
    "enable_layernorm_kernel",
    "enable_sequence_parallelism",
    "dtype",
)


def modernize(config: Config) -> Config:
    """The config with older keys dropped or turned into today's, and one line in the log that says so.

    ``plugin`` becomes ``accelerator``; ZeRO-2 with ``sp_size=1`` gives way to the automatic choice of single or ddp.

    Raises:
        ConfigError: Both ``plugin`` and ``accelerator`` are there, or one has the wrong type.
    """
    values, locations = dict(config.values), dict(config.locations)
    notes = _drop_model_keys(values)
    if "plugin" in values or "sp_size" in values:
        place = locate(locations, ("plugin",) if "plugin" in values else ("sp_size",)) or ""
        notes.append(_replace_plugin(values, place))
        locations[("accelerator",)] = place
    if notes:
        log.info("Keys of an older config: %s", "; ".join(notes))
    return config.part(values, locations)


def _drop_model_keys(values: dict[str, Any]) -> list[str]:
    model = values.get("model")
    found = [key for key in _MODEL_KEYS if isinstance(model, dict) and key in model]
    if not found:
        return []
    values["model"] = {key: value for key, value in values["model"].items() if key not in found}
    names = ", ".join(f"model.{key}" for key in found)
    return [f"{names} left out (kernels are chosen by themselves, precision is dtype, spreading a step is accelerator)"]


def _replace_plugin(values: dict[str, Any], place: str) -> str:
    plugin, sp_size = values.pop("plugin", "zero2"), values.pop("sp_size", 1)
    if not isinstance(plugin, str):
        raise ConfigError(f"plugin must be the name of an accelerator, not {plugin!r}.", location=place)
    if type(sp_size) is not int:
        raise ConfigError(f"sp_size must be a number, not {sp_size!r}.", location=place)
    if values.get("accelerator") is not None:
        raise ConfigError("Both plugin and accelerator are given. Keep accelerator.", location=place)
    if plugin == "zero2" and sp_size == 1:
        return 'plugin="zero2" left out (accelerator is single, or ddp with several processes)'
    values["accelerator"] = {"type": plugin, **({"sp_size": sp_size} if sp_size != 1 else {})}
    return f'plugin="{plugin}" turned into accelerator=dict(type="{plugin}")'
