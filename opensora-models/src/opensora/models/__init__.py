"""Denoisers, autoencoders and text encoders.

They are found by name through their entry points (`opensora.core.load("models", "STDiT3-XL/2")`). The denoisers' classes can
be had from here too, and are imported when they are asked for.
"""

from importlib import import_module

_HOME_OF = {
    "DiT": "dit",
    "DiT_XL_2": "dit",
    "DiT_XL_2x2": "dit",
    "STDiT3": "stdit3",
    "STDiT3_3B_2": "stdit3",
    "STDiT3_XL_2": "stdit3",
}

__version__ = "0.1.0"
__all__ = sorted(_HOME_OF)  # noqa: PLE0605  # computed from the table above


def __getattr__(name: str) -> object:
    if name in _HOME_OF:
        return getattr(import_module(f"opensora.models.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
