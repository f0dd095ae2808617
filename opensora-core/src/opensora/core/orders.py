"""Which samples each step of a run sees.

The order of samples is a pure function of (seed, epoch). Epochs follow one another without a gap, so nothing is dropped
or repeated. Where all clips have one size, a batch may hold the last samples of one epoch and the first of the next, and the
place in the data is the count of samples that all processes have seen; it means the same whatever batch size and number of
processes. Where clips differ in size, the dataset makes the batches of each epoch, and the place is the count of those.
Balanced batches depend on the number of processes too: where that changes within an epoch, the rest of it is dealt out anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any, Protocol

import attrs
import torch
from attrs import define, field, frozen

from opensora.core.errors import DataError
from opensora.core.protocols import Size
from opensora.core.randomness import SampleKey, generator_for
from opensora.core.run_folder import append_jsonl, read_jsonl

__all__ = [
    "BalancesBatches",
    "BatchOrder",
    "Order",
    "OwnBatches",
    "Place",
    "SampleOrder",
    "Slicing",
    "WaitingRows",
]

log = logging.getLogger(__name__)

Begun = tuple[tuple[int, int], ...]
"""Parts of an epoch that are over: on how many processes each, and how many batches."""


def _as_begun(parts: Sequence[Sequence[int]]) -> Begun:
    """From JSON, which has lists alone."""
    return tuple((processes, batches) for processes, batches in parts)


@frozen(kw_only=True)
class Place:
    """Where a run stands in its data, all processes together."""

    samples: int = 0
    """Samples seen."""
    epoch: int = 0
    """Of the dataset's own batches: which epoch's come next."""
    batch: int = 0
    """Of the dataset's own batches: how many of that epoch's were seen."""
    processes: int = 0
    """Of balanced batches: on how many processes those were counted; 0 for others."""
    begun: Begun = field(default=(), converter=_as_begun)
    """Of balanced batches: parts of the epoch before, on how many processes each, and how many batches; 0 processes stand for
    batches that weren't balanced."""


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

    def mend(self, slicing: Slicing, epochs: int) -> str:
        """Why that many epochs from the start don't hold one step, and the smallest change by which they would."""
        ...


@define
class SampleOrder:
    """Endless shuffled order over ``num_samples`` samples, for clips of one size."""

    num_samples: int
    seed: int
    _epoch: int = -1
    _permutation: Sequence[int] | torch.Tensor = ()
    _permute: Callable[[int, int], Sequence[int] | torch.Tensor] | None = None
    """The order that a dataset wants its samples to be read in, by seed and epoch; None: any at random."""

    @classmethod
    def of(cls, dataset: Any, seed: int) -> SampleOrder:
        """The order over a dataset: its own, if it has one (see `Dataset`), or a random one."""
        return cls(len(dataset), seed, permute=getattr(dataset, "order", None))

    def without(self, rows: torch.Tensor) -> SampleOrder:
        """The same order with some rows, int64, taken out of it."""
        is_kept = torch.ones(self.num_samples, dtype=torch.bool)
        is_kept[rows] = False
        permute_all = self._permute or self._shuffle

        def permute(seed: int, epoch: int) -> torch.Tensor:
            permutation = torch.as_tensor(permute_all(seed, epoch))
            return permutation[is_kept[permutation]]

        return SampleOrder(self.num_samples - len(rows), self.seed, permute=permute)

    def key(self, position: int) -> SampleKey:
        """Which sample stands at ``position``, counted from 0 through all epochs."""
        epoch, offset = divmod(position, self.num_samples)
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, (self._permute or self._shuffle)(self.seed, epoch)
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

    def mend(self, slicing: Slicing, epochs: int) -> str:
        """See `Order`."""
        each = slicing.accumulation * slicing.world_size
        samples = epochs * self.num_samples
        ways = [f"set epochs = {-(-slicing.samples_per_step // self.num_samples)}"]
        if samples >= each:
            ways.insert(0, f"lower batch_size to {samples // each}")
        return (
            f"{epochs} epochs of {self.num_samples} samples don't fill one step of {slicing.samples_per_step}. "
            f"{' or '.join(ways).capitalize()}."
        )

    def _shuffle(self, seed: int, epoch: int) -> torch.Tensor:
        return torch.randperm(self.num_samples, generator=generator_for(seed, "order", epoch))


