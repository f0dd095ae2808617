"""Batches of equal cost: who gets what, what waits, and that a run goes on with each row once whatever the processes."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from math import prod
from pathlib import Path

import numpy as np
import pytest
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora.core import DataError
from opensora.core.orders import BatchOrder, Place, Slicing, WaitingRows
from opensora.data.balancing import BalancedBatches, balanced_batches
from opensora.data.buckets import Buckets, EpochBatches

BUCKETS = Buckets.from_config(
    {"144p": {1: (1.0, 7), 16: (1.0, 4), 32: (0.8, 2)}, "240p": {1: (0.5, 5), 16: ((0.5, 0.7), 3)}}
)


class Rows:
    """Random rows, and their batches, without files."""

    def __init__(self, num_rows: int) -> None:
        generator = np.random.default_rng(num_rows)
        frames = np.where(generator.random(num_rows) < 0.4, 1, generator.integers(2, 60, num_rows))
        self.columns = (frames, *generator.integers(150, 900, (2, num_rows)))

    def __len__(self) -> int:
        return len(self.columns[0])

    def assigned(self, seed: int, epoch: int) -> np.ndarray:
        return BUCKETS.assign(*self.columns, frame_interval=1, seed=seed, epoch=epoch)

    def batches(self, seed: int, epoch: int) -> EpochBatches:
        return EpochBatches(self.assigned(seed, epoch), BUCKETS.buckets, seed=seed, epoch=epoch)

    def balanced_batches(self, seed: int, epoch: int, **options) -> BalancedBatches:
        return balanced_batches(self.assigned(seed, epoch), BUCKETS.buckets, seed=seed, epoch=epoch, **options)


@settings(max_examples=30, deadline=None)
@given(num_rows=st.integers(1, 1500), num_processes=st.integers(1, 9), epoch=st.integers(0, 3))
def test_processes_get_batches_of_one_cost_and_rows_are_used_once_or_wait(num_rows, num_processes, epoch):
    rows = Rows(num_rows)
    batches = rows.balanced_batches(5, epoch, num_processes=num_processes, cost=prod)
    assert len(batches) % num_processes == 0
    taken = list(batches)
    for first in range(0, len(taken), num_processes):
        group = taken[first : first + num_processes]
        assert len({len(batch) for batch in group}) == 1
        costs = [sum(prod(key.size) for key in batch) for batch in group]
        assert max(costs) <= 1.02 * np.mean(costs)
        assert len({key.size[0] for batch in group for key in batch}) == 1
    used = [key.index for batch in taken for key in batch]
    assigned = rows.assigned(5, epoch)
    bucketed = np.flatnonzero(assigned >= 0).tolist()
    assert sorted([*used, *batches.left_out.tolist()]) == bucketed
    for batch in taken:
        (size,) = {key.size for key in batch}
        assert all(BUCKETS.buckets[assigned[key.index]].size == size for key in batch)
    if num_processes == 1:
        assert not len(batches.left_out)


def test_most_batches_are_full_and_few_rows_wait():
    batches = Rows(20_000).balanced_batches(0, 0, num_processes=8, cost=prod)
    assert len(batches.left_out) < 0.005 * batches.num_samples
    sizes = {bucket.size: bucket.batch_size for bucket in BUCKETS.buckets}
    assert np.mean([len(batch) == sizes[batch[0].size] for batch in batches]) > 0.9


def test_costs_are_asked_for_whole_sizes_and_decide_who_matches():
    """Where each size costs something else, no two buckets match."""
    sizes = sorted({bucket.size for bucket in BUCKETS.buckets})
    batches = Rows(2000).balanced_batches(0, 0, num_processes=4, cost=lambda size: 2.0 ** sizes.index(size))
    groups = [list(islice(batches, first, first + 4)) for first in range(0, len(batches), 4)]
    assert all(len({batch[0].size for batch in group}) == 1 for group in groups)
    alike = Rows(2000).balanced_batches(0, 0, num_processes=4, cost=lambda size: 1.0)
    assert len(alike.left_out) < len(batches.left_out)


def test_the_order_depends_on_seed_epoch_and_processes_alone_and_other_rows_wait_next_time():
    rows = Rows(3000)

    def indices(seed: int, epoch: int, num_processes: int) -> list[list[int]]:
        batches = rows.balanced_batches(seed, epoch, num_processes=num_processes, cost=prod)
        return [[key.index for key in batch] for batch in batches]

    assert indices(1, 2, 4) == indices(1, 2, 4)
    assert len({str(indices(*key)) for key in ((1, 2, 4), (1, 3, 4), (2, 2, 4), (1, 2, 5))}) == 4
    waiting = [
        set(rows.balanced_batches(1, epoch, num_processes=16, cost=prod).left_out.tolist()) for epoch in range(2)
    ]
    assert all(waiting)
    assert len(waiting[0] & waiting[1]) < 0.5 * len(waiting[0])


@pytest.mark.parametrize(
    "changes", [[], [(4, 3), (2, 4), (4, 1), (3, 2)], [(1, 5), (6, 9)], [(5, 2)] * 3, [(6, 60), (1, 40)]]
)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_epoch_goes_on_with_each_row_once_on_any_number_of_processes(changes, accumulation):
    rows, place, seen = Rows(600), Place(), []

    def step(world_size: int) -> None:
        nonlocal place
        order = BatchOrder(rows, 3, cost=prod)  # anew at each step, as after a kill
        for rank in range(world_size):
            slicing = Slicing(batch_size=1, accumulation=accumulation, world_size=world_size, rank=rank)
            seen.extend(
                key for batch in islice(order.iter_micro_batches(slicing, place), accumulation) for key in batch
            )
        before = place
        place = order.after_step(slicing, place)
        place = Place(
            **json.loads(json.dumps({name: getattr(place, name) for name in Place.__slots__ if name[0] != "_"}))
        )
        assert order.epochs(before) < order.epochs(place)

    for world_size, steps in changes:
        for _ in range(steps):
            step(world_size)
    while place.epoch < 2:
        step(2)
    assert place.samples == len(seen)
    first = Counter(key.index for key in seen if key.epoch == 0)
    assert max(first.values()) == 1
    assert len(first) >= 0.9 * (rows.assigned(3, 0) >= 0).sum()  # a few wait


def test_steps_left_are_those_that_come():
    order, slicing = BatchOrder(Rows(600), 3, cost=prod), Slicing(batch_size=1, world_size=3)
    place, steps = Place(), 0
    assert order.steps_left(slicing, evolve(place, epoch=1), epochs=1) == 0
    expected = order.steps_left(slicing, place, epochs=1)
    while place.epoch < 1:
        place, steps = order.after_step(slicing, place), steps + 1
    assert steps == expected
    halfway = order.after_step(slicing, Place())
    more = Slicing(batch_size=1, world_size=4)
    assert order.steps_left(more, halfway, epochs=1) > 0


def test_rows_that_wait_are_listed_once_an_epoch(tmp_path: Path):
    rows = Rows(400)
    for _ in range(2):  # the second run is one that goes on
        listing = WaitingRows(tmp_path / "waiting.jsonl", len(rows))
        order = BatchOrder(rows, 0, cost=prod, left_out=listing.record)
        slicing = Slicing(batch_size=1, world_size=8)
        count = len(order.of_epoch(0, 8)) // 8
        list(islice(order.iter_micro_batches(slicing, Place()), count + 1))
    records = [json.loads(line) for line in (tmp_path / "waiting.jsonl").read_text().splitlines()]
    assert [(record["epoch"], record["processes"]) for record in records] == [(0, 8), (1, 8)]
    assert records[0]["rows"] == rows.balanced_batches(0, 0, num_processes=8, cost=prod).left_out.tolist()


def test_more_processes_than_any_bucket_has_rows_are_an_error():
    order = BatchOrder(Rows(30), 0, cost=prod)
    with pytest.raises(
        DataError, match=r"No bucket has a row for each of 500 processes in epoch 0, of 30 rows\. Use fewer"
    ):
        order.of_epoch(0, 500)


def test_balance_may_begin_within_an_epoch_with_each_row_once():
    rows, slicing = Rows(600), Slicing(batch_size=1, world_size=1)
    plain, place = BatchOrder(rows, 0), Place()
    seen = [key.index for batch in islice(plain.iter_micro_batches(slicing, place), 9) for key in batch]
    for _ in range(9):
        place = plain.after_step(slicing, place)
    order = BatchOrder(rows, 0, cost=prod)
    going_on = order.iter_micro_batches(slicing, place)
    while place.epoch == 0:
        seen += [key.index for key in next(going_on)]
        place = order.after_step(slicing, place)
        assert 0 < order.epochs(place) <= 1
    assert sorted(seen) == np.flatnonzero(rows.assigned(0, 0) >= 0).tolist()
    halfway = order.after_step(slicing, order.after_step(slicing, place))
    assert plain.after_step(slicing, halfway).epoch == 2  # and what ends within an epoch ends it
