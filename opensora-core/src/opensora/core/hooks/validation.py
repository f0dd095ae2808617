"""The loss on fixed clips, every so many steps; how it is measured: `opensora.core.validation`."""

from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from attrs import evolve, frozen

from opensora.core.components import build
from opensora.core.errors import ConfigError
from opensora.core.hookspecs import hook
from opensora.core.pipelines.train_loop import encode
from opensora.core.run_folder import append_jsonl, read_jsonl, write_atomically
from opensora.core.validation import FixedBatch, choose_clips, held_out_rows, inner_timesteps, iter_fixed, measure

if TYPE_CHECKING:
    from torch import Tensor

    from opensora.core.conditioning import Conditioning
    from opensora.core.loading import Batch
    from opensora.core.pipelines.train_loop import TrainRun, Update
    from opensora.core.pipelines.train_spec import ValidationSpec

__all__ = ["Validation", "ValidationHookSpec"]

log = logging.getLogger(__name__)


@frozen(kw_only=True)
class ValidationHookSpec:
    """Measure the loss on fixed clips. It takes part by the key validation, which has its options."""


class Validation:
    """Measures, tells the other hooks (``validated``), and writes ``validation.jsonl``."""

    Spec = ValidationHookSpec

    def __init__(self, spec: ValidationHookSpec) -> None:
        self._batches: list[FixedBatch] = []
        self._num_clips = 0
        self._losses: list[Tensor] = []

    @hook
    def train_start(self, run: TrainRun) -> None:
        """Measure the weights that training begins with; when resuming, drop what will be written again.

        Raises:
            ConfigError: There is no ``validation`` in the config, or it wants averages and there are none.
        """
        options = self._options(run)
        if options.ema and run.ema is None:
            raise ConfigError("validation.ema = True measures averaged weights, and ema_decay = 0 keeps none.")
        path = run.folder / "validation.jsonl"
        if run.accelerator.is_main and path.exists():
            lines = [record for record in read_jsonl(path) if int(str(record["step"])) <= run.counters.step]
            write_atomically(path, "".join(json.dumps(record) + "\n" for record in lines))
        if run.counters.step == 0:
            self.validate(run)

    @hook
    def step_end(self, run: TrainRun, update: Update) -> None:
        """Measure, if it is time."""
        if not update.is_left_out:
            self._losses.append(update.loss)
        if update.step % self._options(run).every == 0 or update.step == run.max_steps:
            self.validate(run)

    def validate(self, run: TrainRun) -> None:
        """Measure, tell and write; all processes must call this."""
        options = self._options(run)
        run.watchdog.beat("reading the clips of the validation")
        batches = self._batches or self._read(run, options)
        run.denoiser.eval()
        try:
            with run.ema.applied(run.denoiser) if run.ema and options.ema is not False else nullcontext():
                losses = measure(
                    run.parts.scheduler,
                    run.predict,
                    batches,
                    timesteps=inner_timesteps(options.num_timesteps, run.parts.scheduler.num_timesteps),
                    num_clips=self._num_clips,
                    accelerator=run.accelerator,
                    beat=lambda: run.watchdog.beat("validation"),
                )
        finally:
            run.denoiser.train()
        record: dict[str, Any] = {"step": run.counters.step, **losses.record(), **self._training_loss(run)}
        run.hooks.validated(run=run, record=record)
        if run.accelerator.is_main:
            append_jsonl(run.folder / "validation.jsonl", record)
            log.info("Validation at step %d: loss %.5f on %d clips", record["step"], record["loss"], record["clips"])

    def _training_loss(self, run: TrainRun) -> dict[str, float]:
        """The mean since the last time."""
        if not self._losses:
            return {}
        mean = run.accelerator.mean(torch.stack(self._losses).mean()).item()
        self._losses = []
        return {"training_loss": mean}

    def _read(self, run: TrainRun, options: ValidationSpec) -> list[FixedBatch]:
        """Choose, read and encode the clips of this process; what is encoded stays in the CPU's memory."""
        rows = held_out_rows(len(run.dataset), options.held_out, options.seed) if options.held_out else None
        dataset: Any = run.dataset
        if options.data:
            dataset = build("datasets", options.data, bucket_config=run.spec.bucket_config)
        clips = choose_clips(
            dataset, num_clips=options.num_clips, batch_size=run.spec.batch_size, seed=options.seed, rows=rows
        )
        self._num_clips = clips.num_clips

        def encode_clean(batch: Batch) -> tuple[Tensor, Conditioning]:
            latents, conditioning = encode(run, batch)
            return latents, conditioning.replace(dropped=None, frame_mask=None)

        noted, run.noted = run.noted, {}  # what is noted while reading these is none of a step's
        try:
            found = iter_fixed(dataset, clips, encode_clean, accelerator=run.accelerator, size=run.clip_size)
            self._batches = [
                evolve(batch, latents=batch.latents.cpu(), conditioning=batch.conditioning.to("cpu")) for batch in found
            ]
        finally:
            run.noted = noted
        log.info("Validation on %d clips", clips.num_clips)
        return self._batches

    def _options(self, run: TrainRun) -> ValidationSpec:
        options = getattr(run.spec, "validation", None)
        if options is None:
            raise ConfigError("The hook validation takes part by the key validation = dict(every=..., ...).")
        found: ValidationSpec = options
        return found
