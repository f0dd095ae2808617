"""Each module's ``__all__`` lists what it defines in public, and everything listed is there."""

from importlib import import_module
from types import FunctionType

import pytest

import opensora.data

MODULES = [
    "balancing",
    "bucket_advice",
    "bucket_odds",
    "buckets",
    "commands.data",
    "commands.plan",
    "digits.clips",
    "digits.grade",
    "digits.grader",
    "digits.make",
    "labelled_images",
    "planning",
    "shards",
    "tables",
    "temporal",
    "variable_video_text",
    "video_text",
    "web_dataset",
]


@pytest.mark.parametrize("name", MODULES)
def test_public_names_are_listed(name):
    module = import_module(f"opensora.data.{name}")
    defined = {
        name
        for name, value in vars(module).items()
        if isinstance(value, type | FunctionType) and not name.startswith("_") and value.__module__ == module.__name__
    }
    assert defined <= set(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)


def test_the_package_gives_what_it_lists():
    assert all(getattr(opensora.data, name) for name in opensora.data.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Bucket'"):
        opensora.data.Bucket  # noqa: B018
