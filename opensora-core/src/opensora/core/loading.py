"""Which samples a step sees, and how they are read.

The order of samples is a pure function of (seed, epoch). Epochs follow one another without a gap, so nothing is dropped
or repeated. Where all clips have one size, a batch may hold the last samples of one epoch and the first of the next, and the
place in the data is the count of samples that all processes have seen; it means the same whatever batch size and number of
processes. Where clips differ in size, the dataset makes the batches of each epoch, and the place is the count of those.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any, Protocol

import attrs
import torch
from attrs import define, field, frozen

from opensora.core.conditioning import Conditioning
from opensora.core.errors import DataError, ShapeError, UserError
from opensora.core.protocols import IMAGE_FPS, Clip, Dataset, Size, batch_conditioning
from opensora.core.randomness import SampleDraws, SampleKey, generator_for
from opensora.core.run_folder import append_jsonl, read_jsonl

__all__ = [
    "Batch",
    "BatchOrder",
    "Order",
    "OwnBatches",
    "Place",
    "SampleOrder",
    "Slicing",
    "UnreadableFiles",
    "iter_batches",
    "stand_in",
]

log = logging.getLogger(__name__)

_Failed = tuple[SampleKey, str]
"""A sample that could not be read, and the reason."""


@frozen(kw_only=True)
class Place:
    """Where a run stands in its data, all processes together."""

    samples: int = 0
    """Samples seen."""
    epoch: int = 0
    """Of the dataset's own batches: which epoch's come next."""
    batch: int = 0
    """Of the dataset's own batches: how many of that epoch's were seen."""


class Order(Protocol):
    """Which samples each micro-batch holds, for ever."""

    @property
    def num_samples(self) -> int:
        """Rows of the data."""
        ...

    def iter_micro_batches(self, slicing: Slicing, place: Place) -> Iterator[list[SampleKey]]:
        """One process's micro-batches from ``place`` on."""
        ...

    def after_step(self, slicing: Slicing, place: Place) -> Place:
        """Where the next step begins."""
        ...

    def epochs(self, place: Place) -> float:
        """Passes over the data so far."""
        ...

    def steps_left(self, slicing: Slicing, place: Place, epochs: int) -> int:
        """Whole steps from ``place`` to the end of that many epochs."""
        ...


@define
class SampleOrder:
    """Endless shuffled order over ``num_samples`` samples, for clips of one size."""

    num_samples: int
    seed: int
    _epoch: int = -1
    _permutation: torch.Tensor = field(factory=lambda: torch.empty(0, dtype=torch.int64))

    def key(self, position: int) -> SampleKey:
        """Which sample stands at ``position``, counted from 0 through all epochs."""
        epoch, offset = divmod(position, self.num_samples)
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, self._permute(epoch)
        return SampleKey(seed=self.seed, index=int(self._permutation[offset]), epoch=epoch)

    def iter_micro_batches(self, slicing: Slicing, place: Place) -> Iterator[list[SampleKey]]:
        """See `Order`."""
        position = place.samples
        while True:
            for micro in range(slicing.accumulation):
                start = position + (micro * slicing.world_size + slicing.rank) * slicing.batch_size
                yield [self.key(start + offset) for offset in range(slicing.batch_size)]
            position += slicing.samples_per_step

    def after_step(self, slicing: Slicing, place: Place) -> Place:
        """See `Order`."""
        return Place(samples=place.samples + slicing.samples_per_step)

    def epochs(self, place: Place) -> float:
        """See `Order`."""
        return place.samples / self.num_samples

    def steps_left(self, slicing: Slicing, place: Place, epochs: int) -> int:
        """See `Order`."""
        return (epochs * self.num_samples - place.samples) // slicing.samples_per_step

    def _permute(self, epoch: int) -> torch.Tensor:
        return torch.randperm(self.num_samples, generator=generator_for(self.seed, "order", epoch))


