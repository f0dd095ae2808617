"""Readable names mean the published mask strategies, and contradictions between them are refused."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from opensora.core import ConfigError
from opensora.core.frame_conditions import ALL_FRAMES, DEFAULT_STRENGTH, given_frames_of, override_conditions
from opensora.core.mask_strategy import parse_mask_strategy, place_edits, print_mask_strategy


@pytest.mark.parametrize(
    ("conditions", "references", "strategy"),
    [
        ({}, "", ""),
        ({"image": "a.png"}, "a.png", "0"),
        ({"image": "c.mp4"}, "c.mp4", "0"),
        ({"last_image": "b.JPG"}, "b.JPG", "0,0,0,-1,1"),
        ({"image": "a.png", "last_image": "b.png"}, "a.png b.png", "0;0,1,0,-1,1"),
        ({"extend": "c.mp4"}, "c.mp4", "0,0,-8,0,8"),
        ({"extend": "c.mp4", "last_image": "b.png"}, "c.mp4 b.png", "0,0,-8,0,8;0,1,0,-1,1"),
        ({"connect": ("a.png", "b.png")}, "a.png b.png", "0;0,1,0,-1,1"),
        ({"connect": ["c.mp4", "d.MOV"]}, "c.mp4 d.MOV", "0,0,-8,0,8;0,1,0,-8,8"),
        ({"connect": ("a.png", "d.mp4")}, "a.png d.mp4", "0;0,1,0,-8,8"),
        ({"connect": ("c.mp4", "https://e/b.png?v=1.mp4")}, "c.mp4 https://e/b.png?v=1.mp4", "0,0,-8,0,8;0,1,0,-1,1"),
        ({"edit": "c.mp4", "strength": 0.4}, "c.mp4", f"0,0,0,0,{ALL_FRAMES},0.4"),
        ({"edit": "c.mp4"}, "c.mp4", f"0,0,0,0,{ALL_FRAMES},{DEFAULT_STRENGTH}"),
        ({"edit": "a.png", "strength": 1}, "a.png", f"0,0,0,0,{ALL_FRAMES},1"),
        ({"image": "a;b.png"}, "a;b.png", "0"),
        ({"image": "a.heic"}, "a.heic", "0"),
        ({"reference_path": "a.png; b.png", "mask_strategy": "0;0,1,0,-1"}, "a.png b.png", "0;0,1,0,-1,1"),
        ({"reference_path": "", "mask_strategy": ""}, "", ""),
        ({"image": "a.png", "reference_path": "", "mask_strategy": ""}, "a.png", "0"),
    ],
)
def test_each_name_means_a_strategy(conditions: dict[str, Any], references: str, strategy: str) -> None:
    found, edits = given_frames_of(length=8, **conditions)
    assert found == references.split()
    assert edits == parse_mask_strategy(strategy)
    assert parse_mask_strategy(print_mask_strategy(edits), num_references=len(found)) == edits


def test_an_edit_takes_all_frames_and_says_how_many_are_missing() -> None:
    _, edits = given_frames_of(length=5, edit="c.mp4", strength=0.4)
    (whole,) = place_edits(edits, [15], target_frames=15)
    assert (whole.length, whole.num_missing) == (15, 0)
    (longer,) = place_edits(edits, [20], target_frames=15)
    assert (longer.length, longer.num_missing) == (15, 0)
    (shorter,) = place_edits(edits, [10], target_frames=15)
    assert (shorter.length, shorter.num_missing) == (10, 5)


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"image": "a.png", "extend": "c.mp4"}, "image and extend contradict each other: both give the first frames"),
        ({"image": "a.png", "connect": ("a", "b")}, "image and connect contradict each other"),
        ({"last_image": "a.png", "connect": ("a", "b")}, "last_image and connect .* the last frames"),
        ({"extend": "c.mp4", "edit": "d.mp4"}, "extend and edit contradict each other"),
        ({"last_image": "a.png", "edit": "d.mp4"}, "last_image and edit .* the last frames"),
        ({"image": "a.png", "strength": 0.4}, "strength is given without edit"),
        ({"strength": 0.4}, "strength is given without edit"),
        ({"edit": "c.mp4", "strength": 0}, "strength is 0; it is from above 0"),
        ({"edit": "c.mp4", "strength": 1.5}, "strength is 1.5"),
        ({"edit": "c.mp4", "strength": float("nan")}, "strength is nan"),
        ({"image": "a.png", "reference_path": "b.png"}, "image and reference_path can't be given together"),
        ({"extend": "c.mp4", "mask_strategy": "0"}, "extend and mask_strategy can't be given together"),
        ({"strength": 0.4, "reference_path": "b.png"}, "strength and reference_path can't be given together"),
        (
            {"last_image": "c.mp4"},
            "last_image is c.mp4, but takes an image. For a video there is extend, connect or edit",
        ),
        ({"extend": "a.png"}, "extend is a.png, but takes a video. For an image there is image"),
        ({"image": ""}, "image is empty; give a file"),
        ({"connect": ("a.png", " ")}, "connect is empty"),
        ({"connect": ("a.png",)}, r"connect is \('a.png',\); it takes two files"),
        ({"connect": "ab"}, "connect is 'ab'; it takes two files"),
        ({"reference_path": "a.png"}, 'reference_path "a.png" has no mask_strategy, so nothing of it would be used'),
        ({"mask_strategy": "0"}, "reference 0 is missing: there is none"),
        ({"reference_path": "a.png", "mask_strategy": "0;0,1"}, "reference 1 is missing: there are 1"),
        ({"reference_path": "a.png", "mask_strategy": "2", "loop": 2}, "round 2 of 2 is none"),
        ({"reference_path": "a.png;", "mask_strategy": "0"}, "a path is empty"),
    ],
)
def test_contradictions_are_refused(conditions: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        given_frames_of(length=5, **conditions)


def test_a_length_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="condition_frame_length is 0; at least one latent frame is needed"):
        given_frames_of(length=0, extend="c.mp4")


@pytest.mark.parametrize(
    ("general", "special", "result"),
    [
        ({"image": "a.png"}, {}, {"image": "a.png"}),
        ({"image": "a.png"}, {"extend": "c.mp4"}, {"extend": "c.mp4"}),
        ({"edit": "c.mp4", "strength": 0.4}, {"edit": "d.mp4"}, {"edit": "d.mp4"}),
        ({"edit": "c.mp4", "strength": 0.4}, {"strength": 0.6}, {"edit": "c.mp4", "strength": 0.6}),
        ({"edit": "c.mp4", "strength": 0.4}, {"mask_strategy": "0"}, {"mask_strategy": "0"}),
        ({"reference_path": "a", "mask_strategy": "0"}, {"image": "b.png"}, {"image": "b.png"}),
        (
            {"reference_path": "a", "mask_strategy": "0"},
            {"mask_strategy": "0,0,1", "image": None},
            {"reference_path": "a", "mask_strategy": "0,0,1"},
        ),
        ({"reference_path": "a", "mask_strategy": "0"}, {"reference_path": "", "mask_strategy": ""}, {}),
    ],
)
def test_a_prompt_has_its_own_way(general: dict[str, Any], special: dict[str, Any], result: dict[str, Any]) -> None:
    """What holds for the run never contradicts what a prompt says."""
    found = override_conditions(general, special)
    assert {name: value for name, value in found.items() if value} == result


def test_reading_prompts_needs_no_torch() -> None:
    modules = "mask_strategy, prompt_syntax, prompt_files, frame_conditions"
    program = f"from opensora.core import {modules}; import sys; print(sorted({{'torch', 'numpy'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
