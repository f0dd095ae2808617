"""Which hooks take part, in which order, and what is said of those that can't."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from opensora.core import ComponentError, ConfigError
from opensora.core.config.structure import ComponentConfig
from opensora.core.hooking import build_hooks

HOOKS = """
from attrs import frozen
from opensora.core import hook

CALLS = []

@frozen(kw_only=True)
class Spec:
    note: str = ""

class Plain:
    Spec = Spec
    name = "plain"

    def __init__(self, spec):
        self.spec = spec

    @hook
    def train_start(self):
        CALLS.append(self.name + self.spec.note)

class Second(Plain):
    name = "second"

class Third(Plain):
    name = "third"

    @hook
    def step_end(self, update):
        CALLS.append(update)

class First(Plain):
    name = "first"

    @hook(tryfirst=True)
    def train_start(self):
        CALLS.append(self.name)

class Misspelt:
    Spec = Spec

    def __init__(self, spec): ...

    @hook
    def step_ended(self, run): ...

class WrongArgument(Misspelt):
    step_ended = None

    @hook
    def step_end(self, run, loss): ...

class Unmarked(Misspelt):
    step_ended = None

    def step_end(self, run): ...
"""
ENTRIES = {
    name: f"hooks_of_hooking:{target}"
    for name, target in {
        "plain": "Plain",
        "second": "Second",
        "third": "Third",
        "first": "First",
        "misspelt": "Misspelt",
        "wrong-argument": "WrongArgument",
        "unmarked": "Unmarked",
    }.items()
}


@pytest.fixture
def calls(install: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What the hooks of this file were called with."""
    import sys

    monkeypatch.delitem(sys.modules, "hooks_of_hooking", raising=False)
    install("hooking-dist", {"opensora.hooks": ENTRIES}, {"hooks_of_hooking.py": HOOKS})
    from importlib import import_module

    recorded: list[object] = import_module("hooks_of_hooking").CALLS
    return recorded


def config(name: str, **options: object) -> ComponentConfig:
    return ComponentConfig(type=name, options=options)


def test_hooks_are_called_in_the_order_of_the_config_after_the_defaults(calls: list[object]) -> None:
    build_hooks([config("second"), config("plain")], [config("third")]).train_start(run=None)
    assert calls == ["second", "plain", "third"]


def test_a_hook_that_wants_to_be_first_is(calls: list[object]) -> None:
    build_hooks([config("second")], [config("first"), config("third")]).train_start(run=None)
    assert calls == ["first", "second", "third"]


def test_a_chosen_hook_replaces_the_default_of_its_name_in_its_place(calls: list[object]) -> None:
    defaults = [config("plain", note=" old"), config("second")]
    build_hooks(defaults, [config("third"), config("plain", note=" new")]).train_start(run=None)
    assert calls == ["plain new", "second", "third"]


def test_a_hook_takes_only_the_arguments_that_it_names(calls: list[object]) -> None:
    build_hooks([config("third")]).step_end(run="the run", update="the update")
    assert calls == ["the update"]


def test_hooks_can_be_left_out_by_name(calls: list[object]) -> None:
    build_hooks([config("plain"), config("second")], [config("third")], without=["plain", "third"]).train_start(
        run=None
    )
    assert calls == ["second"]


@pytest.mark.usefixtures("calls")
def test_leaving_out_what_is_not_there_comes_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r'without_hooks: no hook named "secnod" takes part. Did you mean "second"?'):
        build_hooks([config("plain"), config("second")], without=["secnod"])


@pytest.mark.usefixtures("calls")
def test_a_hook_that_is_listed_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match='"third" is listed twice'):
        build_hooks([], [config("third"), config("third", note="other")])


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("misspelt", ["unknown hook 'step_ended'"]),
        ("wrong-argument", ["step_end(run, loss)", "'loss'"]),
        ("unmarked", ["no method is marked with @opensora.core.hook"]),
    ],
)
def test_a_hook_that_would_never_be_called_is_refused_by_name(name: str, words: list[str]) -> None:
    with pytest.raises(ComponentError) as caught:
        build_hooks([config("plain"), config(name), config("second")])
    assert str(caught.value).startswith(f'The hook "{name}" of hooking-dist 1.5 ({ENTRIES[name]}) can\'t take part: ')
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.usefixtures("calls")
def test_bad_options_and_unknown_hooks_are_refused() -> None:
    with pytest.raises(ConfigError, match='Did you mean "note"'):
        build_hooks([config("plain", noet="x")])
    with pytest.raises(ComponentError, match=r'No hook is named "palin". Nearest: "plain"'):
        build_hooks([config("palin")])


def test_the_built_in_hooks_take_part_like_any_others() -> None:
    hooks = build_hooks([config(name) for name in ("console", "jsonl", "ema", "checkpoints")])
    assert hooks.denoiser_wrapper(spec=None) == []
