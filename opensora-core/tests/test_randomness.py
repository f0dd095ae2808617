"""Draws belong to a sample: nothing else that happens changes them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from opensora.core import SampleDraws, SampleKey
from opensora.core.randomness import generator_for

KEYS = [SampleKey(7, index, epoch) for epoch in (0, 1) for index in (5, 3, 11)]


def draw_all(draws: SampleDraws) -> dict[str, torch.Tensor]:
    return {
        "normal": draws.normal("noise", (2, 17)),
        "small normal": draws.normal("noise", (3,)),
        "uniform": draws.uniform("timestep"),
        "uniform table": draws.uniform("timestep", [2, 3]),
        "integers": draws.integers("index", 1000),
        "integer table": draws.integers("index", 1000, torch.Size([4])),
    }


def test_a_sample_draws_the_same_whatever_the_batch() -> None:
    whole = draw_all(SampleDraws(KEYS))
    for row, key in enumerate(KEYS):
        alone = draw_all(SampleDraws([key]))
        assert all(torch.equal(alone[name][0], whole[name][row]) for name in whole)
    backwards = draw_all(SampleDraws(KEYS[::-1]))
    assert all(torch.equal(backwards[name].flip(0), whole[name]) for name in whole)


def test_asking_twice_gives_the_same() -> None:
    draws = SampleDraws(KEYS)
    assert torch.equal(draws.normal("noise", (5,)), draws.normal("noise", (5,)))


def test_shapes_and_types_are_as_announced() -> None:
    drawn = draw_all(SampleDraws(KEYS))
    shapes = {name: list(tensor.shape) for name, tensor in drawn.items()}
    assert shapes == {
        "normal": [6, 2, 17],
        "small normal": [6, 3],
        "uniform": [6],
        "uniform table": [6, 2, 3],
        "integers": [6],
        "integer table": [6, 4],
    }
    assert {name: tensor.dtype for name, tensor in drawn.items() if "integer" in name} == {
        "integers": torch.int64,
        "integer table": torch.int64,
    }
    assert {drawn[name].dtype for name in drawn if "integer" not in name} == {torch.float32}
    assert SampleDraws(KEYS).normal("one number", ()).shape == (6,)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (SampleKey(1, 2, 3), "other"),
        (SampleKey(0, 2, 3), "noise"),
        (SampleKey(1, 0, 3), "noise"),
        (SampleKey(1, 2, 0), "noise"),
        (SampleKey(2, 1, 3), "noise"),
        (SampleKey(12, 3), "noise"),
    ],
    ids=["name", "seed", "index", "epoch", "seed and index swapped", "digits elsewhere"],
)
def test_another_key_draws_otherwise(key: SampleKey, name: str) -> None:
    ours = SampleDraws([SampleKey(1, 2, 3)]).normal("noise", (64,))
    theirs = SampleDraws([key]).normal(name, (64,))
    assert abs(float(torch.corrcoef(torch.cat([ours, theirs]))[0, 1])) < 0.5


def test_draws_of_neighbours_are_independent_and_well_distributed() -> None:
    keys = [SampleKey(0, index) for index in range(4000)]
    normal = SampleDraws(keys).normal("noise", ())
    assert abs(float(normal.mean())) < 0.05
    assert abs(float(normal.std()) - 1) < 0.05
    assert abs(float((normal[1:] * normal[:-1]).mean())) < 0.05
    uniform = SampleDraws(keys).uniform("timestep")
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert (uniform.sort().values - torch.linspace(0, 1, 4000)).abs().max() < 0.03


def test_values_of_one_key_stay_what_they_are() -> None:
    """Runs resume and videos repeat only while these numbers stand; a new hash or key order changes them."""
    draws = SampleDraws([SampleKey(seed=1024, index=31, epoch=2)])
    assert draws.uniform("timestep").tolist() == [0.23038792610168457]
    assert draws.integers("index", 1000, (4,)).tolist() == [[154, 313, 157, 473]]
    torch.testing.assert_close(
        draws.normal("noise", (4,)), torch.tensor([[-1.48565, -0.259771, -0.195482, 1.279773]]), rtol=1e-5, atol=1e-6
    )


def test_another_process_draws_the_same() -> None:
    program = (
        "from opensora.core import *; print(SampleDraws([SampleKey(3, 4, 5)]).integers('a', 10**6, (3,)).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(SampleDraws([SampleKey(3, 4, 5)]).integers("a", 10**6, (3,)).tolist())


def test_draws_neither_read_nor_move_global_state() -> None:
    before = draw_all(SampleDraws(KEYS))
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    after = draw_all(SampleDraws(KEYS))
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_defaults_of_dtype_and_device_change_nothing() -> None:
    expected = SampleDraws(KEYS).normal("noise", (3,))
    previous = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            drawn = SampleDraws(KEYS).normal("noise", (3,))
    finally:
        torch.set_default_dtype(previous)
    assert torch.equal(drawn, expected)


def test_draws_go_to_the_device() -> None:
    assert SampleDraws(KEYS, "meta").uniform("timestep").is_meta


def test_a_generator_depends_on_its_whole_key() -> None:
    seeds = {
        generator_for(*key).initial_seed() for key in [(1, "order", 0), (1, "order", 1), (2, "order", 0), (1,), ()]
    }
    assert len(seeds) == 5
