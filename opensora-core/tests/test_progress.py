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
    requests: Any = [SimpleNamespace(path=Path(f"{index}.mp4"), loop=1) for index in range(110)]
    there = {request.path for request in requests[:90]}
    accelerator = SimpleNamespace(is_main=True, world_size=2)
    run: Any = SimpleNamespace(accelerator=accelerator, requests=requests, there=there, num_saved=0)
    progress = Progress(ProgressSpec())
    progress.sample_start(run)
    with caplog.at_level(logging.INFO, "opensora"):
        for _ in range(2):
            progress.sample_batch(run, requests[-1:])
            now[0] += 30
            run.num_saved += 1
            progress.sample_saved(run, SavedSample(request=requests[-1]))
    progress.sample_end(run)
    assert [record.getMessage() for record in caplog.records] == [
        "1 of 10 samples, about 270 s left",
        "2 of 10 samples, about 240 s left",
    ]
