"""Calibrations on disk: one file for one model, in it one calibration for each kind of video."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import attrs
import torch
from attrs import define, frozen
from torch import nn

from opensora.accel._calibration import Calibration
from opensora.core.config.structure import structure, unstructure
from opensora.core.errors import ConfigError
from opensora.core.protocols import Scheduler
from opensora.core.run_folder import write_atomically

__all__ = ["CalibrationFile", "Kind", "Model", "describe_scheduler"]

_FORMAT = "opensora step-cache 1"
_LOOKED_AT = 64  # values of each parameter


@frozen(kw_only=True)
class Model:
    """Whose outputs were measured."""

    type: str
    parameters: int
    digest: str
    """Of names, shapes and some of the values."""

    @classmethod
    def of(cls, denoiser: nn.Module, *, called: str) -> Model:
        """Of a denoiser with its weights, on any device."""
        digest, count = hashlib.blake2b(digest_size=8), 0
        for name, parameter in denoiser.named_parameters():
            count += parameter.numel()
            values = parameter.detach().flatten()[:: max(1, parameter.numel() // _LOOKED_AT)]
            digest.update(f"{name} {list(parameter.shape)}".encode())
            digest.update(values.to("cpu", torch.float32).numpy().tobytes())
        return cls(type=called, parameters=count, digest=digest.hexdigest())

    def __str__(self) -> str:
        return f"{self.type} with {self.parameters:,} parameters ({self.digest})"


@frozen(kw_only=True)
class Kind:
    """All that a calibration depends on but for the model: videos of one kind share it."""

    scheduler: str
    """Class and options."""
    latents: tuple[int, ...]
    """(C, T, H, W)."""
    guidance_scale: float
    frames: tuple[float, ...] | None
    """The frame mask, [T]; None: all frames are generated."""
    tolerance: float
    beside: str
    """What else the run's config says that changes outputs: precision and other hooks."""


@frozen(kw_only=True)
class _Entry:
    kind: Kind
    calibration: Calibration


@frozen(kw_only=True)
class _Content:
    format: str
    model: Model
    entries: list[_Entry]


@define(eq=False)
class CalibrationFile:
    """Reads and writes calibrations."""

    path: Path
    content: _Content | None = None
    """None: there is no file yet."""

    @classmethod
    def open(cls, path: Path) -> CalibrationFile:
        """Read a file, if it is there.

        Raises:
            ConfigError: It is none of ours, cut off, or can't be read; or there is no such folder.
        """
        if not path.parent.is_dir():
            raise ConfigError(
                f"The folder of the calibration file {path} does not exist. Make it, or name another file."
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return cls(path)
        except OSError as error:
            raise ConfigError(f"The calibration file {path} can't be read: {error.strerror}.") from error
        except ValueError as error:
            raise ConfigError(_useless(path, f"it is no JSON, or cut off ({error})")) from error
        if not isinstance(values, dict) or values.get("format") != _FORMAT:
            raise ConfigError(_useless(path, f'it has no "format": "{_FORMAT}"'))
        try:
            return cls(path, structure(_Content, values))
        except ConfigError as error:
            raise ConfigError(_useless(path, str(error).partition("\n")[0])) from error

    def check(self, model: Model) -> None:
        """See that the file is of this model.

        Raises:
            ConfigError: It is of another.
        """
        if self.content is not None and self.content.model != model:
            raise ConfigError(
                f"The calibration file {self.path} is of another model: {self.content.model}. This is {model}. "
                "Name another file, or delete this one to calibrate anew."
            )

    def find(self, kind: Kind) -> Calibration | None:
        """The calibration for videos of a kind, if there is one."""
        entries = self.content.entries if self.content is not None else []
        return next((entry.calibration for entry in entries if entry.kind == kind), None)

    def add(self, model: Model, kind: Kind, calibration: Calibration) -> None:
        """Write a calibration beside those that are there.

        Raises:
            MachineError: The file can't be written.
        """
        entries = [] if self.content is None else self.content.entries
        self.content = _Content(
            format=_FORMAT, model=model, entries=[*entries, _Entry(kind=kind, calibration=calibration)]
        )
        write_atomically(self.path, json.dumps(unstructure(self.content), indent=1))


def describe_scheduler(scheduler: Scheduler) -> str:
    """Class and options in one line."""
    spec = getattr(scheduler, "spec", None)
    options = attrs.asdict(spec) if spec is not None and attrs.has(type(spec)) else {}
    return f"{type(scheduler).__name__} {json.dumps(options, sort_keys=True, default=str)}"


def _useless(path: Path, why: str) -> str:
    return f"The calibration file {path} can't be used: {why}. Delete it to calibrate anew, or name another."
