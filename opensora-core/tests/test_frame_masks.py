"""Frame masks have the published distribution, and always leave something to learn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from opensora.core import ConfigError, SampleKey
from opensora.core.frame_masks import FRAME_MASKS, check_mask_ratios, draw_frame_mask


def frequencies(ratios: dict[str, float], num_frames: int, draws: int) -> dict[str, float]:
    masks = (draw_frame_mask(ratios, num_frames, SampleKey(0, index)) for index in range(draws))
    counts = Counter("".join("01"[int(noised)] for noised in mask.tolist()) for mask in masks)
    return {mask: count / draws for mask, count in counts.items()}


def test_masks_come_as_often_as_published(golden: Callable[[str], Any]) -> None:
    checked = 0
    for row in golden("mask_generator")["rows"]:
        if "error" in row:  # quarters of two and three frames: see below
            continue
        expected = row["masks"]
        found = frequencies({row["name"]: 1.0}, row["frames"], 20 if len(expected) == 1 else 1200)
        for mask in {*expected, *found}:
            assert abs(found.get(mask, 0) - expected.get(mask, 0)) < 0.045, (row["name"], row["frames"], mask)
        checked += 1
    assert checked > 50


def test_random_masks_have_as_many_frames_as_published(golden: Callable[[str], Any]) -> None:
    expected = golden("mask_generator")["random"]
    found = frequencies({"random": 1.0}, expected["frames"], 4000)
    for ones, share in enumerate(expected["ones"]):
        assert abs(sum(each for mask, each in found.items() if mask.count("1") == ones) - share) < 0.025


@pytest.mark.parametrize("name", [name for name in FRAME_MASKS if name.startswith("quarter")])
@pytest.mark.parametrize("num_frames", [2, 3])
def test_a_quarter_of_two_or_three_frames_is_one_frame(name: str, num_frames: int) -> None:
    for mask in frequencies({name: 1.0}, num_frames, 20):
        given = mask.count("0")
        assert given == (0 if mask == "11" and name == "quarter_head_tail" else 2 if name == "quarter_head_tail" else 1)


@pytest.mark.parametrize("name", FRAME_MASKS)
@pytest.mark.parametrize("num_frames", [1, 2, 3, 4, 7])
def test_something_is_always_noised(name: str, num_frames: int) -> None:
    for index in range(30):
        mask = draw_frame_mask({name: 1.0}, num_frames, SampleKey(0, index))
        assert mask.dtype is torch.bool
        assert mask.shape == (num_frames,)
        assert mask.any()


def test_a_mask_belongs_to_its_sample() -> None:
    ratios = check_mask_ratios({"random": 0.5, "image_random": 0.3})
    masks = [draw_frame_mask(ratios, 8, SampleKey(3, index, 1)) for index in range(50)]
    assert torch.equal(masks[20], draw_frame_mask(ratios, 8, SampleKey(3, 20, 1)))
    assert len({tuple(mask.tolist()) for mask in masks}) > 10


def test_names_are_drawn_as_often_as_their_ratios_say() -> None:
    found = frequencies(check_mask_ratios({"image_head": 0.25, "image_tail": 0.5}), 4, 2000)
    assert {mask: round(share * 20) / 20 for mask, share in found.items()} == {"0111": 0.25, "1110": 0.5, "1111": 0.25}


def test_identity_takes_the_rest_and_the_given_dict_stays() -> None:
    given = {"random": 0.2, "image_head": 0.3}
    assert check_mask_ratios(given) == {"random": 0.2, "image_head": 0.3, "identity": 0.5}
    assert given == {"random": 0.2, "image_head": 0.3}
    assert check_mask_ratios({}) == {"identity": 1.0}
    assert sum(
        check_mask_ratios(dict.fromkeys(list(FRAME_MASKS)[1:], 0.1) | {"identity": 0.0}).values()
    ) == pytest.approx(1)


def test_ratios_that_upstream_refuses_are_refused(golden: Callable[[str], Any]) -> None:
    for case in golden("mask_generator")["invalid"]:
        is_defect = sum(case["ratios"].values()) > 1  # upstream lets identity become negative
        if "error" in case or is_defect:
            with pytest.raises(ConfigError, match="mask_ratios"):
                check_mask_ratios(case["ratios"])
        else:
            assert check_mask_ratios(case["ratios"]) == case["ok"]


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        ({"interpolate": 1.0}, 'Did you mean "intepolate"?'),
        ({"image_head": 1.5}, "mask_ratios.image_head is 1.5"),
        ({"image_head": float("nan")}, "mask_ratios.image_head is nan"),
        ({"image_head": 0.7, "random": 0.7}, "sum to 1.4"),
        ({"identity": 0.5, "random": 0.4}, "sum to 0.9"),
    ],
    ids=["misspelt", "above 1", "nan", "too much", "identity and too little"],
)
def test_bad_ratios_say_what_is_wrong(ratios: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_mask_ratios(ratios)
    assert message in str(caught.value)
