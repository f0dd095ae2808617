"""What --help and the reference know about a spec, from its source."""

from __future__ import annotations

import subprocess
import sys
from typing import Literal

from attrs import field, frozen
from attrs.validators import gt

from opensora.core.components import preset
from opensora.core.config import ComponentConfig, SpecField, spec_fields


@frozen(kw_only=True)
class BaseSpec:
    """A base."""

    width: int
    """Channels of
    the hidden layer."""
    depth: int = field(default=4, validator=gt(0))
    """Blocks."""


@frozen(kw_only=True)
class ModelSpec(BaseSpec):
    """A model's."""

    mode: Literal["a", "b"] | None = None
    size: tuple[int, int] = (2, 2)
    """Height and width."""
    inner: ComponentConfig = field(factory=lambda: ComponentConfig("X", {"a": 1}))
    _private: int = field(default=3, init=False)


class Model:
    """A model."""

    Spec = ModelSpec


def test_fields_have_name_type_default_and_help() -> None:
    assert spec_fields(ModelSpec) == (
        SpecField("width", "int", None, "Channels of the hidden layer."),
        SpecField("depth", "int", "4", "Blocks."),
        SpecField("mode", "Literal['a', 'b'] | None", "None", ""),
        SpecField("size", "tuple[int, int]", "(2, 2)", "Height and width."),
        SpecField("inner", "ComponentConfig", 'dict(type="X", a=1)', ""),
    )


def test_a_preset_keeps_the_help_and_has_its_own_defaults() -> None:
    by_name = {one.name: one for one in spec_fields(preset(Model, "Large", depth=28).Spec)}
    assert by_name["depth"] == SpecField("depth", "int", "28", "Blocks.")
    assert by_name["size"].help == "Height and width."


def test_the_pipelines_specs_describe_every_field_without_torch() -> None:
    code = """
import sys
from opensora.core.config import spec_fields
from opensora.core.pipelines.sample_spec import SampleSpec
from opensora.core.pipelines.train_spec import TrainSpec
for cls in (TrainSpec, SampleSpec):
    silent = [one.name for one in spec_fields(cls) if not one.help and one.name != "pipeline"]
    assert not silent, silent
assert not {"torch", "numpy", "cattrs"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
