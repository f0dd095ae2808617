"""Which samples a step sees, and how they are read.

The order of samples is a pure function of (seed, epoch). Epochs follow one another without a gap, so nothing is dropped
or repeated. Where all clips have one size, a batch may hold the last samples of one epoch and the first of the next, and the
place in the data is the count of samples that all processes have seen; it means the same whatever batch size and number of
processes. Where clips differ in size, the dataset makes the batches of each epoch, and the place is the count of those.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any, Protocol

import attrs
import torch
from attrs import define, field, frozen

from opensora.core.conditioning import Conditioning
from opensora.core.errors import DataError, ShapeError, UserError
from opensora.core.machine import die_with_parent
from opensora.core.protocols import IMAGE_FPS, Clip, ClipFeatures, Dataset, Size, batch_conditioning
from opensora.core.randomness import SampleDraws, SampleKey, generator_for
from opensora.core.run_folder import append_jsonl, read_jsonl

__all__ = [
    "BalancesBatches",
    "Batch",
    "BatchOrder",
    "LeavesOut",
    "Order",
    "OwnBatches",
    "Place",
    "SampleOrder",
    "Slicing",
    "UnreadableFiles",
    "WaitingRows",
    "iter_batches",
    "stand_in",
]

log = logging.getLogger(__name__)

Begun = tuple[tuple[int, int], ...]
"""Parts of an epoch that are over: on how many processes each, and how many batches."""

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
    processes: int = 0
    """Of balanced batches: on how many processes those were counted; 0 for others."""
    begun: Begun = field(default=(), converter=lambda parts: tuple(map(tuple, parts)))
    """Of balanced batches: parts of the epoch before, on how many processes each, and how many batches."""


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


class LeavesOut(Protocol):
    """Batches of which some rows wait for the next epoch."""

    left_out: Sequence[int]
    """Those rows, which have a bucket but are in no batch."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sequence[SampleKey]: ...


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
    ) -> LeavesOut:
        """The batches of an epoch, each ``num_processes`` in a row a group; a pure function of its arguments.

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
    left_out: Callable[[int, int, Sequence[int]], None] = lambda epoch, num_processes, rows: None
    """Told, as an epoch begins, which of its rows wait for the next one, so that no process waits."""
    _made: dict[tuple[int, int, Begun], Sequence[Sequence[SampleKey]] | LeavesOut] = field(factory=dict)

    @property
    def num_samples(self) -> int:
        """Rows of the dataset, those included that are in no batch."""
        return len(self.dataset)

    def of_epoch(self, epoch: int, processes: int = 1, begun: Begun = ()) -> Sequence[Sequence[SampleKey]] | LeavesOut:
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
        for processes, batches in reversed(place.begun):
            share = batches / len(self.of_epoch(place.epoch, processes))
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
        if self.cost is not None and len(self.dataset.batches(self.seed, epoch)):
            return (
                f"No bucket has a row for each of {processes} processes in epoch {epoch}, of {self.num_samples} rows. "
                "Use fewer processes or buckets, or leave out balance."
            )
        return (
            f"None of the {self.num_samples} rows falls into a bucket in epoch {epoch}: they are smaller or shorter "
            "than bucket_config asks for, or its probabilities leave them out. Add a smaller size or length."
        )

    def _on(self, place: Place, processes: int) -> Place:
        """The place as that many processes count it: an epoch that others began goes on as a new part."""
        if self.cost is None or place.processes == processes:
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


@frozen(kw_only=True, eq=False)
class Batch:
    """What the loader hands over: the clips that could be read, stacked, and what could not."""

    video: torch.Tensor
    """[B, 3, T, H, W] in [-1, 1]; with ``features``, of those clips alone whose moments aren't there."""
    texts: Sequence[str]
    conditioning: Conditioning
    """Sizes and rates, no text yet."""
    keys: Sequence[SampleKey]
    paths: Sequence[str]
    failed: Sequence[_Failed] = ()
    """Samples that could not be read, with the reason."""
    features: Sequence[ClipFeatures] = ()
    """One a sample, if the run uses features; those that all samples have are stacked in the next two instead."""
    moments: Mapping[str, torch.Tensor] | None = None
    """`ClipFeatures.moments` of all samples, each [B, ...]."""
    text: Conditioning | None = None
    """`ClipFeatures.text` of all samples."""

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
        if self.moments is not None:
            moments = {name: tensor.pin_memory() for name, tensor in self.moments.items()}
            object.__setattr__(self, "moments", moments)
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
    videos = [clip.video for clip in clips if clip.video.numel()]
    return Batch(
        video=torch.stack(videos) if videos else torch.empty(0),
        texts=[clip.text for clip in clips],
        conditioning=batch_conditioning(clips) if clips else Conditioning(),
        keys=[clip.key for clip in clips],
        paths=[clip.path for clip in clips],
        failed=[item for item in items if isinstance(item, tuple)],
        **_stack_features([clip.features for clip in clips if clip.features is not None]),
    )


def _stack_features(features: Sequence[ClipFeatures]) -> dict[str, Any]:
    """The fields of a `Batch` about features. Few large tensors come out of a loader worker faster than many small ones."""
    stacked: dict[str, Any] = {}
    moments = [each.moments for each in features if each.moments is not None]
    if moments and len(moments) == len(features):
        stacked["moments"] = {name: torch.stack([each[name] for each in moments]) for name in moments[0]}
        features = [attrs.evolve(each, moments=None) for each in features]
    texts = [each.text for each in features if each.text is not None]
    if texts and len(texts) == len(features):
        stacked["text"] = Conditioning.cat(texts)
        features = [attrs.evolve(each, text=None) for each in features]
    return {"features": features, **stacked}


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


def _start_worker(_: int) -> None:
    """Torch's own check whether the training process lives is made between samples: not by a worker that hangs in one."""
    die_with_parent()


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
        worker_init_fn=_start_worker,
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
    lists: bool = True
    """Whether this process writes the listing of its samples. One does of those that share them."""
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
                if not self.lists:
                    continue
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
            *(epoch, len(rows), self.num_samples, num_processes, self.listing),
        )
