"""The loss on fixed clips, with fixed noise, at fixed timesteps: nothing but the weights changes from one time to the next.

The training loss differs from step to step because clips, noise and above all timesteps do. Here each clip meets the same
timesteps with the same noise each time, nothing is dropped, and all frames are noised. So small changes show.

Clips are dealt out to processes. Each calls the denoiser equally often, as networks that are spread over processes need.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from attrs import frozen
from torch import Tensor

from opensora.core.accelerator import Accelerator
from opensora.core.conditioning import Conditioning
from opensora.core.errors import DataError
from opensora.core.loading import Batch, read_batches, stand_in
from opensora.core.orders import BatchOrder
from opensora.core.protocols import Dataset, Denoiser, Scheduler, Size
from opensora.core.randomness import SampleDraws, SampleKey, generator_for

__all__ = [
    "FixedBatch",
    "FixedClips",
    "Losses",
    "choose_clips",
    "held_out_rows",
    "inner_timesteps",
    "iter_fixed",
    "measure",
    "scalars",
]

log = logging.getLogger(__name__)
Encode = Callable[[Batch], tuple[Tensor, Conditioning]]


@frozen(kw_only=True)
class FixedClips:
    """Which clips, in batches that are the same on any number of processes."""

    batches: Sequence[Sequence[SampleKey]]
    buckets: Sequence[str]
    """What each batch's loss is reported under; "" is the size of its clips."""
    seed: int

    @property
    def num_clips(self) -> int:
        """In all batches."""
        return sum(map(len, self.batches))


@frozen(kw_only=True, eq=False)
class FixedBatch:
    """One of them, encoded."""

    latents: Tensor
    """[B, C, T, H, W]."""
    conditioning: Conditioning
    keys: Sequence[SampleKey]
    rows: Sequence[int]
    """Places of the clips among all; none where the batch is only there so that all processes call the denoiser as often."""
    bucket: str


def inner_timesteps(count: int, num_timesteps: int) -> list[float]:
    """That many timesteps, evenly spread and strictly inside [0, num_timesteps]."""
    return [num_timesteps * (index + 1) / (count + 1) for index in range(count)]


def held_out_rows(num_rows: int, share: float, seed: int) -> Tensor:
    """Rows that training does not see, int64: that share of them, at least one, a pure function of the arguments."""
    return torch.randperm(num_rows, generator=generator_for(seed, "held out"))[: max(1, round(share * num_rows))]


def choose_clips(
    dataset: Any, *, num_clips: int, batch_size: int, seed: int, rows: Sequence[int] | Tensor | None = None
) -> FixedClips:
    """Clips of a dataset; the same ones each time.

    Args:
        dataset: Where it makes its own batches, each size has about the same number of clips.
        num_clips: At most.
        batch_size: Of clips of one size.
        seed: Decides which they are, and their noise.
        rows: Only of these; None: of all. For clips of one size.

    Raises:
        DataError: There are none.
    """
    if hasattr(dataset, "batches"):
        batches = _of_each_size(BatchOrder(dataset, seed).of_epoch(0), num_clips)
    else:
        known = torch.arange(len(dataset)) if rows is None else torch.as_tensor(rows)
        chosen = known[torch.randperm(len(known), generator=generator_for(seed, "clips"))[:num_clips]].tolist()
        keys = [SampleKey(seed, row) for row in sorted(chosen)]
        batches = [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]
    if not batches:
        raise DataError("The data of the validation has no rows.")
    return FixedClips(batches=batches, buckets=[""] * len(batches), seed=seed)


