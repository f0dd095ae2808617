"""``__all__`` is what is there, and the registered names lead to the classes."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import opensora.accel
from opensora.core.accelerator import Accelerator

NAMES = {
    "ddp": ["DDP", "DDPSpec"],
    "fsdp": ["FSDP", "FSDPSpec"],
    "colossalai": ["Zero2", "Zero2Seq", "Zero2SeqSpec", "Zero2Spec"],
    "pyramid_broadcast": ["PyramidBroadcast", "PyramidBroadcastSpec"],
    "step_cache": ["StepCache", "StepCacheSpec"],
}


def test_all_lists_what_is_there():
    assert opensora.accel.__all__ == sorted(name for names in NAMES.values() for name in names)
    assert all(hasattr(opensora.accel, name) for name in opensora.accel.__all__)
    for module, names in NAMES.items():
        assert import_module(f"opensora.accel.{module}").__all__ == names


@pytest.mark.parametrize("group", ["accelerators", "hooks"])
def test_entry_points_lead_to_classes_with_options(group):
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    for target in project["entry-points"][f"opensora.{group}"].values():
        module, _, name = target.partition(":")
        component = getattr(import_module(module), name)
        assert component.Spec.__name__ == f"{name}Spec"
        assert issubclass(component, Accelerator) == (group == "accelerators")


def test_help_of_the_command_needs_no_torch():
    code = (
        "import contextlib, sys\nfrom opensora.core.commands.opensora import main\n"
        "with contextlib.suppress(SystemExit):\n    main(['plan', '--help'])\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "--fit" in done.stdout
