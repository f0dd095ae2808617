"""The training pipeline: a denoiser learns from captioned clips. The loop is in `opensora.core.pipelines.train_loop`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from opensora.core.accelerator import Single
from opensora.core.attention import use_kernel
from opensora.core.checkpoints import find_checkpoint, read_checkpoint, sweep
from opensora.core.components import build, load
from opensora.core.composing import (
    build_accelerator,
    build_parts,
    check_components,
    checkpoint_activations,
    resolved_values,
    wrap,
)
from opensora.core.config.write import write_config
from opensora.core.errors import CheckpointError, ConfigError, UserError
from opensora.core.frame_masks import check_mask_ratios
from opensora.core.hooking import build_hooks
from opensora.core.loading import SampleOrder, Slicing, UnreadableFiles
from opensora.core.optimization import build_adamw
from opensora.core.pipelines.train_loop import Progress, TrainRun, train
from opensora.core.pipelines.train_spec import TrainSpec
from opensora.core.protocols import Dataset, Size
from opensora.core.randomness import SampleKey
from opensora.core.run_folder import logging_to, make_folder, new_run_folder
from opensora.core.stopping import StopRequest, stopping_on_signals

if TYPE_CHECKING:
    from opensora.core.config.evaluate import Config

__all__ = ["Train"]

log = logging.getLogger(__name__)


class Train:
    """Train a denoiser."""

    Spec = TrainSpec

    def __init__(self, spec: TrainSpec, *, config: Config) -> None:
        """Check every component's options.

        Raises:
            ComponentError, ConfigError: A component is missing or an option is wrong.
        """
        check_components(spec, config.locations)
        if spec.mask_ratios:
            check_mask_ratios(spec.mask_ratios)
        self.spec, self.config = spec, config

    def run(self) -> dict[str, Path]:
        """Train, and return where the results are; see `train` for what it raises."""
        with build_accelerator(self.spec) as accelerator, stopping_on_signals() as stop, ExitStack() as stack:
            folder = choose_folder(self.spec, accelerator)
            if accelerator.is_main:
                stack.enter_context(logging_to(folder / "run.log"))
                write_config(
                    folder / "config.py", resolved_values(self.spec), f"Again: opensora-run {folder}/config.py"
                )
            run = build_run(self.spec, folder, accelerator, stop)
            if self.spec.load:
                resume(run, find_checkpoint(Path(self.spec.load)))
            with use_kernel(load("attention", self.spec.attention)), started(run):
                train(run)
            assert run.last_checkpoint is not None  # the last step is always saved
            results = {
                "checkpoint": run.last_checkpoint,
                "loss plot": folder / "loss.png",
                "metrics": folder / "metrics.jsonl",
            }
            return {name: path for name, path in results.items() if path.exists()}

    def dry_run(self) -> str:
        """What would be trained, with sizes and an estimate of memory and compute. Loads and writes nothing."""
        from opensora.core.pipelines.dry_run import describe_training

        return describe_training(self.spec)


def choose_folder(spec: TrainSpec, accelerator: Single) -> Path:
    """The run folder: the one that is resumed, the one that is named, or a new one. Chosen by the main process.

    Raises:
        CheckpointError: ``load`` holds no checkpoint.
        MachineError: The folder can't be written.
    """

    def choose() -> Path:
        if spec.load and not spec.start_from_scratch:
            checkpoint = find_checkpoint(Path(spec.load))
            if checkpoint.parent.name == "checkpoints":
                return make_folder(checkpoint.parent.parent)
        if spec.run_folder:
            return make_folder(Path(spec.run_folder))
        return new_run_folder(Path(spec.outputs), spec.name or spec.model.type)

    chosen: Path | UserError | None = None
    if accelerator.is_main:
        try:
            chosen = choose()
            sweep(chosen)
        except UserError as error:
            chosen = error
    chosen = accelerator.broadcast(chosen)
    if isinstance(chosen, UserError):
        raise chosen
    assert chosen is not None  # the main process has chosen
    return chosen


def build_run(spec: TrainSpec, folder: Path, accelerator: Single, stop: StopRequest) -> TrainRun:
    """Build every part of the run, connect them, and place them on the device."""
    hooks = build_hooks(spec.default_hooks(), spec.hooks, without=spec.without_hooks)
    dataset: Dataset = build("datasets", spec.dataset)
    slicing = Slicing(
        batch_size=spec.batch_size,
        accumulation=spec.accumulation_steps,
        world_size=accelerator.world_size,
        rank=accelerator.rank,
    )
    max_steps = count_steps(spec, len(dataset), slicing.samples_per_step)
    torch.manual_seed(spec.seed)  # initial weights
    parts = build_parts(spec, size_of=lambda: clip_size(dataset, spec.seed), load_pretrained=not spec.load)
    if spec.grad_checkpoint:
        log.info("Activation checkpointing of %d blocks", checkpoint_activations(parts.denoiser))
    hooks.denoiser_built(denoiser=parts.denoiser, spec=spec)
    predict = wrap(accelerator.prepare(parts.denoiser.train()), hooks, spec)
    for module in parts.frozen_modules:
        accelerator.place(module)
    parameters = [parameter for parameter in parts.denoiser.parameters() if parameter.requires_grad]
    log.info(
        "%s: %s parameters to train of %s; %s samples, %d a step, %d steps; %s on %d x %s, seed %d",
        spec.model.type,
        f"{sum(parameter.numel() for parameter in parameters):,}",
        f"{sum(parameter.numel() for parameter in parts.denoiser.parameters()):,}",
        f"{len(dataset):,}",
        slicing.samples_per_step,
        max_steps,
        str(accelerator.dtype).removeprefix("torch."),
        accelerator.world_size,
        accelerator.device.type,
        spec.seed,
    )
    return TrainRun(
        spec=spec,
        folder=folder,
        accelerator=accelerator,
        parts=parts,
        denoiser=parts.denoiser,
        predict=predict,
        parameters=parameters,
        optimizer=build_adamw(
            parameters, lr=spec.lr, betas=spec.adam_betas, eps=spec.adam_eps, weight_decay=spec.weight_decay
        ),
        dataset=dataset,
        order=SampleOrder(len(dataset), spec.seed),
        slicing=slicing,
        unreadable=UnreadableFiles(folder / "skipped.jsonl", len(dataset), spec.max_unreadable),
        mask_ratios=check_mask_ratios(spec.mask_ratios) if spec.mask_ratios else None,
        max_steps=max_steps,
        hooks=hooks,
        stop=stop,
    )


def clip_size(dataset: Dataset, seed: int) -> Size:
    """(T, H, W) of the dataset's clips: as it declares, or as its first clip has it."""
    declared: Size | None = getattr(dataset, "size", None)
    return declared or dataset[SampleKey(seed, 0)].size


