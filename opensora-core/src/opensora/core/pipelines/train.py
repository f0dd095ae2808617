"""The training pipeline: a denoiser learns from captioned clips. The loop is in `opensora.core.pipelines.train_loop`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import attrs
import torch
from attrs import frozen

from opensora.core.accelerator import Accelerator
from opensora.core.adapters import find_record
from opensora.core.attention import use_kernel
from opensora.core.blocks import checkpoint_activations, compile_blocks
from opensora.core.checkpoints import (
    find_checkpoint,
    list_checkpoints,
    read_checkpoint,
    read_state,
    sweep,
    verify_checkpoint,
)
from opensora.core.components import build, load, structure_spec
from opensora.core.composing import (
    Parts,
    build_accelerator,
    build_parts,
    check_components,
    choose_text_placement,
    place,
    resolved_values,
    wrap,
)
from opensora.core.config.write import write_config
from opensora.core.config_changes import find_changes, plain
from opensora.core.errors import CheckpointError, ConfigError, DataError
from opensora.core.features import Features, open_features
from opensora.core.frame_masks import check_mask_ratios
from opensora.core.hooking import Hooks, build_hooks
from opensora.core.loading import UnreadableFiles
from opensora.core.optimization import build_optimizer, load_optimizer
from opensora.core.orders import BatchOrder, Order, SampleOrder, Slicing, WaitingRows
from opensora.core.pipelines.loop import Counters, LoopRun, train
from opensora.core.pipelines.train_loop import TrainRun
from opensora.core.pipelines.train_spec import LoopSpec, TrainSpec
from opensora.core.protocols import Clip, Dataset, Denoiser, Size, TextEncoder
from opensora.core.randomness import SampleKey
from opensora.core.ready_features import ready_encoders
from opensora.core.run_folder import held, logging_to, make_folder, new_run_folder
from opensora.core.stopping import StopRequest, stopping_on_signals
from opensora.core.text_cache import CachedTextEncoder
from opensora.core.text_sharding import SharedTextEncoder, check_sharing, share_weights
from opensora.core.tokens import count_tokens
from opensora.core.trainable import adapt
from opensora.core.validation import held_out_rows

if TYPE_CHECKING:
    from opensora.core.config.evaluate import Config

__all__ = ["Train", "Training", "build_dataset", "clip_size", "count_steps", "new_listing"]

log = logging.getLogger(__name__)


class Training:
    """What all training pipelines do, whatever they train: the base of their classes, which build the run."""

    Spec: ClassVar[type[LoopSpec]]
    spec: LoopSpec

    def __init__(self, spec: LoopSpec, *, config: Config) -> None:
        """Check every component's options.

        Raises:
            ComponentError, ConfigError: A component is missing or an option is wrong.
        """
        check_components(spec, config.locations)
        build_hooks(spec.default_hooks(), spec.hooks, without=spec.without_hooks)
        if spec.optimizer:
            load_optimizer(spec.optimizer)
        self.spec, self.config = spec, config

    def run(self) -> dict[str, Path]:
        """Train, and return where the results are; see `train` for what it raises."""
        with build_accelerator(self.spec) as accelerator, stopping_on_signals() as stop, ExitStack() as stack:
            source = find_source(self.spec)
            if source:
                accelerator.from_main(partial(check_changes, self.spec, source))
            folder = accelerator.from_main(lambda: choose_folder(self.spec, source))
            if accelerator.is_main:
                stack.enter_context(held(folder))
                stack.enter_context(logging_to(folder / "run.log"))
                sweep(folder)
            needs_base = source is None or find_record(source) is not None  # a checkpoint of adapters is not all
            run = self.build_run(folder, accelerator, stop, load_pretrained=needs_base)
            run.config = plain(resolved_values(self.spec))
            stack.enter_context(closing(run.saver))
            if source:
                resume(run, source)
            if accelerator.is_main:  # not before: a config that does not fit must not replace the one that did
                write_config(
                    folder / "config.py", resolved_values(self.spec), f"Again: opensora-run {folder}/config.py"
                )
            with use_kernel(load("attention", self.spec.attention)), started(run):
                train(run)
            assert run.last_checkpoint is not None  # the last step is always saved
            results = {
                "checkpoint": run.last_checkpoint,
                "loss plot": folder / "loss.png",
                "metrics": folder / "metrics.jsonl",
            }
            return {name: path for name, path in results.items() if path.exists()}

    def build_run(self, folder: Path, accelerator: Accelerator, stop: StopRequest, *, load_pretrained: bool) -> LoopRun:
        """Build every part of the run, connect them, and place them on the device.

        Args:
            load_pretrained: Whether to read weights that the config names; a checkpoint would replace them at once.
        """
        raise NotImplementedError

    def dry_run(self) -> str:
        """What would be trained, with sizes and an estimate of memory and compute. Loads and writes nothing."""
        raise NotImplementedError


class Train(Training):
    """Train a denoiser."""

    Spec: ClassVar[type[TrainSpec]] = TrainSpec
    spec: TrainSpec

    def __init__(self, spec: TrainSpec, *, config: Config) -> None:
        """See `Training`."""
        super().__init__(spec, config=config)
        if spec.validation and spec.validation.data:
            structure_spec("datasets", spec.validation.data, locations=config.locations, path=("validation", "data"))
        if spec.mask_ratios:
            check_mask_ratios(spec.mask_ratios)
        if spec.text_encoder.options.get("shard"):
            check_sharing(spec)

    def build_run(
        self, folder: Path, accelerator: Accelerator, stop: StopRequest, *, load_pretrained: bool
    ) -> TrainRun:
        """See `Training.build_run`."""
        return build_run(self.spec, folder, accelerator, stop, load_pretrained=load_pretrained)

    def dry_run(self, world_size: int = 1) -> str:
        """What would be trained, with sizes, memory and compute of each process. Loads and writes nothing."""
        from opensora.core.pipelines.dry_run import describe_training

        return describe_training(self.spec, world_size)


def find_source(spec: LoopSpec) -> Path | None:
    """The checkpoint to go on from: that of ``load``, or with ``resume`` the newest of ``run_folder``; None starts anew.

    Raises:
        CheckpointError: ``load`` holds no checkpoint, or ``run_folder`` holds some that would be mixed with a new run's.
    """
    if spec.load:
        return find_checkpoint(Path(spec.load))
    there = list_checkpoints(Path(spec.run_folder)) if spec.run_folder else []
    if there and not spec.resume:
        raise CheckpointError(
            f"{spec.run_folder} holds a run already. Go on with --load {spec.run_folder}, or use another folder."
        )
    return find_checkpoint(Path(str(spec.run_folder))) if there else None


def check_changes(spec: LoopSpec, path: Path) -> None:
    """Say what the config has otherwise than that of a checkpoint that is gone on from.

    Raises:
        CheckpointError: Something that decides what is trained or on what, and ``allow_changes`` is off.
    """
    state = read_state(path)
    if not spec.start_from_scratch and not spec.allow_changes and state.get("seed", spec.seed) != spec.seed:
        raise CheckpointError(
            f"{path} was trained with seed {state['seed']}, the config says {spec.seed}: the order of the data would change. "
            f"Give --seed {state['seed']}, or --start-from-scratch to take weights and optimizer alone."
        )
    changes = find_changes(state["config"], plain(resolved_values(spec))) if state.get("config") else []
    grave = [each for each in changes if each.is_of(spec.fixed_keys) and not each.is_of(spec.free_keys)]
    grave = [
        each for each in grave if not (each.is_missing and each.is_within(spec.kinds))
    ]  # new versions bring options
    if grave and not (spec.allow_changes or spec.start_from_scratch):
        raise CheckpointError(
            f"{path} does not fit this config, which has otherwise (then -> now): {'; '.join(map(str, grave))}. Set these as "
            "they were, or go on all the same with --allow-changes, or take the weights alone with --ckpt-path."
        )
    if changes:
        log.info("Changed since %s (then -> now): %s", path, "; ".join(map(str, changes)))


def choose_folder(spec: LoopSpec, source: Path | None) -> Path:
    """The run folder: that of the run that goes on, the one that is named, or a new one.

    A run goes on in its own folder from its newest checkpoint only; from an earlier one it branches into a folder of its own,
    so that nothing is lost.

    Raises:
        MachineError: The folder can't be written.
    """
    if spec.run_folder:
        return make_folder(Path(spec.run_folder))
    if source and not spec.start_from_scratch and source.parent.name == "checkpoints":
        home = source.parent.parent
        if find_checkpoint(home).samefile(source):
            return make_folder(home)
    return new_run_folder(Path(spec.outputs), spec.name or spec.model.type)


def build_run(
    spec: TrainSpec, folder: Path, accelerator: Accelerator, stop: StopRequest, *, load_pretrained: bool
) -> TrainRun:
    """Build every part of the run, connect them, and place them on the device.

    Args:
        load_pretrained: Whether to take ``model.from_pretrained``; a checkpoint would replace those weights at once.
    """
    hooks = build_hooks(spec.default_hooks(), spec.hooks, without=spec.without_hooks)
    dataset: Dataset = build_dataset(spec)
    slicing = Slicing(
        batch_size=spec.batch_size,
        accumulation=spec.accumulation_steps,
        world_size=accelerator.data_world_size,
        rank=accelerator.data_rank,
    )
    waiting = WaitingRows(folder / "waiting.jsonl", len(dataset)) if accelerator.is_main else None
    order = order_of(spec, dataset, waiting)
    max_steps = count_steps(spec, order, slicing)
    size = clip_size(dataset, spec.seed)
    networks = build_networks(spec, dataset, hooks, accelerator, size=size, load_pretrained=load_pretrained)
    denoiser, features = networks.parts.denoiser, networks.features
    parameters = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    run = TrainRun(
        spec=spec,
        folder=folder,
        accelerator=accelerator,
        parts=networks.parts,
        module=denoiser,
        predict=networks.predict,
        parameters=parameters,
        optimizer=accelerator.prepare_optimizer(build_optimizer(parameters, spec)),
        dataset=features.dataset(dataset, hint=extract_hint(folder)) if features else dataset,
        features=features,
        order=order,
        slicing=slicing,
        clip_size=size,
        unreadable=UnreadableFiles(
            new_listing(folder, accelerator), len(dataset), spec.max_unreadable, lists=accelerator.lists_clips
        ),
        mask_ratios=check_mask_ratios(spec.mask_ratios) if spec.mask_ratios else None,
        max_steps=max_steps,
        hooks=hooks,
        stop=stop,
    )
    log.info("%s", describe(run))
    return run


@frozen(kw_only=True)
class Networks:
    """The networks of a run, in their places."""

    parts: Parts
    predict: Denoiser
    """See `TrainRun.predict`."""
    features: Features | None


def build_networks(
    spec: TrainSpec, dataset: Any, hooks: Hooks, accelerator: Accelerator, *, size: Size, load_pretrained: bool
) -> Networks:
    """Build the networks, let the denoiser be changed as configured, and place all on the device."""
    text_device, text_dtype = choose_text_placement(spec.text_encoder, accelerator)
    torch.manual_seed(spec.seed)  # initial weights
    ready = ready_encoders(spec, dataset)
    features = open_features(spec, accelerator) if spec.features and not ready else None
    if features:
        ready = {"vae": features.vae, "text_encoder": features.text_encoder}
    only_size = None if makes_batches(dataset) else size
    parts = build_parts(spec, size_of=lambda: only_size, load_pretrained=load_pretrained, **ready)
    change_blocks(parts.denoiser, spec)
    adapt(parts.denoiser, hooks, spec)
    predict = wrap(accelerator.prepare(parts.denoiser.train()), hooks, spec)
    place(parts.vae, accelerator)
    texts = remembering(parts.text_encoder, len(dataset), spec.text_cache_gib)
    if spec.text_encoder.options.get("shard"):
        share_weights(parts.text_encoder, accelerator, text_dtype)
        texts = SharedTextEncoder(texts, sharded=parts.text_encoder, accelerator=accelerator)
    else:
        place(parts.text_encoder, accelerator, text_device, text_dtype)
    return Networks(parts=attrs.evolve(parts, text_encoder=texts), predict=predict, features=features)


def describe(run: TrainRun) -> str:
    """What is trained, on how much, and where: a line for the lab book."""
    trained = sum(parameter.numel() for parameter in run.parameters)
    parameters = sum(parameter.numel() for parameter in run.denoiser.parameters())
    at_once = "various" if isinstance(run.order, BatchOrder) else run.slicing.samples_per_step
    accelerator, dtype = run.accelerator, str(run.accelerator.dtype).removeprefix("torch.")
    return (
        f"{run.spec.model.type}: {trained:,} parameters to train of {parameters:,}; {len(run.dataset):,} samples, "
        f"{at_once} a step, {run.max_steps} steps; {dtype} on {accelerator.world_size} x {accelerator.device.type}, "
        f"seed {run.spec.seed}"
    )


def extract_hint(folder: Path) -> str:
    """What to do where a feature is missing."""
    return f"Compute all that this run needs with: opensora-run {folder}/config.py --pipeline extract"


def change_blocks(denoiser: torch.nn.Module, spec: TrainSpec) -> None:
    """Compile and checkpoint blocks as configured."""
    if spec.compile:
        log.info("Compiling of %d blocks, when they are first used", compile_blocks(denoiser))
    if spec.grad_checkpoint:
        log.info("Activation checkpointing of %d blocks", checkpoint_activations(denoiser, spec.grad_checkpoint))


def remembering(encoder: TextEncoder, num_samples: int, gib: float) -> TextEncoder:
    """The text encoder, with a memory if that has room for the captions of all samples.

    Whether it has is told by the config and the data alone, and a memory encodes one by one from the first step on: so a
    resumed run computes what the unbroken one did.
    """
    each = 4 * encoder.max_length * (encoder.width or 2)  # float32; a label is int64
    return CachedTextEncoder(encoder, capacity=int(gib * 2**30)) if num_samples * each <= gib * 2**30 else encoder


def new_listing(folder: Path, accelerator: Accelerator) -> Path:
    """``skipped.jsonl``, empty: a resumed run lists again what it still can't read, and not what was mended."""
    listing = folder / "skipped.jsonl"
    if accelerator.is_main:
        listing.unlink(missing_ok=True)
    accelerator.barrier()
    return listing


