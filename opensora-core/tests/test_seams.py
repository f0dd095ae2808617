"""Seams: a cut stands out, motion that goes on doesn't."""

import numpy as np
import pytest
import torch

from opensora.core import ShapeError
from opensora.core.seams import Seam, measure_seam


def moving(num_frames: int, *, start: int = 0) -> torch.Tensor:
    """A bright square that moves one pixel a frame, over a wall of noise."""
    noise = torch.rand(32, 64, 3, generator=torch.Generator().manual_seed(0)).mul(60).to(torch.uint8)
    frames = noise.repeat(num_frames, 1, 1, 1)
    for index in range(num_frames):
        frames[index, 10:18, start + index : start + index + 8] = 230
    return frames


def test_motion_that_goes_on_has_a_ratio_of_about_one():
    seam = measure_seam(moving(12), moving(12, start=12))
    assert seam.ratio == pytest.approx(1, abs=0.1)
    assert seam.jump == pytest.approx(seam.typical, rel=0.1)


def test_a_cut_has_a_large_ratio():
    assert measure_seam(moving(12), moving(12).flip(1)).ratio > 10
    assert measure_seam(moving(12), 255 - moving(12)).ratio > 10


def test_a_jerk_is_between():
    assert 3 < measure_seam(moving(12), moving(12, start=20)).ratio < 20


def test_what_stands_still_has_no_ratio():
    still = moving(1).repeat(9, 1, 1, 1)
    assert measure_seam(still, still) == Seam(jump=0, typical=0, ratio=0)
    assert 0 < measure_seam(still, still + 1).ratio <= 1  # one level, as rounding makes it


def test_figures_are_those_of_the_definition():
    before = torch.zeros(3, 2, 2, 3, dtype=torch.uint8)
    before[1], before[2] = 10, 30  # steps of 10, 20
    after = torch.full((2, 2, 2, 3), 80, dtype=torch.uint8)
    after[1] = 110  # a jump of 50, a step of 30
    seam = measure_seam(before, after)
    assert (seam.jump, seam.typical, seam.ratio) == pytest.approx((50 / 255, 20 / 255, 2.5))


def test_only_the_eight_frames_on_either_side_count():
    jerky = 255 - moving(20)
    before, after = torch.cat([jerky[::2], moving(8)]), torch.cat([moving(8, start=8), jerky[::2]])
    assert measure_seam(before, after) == measure_seam(moving(8), moving(8, start=8))


def test_single_frames_have_a_jump_alone():
    black, white = np.zeros((1, 4, 4, 3), np.uint8), np.full((1, 4, 4, 3), 255, np.uint8)
    assert measure_seam(black, white) == Seam(jump=1, typical=0, ratio=255)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.zeros(2, 4, 5, 3, dtype=torch.uint8)),
        (torch.zeros(2, 4, 4, 3), torch.zeros(2, 4, 4, 3)),
        (torch.zeros(0, 4, 4, 3, dtype=torch.uint8), torch.zeros(2, 4, 4, 3, dtype=torch.uint8)),
    ],
    ids=["sizes", "floats", "nothing"],
)
def test_what_is_no_seam_is_refused(before, after):
    with pytest.raises(ShapeError, match=r"uint8 \[T, H, W, 3\]|frames of one size"):
        measure_seam(before, after)