def count_steps(spec: TrainSpec, num_samples: int, samples_per_step: int) -> int:
    """Optimizer steps of the whole run: ``max_steps``, or as many as ``epochs`` hold.

    Raises:
        ConfigError: That is none.
    """
    steps = spec.epochs * num_samples // samples_per_step
    if spec.max_steps is not None:
        steps = min(steps, spec.max_steps)
    if steps < 1:
        raise ConfigError(
            f"Nothing to train: {spec.epochs} epochs of {num_samples} samples don't fill one step of {samples_per_step}. "
            f"Lower batch_size to {max(1, num_samples)} or less, or raise epochs."
        )
    return steps


def resume(run: TrainRun, path: Path) -> None:
    """Take weights, optimizer and, unless ``start_from_scratch``, the position from a checkpoint.

    Raises:
        CheckpointError: It is damaged, or of another model, or was made with another seed.
    """
    checkpoint = read_checkpoint(path)
    state = dict(checkpoint.state)
    if not run.spec.start_from_scratch and (seed := state.pop("seed", run.spec.seed)) != run.spec.seed:
        raise CheckpointError(
            f"{path} was trained with seed {seed}, the config says {run.spec.seed}: the order of the data would change. "
            f"Give --seed {seed}, or --start-from-scratch to take the weights alone."
        )
    try:
        run.denoiser.load_state_dict(checkpoint.tensors["model"])
        run.optimizer.load_state_dict(checkpoint.optimizer["optimizer"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} does not fit this config's model {run.spec.model.type}: {error}") from error
    run.accelerator.load_scaler_state(checkpoint.optimizer["scaler"])
    run.hooks.restore_tensors(run=run, tensors=checkpoint.tensors)
    if not run.spec.start_from_scratch:
        run.progress = Progress(**state)
        run.last_checkpoint = path
    log.info("Went on from %s: step %d of %d", path, run.progress.step, run.max_steps)


@contextmanager
def started(run: TrainRun) -> Iterator[None]:
    """Tell the hooks that the run starts and, whatever happens, that it ended."""
    run.hooks.train_start(run=run)
    try:
        yield
    finally:
        run.hooks.train_end(run=run)
