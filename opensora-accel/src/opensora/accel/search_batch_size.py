"""The pipeline ``search-batch-size``: finds the batch size of each bucket by making real steps on the device at hand.

Steps are whole ones (encoders, denoiser, backward, optimizer, averages), of noise with the bucket's size that has most
latents, so that no data is needed and none is waited for.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from attrs import field, frozen
from attrs.validators import gt, optional

from opensora.core.accelerator import Accelerator
from opensora.core.attention import use_kernel
from opensora.core.components import load
from opensora.core.composing import build_accelerator, build_parts, check_components
from opensora.core.config.write import write_config
from opensora.core.errors import ConfigError, MachineError, did_you_mean
from opensora.core.pipelines.lone_step import LoneStep, made_up_batch
from opensora.core.pipelines.train_spec import TrainSpec
from opensora.core.protocols import Size
from opensora.core.sizes import RESOLUTIONS

if TYPE_CHECKING:
    from opensora.core.config.evaluate import Config

__all__ = ["Found", "SearchBatchSize", "SearchBatchSizeSpec", "search"]

log = logging.getLogger(__name__)
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
PROMPT = " ".join(["a clip that shows nothing but noise"] * 60)  # longer than any text encoder reads


@frozen(kw_only=True)
class SearchBatchSizeSpec(TrainSpec):
    """Search the batch size of each bucket. Other keys are those of the training that the result is for."""

    pipeline: Literal["search-batch-size"] = "search-batch-size"  # type: ignore[assignment]  # narrower than its base's
    bucket_config: dict[str, Any] | None = None
    """{resolution: {frames: (guess, variance)}}: from guess - variance to guess + variance is searched; a variance of 0 keeps
    the guess."""
    base: tuple[str, int | str] | None = None
    """(resolution, frames) whose largest batch's step time all buckets keep to. None, and no base_step_time: no limit."""
    base_step_time: float | None = field(default=None, validator=optional(gt(0)))
    """The step time to keep to, in seconds, instead of one measured for base."""
    resolution: str | None = None
    """Only this one, to run several searches side by side."""
    warmup_steps_each: int = field(default=5, validator=gt(0))
    """Steps before the time is taken, for each candidate."""
    timed_steps: int = field(default=5, validator=gt(0))
    """Steps whose time is taken, for each candidate."""
    save_path: str = "bucket_config.py"
    """Where the result is written, a config with nothing but bucket_config."""


@frozen(kw_only=True)
class Found:
    """What came of one bucket."""

    batch_size: int | None
    """None: not even the smallest one fits, or is fast enough."""
    step_time: float | None
    """Seconds; None where nothing was measured."""


class SearchBatchSize:
    """The pipeline."""

    Spec = SearchBatchSizeSpec

    def __init__(self, spec: SearchBatchSizeSpec, *, config: Config) -> None:
        """Check the buckets and the components.

        Raises:
            ComponentError, ConfigError: Something is wrong or missing.
        """
        check_components(spec, config.locations)
        self.spec = spec
        self.buckets = check_buckets(spec)

    def dry_run(self) -> str:
        """What would be searched."""
        rows = [
            f"  {resolution:>6} x {frames:<4} from {max(guess - variance, 1)} to {guess + variance}"
            if variance
            else f"  {resolution:>6} x {frames:<4} stays {guess}"
            for (resolution, frames), (guess, variance) in self.buckets.items()
        ]
        spec = self.spec
        time_limit = "no limit"
        if spec.base_step_time or spec.base:
            time_limit = f"{spec.base_step_time} s" if spec.base_step_time else f"that of base = {spec.base}"
        denoiser = build_parts(spec, size_of=lambda: None, meta=True).denoiser
        count = sum(each.numel() for each in denoiser.parameters())
        return "\n".join(
            [
                f"model        {spec.model.type}: {count:,} parameters",
                f"step time    {time_limit}",
                "batch sizes to be searched:",
                *rows,
            ]
        )

    def run(self) -> dict[str, Path]:
        """Search, print a table, and write a bucket_config.

        Raises:
            MachineError: There are several processes, or the base bucket does not fit at all.
        """
        spec = self.spec
        with build_accelerator(spec) as accelerator, use_kernel(load("attention", spec.attention)):
            if accelerator.world_size > 1:
                raise MachineError("search-batch-size measures one process. Start it without --nproc.")
            clock = _Clock(spec, accelerator)
            target = spec.base_step_time or self._measure_base(clock)
            found = {}
            for bucket, bounds in self.buckets.items():
                found[bucket] = self._find(clock, bucket, bounds, target)
                log.info("%s x %s: %s", *bucket, _text(found[bucket]))
        print("\n".join(_table(found, target)))  # noqa: T201  # the result
        path = Path(spec.save_path)
        write_config(path, {"bucket_config": as_bucket_config(found)}, "Found by search-batch-size; for _base_ = [...]")
        return {"bucket_config": path}

    def _measure_base(self, clock: _Clock) -> float | None:
        if self.spec.base is None:
            return None
        bucket = (self.spec.base[0], int(self.spec.base[1]))
        base = self._find(clock, bucket, self.buckets[bucket], None)
        if base.batch_size is not None and base.step_time is None:
            base = Found(batch_size=base.batch_size, step_time=clock.step_time(bucket, base.batch_size))
        if base.step_time is None:
            raise MachineError(f"Not even the smallest batch of base = {self.spec.base} fits. Choose a smaller bucket.")
        log.info("base %s x %s: batches of %d take %.3f s a step", *bucket, base.batch_size, base.step_time)
        return base.step_time

    def _find(self, clock: _Clock, bucket: tuple[str, int], bounds: tuple[int, int], target: float | None) -> Found:
        guess, variance = bounds
        if not variance:
            return Found(batch_size=guess, step_time=None)
        return search(lambda size: clock.step_time(bucket, size), max(guess - variance, 1), guess + variance, target)


