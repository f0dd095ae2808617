"""Each sample is seen once an epoch, in an order that no batch size or process count changes; bad files have a policy."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import psutil
import pytest
import torch
from attrs import frozen
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora.core import Clip, DataError, MachineError, SampleKey, ShapeError
from opensora.core.loading import Batch, UnreadableFiles, iter_batches
from opensora.core.orders import BatchOrder, Place, SampleOrder, Slicing

# ---- order


@given(num_samples=st.integers(1, 60), seed=st.integers(0, 2**40), epochs=st.integers(1, 4))
def test_each_index_comes_once_an_epoch(num_samples: int, seed: int, epochs: int) -> None:
    order = SampleOrder(num_samples, seed)
    keys = [order.key(position) for position in range(num_samples * epochs)]
    assert Counter((key.epoch, key.index) for key in keys) == Counter(
        (epoch, index) for epoch in range(epochs) for index in range(num_samples)
    )
    assert [key.epoch for key in keys] == sorted(key.epoch for key in keys)
    assert {key.seed for key in keys} == {seed}


def indices(order: SampleOrder, epoch: int) -> list[int]:
    return [order.key(epoch * order.num_samples + offset).index for offset in range(order.num_samples)]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [indices(SampleOrder(50, seed), epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_a_position_means_the_same_however_one_got_there() -> None:
    forwards, backwards = SampleOrder(7, 3), SampleOrder(7, 3)
    positions = list(range(40))
    keys = [forwards.key(position) for position in positions]
    assert [backwards.key(position) for position in reversed(positions)] == keys[::-1]


@settings(max_examples=60)
@given(
    batch_size=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    world_size=st.integers(1, 3),
    num_samples=st.integers(1, 30),
    position=st.integers(0, 100),
)
def test_processes_and_micro_batches_share_out_each_step(
    batch_size: int, accumulation: int, world_size: int, num_samples: int, position: int
) -> None:
    order, steps = SampleOrder(num_samples, 5), 3
    dealt: list[list[SampleKey]] = [[] for _ in range(steps)]
    for rank in range(world_size):
        slicing = Slicing(batch_size=batch_size, accumulation=accumulation, world_size=world_size, rank=rank)
        micro_batches = order.iter_micro_batches(slicing, Place(samples=position))
        for step in range(steps):
            for micro_batch in islice(micro_batches, accumulation):
                assert len(micro_batch) == batch_size
                dealt[step] += micro_batch
    per_step = batch_size * accumulation * world_size
    assert slicing.samples_per_step == per_step
    for step, keys in enumerate(dealt):  # the same samples as one process with one large batch
        start = position + step * per_step
        expected = [order.key(start + offset) for offset in range(per_step)]
        assert sorted(keys, key=str) == sorted(expected, key=str)


# ---- reading


@frozen
class Squares:
    """A dataset whose clip of row i is full of i; some rows can't be read."""

    length: int = 20
    bad: frozenset[int] = frozenset()
    odd: frozenset[int] = frozenset()
    missing_library: bool = False

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, key: SampleKey) -> Clip:
        if self.missing_library:
            raise MachineError("Reading this needs a library: pip install it")
        if key.index in self.bad:
            raise DataError(f"clip_{key.index}.mp4 is cut short.")
        crop = torch.rand((), generator=key.generator("crop"))
        video = torch.full((3, 2, 4, 6 if key.index in self.odd else 4), float(key.index)) + crop
        return Clip(video=video, text=f"number {key.index}", fps=8 + key.index, key=key, path=f"clip_{key.index}.mp4")


def batches(
    dataset: Squares, count: int, *, position: int = 0, num_workers: int = 0, batch_size: int = 4
) -> list[Batch]:
    order = SampleOrder(len(dataset), 1)
    slicing = Slicing(batch_size=batch_size)
    endless = iter_batches(dataset, order, slicing, place=Place(samples=position), num_workers=num_workers)
    return list(islice(endless, count))


def assert_same(one: Batch, other: Batch) -> None:
    assert torch.equal(one.video, other.video)
    assert (list(one.texts), list(one.keys), list(one.paths)) == (
        list(other.texts),
        list(other.keys),
        list(other.paths),
    )
    assert list(one.failed) == list(other.failed)
    assert (one.conditioning.fps is None) == (other.conditioning.fps is None)
    if one.conditioning.fps is not None:
        assert torch.equal(one.conditioning.fps, other.conditioning.fps)