class OwnBatches(Protocol):
    """A dataset that makes its own batches, each of clips of one size: its keys have a ``size``."""

    def __len__(self) -> int: ...

    def batches(self, seed: int, epoch: int) -> Sequence[Sequence[SampleKey]]:
        """The batches of an epoch, a pure function of its arguments; each is one process's micro-batch."""
        ...


@define
class BatchOrder:
    """Endless order over the batches that a dataset makes anew each epoch, for clips that differ in size."""

    dataset: OwnBatches
    seed: int
    _made: dict[int, Sequence[Sequence[SampleKey]]] = field(factory=dict)

    @property
    def num_samples(self) -> int:
        """Rows of the dataset, those included that are in no batch."""
        return len(self.dataset)

    def of_epoch(self, epoch: int) -> Sequence[Sequence[SampleKey]]:
        """The batches of one epoch.

        Raises:
            DataError: There are none.
        """
        if epoch not in self._made:
            batches = self.dataset.batches(self.seed, epoch)
            if not len(batches):
                raise DataError(
                    f"None of the {self.num_samples} rows falls into a bucket in epoch {epoch}: they are smaller or shorter "
                    "than bucket_config asks for, or its probabilities leave them out. Add a smaller size or length."
                )
            self._made = {old: made for old, made in self._made.items() if old >= epoch - 1} | {epoch: batches}
        return self._made[epoch]

    def iter_micro_batches(self, slicing: Slicing, place: Place) -> Iterator[list[SampleKey]]:
        """See `Order`; batches are dealt to the processes in turns, and keep their own size."""
        for _, batch in islice(self._from(place), slicing.rank, None, slicing.world_size):
            yield list(batch)

    def after_step(self, slicing: Slicing, place: Place) -> Place:
        """See `Order`."""
        step = list(islice(self._from(place), slicing.accumulation * slicing.world_size))
        samples = place.samples + sum(len(batch) for _, batch in step)
        return attrs.evolve(step[-1][0], samples=samples)

    def epochs(self, place: Place) -> float:
        """See `Order`."""
        return place.epoch + place.batch / len(self.of_epoch(place.epoch))

    def steps_left(self, slicing: Slicing, place: Place, epochs: int) -> int:
        """See `Order`; each epoch counts like the present one."""
        batches = (epochs - place.epoch) * len(self.of_epoch(place.epoch)) - place.batch
        return batches // (slicing.accumulation * slicing.world_size)

    def _from(self, place: Place) -> Iterator[tuple[Place, Sequence[SampleKey]]]:
        """Batches from ``place`` on, each with the place after it."""
        for epoch in count(place.epoch):
            batches = self.of_epoch(epoch)
            for index in range(place.batch if epoch == place.epoch else 0, len(batches)):
                is_last = index + 1 == len(batches)
                yield Place(epoch=epoch + is_last, batch=0 if is_last else index + 1), batches[index]


@frozen(kw_only=True)
class Slicing:
    """How a step's samples are dealt out: ``accumulation`` micro-batches of ``batch_size`` to each process."""

    batch_size: int
    accumulation: int = 1
    world_size: int = 1
    rank: int = 0

    @property
    def samples_per_step(self) -> int:
        """Over all processes."""
        return self.batch_size * self.accumulation * self.world_size


@frozen(kw_only=True, eq=False)
class Batch:
    """What the loader hands over: the clips that could be read, stacked, and what could not."""

    video: torch.Tensor
    """[B, 3, T, H, W] in [-1, 1]."""
    texts: Sequence[str]
    conditioning: Conditioning
    """Sizes and rates, no text yet."""
    keys: Sequence[SampleKey]
    paths: Sequence[str]
    failed: Sequence[_Failed] = ()
    """Samples that could not be read, with the reason."""

    def __len__(self) -> int:
        """Samples that were read."""
        return len(self.keys)

    @property
    def nominal_size(self) -> int:
        """Samples that were to be read."""
        return len(self.keys) + len(self.failed)

    def draws(self, device: torch.device) -> SampleDraws:
        """The random numbers of these samples."""
        return SampleDraws(self.keys, device)

    def pin_memory(self) -> Batch:
        """Called by torch's loader, so that the copy to a GPU needn't wait."""
        object.__setattr__(self, "video", self.video.pin_memory())
        return self


