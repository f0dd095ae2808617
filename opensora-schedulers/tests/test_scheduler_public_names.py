"""``__all__`` is what is there, and the registered names lead to the classes."""

from __future__ import annotations

import tomllib
from importlib import import_module
from inspect import isclass, isfunction
from pathlib import Path

import pytest

import opensora.schedulers


@pytest.mark.parametrize(
    "name",
    ["dpm_solver", "guidance", "iddpm", "iddpm_speed", "noise_schedules", "rectified_flow", "sampling", "solvers"],
)
def test_all_lists_the_public_names(name):
    module = import_module(f"opensora.schedulers.{name}")
    own = {
        key
        for key, value in vars(module).items()
        if (isclass(value) or isfunction(value)) and value.__module__ == module.__name__ and not key.startswith("_")
    }
    assert own <= set(module.__all__)
    assert all(hasattr(module, key) for key in module.__all__)
    assert module.__all__ == sorted(module.__all__)


def test_the_package_exports_what_it_says():
    assert all(hasattr(opensora.schedulers, key) for key in opensora.schedulers.__all__)


def test_entry_points_lead_to_components():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    entries = project["entry-points"]["opensora.schedulers"]
    assert set(entries) == {"dpm-solver", "iddpm", "iddpm-speed", "rflow"}
    for target in entries.values():
        module, _, name = target.partition(":")
        component = getattr(import_module(module), name)
        assert component(component.Spec()).num_timesteps == 1000