def _of_each_size(batches: Any, num_clips: int) -> list[list[SampleKey]]:
    by_size: dict[Size | None, list[Sequence[SampleKey]]] = {}
    for batch in batches:
        by_size.setdefault(batch[0].size, []).append(batch)
    each, left = -(-num_clips // len(by_size)), num_clips
    chosen: list[list[SampleKey]] = []
    for of_size in by_size.values():
        room = min(each, left)
        for batch in of_size:
            if room:
                chosen.append(list(batch[:room]))
                room, left = room - len(chosen[-1]), left - len(chosen[-1])
    return chosen


def iter_fixed(
    dataset: Dataset,
    clips: FixedClips,
    encode: Encode,
    *,
    accelerator: Accelerator,
    size: Size,
    num_workers: int = 0,
) -> Iterator[FixedBatch]:
    """This process's share, read and encoded: as many batches as any other's.

    Args:
        dataset: Has the clips.
        clips: Those of all processes.
        encode: Latents and conditioning of a batch.
        accelerator: Says which share.
        size: (T, H, W) of what stands in for a batch that can't be read, if its keys have none.
        num_workers: Processes that read ahead.
    """
    place = {(batch, key): row for row, (batch, key) in enumerate(_numbered(clips.batches))}
    count, world_size = len(clips.batches), accelerator.data_world_size
    dealt = [(start + accelerator.data_rank) for start in range(0, count, world_size)]
    keys = [list(clips.batches[index % count]) for index in dealt]
    for index, batch in zip(dealt, read_batches(dataset, keys, num_workers=num_workers), strict=True):
        for _, reason in batch.failed:
            log.warning("%s It is left out of the validation.", reason)
        read = batch if len(batch) else stand_in(batch.failed[0][0].size or size)
        with torch.no_grad():
            latents, conditioning = encode(read)
        counts = index < count and len(batch) > 0
        yield FixedBatch(
            latents=latents,
            conditioning=conditioning.replace(dropped=None),
            keys=read.keys,
            rows=[place[index, key] for key in batch.keys] if counts else [],
            bucket=clips.buckets[index % count] or _size_text(read),
        )


def _numbered(batches: Sequence[Sequence[SampleKey]]) -> Iterator[tuple[int, SampleKey]]:
    return ((index, key) for index, batch in enumerate(batches) for key in batch)


def _size_text(batch: Batch) -> str:
    """Frames x height x width in pixels."""
    sizes = batch.conditioning
    numbers = [int(tensor[0]) for tensor in (sizes.num_frames, sizes.height, sizes.width) if tensor is not None]
    return "x".join(map(str, numbers))


@frozen(kw_only=True, eq=False)
class Losses:
    """What was measured."""

    values: Tensor
    """[N, S] float64 on the CPU, of N clips and S timesteps."""
    timesteps: Sequence[float]
    buckets: Sequence[str]
    """[N]."""

    def record(self) -> dict[str, Any]:
        """Means: of all, by timestep, by bucket, and by both; for JSON."""
        members: dict[str, list[int]] = {}
        for row, bucket in enumerate(self.buckets):
            members.setdefault(bucket, []).append(row)
        each = {bucket: self.values[rows].mean(dim=0) for bucket, rows in sorted(members.items())}
        return {
            "loss": self.values.mean().item(),
            "clips": len(self.values),
            "by_timestep": self._by_timestep(self.values.mean(dim=0)),
            "by_bucket": {bucket: row.mean().item() for bucket, row in each.items()},
            "by_bucket_and_timestep": {bucket: self._by_timestep(row) for bucket, row in each.items()},
        }

    def _by_timestep(self, row: Tensor) -> dict[str, float]:
        return {f"{timestep:.1f}": value for timestep, value in zip(self.timesteps, row.tolist(), strict=True)}


@torch.no_grad()
def measure(
    scheduler: Scheduler,
    predict: Denoiser,
    batches: Iterable[FixedBatch],
    *,
    timesteps: Sequence[float],
    num_clips: int,
    accelerator: Accelerator,
    beat: Callable[[], None] = lambda: None,
) -> Losses:
    """The loss of each clip at each timestep; the same in all processes. All of them must call this.

    Args:
        scheduler: Has the loss, with its weights.
        predict: The denoiser, in eval mode.
        batches: From `iter_fixed`.
        timesteps: See `inner_timesteps`.
        num_clips: Of all processes.
        accelerator: Where this runs.
        beat: Called before each batch.

    Raises:
        DataError: No clip could be read.
    """
    device = accelerator.device
    values = torch.zeros(num_clips, len(timesteps) + 1, dtype=torch.float64, device=device)  # and whether it was read
    buckets: dict[int, str] = {}
    for batch in batches:
        beat()
        latents, conditioning = batch.latents.to(device), batch.conditioning.to(device)
        for column, timestep in enumerate(timesteps):
            draws = SampleDraws([attrs.evolve(key, epoch=column) for key in batch.keys], device)
            at = torch.full((len(latents),), timestep, device=device)
            losses = scheduler.loss(predict, latents, conditioning, draws=draws, timestep=at)
            if batch.rows:
                values[batch.rows, column] = losses.double()
        if batch.rows:
            values[batch.rows, -1] = 1
            buckets |= dict.fromkeys(batch.rows, batch.bucket)
    summed = (accelerator.mean(values) * accelerator.data_world_size).cpu()  # others have zeros in one's rows
    for others in accelerator.gather(buckets):
        buckets |= others
    read = (summed[:, -1] > 0.5).nonzero().flatten().tolist()
    if not read:
        raise DataError("None of the clips of the validation can be read.")
    return Losses(values=summed[read, :-1], timesteps=timesteps, buckets=[buckets[row] for row in read])


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a `Losses.record` by one name each, as TensorBoard takes them; without those by both at once."""
    flat = {f"validation/{name}": record[name] for name in ("loss", "training_loss") if name in record}
    flat |= {f"validation/timestep {float(key):05.1f}": value for key, value in record["by_timestep"].items()}
    flat |= {f"validation/bucket {key}": value for key, value in record["by_bucket"].items()}
    return {name: value for name, value in flat.items() if not math.isnan(value)}