def test_a_batch_holds_its_clips_in_order() -> None:
    (batch,) = batches(Squares(), 1)
    order = SampleOrder(20, 1)
    assert list(batch.keys) == [order.key(position) for position in range(4)]
    assert batch.video.shape == (4, 3, 2, 4, 4)
    assert batch.video[:, 0, 0, 0, 0].floor().tolist() == [key.index for key in batch.keys]
    assert list(batch.texts) == [f"number {key.index}" for key in batch.keys]
    assert batch.conditioning.fps.tolist() == [8 + key.index for key in batch.keys]
    assert batch.conditioning.height.tolist() == [4] * 4
    assert batch.conditioning.num_frames.tolist() == [2] * 4
    assert batch.conditioning.aspect_ratio.tolist() == [1] * 4
    assert len(batch) == 4


def test_workers_change_nothing() -> None:
    dataset = Squares(bad=frozenset({3}))
    for alone, read_ahead in zip(batches(dataset, 9), batches(dataset, 9, num_workers=2), strict=True):
        assert_same(alone, read_ahead)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_at_a_position_gives_the_same_tail(num_workers: int) -> None:
    whole = batches(Squares(), 9)  # across epochs: 20 samples are 5 batches
    for batch, again in zip(whole[4:], batches(Squares(), 5, position=16, num_workers=num_workers), strict=True):
        assert_same(batch, again)


def test_the_batch_size_changes_neither_order_nor_clips() -> None:
    small, large = batches(Squares(), 8, batch_size=2), batches(Squares(), 2, batch_size=8)
    assert torch.equal(torch.cat([batch.video for batch in small]), torch.cat([batch.video for batch in large]))


def test_a_samples_draws_belong_to_its_key() -> None:
    (batch,) = batches(Squares(), 1)
    assert batch.draws(torch.device("cpu")).keys == batch.keys


def test_reading_leaves_the_global_random_numbers_alone() -> None:
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    batches(Squares(), 2)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_clips_that_can_not_be_read_are_handed_over_with_the_reason(num_workers: int) -> None:
    bad = frozenset(range(10))
    read = batches(Squares(bad=bad), 5, num_workers=num_workers)
    failed = {key.index: reason for batch in read for key, reason in batch.failed}
    assert failed == {index: f"clip_{index}.mp4 is cut short." for index in bad}
    assert sorted(key.index for batch in read for key in batch.keys) == list(range(10, 20))
    assert all(len(batch) + len(batch.failed) == 4 for batch in read)
    assert all(len(batch.video) == len(batch.conditioning) == len(batch) for batch in read)


def test_a_batch_of_which_nothing_can_be_read_is_empty() -> None:
    (batch,) = batches(Squares(bad=frozenset(range(20))), 1)
    assert len(batch) == 0
    assert len(batch.failed) == 4
    assert len(batch.conditioning) == 0


@pytest.mark.parametrize("num_workers", [0, 1])
def test_clips_of_different_sizes_are_an_error_that_names_them(num_workers: int) -> None:
    with pytest.raises(ShapeError) as caught:
        batches(Squares(odd=frozenset(range(1, 20, 2))), 5, num_workers=num_workers)
    message = str(caught.value)
    assert message.startswith("Clips of one batch must share frames, height and width; got ")
    assert "(2, 4, 6) of clip_" in message
    assert "(2, 4, 4) of clip_" in message
    assert "\n" not in message


@pytest.mark.parametrize("num_workers", [0, 1])
def test_other_errors_stop_the_run_in_their_own_words(num_workers: int) -> None:
    with pytest.raises(MachineError) as caught:
        batches(Squares(missing_library=True), 1, num_workers=num_workers)
    assert str(caught.value) == "Reading this needs a library: pip install it"


def test_workers_go_when_the_batches_do() -> None:
    def children() -> int:
        return len(psutil.Process().children())

    before = children()
    endless = iter_batches(Squares(), SampleOrder(20, 1), Slicing(batch_size=2), num_workers=2)
    next(endless)
    assert children() > before
    del endless
    assert children() == before


# ---- the policy for what can't be read


def failed_batch(*rows: int, epoch: int = 0) -> Batch:
    (empty,) = batches(Squares(bad=frozenset(range(20))), 1)
    keys = [(SampleKey(0, row, epoch), f"clip_{row}.mp4 is cut short.") for row in rows]
    return Batch(video=empty.video, texts=[], conditioning=empty.conditioning, keys=[], paths=[], failed=keys)


