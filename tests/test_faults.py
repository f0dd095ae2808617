"""A process that dies, hangs or meets a bad sample: what becomes of the others, and what the user is told."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from runs import command_line, environment, tiny_training

MISHAPS = '''
import os
import signal
import time

import torch
from attrs import frozen

from opensora.core import hook
from opensora.core.protocols import Clip


@frozen(kw_only=True)
class MishapSpec:
    kind: str
    rank: int = 1
    step: int = 3


class Mishap:
    """Something happens to one process after a step."""

    Spec = MishapSpec

    def __init__(self, spec):
        self.spec = spec

    @hook
    def step_end(self, run, update):
        if (run.accelerator.rank, update.step) == (self.spec.rank, self.spec.step):
            {"dies": die, "sleeps": sleep_for_ever}[self.spec.kind]()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def sleep_for_ever():
    time.sleep(10_000)


class OddClips:
    """Noise; some files never answer, as on a lost network drive, or hold what is no number."""

    Spec = MishapSpec
    size = (4, 16, 16)

    def __init__(self, spec, *, bucket_config=None):
        self.spec = spec

    def __len__(self):
        return 16

    def __getitem__(self, key):
        if self.spec.kind == "sleeps":
            sleep_for_ever()
        video = torch.rand(3, *self.size, generator=key.generator("clip"))
        if key.index == 11:
            video[0, 0, 0, 0] = float("nan")
        return Clip(video=video, text="noise", fps=8, key=key, path=f"odd_{key.index}.mp4")
'''


@pytest.fixture(scope="module")
def mishaps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which the hook ``mishap`` and the dataset ``odd`` are installed."""
    site = tmp_path_factory.mktemp("site")
    (site / "mishaps.py").write_text(MISHAPS)
    metadata = site / "mishaps-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: mishaps\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[opensora.hooks]\nmishap = mishaps:Mishap\n[opensora.datasets]\nodd = mishaps:OddClips\n"
    )
    return {**environment(), "PYTHONPATH": str(site)}


@pytest.fixture
def ends(mishaps: dict[str, str], tmp_path: Path) -> Callable[..., tuple[int, str, float]]:
    """Runs a command that must end by itself with all its processes; gives exit code, stderr and seconds."""

    def run(*arguments: object) -> tuple[int, str, float]:
        marked = {**mishaps, "MARK": str(tmp_path)}
        begin = time.monotonic()
        done = subprocess.run(
            command_line("opensora-run", *arguments),
            cwd=tmp_path, env=marked, capture_output=True, text=True, timeout=90, check=False,
        )  # fmt: skip
        seconds = time.monotonic() - begin
        time.sleep(0.5)  # what was told to end may be about to
        assert not [each for each in psutil.process_iter() if has_mark(each, str(tmp_path))], "processes are left over"
        return done.returncode, done.stderr, seconds

    return run


def has_mark(process: psutil.Process, mark: str) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and process.environ().get("MARK") == mark
    except psutil.Error:
        return False


def mishap(kind: str, **options: object) -> list[dict[str, object]]:
    return [{"type": "mishap", "kind": kind, **options}]


def test_a_rank_asleep_ends_all_and_shows_where_it_slept(
    ends: Callable[..., tuple[int, str, float]], clips: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    config = write(tiny_training(clips, batch_size=4, max_steps=40, step_timeout_s=3, hooks=mishap("sleeps")))
    code, stderr, seconds = ends(config, "--run-folder", tmp_path / "run", "--nproc", 2)
    assert code == 1
    assert seconds < 45
    assert re.search(r"\[rank 1\] error: hooks after step 3 has taken longer than 3 s \(step_timeout_s = 3\)", stderr)
    assert "in sleep_for_ever" in stderr
    assert "in read_together" in stderr or "Connection closed" in stderr  # the other one waited


def test_a_killed_rank_ends_all(
    ends: Callable[..., tuple[int, str, float]], clips: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    config = write(tiny_training(clips, batch_size=4, max_steps=4000, step_timeout_s=3, hooks=mishap("dies")))
    code, _, seconds = ends(config, "--run-folder", tmp_path / "run", "--nproc", 2)
    assert code != 0
    assert seconds < 45


def test_a_loader_that_hangs_ends_with_its_workers(
    ends: Callable[..., tuple[int, str, float]], clips: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    values = tiny_training(clips, dataset={"type": "odd", "kind": "sleeps"}, num_workers=2, step_timeout_s=1)
    code, stderr, _ = ends(write(values), "--run-folder", tmp_path / "run")
    assert code == 1
    assert "error: step 1 has taken longer than 3 s (step_timeout_s = 1)" in stderr
    assert "in read_together" in stderr


def test_a_sample_without_finite_loss_is_named_whichever_process_had_it(
    ends: Callable[..., tuple[int, str, float]], clips: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    odd = {"type": "odd", "kind": "nan"}
    values = tiny_training(clips, dataset=odd, batch_size=4, max_left_out=1)  # 8 a step of 16: in one of two steps
    code, stderr, _ = ends(write(values), "--run-folder", tmp_path / "run", "--nproc", 2)
    assert code == 2, stderr
    told = re.findall(r"Step (\d) is left out: the loss of odd_11.mp4 \(row 11\) is not finite.", stderr)
    assert len(told) == 1, stderr
    assert "odd_11.mp4 (row 11)" in (tmp_path / "run" / "run.log").read_text()
    assert stderr.count(f"--pipeline replay --step {told[0]}") == 1
