"""The grader reads real clips right, and nothing out of nothing."""

import numpy as np
import pytest

from opensora.core import DataError
from opensora.data.digits.clips import make_clips
from opensora.data.digits.grader import Grader


@pytest.fixture(scope="module")
def grader() -> Grader:
    return Grader()


@pytest.mark.parametrize("canvas", [16, 32])
def test_real_clips_are_read_right(grader, canvas):
    clips = list(make_clips(400, seed=5, canvas=canvas))
    readings = [grader.read(clip.frames) for clip in clips]
    digits = np.mean([reading.digit == clip.digit for reading, clip in zip(readings, clips, strict=True)])
    directions = np.mean([reading.direction == clip.direction for reading, clip in zip(readings, clips, strict=True)])
    assert digits >= 0.95
    assert directions >= 0.99


def test_the_classifier_reads_scans_that_it_has_not_seen(grader):
    assert grader.accuracy_on_scans() >= 0.97


def test_played_backwards_the_direction_is_the_opposite(grader):
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    for clip in make_clips(40, seed=6):
        reading = grader.read(clip.frames[::-1])
        assert reading.direction == opposite[clip.direction]


def test_a_still_digit_has_no_direction(grader):
    clip = next(make_clips(1))
    assert grader.read(np.repeat(clip.frames[:1], 8, axis=0)).direction is None
    assert grader.read(np.zeros((8, 16, 16, 3), np.uint8)).direction is None


def test_noise_reads_as_chance(grader):
    rng = np.random.default_rng(0)
    clips = list(make_clips(200, seed=7))
    readings = [grader.read(rng.integers(0, 256, (8, 16, 16, 3), np.uint8)) for _ in clips]
    both = [
        (one.digit == clip.digit, one.direction == clip.direction) for one, clip in zip(readings, clips, strict=True)
    ]
    digit, direction = np.mean(both, axis=0)
    assert digit < 0.2
    assert direction < 0.3


@pytest.mark.parametrize("shape", [(1, 16, 16, 3), (8, 16, 32, 3), (8, 20, 20, 3)], ids=str)
def test_other_sizes_are_refused(grader, shape):
    with pytest.raises(DataError, match=r"the grader reads two or more, square, of a multiple of 16"):
        grader.read(np.zeros(shape, np.uint8))
