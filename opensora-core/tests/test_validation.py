"""The loss on fixed clips: the same clips, noise and timesteps each time, on any number of processes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from opensora.core import ConfigError, DataError
from opensora.core.accelerator import Accelerator, SingleSpec
from opensora.core.conditioning import Conditioning
from opensora.core.config.structure import structure
from opensora.core.loading import Batch
from opensora.core.orders import Place, SampleOrder, Slicing
from opensora.core.pipelines.train_spec import ValidationSpec
from opensora.core.protocols import Clip
from opensora.core.randomness import SampleDraws, SampleKey
from opensora.core.validation import (
    FixedClips,
    Losses,
    choose_clips,
    held_out_rows,
    inner_timesteps,
    iter_fixed,
    measure,
    scalars,
)


class Rows:
    """Clips of one size; some can't be read."""

    def __init__(self, count: int, broken: Sequence[int] = ()) -> None:
        self.count, self.broken = count, broken

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: SampleKey) -> Clip:
        if key.index in self.broken:
            raise DataError(f"row {key.index} is broken.")
        return Clip(video=torch.full((3, *(key.size or (1, 2, 2))), key.index / 10), text="", fps=8, key=key)


class Buckets(Rows):
    """Clips of three sizes, many of the first."""

    def batches(self, seed: int, epoch: int) -> list[list[SampleKey]]:
        sizes = [(1, 2, 2)] * 8 + [(2, 2, 2)] * 2 + [(1, 4, 2)]
        return [[SampleKey(seed, 3 * at + row, size=size) for row in range(3)] for at, size in enumerate(sizes)]


class Noisy:
    """A loss that shows its draws, its timestep, and the clip."""

    num_timesteps = 1000

    def loss(
        self, denoiser: object, latents: Tensor, conditioning: Conditioning, *, draws: SampleDraws, timestep: Tensor
    ) -> Tensor:
        assert conditioning.dropped is None
        noise = draws.normal("noise", (4,)).mean(dim=1)
        return latents.mean(dim=(1, 2, 3, 4)) + 0.001 * timestep + 0.1 * noise


