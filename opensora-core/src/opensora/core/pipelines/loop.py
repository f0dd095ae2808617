"""The training loop, whatever is trained. What only accompanies it (logging, EMA, checkpoints, previews) are hooks."""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Iterator, Mapping
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import attrs
import torch
from attrs import define, field, frozen
from torch import Tensor, nn

from opensora.core.accelerator import Accelerator
from opensora.core.adapters import adapter_state, kept, load_kept
from opensora.core.checkpoints import Checkpoint
from opensora.core.errors import NonFiniteLossError, PeerError, UserError
from opensora.core.hooking import Hooks
from opensora.core.hooks.ema import EMA
from opensora.core.loading import Batch, UnreadableFiles, iter_batches
from opensora.core.optimization import learning_rate_factor, restore_optimizer
from opensora.core.orders import Order, Place, Slicing
from opensora.core.pipelines.train_spec import LoopSpec
from opensora.core.profiling import marked
from opensora.core.protocols import Dataset, Size
from opensora.core.randomness import generator_for
from opensora.core.saving import Saver
from opensora.core.sharding import Like, TensorPath, is_sharded
from opensora.core.stopping import Interrupted, StopRequest
from opensora.core.watchdog import Watchdog

__all__ = ["Counters", "LogWindow", "LoopRun", "Update", "make_step", "read_together", "train"]

log = logging.getLogger(__name__)


@define
class Counters:
    """What the loop counts; saved in every checkpoint."""

    step: int = 0
    """Optimizer steps made, those left out for non-finite gradients included."""
    place: Place = field(factory=Place)
    """In the data."""
    left_out: int = 0
    """Steps left out."""
    left_out_in_a_row: int = 0


@frozen(kw_only=True)
class Update:
    """What one optimizer step did."""

    step: int
    """Counts from 1."""
    loss: Tensor
    """This process's mean loss, detached, on the device."""
    grad_norm: float
    """Before clipping; NaN if the step was left out."""
    lr: float
    epoch: float
    """Passes over the data so far."""
    is_left_out: bool
    metrics: Mapping[str, Tensor] = field(factory=dict)
    """What else `LoopRun.note` was given, the mean over the micro-batches."""


