"""Accelerators of opensora, how a step runs on the hardware; and caches that spare work between sampling steps.

Nothing is imported before it is asked for, so that ``opensora plan --help`` doesn't wait for torch.
"""

from importlib import import_module

_HOMES = {
    "ddp": ("DDP", "DDPSpec"),
    "fsdp": ("FSDP", "FSDPSpec"),
    "colossalai": ("Zero2", "Zero2Seq", "Zero2SeqSpec", "Zero2Spec"),
    "pyramid_broadcast": ("PyramidBroadcast", "PyramidBroadcastSpec"),
    "step_cache": ("StepCache", "StepCacheSpec"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)  # noqa: PLE0605  # computed from the table above


def __getattr__(name: str) -> object:
    if name in _HOME_OF:
        return getattr(import_module(f"opensora.accel.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
