"""``__all__`` is what is there, and the registered names lead to the classes."""

from __future__ import annotations

import tomllib
from importlib import import_module
from pathlib import Path

import opensora.accel
from opensora.core.accelerator import Accelerator


def test_all_lists_what_is_there():
    for module in (opensora.accel, import_module("opensora.accel.ddp")):
        assert module.__all__ == ["DDP", "DDPSpec"]
        assert all(hasattr(module, name) for name in module.__all__)


def test_entry_points_lead_to_accelerators():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    for target in project["entry-points"]["opensora.accelerators"].values():
        module, _, name = target.partition(":")
        assert issubclass(getattr(import_module(module), name), Accelerator)