def search(step_time: Any, low: int, high: int, target: float | None) -> Found:
    """The largest batch size in [low, high] that fits and, with a target, takes no longer.

    Args:
        step_time: Called with a batch size; returns seconds, or None if it does not fit. Grows with the batch size.
        low: Smallest.
        high: Largest.
        target: Seconds; None is no limit.
    """
    best = Found(batch_size=None, step_time=None)
    while low <= high:
        middle = (low + high) // 2
        taken = step_time(middle)
        if taken is not None and (target is None or taken <= target):
            best, low = Found(batch_size=middle, step_time=taken), middle + 1
        else:
            high = middle - 1
    return best


def check_buckets(spec: SearchBatchSizeSpec) -> dict[tuple[str, int], tuple[int, int]]:
    """(resolution, frames) -> (guess, variance).

    Raises:
        ConfigError: There are none, or one is wrong.
    """
    buckets: dict[tuple[str, int], tuple[int, int]] = {}
    for resolution, lengths in (spec.bucket_config or {}).items():
        if resolution not in RESOLUTIONS:
            near = did_you_mean(resolution, RESOLUTIONS)
            raise ConfigError(f'bucket_config: there is no resolution "{resolution}".{near}')
        for frames, value in lengths.items():
            place = f'bucket_config["{resolution}"][{frames}]'
            if not (isinstance(value, tuple | list) and len(value) == 2 and all(type(one) is int for one in value)):
                raise ConfigError(f"{place} is {value!r}; it must be (guess, variance), two whole numbers.")
            if value[0] < 1 or value[1] < 0:
                raise ConfigError(f"{place} is {value!r}; the guess is at least 1, and the variance at least 0.")
            if spec.resolution in (None, resolution):
                buckets[resolution, int(frames)] = (value[0], value[1])
    if not buckets:
        of = f' of resolution "{spec.resolution}"' if spec.resolution else ""
        raise ConfigError(f'No bucket{of} to search: bucket_config = {{"240p": {{51: (20, 10)}}}}, say.')
    if spec.base is not None and (spec.base[0], int(spec.base[1])) not in buckets:
        raise ConfigError(f"base is {spec.base}, which is no bucket of bucket_config that is searched.")
    return buckets


def as_bucket_config(found: Mapping[tuple[str, int], Found]) -> dict[str, dict[int, tuple[float, int | None]]]:
    """As training takes it: each bucket takes all clips; what fits no batch takes none."""
    config: dict[str, dict[int, tuple[float, int | None]]] = {}
    for (resolution, frames), one in found.items():
        config.setdefault(resolution, {})[frames] = (0.0 if one.batch_size is None else 1.0, one.batch_size)
    return config


class _Clock:
    """Makes steps of one run, and times them."""

    def __init__(self, spec: SearchBatchSizeSpec, accelerator: Accelerator) -> None:
        self.spec, self.accelerator = spec, accelerator
        self._step = LoneStep(spec, accelerator, None)
        self._prompt = "0" if self._step.parts.text_encoder.width is None else PROMPT

    def step_time(self, bucket: tuple[str, int], batch_size: int) -> float | None:
        """Seconds of a step, or None if it does not fit into memory. Any other error is raised."""
        try:
            return self._time(self._size(*bucket), batch_size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        self._step.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
        log.info("%s x %s: batches of %d don't fit", *bucket, batch_size)
        return None

    def _time(self, size: Size, batch_size: int) -> float:
        batch = made_up_batch(size, batch_size, prompt=self._prompt)
        for _ in range(self.spec.warmup_steps_each):
            self._step.make(batch)
        self._wait()
        begin = time.perf_counter()
        for _ in range(self.spec.timed_steps):
            self._step.make(batch)
        self._wait()
        return (time.perf_counter() - begin) / self.spec.timed_steps

    def _wait(self) -> None:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self.accelerator.device)

    def _size(self, resolution: str, frames: int) -> Size:
        vae = self._step.parts.vae
        sizes = [(frames, *size) for size in RESOLUTIONS[resolution].values()]
        return max(sizes, key=lambda size: (math.prod(vae.latent_size(size)), math.prod(size)))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in OUT_OF_MEMORY)


def _text(one: Found) -> str:
    if one.batch_size is None:
        return "none fits"
    return f"{one.batch_size}" + (f", {one.step_time:.3f} s a step" if one.step_time is not None else ", as given")


def _table(found: Mapping[tuple[str, int], Found], target: float | None) -> list[str]:
    lines = [f"step time    {'no limit' if target is None else f'{target:.3f} s'}"]
    return lines + [f"  {resolution:>6} x {frames:<4} {_text(one)}" for (resolution, frames), one in found.items()]
