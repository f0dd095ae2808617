"""Compute the features of a whole dataset ahead: latents and embeddings of captions, kept for training.

    opensora-run train.py --pipeline extract --features.folder features

Any training config with ``features`` will do. Run again after it was stopped, or after files changed, it computes what is
missing and nothing else.
"""

from __future__ import annotations

import json
import logging
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from attrs import define, field, frozen
from attrs.validators import gt, optional

from opensora.core.accelerator import Accelerator
from opensora.core.attention import use_kernel
from opensora.core.components import load
from opensora.core.composing import build_accelerator, check_components, resolved_values
from opensora.core.config.structure import ComponentConfig
from opensora.core.config.write import write_config
from opensora.core.errors import ConfigError
from opensora.core.features import LATENTS, TEXTS, Features, open_features
from opensora.core.loading import Batch, UnreadableFiles, iter_batches
from opensora.core.orders import Place, SampleOrder, Slicing
from opensora.core.pipelines.train import build_dataset, makes_batches, new_listing
from opensora.core.pipelines.train_spec import TrainSpec
from opensora.core.randomness import SampleKey
from opensora.core.run_folder import held, logging_to, make_folder, new_run_folder, read_jsonl, write_atomically
from opensora.core.stopping import Interrupted, StopRequest, stopping_on_signals

if TYPE_CHECKING:
    from opensora.core.config.evaluate import Config

__all__ = ["Extract", "ExtractSpec"]

log = logging.getLogger(__name__)
_SECONDS_BETWEEN_LINES = 10
_ROWS_AT_ONCE = 8
_GIB = 2**30


@frozen(kw_only=True)
class ExtractSpec(TrainSpec):
    """Compute features of all rows. What only concerns training is accepted and without effect."""

    kinds: ClassVar[Mapping[str, str]] = {
        key: kind for key, kind in TrainSpec.kinds.items() if key not in ("model", "scheduler")
    }

    pipeline: Literal["extract"] = "extract"  # type: ignore[assignment]  # it is read from the training's config
    model: ComponentConfig | None = None  # type: ignore[assignment]  # no denoiser is needed
    """Without effect here."""
    scheduler: ComponentConfig | None = None  # type: ignore[assignment]  # the same
    """Without effect here."""
    extract_epochs: int | None = field(default=None, validator=optional(gt(0)))
    """Epochs whose clips are computed, for clips that differ from epoch to epoch (random starts, buckets with probabilities).
    None: the dataset's num_starts, or 1."""

    @property
    def epochs_of_clips(self) -> int:
        """How many epochs to go through."""
        return self.extract_epochs or self.dataset.options.get("num_starts") or 1


class Extract:
    """Make features, and say what became of every row."""

    Spec = ExtractSpec

    def __init__(self, spec: ExtractSpec, *, config: Config) -> None:
        """Check every component's options.

        Raises:
            ComponentError, ConfigError: A component is missing or an option is wrong, or there is no ``features.folder``.
        """
        check_components(spec, config.locations)
        if spec.features is None:
            raise ConfigError('Where are features to be kept? Set features = dict(folder="features").')
        self.spec, self.config = spec, config

    def run(self) -> dict[str, Path]:
        """Compute what is missing, and return where it is.

        Raises:
            Interrupted: A signal asked to stop; what was computed is kept.
            DataError: Too many files can't be read.
        """
        spec = self.spec
        with build_accelerator(spec) as accelerator, stopping_on_signals() as stop, ExitStack() as stack:
            folder = accelerator.from_main(lambda: choose_folder(spec))
            if accelerator.is_main:
                stack.enter_context(held(folder))
                stack.enter_context(logging_to(folder / "run.log"))
                write_config(folder / "config.py", resolved_values(spec), f"Again: opensora-run {folder}/config.py")
            with use_kernel(load("attention", spec.attention)):
                features = extract(spec, folder, accelerator, stop)
            return {"features": features.cache.folder, "summary": folder / "summary.json"}

    def dry_run(self) -> str:
        """What would be computed. Loads and writes nothing."""
        from opensora.core.pipelines.dry_run import describe_extraction

        return describe_extraction(self.spec)


@define(eq=False)
class EveryClip(SampleOrder):
    """The clips of some epochs, each once, in the order of the data."""

    dataset: Any = field(kw_only=True)
    num_epochs: int = field(kw_only=True)

    def iter_micro_batches(self, slicing: Slicing, place: Place) -> Iterator[list[SampleKey]]:
        """One process's share, in batches of one size."""
        for number, batch in enumerate(self._iter_batches()):
            if number % slicing.world_size == slicing.rank:
                yield list(batch)

    def count(self) -> int:
        """Clips, over all processes."""
        return sum(len(batch) for batch in self._iter_batches())

    def _iter_batches(self) -> Iterator[Sequence[SampleKey]]:
        for epoch in range(self.num_epochs):
            if makes_batches(self.dataset):
                yield from self.dataset.batches(self.seed, epoch)
            else:
                for start in range(0, self.num_samples, _ROWS_AT_ONCE):
                    rows = range(start, min(start + _ROWS_AT_ONCE, self.num_samples))
                    yield [SampleKey(self.seed, index, epoch) for index in rows]


