"""Fits a training config into a memory limit: batch sizes, checkpointing and offloading, by rehearsed steps.

Nothing is computed and no device is needed; see `opensora.core.pipelines.step_cost`.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
from attrs import frozen

from opensora.core.errors import ConfigError, MachineError
from opensora.core.pipelines.plan import PlannedBucket, describe_costs, planned_buckets, rehearse, shares_of
from opensora.core.pipelines.step_cost import StepCost, StepRehearsal, build_on_meta, encoder_costs
from opensora.core.pipelines.train_spec import TrainSpec
from opensora.core.protocols import Size

__all__ = ["Fit", "Planner", "largest_batch", "parse_bytes"]

log = logging.getLogger(__name__)
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_UNITS |= {"K": 2**10, "M": 2**20, "G": 2**30}
LADDER: Sequence[tuple[Any, bool]] = ((False, False), ("selective", False), (True, False), (True, True))
"""(grad_checkpoint, offload), from the least to the most time."""
LARGEST = 4096
"""No batch is tried above this."""


@frozen(kw_only=True)
class Fit:
    """What fits, and what it takes."""

    grad_checkpoint: bool | int | str
    offload: bool
    costs: Mapping[PlannedBucket, StepCost]
    """Of each bucket, at the chosen batch size."""

    def describe(self, world_size: int) -> list[str]:
        """Lines for people."""
        encoding = [bucket.label for bucket, cost in self.costs.items() if cost.worst_phase == "video encoder"]
        hint = (
            f"             the VAE sets the limit of {', '.join(encoding)}: a smaller vae.micro_batch_size makes room"
        )
        return [
            f"chosen       grad_checkpoint = {self.grad_checkpoint!r}, offload = {self.offload}, and the batch sizes below",
            *([hint] if encoding else []),
            *describe_costs(self.costs, world_size),
        ]

    def changes(self, spec: TrainSpec) -> dict[str, Any]:
        """The keys of the config that it sets."""
        chosen: dict[str, Any] = {"grad_checkpoint": self.grad_checkpoint, "offload": self.offload}
        if not spec.bucket_config or any(bucket.resolution is None for bucket in self.costs):
            return {**chosen, "batch_size": next(iter(self.costs.values())).batch_size}
        sizes = {(bucket.resolution, bucket.size[0]): cost.batch_size for bucket, cost in self.costs.items()}
        buckets = {
            resolution: {
                frames: (value[0], sizes.get((resolution, int(frames)), value[1])) for frames, value in lengths.items()
            }
            for resolution, lengths in spec.bucket_config.items()
        }
        return {**chosen, "bucket_config": buckets}


class Planner:
    """Rehearses steps of one config under several options."""

    def __init__(self, spec: TrainSpec, size: Size, *, world_size: int = 1) -> None:
        """Build the config's parts without memory.

        Args:
            spec: Of the config.
            size: (T, H, W) of the clips, where there are no buckets.
            world_size: Processes of the run.

        Raises:
            ComponentError, ConfigError, ShapeError: The parts can't be built.
        """
        self.spec, self.world_size = spec, world_size
        self._parts = build_on_meta(spec, None if spec.bucket_config else size)
        self._encoders = encoder_costs(spec, self._parts)
        self.buckets = sorted(
            planned_buckets(spec, self._parts, size),
            key=lambda one: -math.prod(self._parts.vae.latent_size(one.size)) * one.batch_size,
        )

        if not self.buckets:
            raise ConfigError("No bucket of bucket_config has a batch size above 0 and a probability above 0.")

    def costs(self) -> dict[PlannedBucket, StepCost]:
        """Of each bucket, as configured."""
        with self._rehearsal(self.spec, self.world_size) as rehearsal:
            return rehearse(rehearsal, self.buckets)

    def fit(self, limit: int) -> Fit:
        """The options that take least time under which every bucket fits at its configured batch size, and then the largest
        batch of each that fits; if no options do, the most saving ones, with the largest batches that fit.

        Args:
            limit: Bytes of the device, for each process.

        Raises:
            MachineError: Not even batches of 1 fit; the message says how much is needed and what would help.
        """
        ladder = [one for one in LADDER if self._saves_at_least(*one)]
        for grad_checkpoint, offload in ladder:
            spec = attrs.evolve(self.spec, grad_checkpoint=grad_checkpoint, offload=offload)
            with self._rehearsal(spec, self.world_size) as rehearsal:
                is_last = (grad_checkpoint, offload) == ladder[-1]
                if not is_last and not all(
                    rehearsal.step(one.size, one.batch_size).peak <= limit for one in self.buckets
                ):
                    log.info("grad_checkpoint = %r, offload = %s: the batches don't fit", grad_checkpoint, offload)
                    continue
                costs = {bucket: self._largest(rehearsal, bucket, limit) for bucket in self.buckets}
            return Fit(grad_checkpoint=grad_checkpoint, offload=offload, costs=costs)
        raise AssertionError("the last options always return or raise")

    def _saves_at_least(self, grad_checkpoint: Any, offload: bool) -> bool:
        """What the config asks for already is not taken away, and what it excludes is not asked for."""
        if self.spec.compile and grad_checkpoint == "selective":
            return False
        order = {False: 0, "selective": 1, True: 2}
        asked = self.spec.grad_checkpoint
        return order[grad_checkpoint] >= order.get(asked, 1) and offload >= self.spec.offload

    def _rehearsal(self, spec: TrainSpec, world_size: int) -> StepRehearsal:
        return StepRehearsal(spec, self._parts, shares_of(spec, world_size), encoders=self._encoders)

    def _largest(self, rehearsal: StepRehearsal, bucket: PlannedBucket, limit: int) -> StepCost:
        known: dict[int, StepCost] = {}

        def peak(batch_size: int) -> int:
            if batch_size not in known:
                known[batch_size] = rehearsal.step(bucket.size, batch_size)
            return known[batch_size].peak

        found = largest_batch(peak, limit, first=bucket.batch_size)
        if not found:
            raise MachineError(self._too_small(known[1], bucket, limit))
        log.info("%s: batches of %d", bucket.label, found)
        return known[found]

    def _too_small(self, cost: StepCost, bucket: PlannedBucket, limit: int) -> str:
        """How much is missing, and what would help."""
        needed = (
            f"A single video of {bucket.label} needs {_gib(cost.peak)} with all options, in {cost.worst_phase}; the limit is "
            f"{_gib(limit)}."
        )
        hints = []
        lasting = sum(amount for name, amount in cost.held.items() if name != "encoders")
        encoders = cost.held.get("encoders", 0)
        if lasting > 0.3 * cost.peak:
            processes = next((n for n in (2, 4, 8, 16, 32, 64) if cost.peak - lasting * (1 - 1 / n) <= limit), None)
            more = f" on {processes} processes" if processes else ""
            hints.append(f'weights, optimizer and EMA take {_gib(lasting)}: accelerator = dict(type="fsdp"){more}')
        if encoders > 0.2 * cost.peak:
            hints.append(f'the encoders take {_gib(encoders)}: train from features, or text_encoder.device = "cpu"')
        if cost.worst_phase == "video encoder":
            hints.append("a smaller vae.micro_batch_size")
        hints.append("fewer frames or a smaller size")
        return f"{needed} What would help: {'; '.join(hints)}."


def largest_batch(peak: Callable[[int], int], limit: int, *, first: int = 2) -> int:
    """The largest batch size whose peak is within ``limit``; 0 if none is. Peaks grow, nearly on a line.

    Args:
        peak: Bytes at a batch size.
        limit: Bytes.
        first: To be tried after 1.
    """
    if peak(1) > limit:
        return 0
    low, high = 1, LARGEST + 1  # low fits, high is taken not to
    guess = max(2, min(first, LARGEST))
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        if peak(guess) <= limit:
            low = guess
        else:
            high = guess
        other = high if high <= LARGEST else 1
        slope = (peak(other) - peak(low)) / (other - low) if other != low else 0.0
        guess = low + int((limit - peak(low)) / slope) if slope > 0 else 2 * low
    return low


def parse_bytes(text: str) -> int:
    """``24GiB``, ``80 GB``, ``512MiB`` as a number of bytes.

    Raises:
        ConfigError: It is no such thing.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not found or found[2].upper() not in _UNITS or float(found[1]) <= 0:
        raise ConfigError(f'"{text}" is no amount of memory. Write 24GiB, say.')
    return int(float(found[1]) * _UNITS[found[2].upper()])


def _gib(amount: int) -> str:
    return f"{amount / 2**30:.2f} GiB"