class Share(Accelerator):
    """One of several processes, alone: sums and gathers see nothing of the others."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__(SingleSpec(), device="cpu")
        self.rank, self.world_size = rank, world_size

    def mean(self, value: Tensor) -> Tensor:
        return value / self.world_size


def encode(batch: Batch) -> tuple[Tensor, Conditioning]:
    return batch.video, batch.conditioning.replace(dropped=torch.ones(len(batch.video), dtype=torch.bool))


def losses(dataset: Rows, clips: FixedClips, *, rank: int = 0, world_size: int = 1) -> Losses:
    accelerator = Share(rank, world_size)
    batches = iter_fixed(dataset, clips, encode, accelerator=accelerator, size=(1, 2, 2))
    return measure(
        Noisy(),
        lambda *_: None,
        batches,
        timesteps=inner_timesteps(3, 1000),
        num_clips=clips.num_clips,
        accelerator=accelerator,
    )


def test_timesteps_are_strictly_inside() -> None:
    assert inner_timesteps(3, 1000) == [250, 500, 750]
    assert inner_timesteps(10, 1000) == pytest.approx(torch.linspace(0, 1000, 12)[1:-1].tolist())


def test_the_same_clips_meet_the_same_noise_each_time() -> None:
    dataset = Rows(50)
    clips = choose_clips(dataset, num_clips=7, batch_size=3, seed=5)
    assert clips == choose_clips(dataset, num_clips=7, batch_size=3, seed=5)
    assert clips != choose_clips(dataset, num_clips=7, batch_size=3, seed=6)
    assert [len(batch) for batch in clips.batches] == [3, 3, 1]
    first, again = losses(dataset, clips), losses(dataset, clips)
    assert torch.equal(first.values, again.values)
    assert first.values.shape == (7, 3)
    noise = first.values - torch.tensor([[0.25, 0.5, 0.75]])
    assert (noise[:, 0] - noise[:, 1]).abs().min() > 1e-6, "each timestep has noise of its own"


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_processes_share_the_clips_and_call_equally_often(world_size: int) -> None:
    dataset = Rows(50, broken=[4, 11])
    clips = choose_clips(dataset, num_clips=20, batch_size=2, seed=1)
    alone = losses(dataset, clips)
    calls = []
    shares = torch.zeros(20, 3, dtype=torch.float64)
    rows = [key.index for batch in clips.batches for key in batch]
    read = [row for row in range(20) if rows[row] not in dataset.broken]
    for rank in range(world_size):
        accelerator = Share(rank, world_size)
        batches = list(iter_fixed(dataset, clips, encode, accelerator=accelerator, size=(1, 2, 2)))
        calls.append(len(batches))
        own = [row for batch in batches for row in batch.rows]
        found = losses(dataset, clips, rank=rank, world_size=world_size)
        shares[sorted(own)] += found.values
    assert len(set(calls)) == 1
    assert torch.equal(shares[read], alone.values)


def test_a_clip_that_cannot_be_read_is_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    dataset = Rows(4, broken=[2])
    clips = choose_clips(dataset, num_clips=4, batch_size=1, seed=0)
    assert len(losses(dataset, clips).values) == 3
    assert "row 2 is broken. It is left out of the validation." in caplog.text
    with pytest.raises(DataError, match="None of the clips"):
        losses(Rows(2, broken=[0, 1]), choose_clips(Rows(2), num_clips=4, batch_size=1, seed=0))


def test_each_size_has_its_share() -> None:
    dataset = Buckets(33)
    clips = choose_clips(dataset, num_clips=6, batch_size=1, seed=0)
    sizes = [key.size for batch in clips.batches for key in batch]
    assert sorted(sizes) == sorted([(1, 2, 2)] * 2 + [(2, 2, 2)] * 2 + [(1, 4, 2)] * 2)
    record = losses(dataset, clips).record()
    assert set(record["by_bucket"]) == {"1x2x2", "2x2x2", "1x4x2"}
    assert record["loss"] == pytest.approx(sum(record["by_bucket"].values()) / 3)


def test_means_by_timestep_and_by_bucket() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [10.0, 20.0]], dtype=torch.float64)
    record = Losses(values=values, timesteps=[250.0, 500.0], buckets=["a", "a", "b"]).record()
    assert record["by_bucket"] == {"a": 2.5, "b": 15.0}
    assert record["by_timestep"] == {"250.0": pytest.approx(14 / 3), "500.0": pytest.approx(26 / 3)}
    assert record["by_bucket_and_timestep"]["a"] == {"250.0": 2.0, "500.0": 3.0}
    assert scalars({"step": 3, **record}) == {
        "validation/loss": pytest.approx(40 / 6),
        "validation/timestep 250.0": pytest.approx(14 / 3),
        "validation/timestep 500.0": pytest.approx(26 / 3),
        "validation/bucket a": 2.5,
        "validation/bucket b": 15.0,
    }


def test_rows_that_are_held_out_are_not_trained_on() -> None:
    rows = held_out_rows(100, 0.07, seed=3)
    assert len(rows) == 7
    order = SampleOrder(100, seed=1).without(rows)
    assert order.num_samples == 93
    batches = order.iter_micro_batches(Slicing(batch_size=31), Place())
    epoch = [key.index for _ in range(3) for key in next(batches)]
    assert sorted(epoch) == sorted(set(range(100)) - set(rows.tolist()))
    chosen = choose_clips(Rows(100), num_clips=50, batch_size=4, seed=0, rows=rows)
    assert sorted(key.index for batch in chosen.batches for key in batch) == sorted(rows.tolist())
    assert len(held_out_rows(5, 0.001, seed=0)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "validation needs clips"),
        ({"held_out": 0.1, "data": {"type": "x"}}, "validation needs clips"),
        ({"held_out": 1.0}, "held_out"),
        ({"held_out": 0.1, "every": 0}, "every"),
        ({"held_out": 0.1, "num_timestep": 5}, "num_timesteps"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        structure(ValidationSpec, options)
