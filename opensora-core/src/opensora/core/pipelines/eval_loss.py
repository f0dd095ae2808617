"""The pipeline ``eval-loss``: what a trained model's loss is, by timestep and by bucket.

    opensora-run train.py --pipeline eval-loss --ckpt-path outputs/003-STDiT3

Any training config will do; its data, or other data by ``--data-path``, is measured as `opensora.core.validation` does.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import attrs
import torch
from attrs import field, frozen
from attrs.validators import gt, optional
from torch import Tensor

from opensora.core.accelerator import Accelerator
from opensora.core.attention import use_kernel
from opensora.core.components import build, load
from opensora.core.composing import (
    Parts,
    build_accelerator,
    build_parts,
    check_components,
    choose_text_placement,
    place,
    resolved_values,
)
from opensora.core.conditioning import Conditioning
from opensora.core.config.write import write_config
from opensora.core.errors import ConfigError, DataError
from opensora.core.frame_masks import check_mask_ratios
from opensora.core.loading import Batch
from opensora.core.pipelines.train import build_dataset, clip_size, makes_batches
from opensora.core.pipelines.train_loop import describe_clips
from opensora.core.pipelines.train_spec import TrainSpec
from opensora.core.protocols import Size
from opensora.core.run_folder import held, logging_to, make_folder, new_run_folder, write_atomically
from opensora.core.text_cache import CachedTextEncoder
from opensora.core.validation import FixedClips, Losses, choose_clips, inner_timesteps, iter_fixed, measure

if TYPE_CHECKING:
    from opensora.core.config.evaluate import Config

__all__ = ["EvalLoss", "EvalLossSpec"]

log = logging.getLogger(__name__)


@frozen(kw_only=True)
class EvalLossSpec(TrainSpec):
    """Measure a model's loss by timestep and by bucket. What only concerns training is accepted, and without effect."""

    pipeline: Literal["eval-loss"] = "eval-loss"  # type: ignore[assignment]  # it reads the config of a training
    num_eval_timesteps: int = field(default=10, validator=gt(0))
    """Timesteps at which each clip is measured, evenly spread. Each costs a call of the denoiser."""
    num_clips: int | None = field(default=None, validator=optional(gt(0)))
    """Clips at most, of each bucket. None: all of the data."""
    start_index: int | None = None
    """First resolution of bucket_config to measure, as in a Python slice; to share the work."""
    end_index: int | None = None
    """Resolution before which to stop."""


class EvalLoss:
    """Writes ``losses.json``, and logs it as a table."""

    Spec: ClassVar[type[EvalLossSpec]] = EvalLossSpec

    def __init__(self, spec: EvalLossSpec, *, config: Config) -> None:
        """Check every component's options.

        Raises:
            ComponentError, ConfigError: A component is missing or an option is wrong.
        """
        spec = attrs.evolve(spec, bucket_config=_all_of_each(spec.bucket_config))
        check_components(spec, config.locations)
        if spec.mask_ratios:
            check_mask_ratios(spec.mask_ratios)
        self.spec, self.config = spec, config

    def run(self) -> dict[str, Path]:
        """Measure, and return where the results are.

        Raises:
            DataError: There are no clips, or none that can be read.
        """
        spec = self.spec
        with build_accelerator(spec) as accelerator, ExitStack() as stack:
            folder = accelerator.from_main(lambda: _choose_folder(spec))
            if accelerator.is_main:
                stack.enter_context(held(folder))
                stack.enter_context(logging_to(folder / "run.log"))
                values = resolved_values(spec)
                write_config(folder / "config.py", values, f"Again: opensora-run {folder}/config.py")
            with use_kernel(load("attention", spec.attention)):
                record = self.measure(accelerator).record()
            if accelerator.is_main:
                write_atomically(folder / "losses.json", json.dumps(record, indent=1))
                log.info("Losses, also in %s:\n%s", folder / "losses.json", table(record))
            return {"losses": folder / "losses.json"}

    def measure(self, accelerator: Accelerator) -> Losses:
        """The losses of all clips; all processes must call this."""
        spec, parts = self.spec, build_evaluated(self.spec, accelerator)
        found = []
        for dataset, clips, size in iter_data(spec):
            log.info("%d clips%s", clips.num_clips, f" of {clips.buckets[0]}" if clips.buckets[0] else "")
            batches = iter_fixed(
                dataset,
                clips,
                encoder(spec, parts, accelerator),
                accelerator=accelerator,
                size=size,
                num_workers=spec.num_workers,
            )
            found.append(
                measure(
                    parts.scheduler,
                    accelerator.predictor(parts.denoiser),
                    batches,
                    timesteps=inner_timesteps(spec.num_eval_timesteps, parts.scheduler.num_timesteps),
                    num_clips=clips.num_clips,
                    accelerator=accelerator,
                )
            )
        return Losses(
            values=torch.cat([each.values for each in found]),
            timesteps=found[0].timesteps,
            buckets=[bucket for each in found for bucket in each.buckets],
        )

    def dry_run(self) -> str:
        """What would be measured. Loads and writes nothing."""
        from opensora.core.pipelines.dry_run import describe_losses

        return describe_losses(self.spec, self.spec.num_eval_timesteps)