def build_dataset(spec: TrainSpec) -> Any:
    """The dataset, given the buckets of the config if it asks for them."""
    dataset = build("datasets", spec.dataset, bucket_config=spec.bucket_config, batch_size=spec.batch_size)
    if spec.bucket_config and not makes_batches(dataset):
        log.warning("bucket_config is without effect: clips of %s have one size.", spec.dataset.type)
    return dataset


def makes_batches(dataset: Any) -> bool:
    """Whether clips differ in size, and the dataset sorts them into batches."""
    return hasattr(dataset, "batches")


def order_of(spec: TrainSpec, dataset: Any, waiting: WaitingRows | None = None) -> Order:
    """The order in which samples are shown.

    Args:
        spec: Says whether batches are balanced.
        dataset: Of the run.
        waiting: Lists rows that balanced batches leave out.

    Raises:
        ConfigError: They are to be, but the dataset's batches can't.
    """
    held_out = spec.validation and spec.validation.held_out
    if not makes_batches(dataset):  # clips of one size: balanced as they are
        order = SampleOrder.of(dataset, spec.seed)
        if spec.validation and held_out:
            order = order.without(held_out_rows(len(dataset), held_out, spec.validation.seed))
        return order
    if held_out:
        raise ConfigError(
            f"validation.held_out: {spec.dataset.type} deals out its own batches, so no rows can be held out of them. "
            "Give the validation a table of its own: validation = dict(data=dict(type=..., data_path=...))."
        )
    if spec.balance is None:
        return BatchOrder(dataset, spec.seed)
    if not hasattr(dataset, "balanced_batches"):
        raise ConfigError(f'balance = "{spec.balance}": {spec.dataset.type} can\'t balance its batches. Leave it out.')
    return BatchOrder(dataset, spec.seed, cost=count_tokens(spec), left_out=waiting.record if waiting else None)


