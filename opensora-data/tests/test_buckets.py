"""Buckets against the published rule's vectors, and the batches made of them."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from opensora.core import ConfigError
from opensora.core.sizes import RESOLUTIONS
from opensora.data.buckets import Buckets, EpochBatches

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
