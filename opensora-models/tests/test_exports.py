"""What the package exports, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

import opensora.models

MODULES = [
    "dit",
    "from_diffusers.transformer",
    "from_diffusers.vae",
    "latte",
    "latte_t2v",
    "pixart",
    "pixart_sigma",
    "stdit",
    "stdit2",
    "stdit3",
    "text_encoders.classes",
    "text_encoders.cleaning",
    "text_encoders.clip",
    "text_encoders.hashed_words",
    "text_encoders.minilm",
    "text_encoders.t5",
    "vae.discriminators",
    "vae.identity",
    "vae.image_vae",
    "vae.losses",
    "vae.lpips",
    "vae.posterior",
    "vae.temporal_decoder",
    "vae.temporal_vae",
    "vae.training.learner",
    "vae.training.measures",
    "vae.training.reconstruct",
    "vae.training.run",
    "vae.training.specs",
    "vae.training.train",
    "vae.video_vae",
]


@pytest.mark.parametrize("name", MODULES)
def test_public_names_are_there(name):
    module = import_module(f"opensora.models.{name}")
    assert all(hasattr(module, exported) for exported in module.__all__)
    own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    assert {key for key in own if not key.startswith("_")} <= set(module.__all__)


def test_classes_can_be_had_from_the_package():
    assert all(
        getattr(opensora.models, name).__module__.startswith("opensora.models.") for name in opensora.models.__all__
    )
    with pytest.raises(AttributeError, match="DiT_XXL"):
        opensora.models.DiT_XXL  # noqa: B018  # the access is the test


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("opensora.models", ["torch"]),
        ("opensora.models.stdit3", ["diffusers", "transformers"]),
        ("opensora.models.vae.identity", ["diffusers"]),
        ("opensora.models.text_encoders.hashed_words", ["transformers", "ftfy"]),
    ],
)
def test_importing_loads_nothing_heavy(module, unwanted):
    code = f"import sys, {module}; print([name for name in {unwanted} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"