def clip_size(dataset: Any, seed: int) -> Size:
    """(T, H, W) of the dataset's clips: as it declares, or as its first readable clip has it, or of its first batch.

    Raises:
        DataError: No clip can be read.
    """
    declared: Size | None = getattr(dataset, "size", None)
    if declared:
        return declared
    if makes_batches(dataset):
        size: Size = BatchOrder(dataset, seed).of_epoch(0)[0][0].size  # type: ignore[assignment]  # such keys have one
        return size
    reason: DataError | None = None
    for index in range(len(dataset)):
        try:
            clip: Clip = dataset[SampleKey(seed, index)]
            return clip.size
        except DataError as error:
            reason = reason or error
    raise DataError(f"None of the {len(dataset)} clips can be read; the first: {reason}")


def count_steps(spec: LoopSpec, order: Order, slicing: Slicing, counters: Counters | None = None) -> int:
    """Optimizer steps of the whole run: ``max_steps``, or as many as ``epochs`` hold.

    Args:
        counters: Steps and place so far, which may have been made with another number of samples a step.

    Raises:
        ConfigError: Not a single step.
    """
    so_far = counters or Counters()
    steps = so_far.step + order.steps_left(slicing, so_far.place, spec.epochs)
    if spec.max_steps is not None:
        if steps < spec.max_steps:
            log.info(
                "epochs = %d end the run after %d steps, before max_steps = %d", spec.epochs, steps, spec.max_steps
            )
        steps = min(steps, spec.max_steps)
    if steps < 1:
        raise ConfigError(f"Nothing to train: {order.mend(slicing, spec.epochs)}")
    return steps


