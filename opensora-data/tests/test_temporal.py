"""Which frames make a clip, against the reference vectors."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opensora.core import DataError
from opensora.data.temporal import last_start, sample_frames

CASES = json.loads(Path(__file__).with_name("goldens").joinpath("temporal.json").read_text())


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case['total']}-{case['num_frames']}x{case['frame_interval']}"
)
def test_reference_indices(case):
    total, num_frames, interval = case["total"], case["num_frames"], case["frame_interval"]
    assert [0, last_start(total, num_frames, frame_interval=interval)] == case["start_range"]
    for start, outcome in zip(case["start_range"], (case["earliest"], case["latest"]), strict=True):
        if "error" in outcome:
            with pytest.raises(DataError, match=f"has {total} frames from frame 0 on; {num_frames} are needed"):
                sample_frames(total, num_frames, frame_interval=interval, start=start)
        else:
            assert sample_frames(total, num_frames, frame_interval=interval, start=start) == outcome["ok"]


@given(total=st.integers(1, 400), num_frames=st.integers(1, 60), interval=st.integers(1, 9), share=st.floats(0, 1))
def test_indices_ascend_within_the_file_and_keep_to_the_window(total, num_frames, interval, share):
    start = round(share * last_start(total, num_frames, frame_interval=interval))
    if total < num_frames:
        with pytest.raises(DataError):
            sample_frames(total, num_frames, frame_interval=interval, start=start)
        return
    indices = sample_frames(total, num_frames, frame_interval=interval, start=start)
    assert len(indices) == num_frames
    assert indices[0] == start
    longest = -(-(num_frames * interval - 1) // max(1, num_frames - 1))
    assert all(0 < after - before <= longest for before, after in pairwise(indices))
    assert indices[-1] <= min(start + num_frames * interval, total) - 1