def _collate(items: Sequence[Clip | _Failed | UserError]) -> Batch | UserError:
    """Stack clips; those that failed stand in ``failed``. An error is returned: raised here, it would lose its words."""
    if error := next((item for item in items if isinstance(item, UserError)), None):
        return error
    clips = [item for item in items if isinstance(item, Clip)]
    sizes = {clip.size: clip.path for clip in clips}
    if len(sizes) > 1:
        listed = ", ".join(f"{size} of {path}" for size, path in sizes.items())
        return ShapeError(f"Clips of one batch must share frames, height and width; got {listed}.")
    return Batch(
        video=torch.stack([clip.video for clip in clips]) if clips else torch.empty(0),
        texts=[clip.text for clip in clips],
        conditioning=batch_conditioning(clips) if clips else Conditioning(),
        keys=[clip.key for clip in clips],
        paths=[clip.path for clip in clips],
        failed=[item for item in items if isinstance(item, tuple)],
    )


def stand_in(size: Size) -> Batch:
    """A batch of one black clip of (T, H, W), for a process that has nothing to read but must keep step with the others."""
    batch = _collate([Clip(video=torch.zeros(3, *size), text="", fps=IMAGE_FPS, key=SampleKey(0, 0))])
    assert isinstance(batch, Batch)  # one clip can't disagree with itself
    return batch


@frozen
class _Reading(torch.utils.data.Dataset[Any]):
    """Hands errors over instead of raising them: a loader worker that raises ends the run, with its traceback as message."""

    dataset: Dataset

    def __getitem__(self, key: SampleKey) -> Clip | _Failed | UserError:
        try:
            return self.dataset[key]
        except DataError as error:
            return key, str(error)
        except UserError as error:
            return error


_START = Place()


def iter_batches(
    dataset: Dataset,
    order: Order,
    slicing: Slicing,
    *,
    place: Place = _START,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """This process's micro-batches from ``place`` on, for ever, read ahead by ``num_workers`` worker processes.

    Raises:
        ShapeError: Clips of one batch differ in size.
    """
    loader = torch.utils.data.DataLoader(
        _Reading(dataset),
        batch_sampler=order.iter_micro_batches(slicing, place),
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # the loader seeds its workers from it; the global one is not its to use
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


@define
class UnreadableFiles:
    """The policy for clips that can't be read: skip, count and list them; too many of them stop the run."""

    listing: Path
    """``skipped.jsonl``."""
    num_samples: int
    limit: float
    """Share of the data's rows."""
    _rows: set[int] = field(factory=set)

    def record(self, batch: Batch) -> None:
        """List what ``batch`` lacks.

        Raises:
            DataError: More rows than allowed can't be read.
        """
        for key, reason in batch.failed:
            if key.index in self._rows:
                continue
            self._rows |= {int(str(record["row"])) for record in read_jsonl(self.listing)}  # of other processes too
            if key.index not in self._rows:
                self._rows.add(key.index)
                append_jsonl(self.listing, {"row": key.index, "epoch": key.epoch, "reason": reason})
                count = f"{len(self._rows)} of {self.num_samples} rows so far"
                log.warning("%s Skipped; %s, listed in %s", reason, count, self.listing)
        if batch.failed and len(self._rows) == self.num_samples:
            raise DataError(
                f"None of the {self.num_samples} rows can be read, listed in {self.listing}: {batch.failed[0][1]}"
            )
        allowed = math.ceil(self.limit * self.num_samples - 1e-9)  # 0.07 of 100 is 7, not the float's 7.000000000000001
        if len(self._rows) > allowed:
            raise DataError(
                f"{len(self._rows)} of {self.num_samples} rows can't be read, more than max_unreadable={self.limit:g} allows "
                f"({allowed}). They are listed in {self.listing}; mend or remove them, or raise max_unreadable."
            )
