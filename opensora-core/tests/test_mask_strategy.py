"""Mask strategies are read as published, mistakes in them are pointed at, and frames are placed as published."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import pytest

from opensora.core import ConfigError
from opensora.core.mask_strategy import (
    FrameEdit,
    carry_over,
    edits_of_round,
    nearest_multiple,
    parse_mask_strategy,
    place_edit,
    place_edits,
    print_mask_strategy,
)

IN_SILENCE = {  # upstream accepts them, which the specification calls a defect
    "0,0,0,0,1,2.5": "edit ratio can't be 2.5. It is from 0 (kept) to 1 (free).",
    "0,0,0,0,1,-1": "edit ratio can't be -1.",
    "-1": "loop can't be -1. Rounds count from 0.",
    "0,0,0,0,0": "length can't be 0. At least one latent frame is needed.",
}


def caret(error: pytest.ExceptionInfo[ConfigError]) -> tuple[str, int]:
    """The text that an error shows, and the column that it points at."""
    _, text, pointer = str(error.value).split("\n")
    assert pointer.strip() == "^"
    return text[4:], pointer.index("^") - 4


def test_strategies_are_read_as_published(golden: Callable[[str], Any]) -> None:
    for row in golden("mask_strategy")["parse"]:
        if "error" in row or row["value"] in IN_SILENCE:
            with pytest.raises(ConfigError, match=r"^mask_strategy: .*\n    .*\n +\^$"):
                parse_mask_strategy(row["value"])
        else:
            assert [list(attrs.astuple(edit)) for edit in parse_mask_strategy(row["value"])] == row["ok"]


@pytest.mark.parametrize("text", IN_SILENCE)
def test_values_without_a_meaning_are_errors(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_mask_strategy(text)
    assert IN_SILENCE[text] in str(caught.value)
    assert caret(caught) == (text, text.rfind(",") + 1)


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("a", 0, 'loop must be a whole number, not "a"'),
        ("0,,0", 2, "reference must be a whole number, and is empty"),
        ("0;", 2, "an entry is empty"),
        (";0", 0, "an entry is empty"),
        ("0; 1 , x", 7, 'reference must be a whole number, not "x"'),
        ("0,1e1", 2, 'reference must be a whole number, not "1e1"'),
        ("0,0,0,0,1.5", 8, 'length must be a whole number, not "1.5"'),
        ("0,0,0,0,1,abc", 10, 'edit ratio must be a number, not "abc"'),
        ("0,0,0,0,1,nan", 10, "edit ratio can't be nan"),
        (
            "0,0,0,0,1,0,9,8",
            12,
            "an entry has at most 6 fields: loop, reference, reference start, target start, length",
        ),
        ("0;0,0,0,0,-2", 10, "length can't be -2"),
    ],
)
def test_mistakes_are_pointed_at(text: str, column: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_mask_strategy(text)
    assert str(caught.value).startswith(f"mask_strategy: {message}")
    assert caret(caught) == (text, column)


def test_of_a_long_strategy_the_surroundings_are_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_mask_strategy(";".join(["0,1,2"] * 50 + ["0,x"] + ["3,4,5"] * 50))
    shown, column = caret(caught)
    assert shown[column] == "x"
    assert shown.startswith("...")
    assert shown.endswith("...")
    assert len(shown) < 120


@pytest.mark.parametrize(
    ("options", "text", "column", "message"),
    [
        ({"loop": 2}, "0;1; 2", 5, "round 2 of 2 is none; they count from 0"),
        ({"num_references": 2}, "0,1;0,2", 6, "reference 2 is missing: there are 2, counted from 0"),
        ({"num_references": 1}, "0,-2", 2, "reference -2 is missing: there are 1"),
        ({"num_references": 0}, "0", 0, "reference 0 is missing: there is none"),
    ],
)
def test_missing_rounds_and_references_are_pointed_at(
    options: dict[str, int], text: str, column: int, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_mask_strategy(text, **options)
    assert message in str(caught.value)
    assert caret(caught) == (text, column)


def test_rounds_and_references_that_are_there_are_taken() -> None:
    assert parse_mask_strategy("2,-2;0,1", num_references=2, loop=3) == [
        FrameEdit(loop=2, reference=-2),
        FrameEdit(reference=1),
    ]


@pytest.mark.parametrize(
    ("written", "printed"),
    [
        ("", ""),
        (" 0 , 0,0 ,0,1, 0 ", "0"),
        ("0;0,1,0,-1,1", "0;0,1,0,-1"),
        ("0,0,-8,0,8", "0,0,-8,0,8"),
        ("0,0,0,0,32,.40", "0,0,0,0,32,0.4"),
        ("1,0,0,0,1,1.0", "1,0,0,0,1,1"),
        ("0,0,0,0,1,1e-5", "0,0,0,0,1,1e-05"),
    ],
)
def test_strategies_are_printed_in_their_shortest_form(written: str, printed: str) -> None:
    edits = parse_mask_strategy(written)
    assert print_mask_strategy(edits) == printed
    assert parse_mask_strategy(printed) == edits


@pytest.mark.parametrize("values", [{"loop": -1}, {"length": 0}, {"edit_ratio": 1.1}, {"edit_ratio": float("nan")}])
def test_an_edit_without_a_meaning_cannot_be_made(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        FrameEdit(**values)


def test_rounds_go_on_as_published(golden: Callable[[str], Any]) -> None:
    for row in golden("mask_strategy")["append_generated"]:
        taken = carry_over(
            loop=row["loop"],
            reference=row["references"],
            length=row["condition_frame_length"],
            edit_ratio=row["condition_frame_edit"],
        )
        assert parse_mask_strategy(row["ok"]) == [*parse_mask_strategy(row["mask_strategy"]), taken]


def test_each_round_has_its_own_edits() -> None:
    edits = parse_mask_strategy("1,0;0,1;1,2")
    assert [edit.reference for edit in edits_of_round(edits, 1)] == [0, 2]
    assert edits_of_round(edits, 2) == []


def test_multiples_are_chosen_as_published(golden: Callable[[str], Any]) -> None:
    for row in golden("mask_strategy")["nearest_point"]:
        assert nearest_multiple(row["value"], row["point"], row["max_value"]) == row["result"]


def test_an_alignment_to_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="align is 0; it must be at least 1"):
        nearest_multiple(3, 0, 10)


def test_starts_count_from_either_end_and_are_aligned() -> None:
    placement = place_edit(
        FrameEdit(reference_start=-4, target_start=-2, length=9, edit_ratio=0.5),
        reference_frames=12,
        target_frames=10,
        align=5,
    )
    assert (placement.reference_start, placement.target_start) == (5, 5)  # from 8, which is nearer to 10, and from 8
    assert (placement.length, placement.edit_ratio, placement.num_missing) == (5, 0.5, 0)


@pytest.mark.parametrize(
    ("length", "reference_frames", "placed", "num_missing"),
    [(3, 8, 3, 0), (8, 5, 5, 3), (10**6, 20, 10, 0), (10**6, 10, 10, 0), (10**6, 8, 8, 2)],
    ids=["as asked", "short", "cut by the sample", "just long enough", "short of the sample"],
)
def test_a_reference_is_short_only_if_the_sample_has_room(
    length: int, reference_frames: int, placed: int, num_missing: int
) -> None:
    placement = place_edit(FrameEdit(length=length), reference_frames=reference_frames, target_frames=10)
    assert (placement.length, placement.num_missing) == (placed, num_missing)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            FrameEdit(reference_start=-5, length=5),
            r'"0,0,-5,0,5" starts at latent frame -5 of reference 0 \(clip\.mp4\), which has 3; a start is from -3 to 2',
        ),
        (FrameEdit(reference_start=3), r"latent frame 3 of reference 0 \(clip\.mp4\), which has 3; a start"),
        (FrameEdit(target_start=10), r"latent frame 10 of the sample, which has 10; a start is from -10 to 9"),
        (FrameEdit(target_start=-11), r"latent frame -11 of the sample, which has 10"),
    ],
)
def test_starts_outside_are_refused(edit: FrameEdit, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        place_edit(edit, reference_frames=3, target_frames=10, name="clip.mp4")


def test_all_edits_of_a_round_are_placed_by_the_lengths_alone() -> None:
    first, last = place_edits(parse_mask_strategy("0;0,-1,0,-1"), [4, 1], target_frames=6)
    assert (first.reference, first.target_start) == (0, 0)
    assert (last.reference, last.target_start) == (1, 5)


def test_an_edit_of_a_missing_reference_is_refused() -> None:
    with pytest.raises(ConfigError, match=r'"0,2" can\'t be applied: reference 2 is missing: there are 2'):
        place_edits(parse_mask_strategy("0,2"), [1, 1], target_frames=4)
    with pytest.raises(ConfigError, match=r"reference 0 \(a\.png\), which has 1"):
        place_edits(parse_mask_strategy("0,0,1"), [1], target_frames=4, names=["a.png"])
