"""What differs between two configs is named by its path."""

from __future__ import annotations

from pathlib import Path

from opensora.core.config_changes import find_changes, plain


def test_changes_are_named_with_both_values() -> None:
    then = {"lr": 0.1, "model": {"type": "A", "depth": 2}, "hooks": [], "old": 1, "same": (1, 2)}
    now = {"lr": 0.2, "model": {"type": "A", "depth": 3}, "hooks": [], "new": None, "same": [1, 2]}
    assert [str(each) for each in find_changes(plain(then), plain(now))] == [
        "lr: 0.1 -> 0.2",
        "model.depth: 2 -> 3",
        "old: 1 -> not set",
        "new: not set -> None",
    ]


def test_a_component_that_comes_or_goes_is_one_change() -> None:
    (change,) = find_changes({"vae": None}, {"vae": {"type": "identity"}})
    assert str(change) == "vae: None -> {'type': 'identity'}"


def test_long_values_are_cut() -> None:
    (change,) = find_changes({"prompts": ["x" * 200]}, {"prompts": []})
    assert change.then.endswith("...")
    assert len(change.then) == 80


def test_what_a_key_covers() -> None:
    (change,) = find_changes({"model": {"block": {"width": 1}}}, {"model": {"block": {"width": 2}}})
    assert change.is_of(frozenset({"model"}))
    assert change.is_of(frozenset({"model.block"}))
    assert not change.is_of(frozenset({"model.blo", "block"}))


def test_an_option_that_a_new_version_brings_is_told_from_a_key_of_a_value() -> None:
    then = {"model": {"type": "A"}, "buckets": {"240p": 1}, "vae": {"inner": {"a": 1}}}
    now = {"model": {"type": "A", "new": 1}, "buckets": {"240p": 1, "480p": 2}, "vae": {"inner": {"a": 1, "b": 2}}}
    changes = find_changes(then, now)
    assert all(each.is_missing for each in changes)
    assert [each.is_within(("model", "vae")) for each in changes] == [True, False, False]


def test_values_are_as_json_gives_them_back() -> None:
    assert plain({"buckets": {16: (1.0, 2)}, "path": Path("a")}) == {"buckets": {"16": [1.0, 2]}, "path": "a"}
