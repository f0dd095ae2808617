"""Frames of references come into a sample as published, with the mask that says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from opensora.core import ConfigError, ShapeError
from opensora.core.given_frames import apply_edits
from opensora.core.mask_strategy import FrameEdit, edits_of_round, parse_mask_strategy

VECTORS = load_file(Path(__file__).with_name("goldens") / "mask_strategy.safetensors")


def apply(case: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The first sample of a published case; the second has no strategy."""
    number = case["case"]
    references = [VECTORS[f"{number}.ref0"], VECTORS[f"{number}.ref1"]]
    edits = edits_of_round(parse_mask_strategy(case["mask_strategy"]), case["loop"])
    return apply_edits(VECTORS[f"{number}.z"][0], references, edits, align=case["align"])


def test_frames_are_placed_as_published(golden: Callable[[str], Any]) -> None:
    cases = golden("mask_strategy")["apply"]["cases"]
    placed = [case for case in cases if "error" not in case and case["mask_strategy"] != "0,0,0,0,0"]
    assert len(placed) == 18
    for case in placed:
        latents, mask = apply(case)
        assert torch.equal(latents, VECTORS[f"{case['case']}.z_out"][0]), case
        assert torch.equal(mask, VECTORS[f"{case['case']}.mask"][0]), case
        assert mask.dtype is torch.float32
        untouched, ones = apply_edits(VECTORS[f"{case['case']}.z"][1], [], [])
        assert torch.equal(untouched, VECTORS[f"{case['case']}.z_out"][1])
        assert torch.equal(ones, VECTORS[f"{case['case']}.mask"][1])


def test_what_cannot_be_placed_is_an_error(golden: Callable[[str], Any]) -> None:
    """Those that fail upstream, and a length of 0, which upstream takes in silence."""
    cases = golden("mask_strategy")["apply"]["cases"]
    wrong = [case for case in cases if "error" in case or case["mask_strategy"] == "0,0,0,0,0"]
    assert len(wrong) == 7
    for case in wrong:
        with pytest.raises(ConfigError, match=r"reference 5 is missing|latent frame -?[0-9]+ of|length can't be"):
            apply({**case, "case": 0})


def test_nothing_that_is_given_is_changed() -> None:
    latents, reference = torch.randn(4, 6, 2, 2), torch.randn(4, 3, 2, 2)
    before, reference_before = latents.clone(), reference.clone()
    result, _ = apply_edits(latents, [reference], [FrameEdit(length=3)])
    result.zero_()
    assert torch.equal(latents, before)
    assert torch.equal(reference, reference_before)


def test_a_later_edit_overwrites_an_earlier() -> None:
    references = [torch.zeros(1, 4, 1, 1), torch.ones(1, 4, 1, 1)]
    edits = [FrameEdit(length=4), FrameEdit(reference=1, target_start=2, length=1, edit_ratio=0.4)]
    result, mask = apply_edits(torch.full((1, 5, 1, 1), 7.0), references, edits)
    assert result.flatten().tolist() == [0, 0, 1, 0, 7]
    assert mask.tolist() == pytest.approx([0, 0, 0.4, 0, 1])


def test_references_take_the_precision_of_the_latents() -> None:
    result, mask = apply_edits(
        torch.zeros(1, 2, 1, 1, dtype=torch.bfloat16), [torch.ones(1, 1, 1, 1)], [FrameEdit(edit_ratio=0.3)]
    )
    assert result.dtype is torch.bfloat16
    assert mask.tolist() == [torch.tensor(0.3).item(), 1]


@pytest.mark.parametrize("shape", [(3, 1, 2, 2), (4, 1, 2, 3), (4, 1, 3, 2)])
def test_a_reference_of_another_size_is_refused(shape: tuple[int, ...]) -> None:
    references = [torch.zeros(4, 1, 2, 2), torch.zeros(shape)]
    with pytest.raises(ShapeError, match=r"Reference 1 \(b\.png\) has latents of shape .*, the sample \[4, 6, 2, 2\]"):
        apply_edits(torch.zeros(4, 6, 2, 2), references, parse_mask_strategy("0;0,1"), names=["a.png", "b.png"])
