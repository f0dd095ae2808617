"""Every error that opensora raises on purpose.

    OpenSoraError                 something went wrong that we can name (exit code 1)
    └── UserError                 something that the user can mend (exit code 2)
        ├── ConfigError           a config, a flag or an option is wrong
        ├── ComponentError        a component can't be had: unknown, claimed twice, broken
        ├── ShapeError            a size, length or number of channels does not fit
        ├── WeightsError          a weights file can't be read, or does not fit the model
        ├── CheckpointError       a run can't be saved or resumed
        ├── DataError             a table, video, image or prompt file can't be used
        ├── MachineError          this machine can't do it: device, dtype, missing package, port
        ├── NonFiniteLossError    training stopped because the loss is not a number
        └── PeerError             another process of the run could not go on

The commands print the message alone; ``--debug`` shows the traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "ComponentError",
    "ConfigError",
    "DataError",
    "MachineError",
    "NonFiniteLossError",
    "OpenSoraError",
    "PeerError",
    "ShapeError",
    "UserError",
    "WeightsError",
    "did_you_mean",
]


class OpenSoraError(Exception):
    """Base of all errors that opensora raises on purpose."""

    exit_code = 1
    is_told_once = False
    """Whether all processes have the same message, so that only the main one says it."""


class UserError(OpenSoraError):
    """Something that the user can mend."""

    exit_code = 2


class ConfigError(UserError, ValueError):
    """A config, flag or option is wrong. ``location`` is ``file:line`` where it is known."""

    def __init__(self, message: str, *, location: str | None = None) -> None:
        self.location = location
        super().__init__(f"{location}: {message}" if location else message)


class ComponentError(UserError, LookupError):
    """A component can't be had: unknown name, one name claimed twice, or a plugin that fails to import."""


class ShapeError(UserError, ValueError):
    """A size, a length or a number of channels does not fit."""


class WeightsError(UserError, ValueError):
    """A weights file can't be read, or does not fit the model."""


class CheckpointError(UserError, RuntimeError):
    """A run can't be saved or resumed."""


class DataError(UserError, ValueError):
    """A table, video, image or prompt file can't be used."""


class MachineError(UserError, RuntimeError):
    """This machine can't do what was asked: a device, dtype, package or port is missing."""


class NonFiniteLossError(UserError, ArithmeticError):
    """Training stopped because the loss stayed NaN or infinite."""

    is_told_once = True


class PeerError(UserError, RuntimeError):
    """Another process of the run could not go on; its own error says why."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` Did you mean "x"?`` for the nearest known name, or nothing. Starts with a blank, to be appended to a message."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f' Did you mean "{near[0]}"?' if near else ""
