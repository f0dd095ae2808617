"""The core of opensora: components found by name, and the pipelines that compose them.

What plugins need is importable from here. Nothing is imported before it is asked for, so that ``opensora --help`` doesn't
wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the same names for type checkers and editors, which don't run __getattr__
    from opensora.core.attention import use_kernel as use_kernel
    from opensora.core.components import Component as Component
    from opensora.core.components import available as available
    from opensora.core.components import build as build
    from opensora.core.components import find as find
    from opensora.core.components import load as load
    from opensora.core.components import preset as preset
    from opensora.core.conditioning import Conditioning as Conditioning
    from opensora.core.errors import CheckpointError as CheckpointError
    from opensora.core.errors import ComponentError as ComponentError
    from opensora.core.errors import ConfigError as ConfigError
    from opensora.core.errors import DataError as DataError
    from opensora.core.errors import MachineError as MachineError
    from opensora.core.errors import NonFiniteLossError as NonFiniteLossError
    from opensora.core.errors import OpenSoraError as OpenSoraError
    from opensora.core.errors import ShapeError as ShapeError
    from opensora.core.errors import UserError as UserError
    from opensora.core.errors import WeightsError as WeightsError
    from opensora.core.hookspecs import hook as hook
    from opensora.core.protocols import Clip as Clip
    from opensora.core.protocols import Dataset as Dataset
    from opensora.core.protocols import Denoiser as Denoiser
    from opensora.core.protocols import SampleState as SampleState
    from opensora.core.protocols import Scheduler as Scheduler
    from opensora.core.protocols import TextEncoder as TextEncoder
    from opensora.core.protocols import VideoAutoencoder as VideoAutoencoder
    from opensora.core.randomness import Draws as Draws
    from opensora.core.randomness import SampleDraws as SampleDraws
    from opensora.core.randomness import SampleKey as SampleKey
    from opensora.core.sequence import SequencePlan as SequencePlan

_HOMES = {
    "components": ("Component", "available", "build", "find", "load", "preset"),
    "conditioning": ("Conditioning",),
    "attention": ("use_kernel",),  # attention itself is opensora.core.attention.attention: the module has its name
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
    "sequence": ("SequencePlan",),
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
