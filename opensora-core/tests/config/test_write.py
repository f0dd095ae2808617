"""Configs written back: readable, and equal when read again."""

from __future__ import annotations

import keyword
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora.core.config import evaluate, format_config, write_config
from opensora.core.errors import ConfigError

VALUES = {
    "pipeline": "train",
    "lr": 1e-4,
    "image_size": (32, 32),
    "model": {
        "type": "STDiT3-XL/2",
        "from_pretrained": None,
        "patch_size": (1, 2, 2),
        "a_long_option_that_fills_the_line": "and its value, which is rather long as well",
        "inner": {"type": "X", "names": ["a", "b"]},
    },
    "bucket_config": {"144p": {1: (1.0, 48), 51: (1.0, 4)}},
    "prompts": ['It\'s "quoted"', "two\nlines", 'say "hi"'],
    "one": (1,),
    "empty": {},
}

TEXT = '''"""Again: opensora-run config.py"""
pipeline = "train"
lr = 0.0001
image_size = (32, 32)
model = dict(
    type="STDiT3-XL/2",
    from_pretrained=None,
    patch_size=(1, 2, 2),
    a_long_option_that_fills_the_line="and its value, which is rather long as well",
    inner=dict(type="X", names=["a", "b"]),
)
bucket_config = {"144p": {1: (1.0, 48), 51: (1.0, 4)}}
prompts = ['It\\'s "quoted"', "two\\nlines", 'say "hi"']
one = (1,)
empty = dict()
'''


def test_a_config_is_written_as_people_write_it() -> None:
    assert format_config(VALUES, "Again: opensora-run config.py") == TEXT


NAMES = st.from_regex(r"[a-zA-Z][a-zA-Z0-9_]{0,8}", fullmatch=True).filter(lambda name: not keyword.iskeyword(name))
TEXTS = st.text(max_size=30)
SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | TEXTS
KEYS = (TEXTS | st.integers() | st.tuples(st.integers(), TEXTS)).filter(lambda key: key != "_delete_")
TREES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.dictionaries(NAMES, inner, max_size=4)
    ),
    max_leaves=12,
)


def same(left: Any, right: Any) -> bool:
    """Equal in type and order too: 1 is not True, a list no tuple."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return same([*left.items()], [*right.items()])
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right) and (not isinstance(left, float) or math.copysign(1, left) == math.copysign(1, right))


@settings(deadline=None)
@given(values=st.dictionaries(NAMES, TREES, max_size=4), header=TEXTS)
def test_what_is_written_is_read_back_equal(tmp_path_factory: pytest.TempPathFactory, values: Any, header: str) -> None:
    path = tmp_path_factory.getbasetemp() / "written.py"
    try:
        header.encode()
    except UnicodeEncodeError:
        header = "no text"
    write_config(path, values, header)
    assert same(evaluate(path).values, values)


def test_what_is_written_is_python_too(tmp_path: Path) -> None:
    write_config(tmp_path / "config.py", VALUES, 'Ends with a "quote"')
    assert same(evaluate(tmp_path / "config.py", trust=True).values, VALUES)


def test_numbers_that_have_no_literal_are_written(tmp_path: Path) -> None:
    write_config(tmp_path / "config.py", {"low": -math.inf, "nan": math.nan, "size": [math.inf]}, "")
    values = evaluate(tmp_path / "config.py").values
    assert (values["low"], values["size"]) == (-math.inf, [math.inf])
    assert math.isnan(values["nan"])


def test_a_path_is_written_as_text() -> None:
    assert format_config({"folder": Path("a/b")}, "") == '""""""\nfolder = "a/b"\n'


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"width": [1, len]}}, r"^model can't be written to a config: <built-in function len> is of type"),
        ({"a b": 1}, r"^'a b' can't be a key"),
        ({"_a": 1}, r"^'_a' can't be a key"),
        ({"class": 1}, r"^'class' can't be a key"),
    ],
)
def test_what_has_no_form_in_a_config_is_named(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        write_config(tmp_path / "config.py", values, "")
    assert list(tmp_path.iterdir()) == []