def _choose_folder(spec: EvalLossSpec) -> Path:
    if spec.run_folder:
        return make_folder(Path(spec.run_folder))
    return new_run_folder(Path(spec.outputs), spec.name or f"{spec.model.type}-losses")


def build_evaluated(spec: EvalLossSpec, accelerator: Accelerator) -> Parts:
    """The parts of a config, on the device, to be measured."""
    device, dtype = choose_text_placement(spec.text_encoder, accelerator)
    if spec.model.options.get("from_pretrained") is None:
        log.warning("model.from_pretrained is not set: %s has random weights. Give --ckpt-path.", spec.model.type)
    torch.manual_seed(spec.seed)  # weights that are random are the same in all processes
    size = None if spec.bucket_config else clip_size(build_dataset(spec), spec.seed)
    parts = build_parts(spec, size_of=lambda: size)
    accelerator.place(parts.denoiser.requires_grad_(False).eval())
    place(parts.vae, accelerator)
    place(parts.text_encoder, accelerator, device, dtype)
    return parts


def encoder(
    spec: EvalLossSpec, parts: Parts, accelerator: Accelerator
) -> Callable[[Batch], tuple[Tensor, Conditioning]]:
    """What makes latents and conditioning of a batch, with frames masked if the config says so."""
    texts = CachedTextEncoder(parts.text_encoder, capacity=int(spec.text_cache_gib * 2**30))
    ratios = check_mask_ratios(spec.mask_ratios) if spec.mask_ratios else None

    def encode(batch: Batch) -> tuple[Tensor, Conditioning]:
        device = accelerator.device
        latents = parts.vae.encode(batch.video.to(device), draws=batch.draws(device)).float()
        return latents, describe_clips(batch, latents, texts.encode(batch.texts), ratios).to(device)

    return encode


def iter_data(spec: EvalLossSpec) -> Iterator[tuple[Any, FixedClips, Size]]:
    """The data, its clips, and the size that stands in for what can't be read: of each bucket, or of all.

    Each bucket is measured on all rows that it has room for, whatever its probability.

    Raises:
        ConfigError: No bucket is left.
    """
    if not spec.bucket_config:
        dataset = build_dataset(spec)
        count = spec.num_clips or len(dataset)
        clips = choose_clips(dataset, num_clips=count, batch_size=spec.batch_size, seed=spec.seed)
        yield dataset, clips, clip_size(dataset, spec.seed)
        return
    is_empty = True
    for resolution in list(spec.bucket_config)[spec.start_index : spec.end_index]:
        for frames, entry in spec.bucket_config[resolution].items():
            dataset = build("datasets", spec.dataset, bucket_config={resolution: {frames: entry}})
            if not makes_batches(dataset):
                raise ConfigError(f"bucket_config: clips of {spec.dataset.type} have one size. Leave it out.")
            try:
                batches = _cut([list(batch) for batch in dataset.batches(spec.seed, 0)], spec.num_clips)
            except DataError as error:  # no row is large and long enough
                log.warning("Bucket %s, %s frames: %s", resolution, frames, error)
                continue
            is_empty = False
            names = [f"{resolution}-{frames}"] * len(batches)
            yield dataset, FixedClips(batches=batches, buckets=names, seed=spec.seed), batches[0][0].size
    if is_empty:
        raise ConfigError("No row of the data falls into a bucket. Look at bucket_config, start_index and end_index.")


def _all_of_each(buckets: dict[str, Any] | None) -> dict[str, Any] | None:
    """The buckets with probability 1; without those that have no batch size, as they hold no clips."""
    if buckets is None:
        return None
    return {
        resolution: {frames: (1.0, entry[1]) for frames, entry in lengths.items() if entry[1] is not None}
        for resolution, lengths in buckets.items()
    }


def _cut(batches: list[list[Any]], num_clips: int | None) -> list[list[Any]]:
    """So many clips of the first batches."""
    kept, left = [], sum(map(len, batches)) if num_clips is None else num_clips
    for batch in batches:
        if left > 0:
            kept.append(batch[:left])
            left -= len(kept[-1])
    return kept


def table(record: dict[str, Any]) -> str:
    """The record for people: a row a bucket, a column a timestep."""
    columns = list(record["by_timestep"])
    width = max(12, *(len(name) + 2 for name in record["by_bucket"]))
    head = "timestep".ljust(width) + "".join(f"{name:>9}" for name in columns) + f"{'mean':>9}"
    rows = [(name, record["by_bucket_and_timestep"][name], mean) for name, mean in record["by_bucket"].items()]
    rows.append(("all", record["by_timestep"], record["loss"]))
    lines = [
        name.ljust(width) + "".join(f"{each[column]:9.4f}" for column in columns) + f"{mean:9.4f}"
        for name, each, mean in rows
    ]
    return "\n".join([head, *lines])