@define(kw_only=True, eq=False)
class LoopRun:
    """Everything that a training run consists of, whatever it trains. Hooks get it."""

    spec: LoopSpec
    folder: Path
    accelerator: Accelerator
    module: nn.Module
    """The trained network; its ``state_dict`` is what is saved."""
    parameters: list[nn.Parameter]
    """Those that the optimizer has."""
    optimizer: torch.optim.Optimizer
    dataset: Dataset
    order: Order
    slicing: Slicing
    clip_size: Size
    """(T, H, W) in pixels."""
    unreadable: UnreadableFiles
    max_steps: int
    hooks: Hooks
    stop: StopRequest
    counters: Counters = field(factory=Counters)
    config: Mapping[str, Any] = field(factory=dict)
    """What checkpoints say that the run was made with."""
    last_checkpoint: Path | None = None
    last_saved_step: int = -1
    ema: EMA | None = None
    """Set by the hook of that name."""
    noted: dict[str, list[Tensor]] = field(factory=dict)
    """What `note` was given in the step that is being made."""
    sample_losses: list[Tensor] = field(factory=list)
    """Of each micro-batch of the newest step, [B], detached, where `loss` knows them: which sample was it?"""
    watchdog: Watchdog = field(factory=lambda: Watchdog(0))
    """Tell it what takes long besides steps: ``run.watchdog.beat("validation, batch 3")`` begins the time limit anew."""
    saver: Saver = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.saver = Saver(self.folder / "checkpoints", self.accelerator, in_background=self.spec.async_checkpoints)

    def loss(self, batch: Batch) -> Tensor:
        """The mean loss over a micro-batch's nominal size; samples that could not be read count as zero.

        A process whose whole micro-batch is unreadable still takes part in the exchange of gradients, with a stand-in.
        """
        raise NotImplementedError

    def step_optimizer(self, lr: float) -> float:
        """Use the gradients.

        Returns:
            Their norm before clipping; NaN when they weren't finite, and the step was left out.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return self.accelerator.update(self.optimizer, self.parameters, grad_clip=self.spec.grad_clip)

    def note(self, name: str, value: Tensor) -> None:
        """Have a number of this micro-batch logged beside the loss; in each step all processes must note the same names."""
        self.noted.setdefault(name, []).append(value.detach())

    def iter_batches(self) -> Iterator[Batch]:
        """This process's micro-batches, from where the run stands."""
        return iter_batches(
            self.dataset,
            self.order,
            self.slicing,
            place=self.counters.place,
            num_workers=self.spec.num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )

    def save_checkpoint(self) -> None:
        """Write a checkpoint of this moment; all processes must call it.

        With ``async_checkpoints`` it is written while the run goes on, and whole once `finish_saving` has returned; before,
        the one that is being written is waited for.

        Raises:
            CheckpointError: It can't be written, in whichever process; or the one before.
        """
        self.finish_saving()
        self.watchdog.beat(f"saving step {self.counters.step}")
        added = {stem: tensors for files in self.hooks.save_tensors(run=self) for stem, tensors in files.items()}

        def build() -> Checkpoint:
            own = self.checkpoint()
            return attrs.evolve(own, tensors={**own.tensors, **added})

        self.saver.begin(self.counters.step, build)
        if not self.spec.async_checkpoints:
            self.finish_saving()

    def finish_saving(self) -> None:
        """Wait for the checkpoint that is being written, if there is one; all processes must call it.

        Raises:
            CheckpointError: It could not be written, in whichever process.
        """
        if self.saver.step is None:
            return
        step, path = self.saver.step, self.saver.finish()
        self.last_checkpoint, self.last_saved_step = path, step
        self.hooks.checkpoint_saved(run=self, path=path)
        self.watchdog.beat(f"hooks after saving step {step}")

    def checkpoint(self) -> Checkpoint:
        """All that the run needs to go on from this moment, besides what hooks add."""
        return Checkpoint(
            tensors={"model": kept(self.module, self.module.state_dict())},
            optimizer={"optimizer": self.optimizer.state_dict(), "scaler": self.accelerator.scaler_state()},
            state={
                "seed": self.spec.seed,
                **adapter_state(self.module),
                **attrs.asdict(self.counters),
                "config": self.config,
            },
        )

    def like(self) -> Like | None:
        """How a checkpoint's tensors are to be dealt out: as the parameters that they are of. None: each process has all."""
        if not self.accelerator.shards_state:
            return None
        named = self.module.state_dict()
        parameters = [each for group in self.optimizer.param_groups for each in group["params"]]

        def find(path: TensorPath, size: torch.Size) -> Tensor | None:
            if path[:3] == ("optimizer", "optimizer", "state"):
                own = parameters[int(path[3])] if int(path[3]) < len(parameters) else None
            else:
                own = named.get(str(path[1]))  # hooks add tensors of the same names
            return own if own is not None and is_sharded(own) and own.shape == size else None

        return find

    def restore(self, checkpoint: Checkpoint) -> Counters:
        """Take back what `checkpoint` returned, and return the counters. Options of the optimizer stay the config's.

        Raises:
            KeyError, TypeError, RuntimeError, ValueError: It is of another model.
        """
        state = {key: value for key, value in checkpoint.state.items() if key in attrs.fields_dict(Counters)}
        counters = Counters(**{**state, "place": Place(**state["place"])})
        load_kept(self.module, checkpoint.tensors["model"], checkpoint.state.get("adapter"))
        restore_optimizer(self.optimizer, checkpoint.optimizer["optimizer"])
        self.accelerator.load_scaler_state(checkpoint.optimizer["scaler"])
        return counters

    def ensure_saved(self) -> Path:
        """The checkpoint of this moment, written if it isn't yet; see `save_checkpoint`."""
        self.finish_saving()
        if self.last_checkpoint is None or self.last_saved_step != self.counters.step:
            self.save_checkpoint()
            self.finish_saving()
        assert self.last_checkpoint is not None  # it was saved
        return self.last_checkpoint