class OwnBatches(Protocol):
    """A dataset that makes its own batches, each of clips of one size: its keys have a ``size``."""

    def __len__(self) -> int: ...

    def batches(self, seed: int, epoch: int) -> Sequence[Sequence[SampleKey]]:
        """The batches of an epoch, a pure function of its arguments; each is one process's micro-batch."""
        ...


class BalancesBatches(OwnBatches, Protocol):
    """A dataset whose batches can be put in groups of nearly one cost."""

    def balanced_batches(
        self,
        seed: int,
        epoch: int,
        *,
        num_processes: int,
        cost: Callable[[Size], float],
        begun: Sequence[tuple[int, int]] = (),
    ) -> Sequence[Sequence[SampleKey]]:
        """The batches of an epoch, each ``num_processes`` in a row a group; a pure function of its arguments.

        What is returned has ``left_out``, the rows that have a bucket but are in no batch.

        Args:
            seed: Of the run.
            epoch: Counts from 0.
            num_processes: Batches of a group.
            cost: Of one clip of that size.
            begun: See `Place`: rows of those batches are over, and in none.
        """
        ...


@define
class BatchOrder:
    """Endless order over the batches that a dataset makes anew each epoch, for clips that differ in size."""

    dataset: Any
    """An `OwnBatches`; with ``cost`` a `BalancesBatches`."""
    seed: int
    cost: Callable[[Size], float] | None = None
    """Of one clip of that size: the batches of each micro-step are to cost the same. None: any batches."""
    left_out: Callable[[int, int, Sequence[int]], None] | None = None
    """Told, as an epoch begins: (epoch, processes, its rows that wait for the next one so that no process waits)."""
    _made: dict[tuple[int, int, Begun], Sequence[Sequence[SampleKey]]] = field(factory=dict)

    @property
    def num_samples(self) -> int:
        """Rows of the dataset, those included that are in no batch."""
        return len(self.dataset)

    def of_epoch(self, epoch: int, processes: int = 1, begun: Begun = ()) -> Sequence[Sequence[SampleKey]]:
        """The batches of one epoch, or what is left of it after parts that are over.

        Args:
            epoch: Counts from 0.
            processes: How many there are. Without ``cost`` nothing depends on it.
            begun: See `Place`.

        Raises:
            DataError: There are none.
        """
        key = (epoch, processes if self.cost else 0, begun)
        if key not in self._made:
            if self.cost is None:
                batches = self.dataset.batches(self.seed, epoch)
            else:
                options = {"num_processes": processes, "cost": self.cost, "begun": begun}
                batches = self.dataset.balanced_batches(self.seed, epoch, **options)
            if not len(batches) and not begun:
                raise DataError(self._why_none(epoch, processes))
            self._made = {old: made for old, made in self._made.items() if old[0] >= epoch - 1} | {key: batches}
        return self._made[key]

    def iter_micro_batches(self, slicing: Slicing, place: Place) -> Iterator[list[SampleKey]]:
        """See `Order`; batches are dealt to the processes in turns, and keep their own size."""
        batches = self._from(place, slicing.world_size, self.left_out)
        for _, batch in islice(batches, slicing.rank, None, slicing.world_size):
            yield list(batch)

    def after_step(self, slicing: Slicing, place: Place) -> Place:
        """See `Order`."""
        step = list(islice(self._from(place, slicing.world_size), slicing.accumulation * slicing.world_size))
        samples = place.samples + sum(len(batch) for _, batch in step)
        return attrs.evolve(step[-1][0], samples=samples)

    def epochs(self, place: Place) -> float:
        """See `Order`; batches that other numbers of processes took count as theirs."""
        seen = place.batch / max(1, len(self.of_epoch(place.epoch, place.processes or 1, place.begun)))
        for part, (processes, batches) in reversed(list(enumerate(place.begun))):
            whole = self.of_epoch(place.epoch, processes, place.begun[:part]) if processes else self._plain(place.epoch)
            share = batches / len(whole)
            seen = share + (1 - share) * seen
        return place.epoch + seen

    def steps_left(self, slicing: Slicing, place: Place, epochs: int) -> int:
        """See `Order`; each epoch counts like the present one."""
        place = self._on(place, slicing.world_size)
        here = len(self.of_epoch(place.epoch, slicing.world_size, place.begun)) - place.batch
        if epochs > place.epoch + 1:
            here += (epochs - place.epoch - 1) * len(self.of_epoch(place.epoch, slicing.world_size))
        return (here if epochs > place.epoch else 0) // (slicing.accumulation * slicing.world_size)

    def mend(self, slicing: Slicing, epochs: int) -> str:
        """See `Order`."""
        batches, step = epochs * len(self.of_epoch(0, slicing.world_size)), slicing.accumulation * slicing.world_size
        ways = [f"set epochs = {-(-step * epochs // batches)}"]
        if batches >= slicing.world_size:
            ways.insert(0, f"lower accumulation_steps to {batches // slicing.world_size}")
        elif slicing.world_size > 1:
            ways.insert(0, f"use {batches} processes")
        return (
            f"{epochs} epochs of {self.num_samples} rows give {batches} batches; a step takes {step} ({slicing.accumulation} "
            f"on each of {slicing.world_size} processes). {' or '.join(ways).capitalize()}, or lower the batch sizes of "
            "bucket_config."
        )

    def _why_none(self, epoch: int, processes: int) -> str:
        if self.cost is not None and len(self._plain(epoch)):
            return (
                f"No bucket has a row for each of {processes} processes in epoch {epoch}, of {self.num_samples} rows. "
                "Use fewer processes or buckets, or leave out balance."
            )
        return (
            f"None of the {self.num_samples} rows falls into a bucket in epoch {epoch}: they are smaller or shorter "
            "than bucket_config asks for, or its probabilities leave them out. Add a smaller size or length."
        )

    def _plain(self, epoch: int) -> Sequence[Sequence[SampleKey]]:
        """An epoch's batches without balance."""
        batches: Sequence[Sequence[SampleKey]] = self.dataset.batches(self.seed, epoch)
        return batches

    def _on(self, place: Place, processes: int) -> Place:
        """The place as that many processes count it: an epoch that others began goes on as a new part.

        Without balance now, but with it before, the next epoch begins: there is no telling what the rest of this one is.
        """
        if self.cost is None:
            return Place(samples=place.samples, epoch=place.epoch + (place.batch > 0)) if place.processes else place
        if place.processes == processes:
            return place
        begun = (*place.begun, (place.processes, place.batch)) if place.batch else place.begun
        return attrs.evolve(place, processes=processes, begun=begun, batch=0)

    def _from(
        self, place: Place, processes: int, left_out: Callable[[int, int, Sequence[int]], None] | None = None
    ) -> Iterator[tuple[Place, Sequence[SampleKey]]]:
        """Batches from ``place`` on, each with the place after it."""
        place = self._on(place, processes)
        for epoch in count(place.epoch):
            begun, first = (place.begun, place.batch) if epoch == place.epoch else ((), 0)
            batches = self.of_epoch(epoch, processes, begun)
            if left_out and len(rows := getattr(batches, "left_out", ())):
                left_out(epoch, processes, rows)
            here = Place(epoch=epoch, processes=place.processes, begun=begun)
            for index in range(first, len(batches)):
                is_last = index + 1 == len(batches)
                after = (
                    Place(epoch=epoch + 1, processes=place.processes)
                    if is_last
                    else attrs.evolve(here, batch=index + 1)
                )
                yield after, batches[index]


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


@define
class WaitingRows:
    """Lists the rows that balanced batches leave out of an epoch: one record an epoch, in ``waiting.jsonl``."""

    listing: Path
    num_samples: int

    def record(self, epoch: int, num_processes: int, rows: Sequence[int]) -> None:
        """List them, unless a run that was killed did."""
        record = {"epoch": epoch, "processes": num_processes, "rows": [int(row) for row in rows]}
        if record in read_jsonl(self.listing):
            return
        append_jsonl(self.listing, record)
        log.info(
            "Epoch %d: %d of %d rows wait for the next one, so that %d processes have equal work; listed in %s",
            epoch,
            len(rows),
            self.num_samples,
            num_processes,
            self.listing,
        )
