"""Public is what has no underscore in its path, and each module's ``__all__`` says so."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from importlib import import_module
from inspect import isclass, isfunction
from pathlib import Path

import pytest

import opensora.core

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(opensora.core.__path__, "opensora.core.")
    if not any(part.startswith("_") for part in module.name.split("."))
)
LISTED = [name for name in MODULES if name != "opensora.core.run" and hasattr(import_module(name), "__all__")]


@pytest.mark.parametrize("name", LISTED)
def test_all_names_what_is_there_once(name: str) -> None:
    module = import_module(name)
    assert [each for each in module.__all__ if not hasattr(module, each)] == []
    assert len(set(module.__all__)) == len(module.__all__)
    assert not [each for each in module.__all__ if each.startswith("_")]


CONTRACT = [
    "accelerator", "attention", "checkpoints", "components", "conditioning", "denoising", "errors", "frame_conditions",
    "frame_masks", "given_frames", "hooking", "hookspecs", "loading", "mask_strategy", "optimization", "prompt_files",
    "prompt_syntax", "prompts", "protocols", "randomness", "recipes", "references", "requests", "run_folder", "sampling",
    "seams", "sizes", "stopping", "testing", "text_cache", "text_cuts", "transforms", "video", "watermark", "weights",
]  # fmt: skip


@pytest.mark.parametrize("name", CONTRACT)
def test_all_names_every_public_class_and_function(name: str) -> None:
    module = import_module(f"opensora.core.{name}")
    own = {
        key
        for key, value in vars(module).items()
        if (isclass(value) or isfunction(value)) and value.__module__ == module.__name__ and not key.startswith("_")
    }
    assert own - set(module.__all__) == set()


def test_the_package_exports_what_it_says() -> None:
    for name in opensora.core.__all__:
        value = getattr(opensora.core, name)
        assert value.__module__.startswith(("opensora.core.", "pluggy")), name
    assert dir(opensora.core) == opensora.core.__all__ == sorted(opensora.core.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Conditionning'"):
        opensora.core.Conditionning  # noqa: B018


def test_no_exported_name_is_a_module_too() -> None:
    """Importing the module would put it in the name's place."""
    modules = {name.rpartition(".")[2] for name in MODULES}
    assert modules & set(opensora.core.__all__) == set()


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(opensora.core.__file__).read_text())
    (block,) = [statement for statement in tree.body if isinstance(statement, ast.If)]
    seen = {}
    for statement in block.body:
        assert isinstance(statement, ast.ImportFrom)
        seen.update({alias.asname: statement.module for alias in statement.names})
    assert sorted(seen) == opensora.core.__all__
    for name, module in seen.items():
        assert getattr(import_module(module), name) is getattr(opensora.core, name)


def test_every_error_belongs_to_the_family() -> None:
    errors = import_module("opensora.core.errors")
    for name in errors.__all__:
        if isclass(kind := getattr(errors, name)):
            assert issubclass(kind, errors.OpenSoraError)
            assert kind.exit_code == (2 if issubclass(kind, errors.UserError) else 1)
    assert str(errors.ComponentError("No model")) == "No model"  # a KeyError would add quotes
    assert str(errors.ConfigError("x is wrong.", location="config.py:3")) == "config.py:3: x is wrong."


def test_importing_core_imports_no_torch() -> None:
    program = "import opensora.core, sys; print(sorted({'torch', 'numpy', 'attrs', 'pluggy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