def train(run: LoopRun) -> None:
    """Train until ``run.max_steps``, going on exactly where ``run.counters`` stands.

    Raises:
        Interrupted: A signal asked to stop; a checkpoint was saved.
        NonFiniteLossError: Too many steps in a row had no finite gradients.
        DataError: Too many files can't be read.
        CheckpointError: A checkpoint can't be written.
        PeerError: Another process could not go on.
    """
    window = LogWindow(run)
    batches = run.iter_batches()
    first = run.counters.step
    with Watchdog(run.spec.step_timeout_s) as run.watchdog:
        while run.counters.step < run.max_steps:
            run.watchdog.beat(f"step {run.counters.step + 1}", times=3 if run.counters.step == first else 1)
            with marked("data"):
                micro_batches = read_together(run, batches)
            update = make_step(run, micro_batches)
            if record := window.add(update):
                run.hooks.log(run=run, record=record)
            run.watchdog.beat(f"hooks after step {update.step}")
            run.hooks.step_end(run=run, update=update)
            check_finite(run, update, micro_batches)
        run.ensure_saved()


def make_step(run: LoopRun, micro_batches: list[Batch]) -> Update:
    """One optimizer step on these micro-batches."""
    seed_layers(run)
    run.sample_losses.clear()
    losses = []
    for index, batch in enumerate(micro_batches):
        with run.accelerator.micro_step(last=index == len(micro_batches) - 1):
            with marked("loss"):
                loss = run.loss(batch)
            with marked("backward"):
                run.accelerator.backward(loss / len(micro_batches))
        losses.append(loss.detach())
    with marked("optimizer"):
        return make_update(run, torch.stack(losses).mean())


def read_together(run: LoopRun, batches: Iterator[Batch]) -> list[Batch]:
    """The micro-batches of the next step, once all processes have theirs and none was asked to stop.

    Processes agree before the step, since one that gave up alone would leave the others waiting for its gradients.

    Raises:
        Interrupted, DataError, PeerError, CheckpointError: See `train`.
    """
    error: UserError | None = None
    micro_batches = []
    try:
        run.saver.check()
        for batch in islice(batches, run.slicing.accumulation):
            run.unreadable.record(batch)
            micro_batches.append(batch)
    except UserError as failure:
        error = failure
    highest = run.accelerator.highest(2 * (2 if error else 1 if run.stop else 0) + run.saver.is_writing)
    worst, any_is_writing = divmod(highest, 2)
    if error:
        raise error
    if worst == 2:
        run.saver.check(wait=True)  # what has failed in one process when saving together fails in all
        raise PeerError("Stopped: another process could not go on; its message says why.")
    if worst == 1:
        path = run.ensure_saved()
        raise Interrupted(
            f"Stopped at step {run.counters.step} of {run.max_steps}, saved {path}. "
            f"Go on with: opensora-run {run.folder}/config.py --load {run.folder}",
            signal_number=run.stop.signal_number or signal.SIGTERM,
        )
    if not any_is_writing:
        run.finish_saving()
    return micro_batches


def seed_layers(run: LoopRun) -> None:
    """Make what layers draw in this step (stochastic depth) depend on the seed, the step and the share of the samples alone.

    Not ``torch.manual_seed``: on a machine without GPUs that remembers each call, with its stack, for a GPU to come.
    """
    seed = generator_for(run.spec.seed, run.counters.step, run.accelerator.data_rank).initial_seed()
    torch.default_generator.manual_seed(seed)
    if run.accelerator.device.type == "cuda":
        torch.cuda.manual_seed(seed)


