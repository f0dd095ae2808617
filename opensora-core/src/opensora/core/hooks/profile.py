"""A trace of a few steps by torch's profiler: where the time and the memory go."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from attrs import field, frozen
from attrs.validators import gt

from opensora.core.hookspecs import hook
from opensora.core.profiling import tracing
from opensora.core.run_folder import make_folder, write_atomically

if TYPE_CHECKING:
    from opensora.core.pipelines.loop import LoopRun, Update
    from opensora.core.pipelines.sample_loop import SampleRun
    from opensora.core.protocols import SampleState

__all__ = ["Profile", "ProfileSpec"]

log = logging.getLogger(__name__)
ROWS = 40


@frozen(kw_only=True)
class ProfileSpec:
    """Write ``profile/trace.json`` (for chrome://tracing or ui.perfetto.dev) and ``profile/table.txt`` to the run folder."""

    first_step: int = field(default=4, validator=gt(0))
    """With which step of this run, counted from 1, the trace begins; those before warm up. In sampling: denoising steps."""
    steps: int = field(default=3, validator=gt(0))
    """How many are traced. Each makes some MB."""
    memory: bool = True
    """Trace each allocation too."""
    shapes: bool = False
    """Note the shapes of operations' inputs."""
    all_processes: bool = False
    """Trace each process, to ``trace-1.json`` and so on. Otherwise the main one alone."""


class Profile:
    """Starts before the first of the steps, and writes after the last of them or when the run ends."""

    Spec = ProfileSpec

    def __init__(self, spec: ProfileSpec) -> None:
        self.spec = spec
        self._done = 0
        self._profiler: Any = None
        self._stack = ExitStack()

    @hook(trylast=True)
    def train_start(self, run: LoopRun) -> None:
        """Start at once, if the first step is to be traced."""
        self._advance(run, 0)

    @hook(trylast=True)
    def step_end(self, run: LoopRun, update: Update) -> None:  # the name tells pluggy
        """Count."""
        self._advance(run, 1)

    @hook(tryfirst=True)
    def train_end(self, run: LoopRun) -> None:
        """Write what there is."""
        self._end(run)

    @hook(trylast=True)
    def sample_start(self, run: SampleRun) -> None:
        """Start at once, if the first step is to be traced."""
        self._advance(run, 0)

    @hook(trylast=True)
    def sample_step(self, run: SampleRun, state: SampleState) -> None:  # the name tells pluggy
        """Count."""
        self._advance(run, 1)

    @hook(tryfirst=True)
    def sample_end(self, run: SampleRun) -> None:
        """Write what there is."""
        self._end(run)

    def _advance(self, run: LoopRun | SampleRun, steps: int) -> None:
        if not (run.accelerator.is_main or self.spec.all_processes):
            return
        self._done += steps
        if self._profiler is not None and self._done == self.spec.first_step - 1 + self.spec.steps:
            self._write(run)
        elif self._profiler is None and self._done == self.spec.first_step - 1:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if run.accelerator.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._stack.enter_context(tracing())
            self._profiler = torch.profiler.profile(
                activities=activities, profile_memory=self.spec.memory, record_shapes=self.spec.shapes
            )
            self._profiler.start()

    def _end(self, run: LoopRun | SampleRun) -> None:
        if self._profiler is not None:
            self._write(run)
        elif self._done < self.spec.first_step - 1 + self.spec.steps and run.accelerator.is_main:
            log.warning(
                "profile: the run had %d steps, so that step %d was not reached. Set first_step lower.",
                self._done,
                self.spec.first_step,
            )

    def _write(self, run: LoopRun | SampleRun) -> None:
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        self._stack.close()
        folder = make_folder(Path(run.folder) / "profile")
        suffix = f"-{run.accelerator.rank}" if run.accelerator.rank else ""
        profiler.export_chrome_trace(str(folder / f"trace{suffix}.json"))
        sort = "self_device_time_total" if run.accelerator.device.type == "cuda" else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=sort, row_limit=ROWS)
        traced = self._done - self.spec.first_step + 1
        write_atomically(folder / f"table{suffix}.txt", f"{traced} steps from step {self.spec.first_step} on\n{table}")
        log.info("Profile of %d steps: %s", traced, folder)
