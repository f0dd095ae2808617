"""Reading configs: what may stand in them, what may not, and where each value came from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from opensora.core.config import Config, evaluate, evaluate_literal
from opensora.core.errors import ConfigError

Read = Callable[..., Config]


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Read:
    """Evaluates a text as the file ``config.py`` of the current folder."""
    monkeypatch.chdir(tmp_path)

    def read(text: str, *, trust: bool = False, **others: str) -> Config:
        for name, content in others.items():
            (tmp_path / f"{name}.py").write_text(content)
        (tmp_path / "config.py").write_text(text)
        return evaluate("config.py", trust=trust)

    return read


SAMPLE_CONFIG = '''"""Samples.

With a docstring of several lines.
"""
resolution = "240p"  # a comment
image_size = (height, width) = (32, 2 * 24)
num_frames: int = 51
fps = 24 // 3
betas = [0.9, 1 - 1e-3]
model = dict(
    type="STDiT3-XL/2",
    depth=num_frames - 23,
    qk_norm=not False and fps > 3,
    patch_size=(1, 2, 2),
)
bucket_config = {"144p": {1: (1.0, 48), **{frames: (1, 96 // frames) for frames in (16, 32)}}, "256": None}
small = {**model, "depth": 2 if len(betas) == 2 else max(3, 4)}
names = [f"{width}x{height:03d}-{name!r}" for name in ["a", "b"] if name != "b"]
numbers = list(range(3)) + [*betas[:1]] + [round(float("2.5")), min(int("7"), 9)] * 2
nested = [[x * y for y in range(x)] for x in range(3)]
last = names[-1][-3:] + str(1)
'''


def test_a_config_has_the_values_that_python_would_give_it(read: Read) -> None:
    assert read(SAMPLE_CONFIG).values == read(SAMPLE_CONFIG, trust=True).values


def test_a_range_becomes_a_list(read: Read) -> None:
    assert read("steps = range(0, 9, 4)").values == {"steps": [0, 4, 8]}


def test_names_that_start_with_an_underscore_are_no_keys(read: Read) -> None:
    assert read("_width = 3\nsize = (_width, _width)").values == {"size": (3, 3)}


def test_dicts_that_share_a_name_do_not_share_their_contents(read: Read) -> None:
    values = read("vae = dict(a=[1])\nother = vae").values
    values["vae"]["a"].append(2)
    assert values["other"] == {"a": [1]}


def test_each_key_has_its_line(read: Read) -> None:
    config = read(
        "common = dict(\n    lr=1,\n)\nmodel = dict(\n    common,\n    depth=[\n        1,\n        dict(a=2)],\n)\n"
    )
    assert config.locations == {
        (): "config.py",
        ("common",): "config.py:1",
        ("common", "lr"): "config.py:2",
        ("model",): "config.py:4",
        ("model", "lr"): "config.py:2",
        ("model", "depth"): "config.py:6",
        ("model", "depth", "0"): "config.py:7",
        ("model", "depth", "1"): "config.py:8",
        ("model", "depth", "1", "a"): "config.py:8",
    }


@pytest.mark.parametrize(
    "written",
    [
        "model = {\n 'depth': 1}",
        "model = dict(\n depth=1)",
        "model = dict(\n **dict(depth=1))",
        "model = {\n **{'depth': 1}}",
    ],
)
def test_a_key_is_located_however_its_dict_is_written(read: Read, written: str) -> None:
    assert read(written).locations[("model", "depth")] == "config.py:2"


REFUSED = {
    "import os": "import os is not allowed",
    "from os import system": "from os import system is not allowed",
    "x = __import__('os')": "calling __import__() is not allowed",
    "x = open('/etc/passwd')": "calling open() is not allowed",
    "exec('x = 1')": "exec('x = 1') is not allowed",
    "x = dcit(a=1)": 'calling dcit() is not allowed in a config, which is read and not run. Did you mean "dict"?',
    "x = 'a'.join(['b'])": "calling 'a'.join() is not allowed",
    "x = (1).real": "the attribute .real is not allowed",
    "x = ().__class__": "the attribute .__class__ is not allowed",
    "x = f'{().__class__}'": "the attribute .__class__ is not allowed",
    "x = lambda: 1": "lambda: 1 is not allowed",
    "def f(): pass": "def f(): pass is not allowed",
    "class A: pass": "class A: pass is not allowed",
    "if True: x = 1": "if True: x = 1 is not allowed",
    "for i in range(3): x = i": "for i in range(3): x = i is not allowed",
    "while True: pass": "while True: pass is not allowed",
    "x = 1\nx += 1": "x += 1 is not allowed",
    "x = dict()\nx['a'] = 1": "assigning to x['a'] is not allowed",
    "del dict": "del dict is not allowed",
    "x = (y := 1)": "(y := 1) is not allowed",
    "x = '%1000d' % 5": "'%1000d' % 5 is not allowed",
    "x = b'bytes'": "a value of type bytes is not allowed",
    "x = 1j": "a value of type complex is not allowed",
    "x = (-1) ** 0.5": "a value of type complex is not allowed",
    "x = ...": "a value of type ellipsis is not allowed",
    "x = len": "the function len as a value is not allowed",
    "x = [a async for a in []]": "async is not allowed",
    "x = 3 @ 4": "3 @ 4 is not allowed",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_a_config_may_not_do_is_named_with_its_line_and_the_way_out(read: Read, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(f"\n\n{text}")
    line = 3 + text.count("\n")
    assert str(caught.value).startswith(f"config.py:{line}: {REFUSED[text]}")
    assert "--trust-config executes it as Python" in str(caught.value)


WRONG = {
    "x = depht": 'config.py:2: the name depht is not defined. Did you mean "depth"?',
    "x = sizes['a']": "config.py:2: sizes['a'] fails: LookupError: no such key. Did you mean \"aa\"?",
    "x = 1 / 0": "config.py:2: 1 / 0 fails: ZeroDivisionError: division by zero",
    "x = (1, 2)[3]": "config.py:2: (1, 2)[3] fails: IndexError: tuple index out of range",
    "x = 'a' + 1": "config.py:2: 'a' + 1 fails: TypeError: can only concatenate str",
    "x = int('a')": "config.py:2: int('a') fails: ValueError: invalid literal",
    "x = 1e300 ** 2": "config.py:2: 1e+300 ** 2 fails: OverflowError",
    "x = {[1]: 2}": "config.py:2: {[1]: 2} fails: TypeError: unhashable type",
    "x = {1, 2}": "config.py:2: {1, 2} is a set. Write a list",
    "x = dict(a=1, a=2)": "config.py:2: the key 'a' is given twice",
    "x = {'a': 1, 'a': 2}": "config.py:2: the key 'a' is given twice",
    "x = dict(**sizes, aa=2)": "config.py:2: the key 'aa' is given twice",
    "x = dict(**{1: 2})": "config.py:2: ** needs names as keys, not 1",
    "x = {**depth}": "config.py:2: ** needs a dict; depth is 3",
    "x = [*depth]": "config.py:2: depth is 3, which holds no items",
    "x = [a for a in depth]": "config.py:2: depth is 3, which holds no items",
    "a, b = (1, 2, 3)": "config.py:2: can't take (a, b) from (1, 2, 3)",
    "x = (": "config.py:2: not valid Python: '(' was never closed",
    "x = 08": "config.py:2: not valid Python: leading zeros",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_mistake_is_named_with_its_line(read: Read, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(f"depth = 3; sizes = dict(aa=1)\n{text}")
    assert str(caught.value).startswith(WRONG[text])


BOMBS = {
    "power": "x = 9 ** 9 ** 9 ** 9",
    "negative base": "x = (-9) ** 10 ** 10",
    "shift": "x = 1 << 10 ** 12",
    "product": "\n".join(["x = 3"] + ["x = x * x"] * 40),
    "rounding": "x = round(5, -(10 ** 10))",
    "repeated list": "x = [0] * 10 ** 10",
    "repeated text": "x = 10 ** 10 * 'a'",
    "repeated tuple in steps": "x = (0,)\n" + "x = x * 1000\n" * 4,
    "range": "x = list(range(10 ** 12))",
    "range itself": "x = range(10 ** 12)",
    "loops": "x = [a for a in range(10 ** 4) for b in range(10 ** 4)]",
    "loops that keep nothing": "x = [1 for a in range(3000) for b in range(3000) if False]",
    "doubled dict": "x = 'a'\n" + "x = [x, x]\n" * 45,
    "thousandfold": "x = [0] * 1000\n" + "x = [x] * 1000\n" * 4,
    "text of all": "x = [0] * 1000\nx = [x] * 1000\ny = [str(x) for i in range(1000)]",
    "equal": "x = [0] * 900\nx = [x] * 900\ny = [x == [*x] for i in range(900)]",
    "width": "x = f'{1:1000000000}'",
    "precision": "x = f'{1.0:.1000000000f}'",
    "nested width": "w = 10 ** 9\nx = f'{1:{w}}'",
    "nested": "x = 1\n" + "x = [x]\n" * 100_000,
    "nested tuple as a key": "x = 1\n" + "x = (x,)\n" * 100_000 + "y = {x: 1}",
    "brackets": "x = " + "[" * 5000 + "]" * 5000,
    "minus": "x = " + "-" * 100_000 + "1",
    "long sum": "x = " + "+".join("1" * 100_000),
    "large file": "x = 1\n" * 300_000,
    "digits": "x = int('9' * 5000)",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_config_that_computes_too_much_is_stopped(read: Read, name: str) -> None:
    begin = time.perf_counter()
    with pytest.raises(ConfigError):
        read(BOMBS[name])
    assert time.perf_counter() - begin < 20


def test_a_large_honest_config_is_read(read: Read) -> None:
    values = read("prompts = [f'prompt {i}' for i in range(20_000)]\n" + "a = dict(x=[1, 2])\n" * 2000).values
    assert len(values["prompts"]) == 20_000


@settings(deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60))
@example("\0")
@example("x = '\\ud800'")
@example("﻿x = 1")
@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
def test_any_text_is_read_or_is_a_config_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.py"
    path.write_text(text, encoding="utf-8")
    try:
        message = f"any.py: {evaluate(path).values}"
    except ConfigError as error:
        message = str(error)
    assert "any.py" in message


# ---- _base_


def test_dicts_merge_into_those_of_the_base_and_all_else_is_replaced(read: Read) -> None:
    config = read(
        "_base_ = ['base.py']\nmodel = dict(depth=2, inner=dict(b=3))\nsize = (1,)\nlr = dict(start=1)\nnew = 4",
        base="model = dict(type='A', depth=1, inner=dict(a=1, b=2))\nsize = (5, 6)\nlr = 0.1\nold = [1]",
    )
    assert config.values == {
        "model": {"type": "A", "depth": 2, "inner": {"a": 1, "b": 3}},
        "size": (1,),
        "lr": {"start": 1},
        "old": [1],
        "new": 4,
    }


def test_keys_of_a_base_are_located_in_its_file(read: Read) -> None:
    config = read(
        "_base_ = 'base.py'\nmodel = dict(\n  depth=2)\nsize = (1,)",
        base="\nmodel = dict(type='A', depth=1)\nsize = (\n5, 6)\nold = [\n1]",
    )
    assert config.locations == {
        (): "config.py",
        ("model",): "config.py:2",
        ("model", "type"): "base.py:2",
        ("model", "depth"): "config.py:3",
        ("size",): "config.py:4",
        ("size", "0"): "config.py:4",
        ("old",): "base.py:5",
        ("old", "0"): "base.py:6",
    }


def test_delete_replaces_a_dict_of_the_base(read: Read) -> None:
    config = read(
        "_base_ = ['base.py']\nmodel = dict(_delete_=True, type='B')\nother = dict(a=dict(_delete_=True, y=1))",
        base="model = dict(type='A', depth=1)\nother = dict(a=dict(x=1), b=2)",
    )
    assert config.values == {"model": {"type": "B"}, "other": {"a": {"y": 1}, "b": 2}}
    assert ("model", "depth") not in config.locations


def test_delete_without_a_base_leaves_no_key(read: Read) -> None:
    assert read("model = dict(_delete_=True, type='B')").values == {"model": {"type": "B"}}


def test_names_of_a_base_can_be_used(read: Read) -> None:
    assert read("_base_ = ['base.py']\nwidth = height * 2", base="height = 4").values == {"height": 4, "width": 8}


def test_bases_are_found_beside_their_file_and_may_have_bases(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "root.py").write_text("a = 1\nb = 1\nc = 1")
    (tmp_path / "middle.py").write_text("_base_ = ['root.py']\nb = 2\nc = 2")
    (tmp_path / "deep" / "top.py").write_text("_base_ = ['../middle.py']\nc = 3")
    assert evaluate(tmp_path / "deep" / "top.py").values == {"a": 1, "b": 2, "c": 3}


def test_two_bases_may_share_a_base_but_not_disagree(read: Read) -> None:
    files = {"root": "seed = 1", "one": "_base_ = 'root.py'\na = 1", "two": "_base_ = 'root.py'\nb = 2"}
    text = "_base_ = ['one.py', 'two.py']"
    assert read(text, **files).values == {"seed": 1, "a": 1, "b": 2}
    with pytest.raises(ConfigError, match=r'^config.py:1: two files of _base_ set "a": one.py:2 and two.py:1$'):
        read(text, **files | {"two": "a = 3"})


def test_a_base_that_leads_back_is_an_error(read: Read) -> None:
    with pytest.raises(ConfigError, match=r"^base.py:2: _base_ leads back to config.py$"):
        read("_base_ = ['base.py']", base="\n_base_ = ['config.py']")


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("'nowhere.py'", r"^config.py:1: _base_: there is no file nowhere.py. "),
        ("3", r"^config.py:1: _base_ must be a list of config files, not 3$"),
        ("[None]", r"^config.py:1: _base_ must be a list of config files, not \[None\]$"),
        ("open('x')", r"^config.py:1: calling open\(\) is not allowed"),
    ],
)
def test_a_base_that_cannot_be_found_is_named(read: Read, base: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(f"_base_ = {base}")


# ---- --trust-config


def test_a_trusted_config_is_executed(read: Read) -> None:
    text = """