def make_update(run: LoopRun, loss: Tensor) -> Update:
    """Step the optimizer and count."""
    factor = learning_rate_factor(
        run.counters.step,
        warmup_steps=run.spec.warmup_steps or 0,
        max_steps=run.max_steps,
        schedule=run.spec.lr_schedule,
    )
    grad_norm = run.step_optimizer(run.spec.lr * factor)
    metrics = {name: torch.stack(values).mean() for name, values in run.noted.items()}
    run.noted.clear()
    is_left_out = math.isnan(grad_norm)
    is_scaling = is_left_out and run.accelerator.is_scaling and bool(loss.isfinite())  # fp16 looks for its loss scale
    run.counters.step += 1
    run.counters.place = run.order.after_step(run.slicing, run.counters.place)
    run.counters.left_out += is_left_out
    if not is_scaling:
        run.counters.left_out_in_a_row = run.counters.left_out_in_a_row + 1 if is_left_out else 0
    return Update(
        step=run.counters.step,
        loss=loss,
        grad_norm=grad_norm,
        lr=run.spec.lr * factor,
        epoch=run.order.epochs(run.counters.place),
        is_left_out=is_left_out,
        metrics=metrics,
    )


def check_finite(run: LoopRun, update: Update, batches: list[Batch]) -> None:
    """Warn of a step that was left out.

    Raises:
        NonFiniteLossError: It was one too many in a row.
    """
    if not update.is_left_out:
        return
    suspects = find_suspects(run, batches)
    if run.accelerator.is_main:
        log.warning("Step %d is left out: %s", update.step, suspects)
    if run.counters.left_out_in_a_row >= run.spec.max_left_out:
        good = run.last_checkpoint or "none yet"
        raise NonFiniteLossError(
            f"The loss was not finite in {run.counters.left_out_in_a_row} steps in a row, up to step {update.step}: "
            f"{suspects} Last good checkpoint: {good}. Try a lower lr, grad_clip = 1.0, or --dtype fp32; look at these "
            f"samples with: opensora-run {run.folder}/config.py --pipeline replay --step {update.step}"
        )


def find_suspects(run: LoopRun, batches: list[Batch]) -> str:
    """Which samples of the step had no finite loss, in whichever process; all, where each loss is finite or unknown."""
    shown = [
        (f"{path or 'a sample'} (row {key.index})", loss)
        for batch, losses in zip_longest(batches, run.sample_losses)
        if len(batch)  # what stands in for unreadable samples is none
        for path, key, loss in zip_longest(batch.paths, batch.keys, [] if losses is None else losses.tolist())
    ]
    everywhere = [each for own in run.accelerator.gather(shown) for each in own]
    bad = [name for name, loss in everywhere if loss is not None and not math.isfinite(loss)]
    names = list(dict.fromkeys(bad or [name for name, _ in everywhere]))  # processes may share samples
    listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    what = f"the loss of {listed} is" if bad else f"loss or gradients of {listed} are"
    return f"{what} not finite."


class LogWindow:
    """Gathers updates and makes a record of them every ``log_every`` steps: only then is the device waited for."""

    def __init__(self, run: LoopRun) -> None:
        self.run = run
        self._losses: list[Tensor] = []
        self._metrics: dict[str, list[Tensor]] = {}
        self._since = time.perf_counter()

    def add(self, update: Update) -> dict[str, float] | None:
        """Take one more update; at the end of a window, return what the ``log`` hook is told."""
        run = self.run
        self._losses.append(update.loss)
        for name, value in update.metrics.items():
            self._metrics.setdefault(name, []).append(value)
        if update.step % run.spec.log_every and update.step != run.max_steps:
            return None
        windows = [self._losses, *self._metrics.values()]
        means = torch.stack([update.loss, *(torch.stack(window).mean() for window in windows)])
        loss, average, *metrics = run.accelerator.mean(means).tolist()
        elapsed = time.perf_counter() - self._since
        record = {
            "step": update.step,
            "loss": loss,
            "avg_loss": average,
            "lr": update.lr,
            "grad_norm": update.grad_norm,
            "epoch": update.epoch,
            "samples": run.counters.place.samples,
            "left_out": run.counters.left_out,
            "steps_per_second": len(self._losses) / elapsed,
            **dict(zip(self._metrics, metrics, strict=True)),
        }
        self._losses, self._metrics, self._since = [], {}, time.perf_counter()
        return record
