"""A progress bar, on a terminal only."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from attrs import frozen
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.table import Column
from rich.text import Text

from opensora.core.hookspecs import hook

if TYPE_CHECKING:
    from opensora.core.pipelines.loop import LoopRun, Update
    from opensora.core.pipelines.sample_loop import SampleRun, SavedSample
    from opensora.core.protocols import SampleState
    from opensora.core.requests import Request
    from opensora.core.video_sampler import Piece

__all__ = ["Progress", "ProgressSpec"]

log = logging.getLogger(__name__)
_SECONDS_BETWEEN_LINES = 10


@frozen(kw_only=True)
class ProgressSpec:
    """Show progress with rate and time left."""

    steps: bool = False
    """When sampling, a second bar over denoising steps."""


def _fixed() -> Column:
    """A column that stays whole in a narrow terminal, where the note beside it is cut."""
    return Column(no_wrap=True)


class _Note(TextColumn):
    """A text that takes the room that is left, and one line."""

    def render(self, task: Task) -> Text:
        """The text, cut rather than wrapped."""
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


class Progress:
    """Bars on stderr, in the main process."""

    Spec = ProgressSpec

    def __init__(self, spec: ProgressSpec) -> None:
        self.spec = spec
        self._bar = Bar(
            TextColumn("{task.description}", table_column=_fixed()),
            BarColumn(12, table_column=_fixed()),
            MofNCompleteColumn(table_column=_fixed()),
            TimeElapsedColumn(table_column=_fixed()),
            TextColumn("gone,", table_column=_fixed()),
            TimeRemainingColumn(table_column=_fixed()),
            TextColumn("left", table_column=_fixed()),
            _Note("{task.fields[note]}", table_column=Column()),
            console=Console(file=sys.stderr),
            disable=not sys.stderr.isatty(),
        )
        self._main: TaskID | None = None
        self._steps: TaskID | None = None
        self._batch: Sequence[Request] = ()
        self._round = self._decoded = self._finished = self._total = 0
        self._begin = self._told = 0.0

    @hook
    def train_start(self, run: LoopRun) -> None:
        """Show the bar, standing where the run does."""
        if run.accelerator.is_main:
            self._bar.start()
            self._main = self._bar.add_task("train", total=run.max_steps, completed=run.counters.step, note="")

    @hook
    def step_end(self, run: LoopRun, update: Update) -> None:
        """Move the bar."""
        if self._main is not None:
            self._bar.update(self._main, completed=update.step)

    @hook
    def log(self, run: LoopRun, record: Mapping[str, float]) -> None:
        """Show loss and rate."""
        if self._main is not None:
            note = f"loss {record['avg_loss']:.4f}, {record['steps_per_second']:.2f} steps/s"
            self._bar.update(self._main, note=note)

    @hook
    def train_end(self, run: LoopRun) -> None:
        """Leave the bar as it is."""
        self._bar.stop()

    @hook
    def sample_start(self, run: SampleRun) -> None:
        """Show the bar over all denoising steps and frames to decode of this process's videos, which tells the time left."""
        if run.accelerator.is_main:
            self._bar.start()
            there = getattr(run, "there", ())
            wanted = len(run.requests) - (sum(each.path in there for each in run.requests) if there else 0)
            shares = run.accelerator.sampling_world_size
            self._total = -(-wanted // shares)  # the main process has the first, so the most
            self._main = self._bar.add_task("sample", total=self._total, note="")
            self._begin = self._told = time.monotonic()
            if self.spec.steps:
                self._steps = self._bar.add_task("steps", total=None, note="")

    @hook
    def sample_batch(self, run: SampleRun, requests: Sequence[Request]) -> None:
        """Begin anew with the steps of a batch."""
        self._batch, self._round = requests, 0
        self._finished = run.num_saved

    @hook
    def sample_step(self, run: SampleRun, state: SampleState) -> None:
        """Move the bars over steps, and over videos by the share that the step is of their denoising."""
        if self._steps is not None:
            self._bar.update(
                self._steps, total=state.num_steps, completed=state.step + 1, note=f"round {self._round + 1}"
            )
        self._show((state.step + 1) / state.num_steps, f"denoising, step {state.step + 1} of {state.num_steps}")

    @hook
    def sample_frames(self, run: SampleRun, requests: Sequence[Request], piece: Piece) -> None:
        """Say that frames are being decoded; a round is done with its last."""
        if piece.is_first:
            self._decoded, self._round = 0, piece.round
        self._decoded += len(piece.frames[0])
        self._show(1.0, f"decoding, frame {self._decoded} of {requests[0].size[0]}")
        self._round = piece.round + 1

    def _show(self, share: float, note: str) -> None:
        """``share``: how much of the present round is denoised."""
        if self._main is not None:
            rounds = self._batch[0].loop
            done = (min(self._round, rounds - 1) + share) / rounds * len(self._batch)
            self._tell(self._finished + done)
            self._bar.update(self._main, completed=self._finished + done, note=f"{note}, {self._batch[0].path.name}")

    @hook
    def sample_saved(self, run: SampleRun, sample: SavedSample) -> None:
        """Move the bar over videos."""
        if self._main is None:
            return
        self._finished += 1
        self._bar.update(self._main, completed=self._finished, note=sample.request.path.name)
        self._tell(self._finished)

    def _tell(self, done: float) -> None:
        """Where there is no terminal, say from time to time how far it is. ``done``: videos, the begun one in part."""
        now = time.monotonic()
        gone = now - self._begin
        pause = max(_SECONDS_BETWEEN_LINES, gone / 20)  # so that long runs don't fill the log
        if self._bar.disable and now - self._told >= pause and 0 < done < self._total:
            self._told = now
            left = gone / done * (self._total - done)
            log.info("%d of %d samples, about %.0f s left", done, self._total, left)

    @hook
    def sample_end(self, run: SampleRun) -> None:
        """Leave the bar as it is."""
        self._bar.stop()
