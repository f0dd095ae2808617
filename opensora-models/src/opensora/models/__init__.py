"""Denoisers, autoencoders and text encoders.

They are found by name through their entry points (`opensora.core.load("models", "STDiT3-XL/2")`). The denoisers' classes can
be had from here too, and are imported when they are asked for.
"""

from importlib import import_module

_HOME_OF = {
    "DiT": "dit",
    "DiT_B_2": "dit",
    "DiT_B_4": "dit",
    "DiT_B_8": "dit",
    "DiT_L_2": "dit",
    "DiT_L_4": "dit",
    "DiT_L_8": "dit",
    "DiT_S_2": "dit",
    "DiT_S_4": "dit",
    "DiT_S_8": "dit",
    "DiT_XL_2": "dit",
    "DiT_XL_2x2": "dit",
    "DiT_XL_4": "dit",
    "DiT_XL_8": "dit",
    "DiffusersTransformer": "from_diffusers.transformer",
    "Latte": "latte",
    "LatteT2V": "latte_t2v",
    "LatteT2V_XL_2": "latte_t2v",
    "Latte_XL_2": "latte",
    "Latte_XL_2x2": "latte",
    "PixArt": "pixart",
    "PixArtMS": "pixart",
    "PixArtMS_XL_2": "pixart",
    "PixArtSigma": "pixart_sigma",
    "PixArtSigma_XL_2": "pixart_sigma",
    "PixArt_1B_2": "pixart",
    "PixArt_XL_2": "pixart",
    "STDiT": "stdit",
    "STDiT2": "stdit2",
    "STDiT2_XL_2": "stdit2",
    "STDiT3": "stdit3",
    "STDiT3_3B_2": "stdit3",
    "STDiT3_XL_2": "stdit3",
    "STDiT_XL_2": "stdit",
}

__version__ = "0.1.0"
__all__ = sorted(_HOME_OF)  # noqa: PLE0605  # computed from the table above


def __getattr__(name: str) -> object:
    if name in _HOME_OF:
        return getattr(import_module(f"opensora.models.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