import math
from pathlib import Path
class Helper: pass
def double(x): return 2 * x
_hidden = 3
model = dict(depth=double(2))
size = [math.ceil(1.5)]
for _i in range(3):
    size.append(_i)
home = Path("a")
"""
    config = read(text, trust=True)
    assert config.values == {"model": {"depth": 4}, "size": [2, 0, 1, 2], "home": Path("a")}
    assert config.locations[("model", "depth")] == "config.py:7"


def test_a_trusted_config_has_bases(read: Read) -> None:
    config = read(
        "import math\n_base_ = ['base.py']\nmodel = dict(depth=2)\nwidth = 2 * height",
        trust=True,
        base="height = 4\nmodel = dict(a=1)",
    )
    assert config.values == {"height": 4, "model": {"a": 1, "depth": 2}, "width": 8}


def test_an_error_of_a_trusted_config_has_its_line(read: Read) -> None:
    with pytest.raises(ConfigError, match=r"^config.py:2: raised RuntimeError: no$"):
        read("def f():\n    raise RuntimeError('no')\nf()", trust=True)
    with pytest.raises(ConfigError, match=r"raised SyntaxError: 'return' outside function"):
        read("return", trust=True)


# ---- files


def test_a_missing_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^There is no config file nowhere/config.py\.$"):
        evaluate("nowhere/config.py")


def test_a_folder_is_no_config_but_may_hold_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    with pytest.raises(ConfigError, match=r"^run is a folder\.$"):
        evaluate("run")
    (tmp_path / "run" / "config.py").touch()
    with pytest.raises(ConfigError, match=r"^run is a folder\. Did you mean run/config.py\?$"):
        evaluate("run")


@pytest.mark.parametrize("content", [b"x = '\xff'", b"x = 1\0", b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_no_python_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.py").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config.py.*: not valid Python"):
        evaluate(tmp_path / "config.py")


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"config.py can't be read: Not a directory"):
        evaluate(tmp_path / "file" / "config.py")


# ---- values on the command line


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12),
        (" -3 ", -3),
        ("1e-4", 1e-4),
        ("True", True),
        ("None", None),
        ("'12'", "12"),
        ("(1, 2)", (1, 2)),
        ("1,2", (1, 2)),
        ("[1, 'a']", [1, "a"]),
        ("{'a': 1}", {"a": 1}),
        ("dict(type='a', n=2*3)", {"type": "a", "n": 6}),
        ("", ""),
        ("240p", "240p"),
        ("16:9", "16:9"),
        ("3-4", "3-4"),
        ("1/2", "1/2"),
        ("a wave", "a wave"),
        ("wave, sea", "wave, sea"),
        ("rflow", "rflow"),
        ("not True", "not True"),
        ("2024-01-01", "2024-01-01"),
        ("open('x')", "open('x')"),
        ("[open('x')]", "[open('x')]"),
        ("[0] * 10**10", "[0] * 10**10"),
        ("[[0] * 10**10]", "[[0] * 10**10]"),
        ("1j", "1j"),
        ("1if 2else 3", "1if 2else 3"),
        ("\\d", "\\d"),
        ("((((", "(((("),
    ],
)
def test_text_on_the_command_line_is_a_literal_or_itself(text: str, value: Any) -> None:
    found = evaluate_literal(text)
    assert found == value
    assert type(found) is type(value)


@settings(deadline=None)
@given(st.floats(allow_nan=False) | st.integers(-(10**30), 10**30) | st.booleans() | st.none())
def test_numbers_as_python_prints_them_are_read_back(value: float | bool | None) -> None:
    if not (isinstance(value, float) and math.isinf(value)):
        assert evaluate_literal(repr(value)) == value


@settings(deadline=None)
@given(st.text(max_size=40))
def test_any_text_on_the_command_line_has_a_value(text: str) -> None:
    evaluate_literal(text)
