"""Random draws that belong to a sample, not to a batch, a process or a point in time.

Whatever is random about a sample (its crop, its noise, its timestep, whether its caption is dropped) is drawn from a
generator that is keyed by (seed, sample index, epoch) and by the name of the draw. So batch size, number of processes and
number of loader workers don't change what a sample sees, and there is no random state to save: a resumed run draws the same.

Draws are made on the CPU and moved, so that a video depends on its seed and not on the device that made it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from attrs import frozen
from torch import Tensor

__all__ = ["Draws", "SampleDraws", "SampleKey", "generator_for", "seed_for"]


def generator_for(*key: object) -> torch.Generator:
    """A CPU generator that depends on nothing but ``key``, the same on any machine and in any process.

    torch's CPU generator takes 32 bits of a seed, so among very many keys some share their numbers.
    """
    return torch.Generator().manual_seed(seed_for(*key))


def seed_for(*key: object) -> int:
    """A number of 64 bits that depends on nothing but ``key``, for other generators than torch's."""
    digest = hashlib.blake2b("\0".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


@frozen
class SampleKey:
    """Names one showing of one sample: the run's seed, the sample's index in the data, and the epoch."""

    seed: int
    index: int
    epoch: int = 0
    size: tuple[int, int, int] | None = None
    """The (T, H, W) that this showing is to have, where batches differ in theirs. No draw depends on it."""

    def generator(self, name: str) -> torch.Generator:
        """The generator of the draw called ``name``, fresh at each call."""
        return generator_for(self.seed, self.index, self.epoch, name)


class Draws(Protocol):
    """Where schedulers and autoencoders take their random numbers from. Each draw has a name; asking twice gives it twice."""

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """Standard normal float32 numbers [B, *shape]."""
        ...

    def uniform(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """Float32 numbers in [0, 1), [B, *shape]."""
        ...

    def integers(self, name: str, high: int, shape: Sequence[int] = ()) -> Tensor:
        """Int64 numbers in [0, high), [B, *shape]."""
        ...


@frozen
class SampleDraws:
    """`Draws` for a batch: row b comes from the generator of ``keys[b]`` alone."""

    keys: Sequence[SampleKey]
    device: torch.device | str = "cpu"

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """See `Draws.normal`."""
        return self._stack(partial(torch.randn, tuple(shape), dtype=torch.float32), name)

    def uniform(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """See `Draws.uniform`."""
        return self._stack(partial(torch.rand, tuple(shape), dtype=torch.float32), name)

    def integers(self, name: str, high: int, shape: Sequence[int] = ()) -> Tensor:
        """See `Draws.integers`."""
        return self._stack(partial(torch.randint, high, tuple(shape), dtype=torch.int64), name)

    def _stack(self, draw: Callable[..., Tensor], name: str) -> Tensor:
        rows = [draw(generator=key.generator(name), device="cpu") for key in self.keys]
        return torch.stack(rows).to(self.device, non_blocking=True)
