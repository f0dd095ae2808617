"""The shipped configs: safe to read, with options that the components of this package have."""

from __future__ import annotations

import ast
from importlib import resources

import pytest

from opensora.core.components import structure_spec
from opensora.core.config.evaluate import evaluate
from opensora.core.config.structure import ComponentConfig

FOLDER = resources.files("opensora.models") / "configs"
NAMES = ["dit/sample.py", "dit/train.py", "stdit3/sample.py", "stdit3/train.py"]
OF_CORE = ("type", "from_pretrained")


def test_all_are_listed_here():
    assert sorted(str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.py")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_components_take_their_options(name):
    values = evaluate(FOLDER / name).values
    model = dict(values["model"])
    assert {"dataset", "prompt"} & values.keys()
    for kind, options, taken in (
        ("models", model, OF_CORE),
        ("vaes", values["vae"], ("type",)),
        ("text_encoders", values["text_encoder"], ("type",)),
    ):
        own = {key: value for key, value in options.items() if key not in taken}
        structure_spec(kind, ComponentConfig(type=options["type"], options=own))


@pytest.mark.parametrize("name", NAMES)
def test_docstring_has_hardware_and_command(name):
    docstring = ast.get_docstring(ast.parse((FOLDER / name).read_text(encoding="utf-8")))
    assert "Hardware:" in docstring
    assert f"opensora-run {name}" in docstring
