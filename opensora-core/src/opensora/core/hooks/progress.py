"""A progress bar, on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from attrs import frozen
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from opensora.core.hookspecs import hook

if TYPE_CHECKING:
    from opensora.core.pipelines.loop import LoopRun, Update
    from opensora.core.pipelines.sample_loop import SampleRun, SavedSample
    from opensora.core.protocols import SampleState

__all__ = ["Progress", "ProgressSpec"]


@frozen(kw_only=True)
class ProgressSpec:
    """Show progress with rate and time left."""

    steps: bool = False
    """When sampling, a second bar over denoising steps."""


class Progress:
    """Bars on stderr, in the main process."""

    Spec = ProgressSpec

    def __init__(self, spec: ProgressSpec) -> None:
        self.spec = spec
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(file=sys.stderr),
            disable=not sys.stderr.isatty(),
        )
        self._main: TaskID | None = None
        self._steps: TaskID | None = None

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
        """Show the bar over this process's videos."""
        if run.accelerator.is_main:
            mine = len(run.requests[:: run.accelerator.world_size])
            self._bar.start()
            self._main = self._bar.add_task("sample", total=mine, note="")
            if self.spec.steps:
                self._steps = self._bar.add_task("steps", total=None, note="")

    @hook
    def sample_step(self, run: SampleRun, state: SampleState) -> None:
        """Move the bar over steps."""
        if self._steps is not None:
            self._bar.update(self._steps, total=state.num_steps, completed=state.step + 1)

    @hook
    def sample_saved(self, run: SampleRun, sample: SavedSample) -> None:
        """Move the bar over videos."""
        if self._main is not None:
            self._bar.update(self._main, advance=1, note=sample.request.path.name)

    @hook
    def sample_end(self, run: SampleRun) -> None:
        """Leave the bar as it is."""
        self._bar.stop()
