"""Moving digits: what a caption says is what the pixels do."""

from collections import Counter

import numpy as np
import pytest

from opensora.core import ConfigError
from opensora.data.digits.clips import DIRECTIONS, captions, load_scans, make_clips


def test_captions_come_in_equal_shares():
    counts = Counter(clip.caption for clip in make_clips(80, num_frames=2))
    assert counts == {caption: 2 for _, _, caption in captions()}
    assert len(counts) == 40
    assert "a handwritten seven moving left" in counts


@pytest.mark.parametrize("canvas", [16, 32])
def test_clips_move_as_their_caption_says_and_stay_in_the_picture(canvas):
    for clip in make_clips(120, canvas=canvas):
        assert clip.frames.shape == (8, canvas, canvas, 3)
        assert clip.frames.dtype == np.uint8
        ink = clip.frames[..., 0].astype(float)
        amount = ink.sum(axis=(1, 2))
        assert (amount == amount[0]).all()
        assert amount[0] > 0
        rows, columns = np.indices((canvas, canvas))
        centres = np.stack([(ink * axis).sum(axis=(1, 2)) / amount for axis in (rows, columns)], axis=1)
        expected = np.array(DIRECTIONS[clip.direction]) * canvas / 16
        np.testing.assert_allclose(np.diff(centres, axis=0), np.tile(expected, (7, 1)), atol=1e-6)


def test_clips_of_a_caption_differ():
    first_frames = {clip.frames[0].tobytes() for clip in make_clips(400) if clip.caption == captions()[0][2]}
    assert len(first_frames) >= 9


def test_the_seed_decides():
    def bytes_of(seed):
        return b"".join(clip.frames.tobytes() for clip in make_clips(40, seed=seed))

    assert bytes_of(3) == bytes_of(3) != bytes_of(4)
    assert bytes_of((3, 1)) != bytes_of(3)


def test_the_two_halves_of_the_scans_never_meet():
    clips, grader = ({scan.tobytes() for scan in load_scans(split)[0]} for split in ("clips", "grader"))
    assert len(load_scans("clips")[1]) + len(load_scans("grader")[1]) == 1797
    assert not clips & grader
    for split in ("clips", "grader"):
        assert min(Counter(load_scans(split)[1].tolist()).values()) > 75  # of each digit


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"canvas": 20}, "canvas=20 must be a multiple of 16"),
        ({"canvas": 0}, "canvas=0 must be"),
        ({"num_frames": 10}, "num_frames=10 must be 2 to 9"),
        ({"num_frames": 1}, "num_frames=1 must be 2 to 9"),
        ({"jitter": 5}, "jitter=5 must be 0 to 4"),
    ],
    ids=str,
)
def test_paths_that_do_not_fit_are_refused(options, says):
    with pytest.raises(ConfigError, match=says):
        next(make_clips(1, **options))
