"""The core of opensora: components found by name, and the pipelines that compose them.

What plugins need is importable from here. Nothing is imported before it is asked for, so that ``opensora --help`` doesn't
wait for torch.
"""

from importlib import import_module

_HOMES = {
    "components": ("Component", "available", "build", "find", "load", "preset"),
    "conditioning": ("Conditioning",),
    "attention": ("attention", "use_kernel"),
    "errors": (
        "CheckpointError",
        "ComponentError",
        "ConfigError",
        "DataError",
        "MachineError",
        "NonFiniteLossError",
        "OpenSoraError",
        "ShapeError",
        "UserError",
        "WeightsError",
    ),
    "hookspecs": ("hook",),
    "protocols": ("Clip", "Dataset", "Denoiser", "SampleState", "Scheduler", "TextEncoder", "VideoAutoencoder"),
    "randomness": ("Draws", "SampleDraws", "SampleKey"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__version__ = "0.1.0"
__all__ = sorted(_HOME_OF)  # noqa: PLE0605  # computed from the table above


def __getattr__(name: str) -> object:
    if name in _HOME_OF:
        return getattr(import_module(f"opensora.core.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