def test_unreadable_rows_are_listed_once_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    listing = tmp_path / "skipped.jsonl"
    policy = UnreadableFiles(listing, num_samples=100, limit=0.05)
    policy.record(failed_batch(7))
    policy.record(failed_batch(7, 8, epoch=1))
    policy.record(failed_batch())
    records = [json.loads(line) for line in listing.read_text().splitlines()]
    assert records == [
        {"row": 7, "epoch": 0, "reason": "clip_7.mp4 is cut short."},
        {"row": 8, "epoch": 1, "reason": "clip_8.mp4 is cut short."},
    ]
    assert f"clip_8.mp4 is cut short. Skipped; 2 of 100 rows so far, listed in {listing}" in caplog.text


def test_no_share_allows_that_nothing_can_be_read(tmp_path: Path) -> None:
    policy = UnreadableFiles(tmp_path / "skipped.jsonl", num_samples=3, limit=1.0)
    policy.record(failed_batch(0, 2))
    with pytest.raises(DataError, match=r"None of the 3 rows can be read.*skipped\.jsonl"):
        policy.record(failed_batch(1))


def test_processes_that_share_a_list_count_each_row_once(tmp_path: Path) -> None:
    policies = [UnreadableFiles(tmp_path / "skipped.jsonl", num_samples=100, limit=0.03) for _ in range(2)]
    policies[0].record(failed_batch(1, 2))
    policies[1].record(failed_batch(2, 3))
    assert [json.loads(line)["row"] for line in (tmp_path / "skipped.jsonl").read_text().splitlines()] == [1, 2, 3]
    with pytest.raises(DataError, match="4 of 100 rows"):
        policies[0].record(failed_batch(4))


def test_nothing_unreadable_leaves_no_list(tmp_path: Path) -> None:
    UnreadableFiles(tmp_path / "skipped.jsonl", num_samples=100, limit=0.0).record(failed_batch())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("num_samples", "limit", "allowed"), [(100, 0.0, 0), (100, 0.07, 7), (30, 0.1, 3), (10, 0.01, 1), (10, 0.75, 8)]
)
def test_more_than_the_allowed_share_stops_the_run(
    num_samples: int, limit: float, allowed: int, tmp_path: Path
) -> None:
    policy = UnreadableFiles(tmp_path / "skipped.jsonl", num_samples=num_samples, limit=limit)
    policy.record(failed_batch(*range(allowed)))
    with pytest.raises(DataError) as caught:
        policy.record(failed_batch(allowed))
    assert f"{allowed + 1} of {num_samples} rows can't be read, more than max_unreadable={limit:g} allows" in str(
        caught.value
    )
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == allowed + 1


class OwnBatches:
    """Epoch e has 3 + e batches of 1, 2, 3, ... rows."""

    def __len__(self) -> int:
        return 50

    def batches(self, seed: int, epoch: int) -> list[list[SampleKey]]:
        return [
            [SampleKey(seed, 10 * number + row, epoch, (1, 2, 2)) for row in range(number + 1)]
            for number in range(3 + epoch)
        ]


@given(world_size=st.integers(1, 4), accumulation=st.integers(1, 3), steps=st.integers(0, 5))
def test_own_batches_are_each_dealt_once_and_go_on_from_any_step(world_size, accumulation, steps):
    order = BatchOrder(OwnBatches(), 7)
    everything = [batch for epoch in range(20) for batch in OwnBatches().batches(7, epoch)]
    slicings = [
        Slicing(batch_size=1, accumulation=accumulation, world_size=world_size, rank=rank) for rank in range(world_size)
    ]
    place = Place()
    for _ in range(steps):
        place = order.after_step(slicings[0], place)
    seen = steps * accumulation * world_size
    assert place.samples == sum(len(batch) for batch in everything[:seen])
    dealt = [list(islice(order.iter_micro_batches(slicing, place), accumulation)) for slicing in slicings]
    in_turns = [dealt[rank][micro] for micro in range(accumulation) for rank in range(world_size)]
    assert in_turns == everything[seen : seen + accumulation * world_size]


def test_epochs_of_own_batches_are_counted():
    order = BatchOrder(OwnBatches(), 0)
    slicing = Slicing(batch_size=1)
    assert order.epochs(Place(epoch=2, batch=1)) == 2.2
    assert order.steps_left(slicing, Place(epoch=1, batch=3), epochs=3) == 5
    assert order.after_step(slicing, Place(epoch=0, batch=2)) == Place(samples=3, epoch=1, batch=0)


def test_no_batch_at_all_is_an_error():
    empty = OwnBatches()
    empty.batches = lambda seed, epoch: []
    with pytest.raises(DataError, match="None of the 50 rows falls into a bucket in epoch 0"):
        BatchOrder(empty, 0).of_epoch(0)
