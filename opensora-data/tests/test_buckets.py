"""Buckets against the published rule's vectors, and the batches made of them."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from opensora.core import ConfigError
from opensora.core.orders import BatchOrder, Place, Slicing
from opensora.core.sizes import RESOLUTIONS
from opensora.data.buckets import Bucket, Buckets, EpochBatches

GOLDENS = Path(__file__).with_name("goldens")
VECTORS = json.loads(gzip.decompress((GOLDENS / "buckets.json.gz").read_bytes()))
PROBABILITIES = json.loads((GOLDENS / "bucket_probabilities.json").read_text(encoding="utf-8"))
SMALL = {"144p": {1: (1.0, 3), 16: (1.0, 2)}, "256": {16: ((0.5, 0.5), 4)}}


def assigned(buckets: Buckets, rows: list, *, frame_interval: int = 1, seed: int = 0, epoch: int = 0) -> list:
    columns = [np.array(column, np.int64) for column in zip(*rows, strict=True)]
    numbers = buckets.assign(*columns, frame_interval=frame_interval, seed=seed, epoch=epoch)
    return [None if number < 0 else buckets.buckets[number] for number in numbers]


@pytest.mark.parametrize(
    "case", [*VECTORS["configs"], {"name": "edge", **VECTORS["edge"]}], ids=lambda case: case["name"]
)
def test_rows_fall_into_the_buckets_of_the_vectors(case):
    buckets = Buckets.from_config(case["bucket_config"])
    for interval in {row[3] for row in case["rows"]}:
        rows = [row for row in case["rows"] if row[3] == interval]
        found = assigned(buckets, [row[:3] for row in rows], frame_interval=interval)
        for row, bucket in zip(rows, found, strict=True):
            expected = row[4] and tuple(row[4])
            assert (bucket and (bucket.resolution, bucket.num_frames, bucket.aspect)) == expected, row
            if bucket and len(row) > 5:
                assert list(bucket.size) == row[5]


def test_probabilities_are_those_of_the_vectors():
    trials = 20_000
    buckets = Buckets.from_config(PROBABILITIES["bucket_config"])
    for row in PROBABILITIES["rows"]:
        found = assigned(buckets, [[row["num_frames"], row["height"], row["width"]]] * trials)
        names = Counter(each and f"{each.resolution}/{each.num_frames}/{each.aspect}" for each in found)
        names.pop(None, None)
        assert names.keys() == row["frequencies"].keys()
        for name, expected in row["frequencies"].items():
            spread = expected * (1 - expected)
            tolerance = 4 * (spread / PROBABILITIES["trials"] + spread / trials) ** 0.5
            assert names[name] / trials == pytest.approx(expected, abs=tolerance), name


def table(num_rows: int = 500) -> list[list[int]]:
    generator = np.random.default_rng(0)
    frames = np.where(generator.random(num_rows) < 0.3, 1, generator.integers(2, 60, num_rows))
    return np.stack([frames, *generator.integers(100, 900, (2, num_rows))], axis=1).tolist()


def epoch_batches(buckets: Buckets, rows: list, *, seed: int = 0, epoch: int = 0) -> EpochBatches:
    columns = [np.array(column, np.int64) for column in zip(*rows, strict=True)]
    numbers = buckets.assign(*columns, frame_interval=1, seed=seed, epoch=epoch)
    return EpochBatches(numbers, buckets.buckets, seed=seed, epoch=epoch)


def test_each_assigned_row_is_in_one_batch_of_its_bucket():
    buckets, rows = Buckets.from_config(SMALL), table()
    batches = epoch_batches(buckets, rows, epoch=3)
    expected = {row: bucket for row, bucket in enumerate(assigned(buckets, rows, epoch=3)) if bucket}
    seen = {key.index: key for batch in batches for key in batch}
    assert seen.keys() == expected.keys()
    assert sum(map(len, batches)) == len(expected) == batches.num_samples
    for batch in batches:
        (bucket,) = {expected[key.index] for key in batch}
        assert {key.size for key in batch} == {bucket.size}
        assert {(key.seed, key.epoch) for key in batch} == {(0, 3)}
        assert 1 <= len(batch) <= bucket.batch_size
    full = Counter(len(batch) == expected[batch[0].index].batch_size for batch in batches)
    used = {(bucket.resolution, bucket.num_frames, bucket.aspect) for bucket in expected.values()}
    assert full[False] <= len(used)  # at most one smaller batch a bucket


def test_order_and_assignment_depend_on_seed_and_epoch_alone():
    buckets, rows = Buckets.from_config(SMALL), table()
    first = [list(batch) for batch in epoch_batches(buckets, rows, seed=1, epoch=2)]
    assert first == [list(batch) for batch in epoch_batches(buckets, rows, seed=1, epoch=2)]
    for seed, epoch in ((1, 3), (2, 2)):
        other = list(epoch_batches(buckets, rows, seed=seed, epoch=epoch))
        assert [[key.index for key in batch] for batch in other] != [[key.index for key in batch] for batch in first]


def test_a_rows_bucket_does_not_depend_on_the_other_rows():
    buckets, rows = Buckets.from_config(SMALL), table()
    assert assigned(buckets, rows)[:100] == assigned(buckets, rows[:100])


def test_buckets_in_use_are_those_that_clips_can_reach():
    config = {"240p": {1: (1.0, 2), 51: (0.0, None), 16: ((1.0, 0.0), 4)}}
    assert {bucket.num_frames for bucket in Buckets.from_config(config).in_use()} == {1}
    assert sum(1 for _ in Buckets.from_config(config).in_use()) == len(RESOLUTIONS["240p"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "bucket_config is empty"),
        ({"240": {1: (1.0, 1)}}, 'no resolution "240".*Did you mean'),
        ({"240p": {0: (1.0, 1)}}, r'bucket_config\["240p"\]: 0 is no number of frames'),
        ({"240p": {"2s": (1.0, 1)}}, "'2s' is no number of frames"),
        ({"240p": {51: 4}}, r'\["240p"\]\[51\] is 4; it must be \(probability, batch size\)'),
        ({"240p": {51: (1.5, 4)}}, "the probability is 1.5"),
        ({"240p": {51: ((0.5, 0.5, 0.5), 4)}}, "a number from 0 to 1, or two"),
        ({"240p": {51: (None, 4)}}, "the probability is None"),
        ({"240p": {51: (0.5, None)}}, "the batch size is None"),
        ({"240p": {51: (0.5, 0)}}, "the batch size is 0"),
    ],
)
def test_a_wrong_config_names_the_place(config, message):
    with pytest.raises(ConfigError, match=message):
        Buckets.from_config(config)


SAMPLERS = json.loads(gzip.decompress((GOLDENS / "samplers.json.gz").read_bytes()))


def published_items(case: dict) -> dict[int, tuple[int, ...]]:
    """{row: (T, H, W)} of all batches of a case."""
    items = [tuple(map(int, item.split("-"))) for rank in case["batches"] for batch in rank for item in batch]
    return {row: size for row, *size in items}


@pytest.mark.parametrize(
    "case", SAMPLERS["variable"], ids=lambda case: f"{case['world']}-{case['drop_last']}-{case['epoch']}"
)
def test_batches_have_the_published_samplers_shapes_and_each_row_once(case):
    """Permutations are our own; what is in a batch together, and at which size, is not."""
    buckets = Buckets.from_config(SAMPLERS["bucket_config"])
    published = published_items(case)
    batches = epoch_batches(buckets, SAMPLERS["rows"], seed=case["seed"], epoch=case["epoch"])
    sizes = {key.index: list(key.size) for batch in batches for key in batch}
    assert {row: sizes[row] for row in published} == published
    assert sum(map(len, batches)) == len(sizes)
    if not case["drop_last"]:
        lost = (
            sizes.keys() - published.keys()
        )  # by the published one, which pads a bucket with no more than its own rows
        small = [batch for batch in batches if 2 * len(batch) < bucket_of(buckets, batch).batch_size]
        assert lost <= {key.index for batch in small for key in batch}
    full = sum(len(batch) == bucket_of(buckets, batch).batch_size for batch in batches)
    assert full == SAMPLERS["approximate_num_batch"]


def bucket_of(buckets: Buckets, batch: list) -> Bucket:
    (found,) = {bucket for bucket in buckets.buckets if bucket.size == batch[0].size}
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_going_on_gives_the_batches_that_the_unbroken_run_had(world_size):
    """As the published sampler's state, a number of batches that all replicas have seen."""

    class Rows:
        def __len__(self) -> int:
            return len(SAMPLERS["rows"])

        def batches(self, seed: int, epoch: int) -> EpochBatches:
            buckets = Buckets.from_config(SAMPLERS["bucket_config"])
            return epoch_batches(buckets, SAMPLERS["rows"], seed=seed, epoch=epoch)

    state, steps = SAMPLERS["resume"]["state"], SAMPLERS["resume"]["after_steps"]
    for rank in range(world_size):
        slicing, place = Slicing(batch_size=1, world_size=world_size, rank=rank), Place(epoch=state["epoch"])
        unbroken = list(islice(BatchOrder(Rows(), state["seed"]).iter_micro_batches(slicing, place), steps + 3))
        for _ in range(steps):
            place = BatchOrder(Rows(), state["seed"]).after_step(slicing, place)
        assert place.batch == steps * world_size
        gone_on = BatchOrder(Rows(), state["seed"]).iter_micro_batches(slicing, place)
        assert list(islice(gone_on, 3)) == unbroken[steps:]


FAILURES = json.loads((GOLDENS / "bucket_failures.json").read_text(encoding="utf-8"))
BETTER = {
    "unknown_resolution": ({"999p": {1: (1.0, 1)}}, "no resolution"),
    "empty": ({}, "bucket_config is empty"),
    "tuple_prob_for_images": ({"144p": {1: ((1.0, 0.5), 1)}}, None),
    "list_prob": ({"144p": {16: ([1.0, 0.5], 1)}}, None),
    "no_seed": ({"144p": {16: (0.5, 1)}}, None),  # a seed is no option here
}


def test_what_the_published_sampler_fails_at_works_or_says_why():
    assert FAILURES.keys() == BETTER.keys()
    for config, message in BETTER.values():
        if message:
            with pytest.raises(ConfigError, match=message):
                Buckets.from_config(config)
        else:
            assert Buckets.from_config(config).buckets


def test_chunks_change_nothing(monkeypatch):
    buckets, rows = Buckets.from_config(SMALL), table(300)
    whole = assigned(buckets, rows)
    monkeypatch.setattr("opensora.data.buckets._CHUNK", 7)
    assert assigned(buckets, rows) == whole
