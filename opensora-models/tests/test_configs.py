"""The shipped configs: safe to read, with options that the components of this package have, each explaining itself."""

from __future__ import annotations

import ast
from importlib import resources

import pytest

from opensora.core.components import structure_spec
from opensora.core.config.evaluate import evaluate
from opensora.core.config.names import find_text, iter_configs, resolve
from opensora.core.config.structure import ComponentConfig

FOLDER = resources.files("opensora.models") / "configs"
FILES = set(FOLDER.rglob("*.py"))
CONFIGS = [config for config in iter_configs() if config.distribution == "opensora-models"]
OF_CORE = ("type", "from_pretrained", "partial")
KINDS = {"model": "models", "vae": "vaes", "text_encoder": "text_encoders"}

each_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)


def test_every_file_is_found_by_its_name():
    assert {config.path for config in CONFIGS} == FILES
    assert len(CONFIGS) == 59
    assert all(resolve(config.name) == config.path for config in CONFIGS)


@each_config
def test_components_take_their_options(config):
    values = dict(evaluate(config.path).values)
    assert {"dataset", "prompt", "prompt_path"} & values.keys()
    is_vae = config.name.startswith("vae/")
    for key, kind in KINDS.items():
        if key in values:
            options = values[key]
            taken = OF_CORE if key == "model" and not is_vae else ("type",)
            own = {name: value for name, value in options.items() if name not in taken}
            structure_spec("vaes" if is_vae else kind, ComponentConfig(type=options["type"], options=own))


@each_config
def test_a_page_says_what_it_is_for_on_which_hardware_and_how_to_run_it(config):
    docstring = ast.get_docstring(ast.parse(config.path.read_text(encoding="utf-8")))
    assert "Hardware:" in docstring
    assert f"opensora-run {config.name}" in docstring


@each_config
def test_prompt_files_ship_too(config):
    path = evaluate(config.path).values.get("prompt_path")
    assert path is None or find_text(path).read_text(encoding="utf-8").strip()
