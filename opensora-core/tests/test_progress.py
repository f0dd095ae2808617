"""Progress, in narrow terminals and where there is none."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from opensora.core.hooks.progress import Progress, ProgressSpec
from opensora.core.pipelines.sample_loop import SavedSample


def test_the_time_left_is_told_by_what_was_made_and_not_by_what_was_there(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    requests: Any = [SimpleNamespace(path=Path(f"{index}.mp4"), loop=1) for index in range(110)]
    there = {request.path for request in requests[:90]}
    accelerator = SimpleNamespace(is_main=True, sampling_world_size=2)
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


def test_a_single_long_sample_tells_its_time_left_by_its_steps(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    requests: Any = [SimpleNamespace(path=Path("0.mp4"), loop=1)]
    accelerator = SimpleNamespace(is_main=True, sampling_world_size=1)
    run: Any = SimpleNamespace(accelerator=accelerator, requests=requests, num_saved=0)
    progress = Progress(ProgressSpec())
    progress.sample_start(run)
    progress.sample_batch(run, requests)
    with caplog.at_level(logging.INFO, "opensora"):
        for step in range(4):
            now[0] += 6
            progress.sample_step(run, SimpleNamespace(step=step, num_steps=4))  # type: ignore[arg-type]  # a state's face
    progress.sample_end(run)
    assert [record.getMessage() for record in caplog.records] == ["0 of 1 samples, about 12 s left"]


@pytest.mark.parametrize("width", [70, 80, 120])
def test_times_stay_whole_in_a_narrow_terminal(width: int) -> None:
    requests: Any = [SimpleNamespace(path=Path("a-long-name-after-its-prompt.mp4"), loop=1)]
    accelerator = SimpleNamespace(is_main=True, sampling_world_size=1)
    run: Any = SimpleNamespace(accelerator=accelerator, requests=requests, num_saved=0)
    progress = Progress(ProgressSpec(steps=True))
    progress.sample_start(run)
    progress.sample_batch(run, requests)
    progress.sample_step(run, SimpleNamespace(step=1, num_steps=20))  # type: ignore[arg-type]  # a state's face
    console = Console(file=io.StringIO(), width=width)
    console.print(progress._bar.get_renderable())
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]  # of StringIO
    progress.sample_end(run)
    assert [line.split()[0] for line in lines if line.strip()] == ["sample", "steps"]
    assert all("0:00:00 gone, -:--:-- left" in line for line in lines if line.strip())
