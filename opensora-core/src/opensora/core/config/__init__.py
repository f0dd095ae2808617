"""Configs: read, overridden, checked and written back."""

from opensora.core.config.evaluate import Config, evaluate, evaluate_literal
from opensora.core.config.structure import ComponentConfig, SpecField, spec_fields, structure
from opensora.core.config.write import format_config, write_config

__all__ = [
    "ComponentConfig",
    "Config",
    "SpecField",
    "evaluate",
    "evaluate_literal",
    "format_config",
    "spec_fields",
    "structure",
    "write_config",
]
