"""Specs from dicts: what is accepted, and what each mistake is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from attrs import field, frozen
from attrs.validators import and_, ge, gt, in_, le, max_len, optional
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora.core.components import preset
from opensora.core.config import ComponentConfig, structure
from opensora.core.config.structure import unstructure
from opensora.core.errors import ConfigError


@frozen(kw_only=True)
class Inner:
    """A nested spec."""

    depth: int = field(default=1, validator=gt(0))
    names: list[str] = field(factory=list)


@frozen(kw_only=True)
class Everything:
    """A field of each kind."""

    count: int = 1
    rate: float = 0.5
    flag: bool = False
    text: str = ""
    path: Path | None = None
    maybe: int | None = None
    either: int | str = 0
    number: float | int = 0
    dtype: Literal["fp32", "bf16"] = "fp32"
    level: Literal[1, "auto"] = 1
    size: tuple[int, int] = (1, 1)
    sizes: tuple[int, ...] = ()
    names: list[str] = field(factory=list)
    some: Sequence[float] | None = None
    prompt: str | list[str] | None = None
    ratios: dict[str, float] | None = None
    buckets: Mapping[str, dict[int, tuple[float, int]]] = field(factory=dict)
    inner: Inner = Inner()
    inners: list[Inner] = field(factory=list)
    model: ComponentConfig | None = None
    hooks: list[ComponentConfig] = field(factory=list)
    anything: Any = None
    bare: dict = field(factory=dict)  # type: ignore[type-arg]


GOOD = [
    ("count", 3, 3),
    ("rate", 0.25, 0.25),
    ("rate", 2, 2.0),
    ("flag", True, True),
    ("text", "a", "a"),
    ("path", "a/b", Path("a/b")),
    ("path", Path("a/b"), Path("a/b")),
    ("path", None, None),
    ("maybe", 3, 3),
    ("maybe", None, None),
    ("either", "a", "a"),
    ("either", 4, 4),
    ("number", 4, 4),
    ("number", 4.5, 4.5),
    ("dtype", "bf16", "bf16"),
    ("level", "auto", "auto"),
    ("size", (2, 3), (2, 3)),
    ("size", [2, 3], (2, 3)),
    ("sizes", [1, 2, 3], (1, 2, 3)),
    ("names", ("a", "b"), ["a", "b"]),
    ("some", [1, 2.5], [1.0, 2.5]),
    ("prompt", "a", "a"),
    ("prompt", ["a"], ["a"]),
    ("ratios", {"a": 1}, {"a": 1.0}),
    ("buckets", {"144p": {1: (0.5, 48), 51: [1, 4]}}, {"144p": {1: (0.5, 48), 51: (1.0, 4)}}),
    ("inner", {"depth": 2}, Inner(depth=2)),
    ("inners", [{"depth": 2}, {}], [Inner(depth=2), Inner()]),
    (
        "model",
        {"type": "A", "depth": 2, "inner": {"type": "B"}},
        ComponentConfig("A", {"depth": 2, "inner": {"type": "B"}}),
    ),
    ("model", ComponentConfig("A"), ComponentConfig("A")),
    ("hooks", [{"type": "ema"}], [ComponentConfig("ema")]),
    ("anything", {"a": [1]}, {"a": [1]}),
    ("bare", {1: "a"}, {1: "a"}),
]


@pytest.mark.parametrize(("key", "value", "expected"), GOOD, ids=[f"{key}={value}" for key, value, _ in GOOD])
def test_values_that_fit_are_taken(key: str, value: Any, expected: Any) -> None:
    found = getattr(structure(Everything, {key: value}), key)
    assert found == expected
    assert type(found) is type(expected)


BAD = [
    ("count", True, "count must be int, not True."),
    ("count", "3", 'count must be int, not "3" (str).'),
    ("count", 3.0, "count must be int, not 3.0 (float)."),
    ("count", None, "count must be int, not None."),
    ("rate", True, "rate must be float, not True."),
    ("rate", "0.5", 'rate must be float, not "0.5" (str).'),
    ("flag", 1, "flag must be bool, not 1 (int)."),
    ("text", 1, "text must be str, not 1 (int)."),
    ("path", 1, "path must be Path or None, not 1 (int)."),
    ("maybe", "a", 'maybe must be int or None, not "a" (str).'),
    ("either", 1.5, "either must be int or str, not 1.5 (float)."),
    ("either", None, "either must be int or str, not None."),
    ("dtype", "bf61", 'dtype must be one of "fp32", "bf16", not "bf61" (str). Did you mean "bf16"?'),
    ("dtype", ["bf16"], 'dtype must be one of "fp32", "bf16", not [\'bf16\'] (list).'),
    ("level", True, 'level must be one of 1, "auto", not True.'),
    ("size", (1, 2, 3), "size must be tuple[int, int], not (1, 2, 3) (tuple)."),
    ("size", 256, "size must be tuple[int, int], not 256 (int)."),
    ("size", "12", 'size must be tuple[int, int], not "12" (str).'),
    ("size", (1, "2"), 'size.1 must be int, not "2" (str).'),
    ("sizes", (1, 2.5), "sizes.1 must be int, not 2.5 (float)."),
    ("names", "abc", 'names must be list[str], not "abc" (str).'),
    ("names", ["a", 1], "names.1 must be str, not 1 (int)."),
    ("some", {"a": 1}, "some must be list[float] or None, not {'a': 1} (dict)."),
    ("prompt", ["a", 1], "prompt.1 must be str, not 1 (int)."),
    ("prompt", 1, "prompt must be str or list[str] or None, not 1 (int)."),
    ("ratios", [1], "ratios must be dict[str, float] or None, not [1] (list)."),
    ("ratios", {"a": "b"}, 'ratios.a must be float, not "b" (str).'),
    ("ratios", {1: 1}, "ratios.1 must be str, not 1 (int)."),
    ("buckets", {"144p": {"1": (1, 2)}}, 'buckets.144p.1 must be int, not "1" (str).'),
    ("buckets", {"144p": {1: (1, None)}}, "buckets.144p.1.1 must be int, not None."),
    ("inner", 3, "inner must be a dict of Inner, not 3 (int)."),
    ("inner", {"depht": 3}, 'inner.depht is not a field of Inner. Did you mean "depth"?'),
    ("inner", {"depth": -3}, "inner.depth must be > 0, not -3."),
    ("inners", [{}, {"depth": "a"}], 'inners.1.depth must be int, not "a" (str).'),
    ("model", "A", 'model must be dict(type=..., ...) or None, not "A" (str).'),
    ("model", {"depth": 3}, "model.type is missing. It must be a component's name; see opensora plugins."),
    ("model", {"type": 3}, "model.type must be a component's name, not 3 (int)."),
    (
        "hooks",
        [{"type": "a"}, {"typ": "b"}],
        "hooks.1.type is missing. It must be a component's name; see opensora plugins.",
    ),
    ("hooks", ["ema"], 'hooks.0 must be dict(type=..., ...), not "ema" (str).'),
    ("bare", [], "bare must be dict, not [] (list)."),
    ("text", ["x" * 100], f"text must be str, not ['{'x' * 55}... (list)."),
]


@pytest.mark.parametrize(("key", "value", "message"), BAD, ids=[f"{key}={value}"[:40] for key, value, _ in BAD])
def test_a_value_that_does_not_fit_is_named_with_its_path(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        structure(Everything, {key: value})
    assert str(caught.value) == message


def test_a_message_has_the_place_of_the_key_or_of_what_is_around_it() -> None:
    locations = {(): "c.py", ("inner",): "c.py:3", ("inner", "depht"): "c.py:4", ("hooks",): "c.py:7"}
    with pytest.raises(ConfigError) as caught:
        structure(Everything, {"inner": {"depht": 1}, "hooks": [3], "cuont": 4}, locations=locations)
    assert str(caught.value).splitlines() == [
        'c.py: cuont is not a field of Everything. Did you mean "count"?',
        'c.py:4: inner.depht is not a field of Inner. Did you mean "depth"?',
        "c.py:7: hooks.0 must be dict(type=..., ...), not 3 (int).",
    ]


def test_a_single_mistake_leaves_its_place_on_the_error() -> None:
    with pytest.raises(ConfigError, match=r"^--model\.depth: model\.depth must be > 0, not -1\.$") as caught:
        structure(Inner, {"depth": -1}, locations={("model", "depth"): "--model.depth"}, path=("model",))
    assert caught.value.location == "--model.depth"


def test_a_component_is_located_by_the_path_it_has_in_the_config() -> None:
    with pytest.raises(ConfigError) as caught:
        structure(Inner, {"depht": 3}, locations={("model", "depht"): "config.py:14"}, path=("model",))
    assert str(caught.value) == 'config.py:14: model.depht is not a field of Inner. Did you mean "depth"?'


def test_an_unknown_key_that_resembles_none_lists_the_fields() -> None:
    with pytest.raises(ConfigError) as caught:
        structure(Inner, {"zzz": 3})
    assert str(caught.value) == (
        "zzz is not a field of Inner. It has: depth, names. Names of helpers start with an underscore."
    )


@frozen(kw_only=True)
class Checked:
    """Fields with validators of all sorts."""

    lr: float = field(validator=gt(0))
    share: float = field(default=0.5, validator=and_(ge(0), le(1)))
    steps: int | None = field(default=None, validator=optional(gt(0)))
    mode: str = field(default="a", validator=in_(["a", "b"]))
    names: list[str] = field(factory=list, validator=max_len(1))
    warmup: int = field(default=0, converter=lambda value: value or 0, validator=ge(0))
    width: int = 8
    heads: int = field(default=2)

    @heads.validator
    def _divides(self, _: object, value: int) -> None:
        if self.width % value:
            raise ValueError(f"{self.width} channels don't divide into {value} heads")

    def __attrs_post_init__(self) -> None:
        if self.steps == self.width:
            raise ConfigError("steps and width must differ.")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 0}, "lr must be > 0, not 0.0."),
        ({}, "lr is missing. It must be float."),
        ({"lr": 1, "share": 1.5}, "share must be <= 1, not 1.5."),
        ({"lr": 1, "steps": 0}, "steps must be > 0, not 0."),
        ({"lr": 1, "mode": "c"}, "mode must be in ['a', 'b'] (got 'c')."),
        ({"lr": 1, "names": ["a", "b"]}, "names: Length of 'names' must be <= 1: 2"),
        ({"lr": 1, "warmup": -1}, "warmup must be >= 0, not -1."),
        ({"lr": 1, "warmup": "a"}, 'warmup must be int, not "a" (str).'),
        ({"lr": 1, "heads": 3}, "8 channels don't divide into 3 heads"),
        ({"lr": 1, "steps": 8}, "steps and width must differ."),
    ],
)
def test_what_a_validator_says_is_a_config_error(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        structure(Checked, values)
    assert str(caught.value) == message


def test_all_validators_speak_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        structure(Checked, {"lr": -1, "share": 2, "steps": 0}, path=("train",), locations={("train", "lr"): "--lr"})
    assert str(caught.value).splitlines() == [
        "--lr: train.lr must be > 0, not -1.0.",
        "train.share must be <= 1, not 2.0.",
        "train.steps must be > 0, not 0.",
    ]


def test_none_goes_to_a_converter() -> None:
    assert structure(Checked, {"lr": 1, "warmup": None}).warmup == 0


class _Tiny:
    Spec = Inner


def test_a_preset_is_structured_with_its_own_defaults() -> None:
    large = preset(_Tiny, "Large", depth=28)
    assert structure(large.Spec, {}).depth == 28
    assert structure(large.Spec, {"depth": 2, "names": ["a"]}).names == ["a"]
    with pytest.raises(ConfigError, match=r"^depth must be > 0, not 0\.$"):
        structure(large.Spec, {"depth": 0})
    with pytest.raises(ConfigError, match=r"^depth must be int, not \"a\" \(str\)\.$"):
        structure(large.Spec, {"depth": "a"})


@frozen
class Buggy:
    """Whose validator has a mistake of its own."""

    size: int = field()

    @size.validator
    def _check(self, _: object, value: int) -> None:
        raise RuntimeError("a mistake in the plugin")


def test_a_mistake_in_a_validator_is_not_the_users() -> None:
    with pytest.raises(Exception, match=r"in Buggy|a mistake in the plugin") as caught:
        structure(Buggy, {"size": 1})
    assert not isinstance(caught.value, ConfigError)


NAMES = st.text("abc", min_size=1, max_size=3)
SPECS = st.builds(
    Everything,
    count=st.integers(),
    rate=st.floats(allow_nan=False),
    flag=st.booleans(),
    text=st.text(),
    path=st.none() | st.builds(Path, NAMES),
    maybe=st.none() | st.integers(),
    either=st.integers() | st.text(),
    dtype=st.sampled_from(["fp32", "bf16"]),
    size=st.tuples(st.integers(), st.integers()),
    names=st.lists(st.text()),
    ratios=st.none() | st.dictionaries(st.text(), st.floats(allow_nan=False)),
    inner=st.builds(Inner, depth=st.integers(1), names=st.lists(st.text())),
    inners=st.lists(st.builds(Inner, depth=st.integers(1), names=st.just([])), max_size=2),
    model=st.none() | st.builds(ComponentConfig, NAMES, st.dictionaries(NAMES, st.integers())),
)


@settings(deadline=None)
@given(SPECS)
def test_unstructure_is_the_inverse(spec: Everything) -> None:
    assert structure(Everything, unstructure(spec)) == spec
