"""The contract of hooks: when each is called, and with what.

A hook is a component of group ``opensora.hooks``: a class with a ``Spec`` whose methods carry `hook` and have names from this
file. A method takes only those arguments that it needs. The built-in behaviour (progress, logging, EMA, checkpoints,
previews) is written over the same hooks.

Hooks run in all processes; ask ``run.accelerator.is_main`` before writing a file, or ``run.accelerator.writes_samples``
before writing one of this process's samples, which others may have too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from torch import Tensor, nn

    from opensora.core.denoising import Denoising
    from opensora.core.pipelines.loop import LoopRun, Update
    from opensora.core.pipelines.sample_loop import SampleRun, SavedSample
    from opensora.core.pipelines.sample_spec import SampleSpec
    from opensora.core.pipelines.train_spec import TrainSpec
    from opensora.core.protocols import Denoiser, SampleState
    from opensora.core.requests import Request
    from opensora.core.video_sampler import Piece

__all__ = ["HookSpecs", "hook", "hookspec"]

hookspec = pluggy.HookspecMarker("opensora")
hook = pluggy.HookimplMarker("opensora")
"""Marks a method as the implementation of the hook of that name."""


class HookSpecs:
    """All hooks, since 0.1 where not said otherwise."""

    # ---- both pipelines

    @hookspec
    def denoiser_built(self, denoiser: nn.Module, spec: TrainSpec | SampleSpec) -> None:
        """The denoiser exists, with its weights, before the optimizer: change its modules here (adapters, quantizing)."""

    @hookspec
    def denoiser_wrapper(self, spec: TrainSpec | SampleSpec) -> Callable[[Denoiser], Denoiser] | None:
        """Return a function that wraps the denoiser as schedulers call it (step caches, profiling), or None.

        When sampling that is outside guidance: one row a video.
        """

    @hookspec
    def denoising_step(self, denoising: Denoising) -> None:
        """Before each denoising step of a batch; ``denoising.state`` is that of the step before, None at the first. Called by
        the command, from Python, and for previews in training. Several may take turns: tell them apart by identity.
        """

    # ---- training

    @hookspec
    def train_start(self, run: LoopRun) -> None:
        """Everything is built and, when resuming, restored; no step has been made."""

    @hookspec
    def step_end(self, run: LoopRun, update: Update) -> None:
        """After each optimizer step. Must not wait for the device; for numbers use `log`."""

    @hookspec
    def log(self, run: LoopRun, record: Mapping[str, float]) -> None:
        """Every ``log_every`` steps: step, loss, avg_loss (mean since the last), lr, grad_norm, epoch, samples, left_out,
        steps_per_second, and what the pipeline notes besides (train-vae: its losses one by one).
        """

    @hookspec
    def validated(self, run: LoopRun, record: Mapping[str, Any]) -> None:
        """The loss was measured on fixed clips: step, loss, training_loss (mean since the last time), clips, and loss
        by_timestep, by_bucket and by_bucket_and_timestep. In all processes.
        """

    @hookspec
    def save_tensors(self, run: LoopRun) -> Mapping[str, Mapping[str, Tensor]] | None:
        """A checkpoint is being written: return further tensor files for it, {file stem: {key: tensor}}."""

    @hookspec
    def restore_tensors(self, run: LoopRun, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """A run resumes: take back what `save_tensors` returned."""

    @hookspec
    def checkpoint_saved(self, run: LoopRun, path: Path) -> None:
        """A checkpoint is whole on disk."""

    @hookspec
    def train_end(self, run: LoopRun) -> None:
        """Training ended, was stopped or failed; called always once `train_start` was."""

    # ---- sampling

    @hookspec
    def sample_start(self, run: SampleRun) -> None:
        """Everything is built; nothing has been sampled."""

    @hookspec
    def sample_batch(self, run: SampleRun, requests: Sequence[Request]) -> None:
        """A batch begins: its references are about to be read, and its first step made."""

    @hookspec
    def sample_step(self, run: SampleRun, state: SampleState) -> None:
        """After each denoising step of a batch."""

    @hookspec
    def sample_frames(self, run: SampleRun, requests: Sequence[Request], piece: Piece) -> None:
        """The next frames of a batch are decoded and on their way to their files."""

    @hookspec
    def sample_saved(self, run: SampleRun, sample: SavedSample) -> None:
        """A video or image is whole on disk. In the process that wrote it."""

    @hookspec
    def sample_end(self, run: SampleRun) -> None:
        """Sampling ended or failed; called always once `sample_start` was."""

    @hookspec
    def sample_report(self, run: SampleRun) -> Mapping[str, object] | None:
        """Return facts for ``summary.json``, by name. Asked in all processes at the end; the main one's are written."""
