"""Batches in groups of equal cost, one for each process, so that in no step one waits for another.

The batches of a group have one batch size, one resolution and one number of frames, and mostly one bucket. What is left of
buckets is matched across the aspect ratios of a resolution and length, whose costs differ by what rounding to their sizes
makes of it. Rows that match nothing wait for the next epoch, which shuffles them anew: `BalancedBatches.left_out` has them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from attrs import define, field

from opensora.core.protocols import Size
from opensora.core.randomness import seed_for
from opensora.data.bucket_odds import NO_BUCKET, Integers
from opensora.data.buckets import Bucket, EpochBatches, shuffle_within_buckets

__all__ = ["TOLERANCE", "BalancedBatches", "balanced_batches"]

TOLERANCE = 0.02
"""The costliest batch of a group is at most this much above their mean."""


class BalancedBatches(EpochBatches):
    """The batches of one epoch, each ``num_processes`` in a row of nearly one cost: a group, the micro-batches of a step."""

    left_out: npt.NDArray[np.int32]
    """Rows that have a bucket and are in no batch, ascending."""

    def __init__(
        self,
        assigned: npt.NDArray[np.int32],
        buckets: Sequence[Bucket],
        *,
        seed: int,
        epoch: int,
        num_processes: int,
        cost: Callable[[Size], float],
        part: int = 0,
    ) -> None:
        """Match batches; a pure function of the arguments.

        Args:
            assigned: What `Buckets.assign` returns.
            buckets: Of the config.
            seed: Of the run.
            epoch: Counts from 0.
            num_processes: Batches of a group.
            cost: Of one clip of that size, in any unit.
            part: How many parts of the epoch were before.
        """
        self._buckets, self._seed, self._epoch = buckets, seed, epoch
        generator = np.random.default_rng(seed_for("balanced batches", seed, epoch, num_processes, part))
        self._rows, counts = shuffle_within_buckets(assigned, len(buckets), generator)
        first = np.cumsum(counts) - counts
        groups = _Groups.deal(counts, buckets, num_processes, cost)
        rests = [
            self._rows[first[each] + counts[each] - groups.left[each] : first[each] + counts[each]]
            for each in np.flatnonzero(groups.left)
        ]
        self.left_out = np.sort(np.concatenate([np.empty(0, np.int32), *rests]))
        order = generator.permutation(groups.num_groups)
        shuffled = generator.permuted(np.arange(groups.num_groups * num_processes).reshape(-1, num_processes), axis=1)
        bucket_of, sizes, start = groups.batches(first)
        chosen = shuffled[order].ravel()
        self._bucket_of, self._start, self._stop = bucket_of[chosen], start[chosen], (start + sizes)[chosen]


def balanced_batches(
    assigned: npt.NDArray[np.int32],
    buckets: Sequence[Bucket],
    *,
    seed: int,
    epoch: int,
    num_processes: int,
    cost: Callable[[Size], float],
    begun: Sequence[tuple[int, int]] = (),
) -> BalancedBatches:
    """The batches of an epoch, or of what remains of one that other numbers of processes began.

    Args:
        assigned: What `Buckets.assign` returns.
        buckets: Of the config.
        seed: Of the run.
        epoch: Counts from 0.
        num_processes: Batches of a group.
        cost: Of one clip of that size, in any unit.
        begun: The parts of the epoch that are over: on how many processes, and how many batches. 0 processes: as
            `EpochBatches` has them, not balanced.
    """
    for part, (processes, batches) in enumerate(begun):
        over = (
            BalancedBatches(assigned, buckets, seed=seed, epoch=epoch, num_processes=processes, cost=cost, part=part)
            if processes
            else EpochBatches(assigned, buckets, seed=seed, epoch=epoch)
        )
        assigned = assigned.copy()
        assigned[over.rows_before(batches)] = NO_BUCKET
    return BalancedBatches(
        assigned, buckets, seed=seed, epoch=epoch, num_processes=num_processes, cost=cost, part=len(begun)
    )


@define
class _Groups:
    """Groups of batches, and how many rows of each bucket are in none yet."""

    num_processes: int
    left: Integers
    """[buckets]."""
    costs: npt.NDArray[np.float64]
    """Of one row of each bucket."""
    _buckets: list[Integers] = field(factory=list)
    """Each [groups, num_processes]."""
    _sizes: list[Integers] = field(factory=list)
    """Each [groups]: rows of a batch."""

    @classmethod
    def deal(
        cls, counts: Integers, buckets: Sequence[Bucket], num_processes: int, cost: Callable[[Size], float]
    ) -> _Groups:
        """Groups of as many rows as can be."""
        used = np.flatnonzero(counts)
        costs = np.zeros(len(buckets))
        costs[used] = [cost(buckets[bucket].size) for bucket in used.tolist()]
        groups = cls(num_processes, counts.copy(), costs)
        sizes = np.array([bucket.batch_size for bucket in buckets])
        pools = _pools(buckets, used)
        groups.add_alike(sizes)
        for pool in pools:
            groups.add_matches(pool, int(sizes[pool[0]]))
        groups.add_alike(groups.left // num_processes)
        for pool in pools:
            size = int(groups.left[pool].sum()) // num_processes
            while size:
                groups.add_matches(pool, size)
                size //= 2
        return groups

    def add_alike(self, sizes: Integers) -> None:
        """Groups of one bucket each, whose batches have ``sizes`` [buckets] rows."""
        numbers = self.left // np.maximum(1, sizes * self.num_processes) * (sizes > 0)
        bucket_of = np.repeat(np.arange(len(sizes)), numbers)
        self._add(np.repeat(bucket_of[:, None], self.num_processes, axis=1), sizes[bucket_of])

    def add_matches(self, pool: Integers, size: int) -> None:
        """Groups across the buckets of a pool, whose batches have ``size`` rows and cost nearly the same."""
        number = self.num_processes
        pool = pool[np.argsort(-self.costs[pool], kind="stable")]
        candidates = np.repeat(pool, self.left[pool] // size)
        totals = np.concatenate([[0.0], np.cumsum(self.costs[candidates])])
        means = (totals[number:] - totals[:-number]) / number
        fits = np.flatnonzero(self.costs[candidates[: len(means)]] <= (1 + TOLERANCE) * means)
        starts, free = [], 0
        while (index := int(np.searchsorted(fits, free))) < len(fits):
            starts.append(fits[index])
            free = fits[index] + number
        if starts:
            self._add(candidates[np.array(starts)[:, None] + np.arange(number)], np.full(len(starts), size))

    def _add(self, groups: Integers, sizes: Integers) -> None:
        self._buckets.append(groups)
        self._sizes.append(sizes)
        taken = np.bincount(
            groups.ravel(), np.repeat(sizes, self.num_processes).astype(np.float64), minlength=len(self.left)
        )
        self.left = self.left - taken.astype(np.int64)

    @property
    def num_groups(self) -> int:
        """How many there are."""
        return sum(map(len, self._sizes))

    def batches(self, first: Integers) -> tuple[Integers, Integers, Integers]:
        """Bucket, rows and first row of each batch, group after group.

        Args:
            first: The first row of each bucket.
        """
        bucket_of = np.concatenate([groups.ravel() for groups in self._buckets])
        sizes = np.repeat(np.concatenate(self._sizes), self.num_processes)
        order = np.argsort(bucket_of, kind="stable")  # each bucket's batches follow one another in its rows
        ends = np.cumsum(sizes[order])
        begins = ends - sizes[order]
        of_bucket = bucket_of[order]
        is_first = np.concatenate([[True], of_bucket[1:] != of_bucket[:-1]])[: len(order)]
        origins = begins[is_first][np.cumsum(is_first) - 1]
        start = np.empty_like(begins)
        start[order] = first[of_bucket] + begins - origins
        return bucket_of, sizes, start


def _pools(buckets: Sequence[Bucket], used: Integers) -> list[Integers]:
    """Buckets of one resolution and length each."""
    pools: dict[tuple[str, int], list[int]] = {}
    for bucket in used.tolist():
        pools.setdefault((buckets[bucket].resolution, buckets[bucket].num_frames), []).append(bucket)
    return [np.array(pool) for pool in pools.values()]
