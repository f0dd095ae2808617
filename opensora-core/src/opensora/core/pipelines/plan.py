"""What each bucket of a training config takes, in numbers and as a table."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence

from attrs import frozen

from opensora.core.accelerator import Accelerator
from opensora.core.components import load, structure_spec
from opensora.core.composing import Parts, is_installed
from opensora.core.pipelines.step_cost import StepCost, StepRehearsal
from opensora.core.pipelines.train_spec import TrainSpec
from opensora.core.protocols import Size
from opensora.core.shares import Shares
from opensora.core.sizes import RESOLUTIONS

__all__ = ["PlannedBucket", "describe_costs", "planned_buckets", "rehearse", "shares_of"]

log = logging.getLogger(__name__)
_SECONDS_OF_SILENCE = 10.0
_GIB = 2**30
_PHASES = {
    "VAE": ("video encoder",),
    "text": ("text encoder",),
    "forward": ("forward",),
    "backward": ("backward", "end of backward"),
    "optimizer": ("optimizer",),
}
_HELD = {"parameters": "weights", "optimizer": "optimizer", "average": "EMA", "encoders": "VAE and text encoder"}


@frozen(kw_only=True)
class PlannedBucket:
    """Clips of one resolution and length; of their sizes, that with most latents."""

    resolution: str | None
    """None: the dataset's clips have one size."""
    size: Size
    """(T, H, W) in pixels."""
    batch_size: int

    @property
    def label(self) -> str:
        """As in tables."""
        return f"{self.resolution or f'{self.size[1]}x{self.size[2]}'} x {self.size[0]}"


def planned_buckets(spec: TrainSpec, parts: Parts, size: Size) -> list[PlannedBucket]:
    """The buckets that clips can fall into, or the one size of all clips.

    Args:
        size: (T, H, W) of the clips where there are no buckets.
    """
    sizes_of = getattr(load("datasets", spec.dataset.type), "bucket_sizes", None)
    if not (sizes_of and spec.bucket_config):
        return [PlannedBucket(resolution=None, size=size, batch_size=spec.batch_size)]
    in_use = dict(sizes_of(spec.bucket_config))
    buckets = []
    for resolution, lengths in spec.bucket_config.items():
        for frames, value in lengths.items():
            sizes = [(int(frames), *each) for each in RESOLUTIONS[resolution].values()]
            possible = [each for each in sizes if each in in_use]
            if possible and value[1]:
                worst = max(possible, key=lambda each: (math.prod(parts.vae.latent_size(each)), math.prod(each)))
                buckets.append(PlannedBucket(resolution=resolution, size=worst, batch_size=value[1]))
    return buckets


def shares_of(spec: TrainSpec, world_size: int) -> Shares:
    """What part each of so many processes holds, as the config's accelerator says; all, where that is not installed."""
    if spec.accelerator is None or not is_installed(spec.accelerator):
        return Shares()
    accelerator: type[Accelerator] = load("accelerators", spec.accelerator.type)
    return accelerator.shares(structure_spec("accelerators", spec.accelerator), world_size)


def rehearse(rehearsal: StepRehearsal, buckets: Sequence[PlannedBucket]) -> dict[PlannedBucket, StepCost]:
    """A step of each bucket. If that takes long, it says every ten seconds how far it is."""
    costs: dict[PlannedBucket, StepCost] = {}
    told = time.monotonic()
    for bucket in buckets:
        if time.monotonic() - told > _SECONDS_OF_SILENCE:
            log.info("%d of %d buckets are rehearsed", len(costs), len(buckets))
            told = time.monotonic()
        costs[bucket] = rehearsal.step(bucket.size, bucket.batch_size)
    return costs


def describe_costs(costs: Mapping[PlannedBucket, StepCost], world_size: int = 1) -> list[str]:
    """Lines about memory and compute of each process: what lasts, a table of the buckets, and the most that is needed."""
    any_cost = next(iter(costs.values()))
    lasting = {_HELD[name]: amount for name, amount in any_cost.held.items() if name in _HELD}
    listed = ", ".join(f"{name} {_gib(amount)}" for name, amount in lasting.items())
    of = f", {world_size} processes" if world_size > 1 else ""
    gradients = max(cost.gradients for cost in costs.values())
    rows = [("bucket", "batch", "saved", *_PHASES, "TFLOP")]
    rows += [_row(bucket, cost) for bucket, cost in costs.items()]
    worst = max(costs, key=lambda bucket: costs[bucket].peak)
    cost = costs[worst]
    needed = f"memory       {_gib(cost.peak)} GiB a process at most{of}"
    needed += f": {worst.label}, batch {cost.batch_size}, in {cost.worst_phase}"
    host = max(one.host for one in costs.values())
    return [
        needed,
        f"  between steps, GiB: {listed}; gradients {_gib(gradients)}" + (f"; CPU {_gib(host)}" if host else ""),
        "  peaks, GiB, all included; compute of a micro-batch, forward and backward:",
        *_table(rows),
        f"compute      {_most(costs, 'flops')} TFLOP a micro-batch at most, and {_most(costs, 'encoder_flops')} to encode it",
    ]


def _row(bucket: PlannedBucket, cost: StepCost) -> tuple[str, ...]:
    phases = [max(cost.peaks[name].bytes for name in names if name in cost.peaks) for names in _PHASES.values()]
    return (
        bucket.label,
        str(cost.batch_size),
        _gib(cost.saved),
        *map(_gib, phases),
        f"{cost.flops / 1e12:.3f}",
    )


def _most(costs: Mapping[PlannedBucket, StepCost], name: str) -> str:
    return f"{max(getattr(one, name) for one in costs.values()) / 1e12:.3f}"


def _gib(amount: int) -> str:
    return f"{amount / _GIB:.2f}" if amount >= 0.1 * _GIB or not amount else f"{amount / _GIB:.4f}"


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows in aligned columns, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
