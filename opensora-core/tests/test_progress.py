"""Progress where there is no terminal."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opensora.core.hooks.progress import Progress, ProgressSpec
from opensora.core.pipelines.sample_loop import SavedSample


def test_the_time_left_is_told_by_what_was_made_and_not_by_what_was_there(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    request: Any = SimpleNamespace(path=Path("a.mp4"), loop=1)
    accelerator = SimpleNamespace(is_main=True, world_size=1)
    run: Any = SimpleNamespace(accelerator=accelerator, requests=[request] * 100, num_saved=0, num_skipped=90)
    progress = Progress(ProgressSpec())
    progress.sample_start(run)
    with caplog.at_level(logging.INFO, "opensora"):
        for _ in range(2):
            progress.sample_batch(run, [request])
            now[0] += 30
            run.num_saved += 1
            progress.sample_saved(run, SavedSample(request=request))
    progress.sample_end(run)
    assert [record.getMessage() for record in caplog.records] == [
        "91 of 100 samples, about 270 s left",
        "92 of 100 samples, about 240 s left",
    ]