def choose_folder(spec: ExtractSpec) -> Path:
    """Where log, config and summary go.

    Raises:
        MachineError: It can't be written.
    """
    if spec.run_folder:
        return make_folder(Path(spec.run_folder))
    return new_run_folder(Path(spec.outputs), spec.name or "features")


def extract(spec: ExtractSpec, folder: Path, accelerator: Accelerator, stop: StopRequest) -> Features:
    """Go through all clips once; see `Extract.run`."""
    begin = time.perf_counter()
    dataset = build_dataset(spec)
    order = EveryClip(len(dataset), spec.seed, dataset=dataset, num_epochs=spec.epochs_of_clips)
    features = open_features(spec, accelerator, fill=True)
    slicing = Slicing(batch_size=_ROWS_AT_ONCE, world_size=accelerator.data_world_size, rank=accelerator.data_rank)
    unreadable = UnreadableFiles(new_listing(folder, accelerator), len(dataset), spec.max_unreadable)
    looked_up = features.dataset(dataset, only_looks=True)
    clips = order.count()
    progress = _Told(clips, accelerator)
    for batch in iter_batches(looked_up, order, slicing, num_workers=spec.num_workers):
        unreadable.record(batch)
        make(features, batch)
        progress.add(batch.nominal_size)
        if stop:
            break
    accelerator.wait()
    is_stopped = accelerator.highest(bool(stop)) > 0
    summarize(features, unreadable, folder, accelerator, clips=clips, seconds=time.perf_counter() - begin)
    if is_stopped:
        raise Interrupted(
            f"Stopped; what was computed is kept. Go on with: opensora-run {folder}/config.py",
            signal_number=stop.signal_number or signal.SIGTERM,
        )
    return features


@torch.no_grad()
def make(features: Features, batch: Batch) -> None:
    """Compute and keep what a batch lacks."""
    features.count(batch)
    if features.vae is not None and batch.moments is None and len(batch):
        features.make_moments(batch)
    if features.text_encoder is not None and batch.text is None:
        missing = [text for text, each in zip(batch.texts, batch.features, strict=True) if each.text is None]
        for caption in dict.fromkeys(missing):
            features.text_encoder.encode([caption])


def summarize(
    features: Features,
    unreadable: UnreadableFiles,
    folder: Path,
    accelerator: Accelerator,
    *,
    clips: int,
    seconds: float,
) -> None:
    """Write ``summary.json`` with the numbers of all processes, and log them."""
    counts = features.counts
    own = [counts.found[LATENTS], counts.made[LATENTS], counts.found[TEXTS], counts.made[TEXTS], counts.damaged]
    own.append(features.cache.evicted)
    total = accelerator.mean(torch.tensor(own, dtype=torch.float64, device=accelerator.device)) * accelerator.world_size
    found_latents, made_latents, found_texts, made_texts, damaged, evicted = map(int, total.round().tolist())
    if not accelerator.is_main:
        return
    usage = features.cache.usage()
    rows = len({record["row"] for record in read_jsonl(unreadable.listing)})
    summary = {
        "folder": str(features.cache.folder),
        "clips": clips,
        "latents": {"found": found_latents, "made": made_latents},
        "texts": {"found": found_texts, "made": made_texts},
        "damaged": damaged,
        "evicted": evicted,
        "unreadable_rows": rows,
        "entries": dict(usage.entries),
        "bytes": usage.size,
        "seconds": round(seconds, 1),
    }
    write_atomically(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    log.info("Latents: %d made, %d were there. Embeddings of captions: %d made, %d were there. %d damaged, made again",
             made_latents, found_latents, made_texts, found_texts, damaged)  # fmt: skip
    log.info("%s holds %.3f GiB in %s entries", features.cache.folder, usage.size / _GIB, sum(usage.entries.values()))
    if rows:
        log.warning("%d rows can't be read; they are listed in %s", rows, unreadable.listing)
    if evicted:
        log.warning(
            "features.max_gib = %g is too small for all of them: %d that were unused for longest are gone again",
            features.options.max_gib,
            evicted,
        )


class _Told:
    """Says how far it is, in the main process."""

    def __init__(self, total: int, accelerator: Accelerator) -> None:
        self.total, self.world_size, self.is_main = total, accelerator.data_world_size, accelerator.is_main
        self.done, self.begin = 0, time.monotonic()
        self.told = self.begin

    def add(self, clips: int) -> None:
        """So many more clips of this process are done; others are taken to be as far."""
        self.done += clips
        now = time.monotonic()
        if not self.is_main or now - self.told < _SECONDS_BETWEEN_LINES:
            return
        self.told = now
        done = min(self.total, self.done * self.world_size)
        left = (now - self.begin) / done * (self.total - done)
        log.info("%d of %d clips, %.1f a second, about %.0f s left", done, self.total, done / (now - self.begin), left)