def resume(run: LoopRun, path: Path) -> None:
    """Take weights, optimizer and, unless ``start_from_scratch``, the position from a checkpoint.

    Raises:
        CheckpointError: It is damaged, or of another model.
    """
    verify_checkpoint(path, run.accelerator)
    checkpoint = read_checkpoint(path, like=run.like(), is_verified=True)
    try:
        counters = run.restore(checkpoint)
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} does not fit this config's model {run.spec.model.type}: {error}") from error
    run.hooks.restore_tensors(run=run, tensors=checkpoint.tensors)
    if not run.spec.start_from_scratch:
        run.counters = counters
        run.last_checkpoint = path
        run.last_saved_step = counters.step if path.parent.parent == run.folder else -1
        run.max_steps = count_steps(run.spec, run.order, run.slicing, counters)
    log.info("Went on from %s: step %d of %d", path, run.counters.step, run.max_steps)


@contextmanager
def started(run: LoopRun) -> Iterator[None]:
    """Tell the hooks that the run starts and, whatever happens, that it ended; they can't hide why it failed."""
    try:
        run.hooks.train_start(run=run)
        yield
    except BaseException:
        try:
            run.hooks.train_end(run=run)
        except Exception:
            log.warning("A hook failed at the end of a run that had failed", exc_info=True)
        raise
    run.hooks.train_end(run=run)
