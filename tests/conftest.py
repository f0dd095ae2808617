"""What tests across packages share: a small dataset of real mp4 files, and the real commands."""

from __future__ import annotations

import multiprocessing
import subprocess
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from forks import ForkedCommands
from runs import Command, command_line, environment

from opensora.core.config.write import write_config
from opensora.core.video import write_video


def clip(digit: int, *, num_frames: int = 4, side: int = 16) -> torch.Tensor:
    """A bright square, larger for higher numbers, that moves right: [T, H, W, 3] uint8."""
    frames = torch.zeros(num_frames, side, side, 3, dtype=torch.uint8)
    for step in range(num_frames):
        frames[step, 4 : 6 + digit, step + 2 : step + 5] = 220
    return frames


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file with the longest tests first: files are dealt out to two processes, and neither should wait at the end."""
    items.sort(key=lambda item: item.path.name != "test_resume.py")


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 24 captioned mp4 files."""
    folder = tmp_path_factory.mktemp("clips")
    rows = ["path,text"]
    for index in range(24):
        write_video(folder / f"clip_{index:02d}.mp4", clip(index % 6), fps=8, crf=4)
        rows.append(f"clip_{index:02d}.mp4,a square of size {index % 6}")
    (folder / "clips.csv").write_text("\n".join(rows) + "\n")
    return folder / "clips.csv"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes values as a config file."""

    def write(values: dict[str, object], name: str = "config.py") -> Path:
        write_config(tmp_path / name, values, "A test's config.")
        return tmp_path / name

    return write


@pytest.fixture(scope="session")
def run_in() -> Command:
    """Runs one of the commands in a folder."""
    forked = ForkedCommands() if "forkserver" in multiprocessing.get_all_start_methods() else None

    def run(
        folder: Path, *arguments: object, timeout_s: float = 200, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        line, variables = command_line(*arguments), env or environment()
        if forked and forked.suits(variables):
            return forked.run(line, folder, timeout_s)
        return subprocess.run(
            line, cwd=folder, env=variables, capture_output=True, text=True, check=False, timeout=timeout_s
        )

    return run


@pytest.fixture
def command(tmp_path: Path, run_in: Command) -> Command:
    """Runs one of the commands in an empty folder."""
    return partial(run_in, tmp_path)
