"""Buckets: clips of any size and length, sorted into batches that each have one.

A bucket is (resolution, number of frames, aspect key). Each epoch every row of a table falls into one bucket or into none, by
its size, its length and the probabilities of the config. All of it is computed in columns, and is a pure function of the
config, the rows, the seed and the epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from attrs import field, frozen

from opensora.core.errors import ConfigError, did_you_mean
from opensora.core.protocols import Size
from opensora.core.randomness import SampleKey, seed_for
from opensora.core.sizes import RESOLUTIONS, nominal_pixels
from opensora.data.bucket_odds import NO_BUCKET, Integers, Length, Odds, Resolution, uniform

__all__ = ["Bucket", "Buckets", "EpochBatches", "shuffle_within_buckets"]

_CHUNK = 1 << 15
"""Rows that are looked at together: what is computed on the way takes memory, and fits the cache, for so many alone."""


@frozen(kw_only=True)
class Bucket:
    """Where clips of one size and length meet."""

    resolution: str
    num_frames: int
    aspect: str
    height: int
    width: int
    batch_size: int

    @property
    def size(self) -> Size:
        """(T, H, W)."""
        return self.num_frames, self.height, self.width


@frozen
class Buckets:
    """All buckets of a config, and the rule by which clips fall into them."""

    buckets: Sequence[Bucket]
    resolutions: Sequence[Resolution] = field(repr=False)
    """In the order in which they are tried: most pixels first."""

    @classmethod
    def from_config(cls, config: Mapping[str, Mapping[int | str, Any]]) -> Buckets:
        """From ``{resolution: {frames: (probability, batch size)}}``.

        The probability may be a pair: of the resolution, and of the length. A batch size may be None where the first is 0.

        Raises:
            ConfigError: A name, number or form is wrong; the message has its place.
        """
        if not config:
            raise ConfigError('bucket_config is empty. Write {"240p": {51: (1.0, 4)}}, say.')
        for name in config:
            if name not in RESOLUTIONS:
                raise ConfigError(
                    f'bucket_config: there is no resolution "{name}".{did_you_mean(str(name), RESOLUTIONS)}'
                )
        buckets: list[Bucket] = []
        resolutions = []
        for name in sorted(config, key=nominal_pixels, reverse=True):
            sizes = RESOLUTIONS[name]
            lengths = []
            entries = {_frames(name, frames): value for frames, value in config[name].items()}
            for frames in sorted(entries, reverse=True):
                accept, choose, batch_size = _probabilities(name, frames, entries[frames])
                lengths.append(Length(num_frames=frames, accept=accept, choose=choose, first_bucket=len(buckets)))
                buckets += [
                    Bucket(
                        resolution=name,
                        num_frames=frames,
                        aspect=key,
                        height=height,
                        width=width,
                        batch_size=batch_size,
                    )
                    for key, (height, width) in sizes.items()
                ]
            aspects = np.array([float(key) for key in sizes])
            resolutions.append(Resolution(name, nominal_pixels(name), lengths, aspects))
        return cls(buckets, resolutions)

    def assign(
        self, num_frames: Integers, height: Integers, width: Integers, *, frame_interval: int, seed: int, epoch: int
    ) -> npt.NDArray[np.int32]:
        """The bucket of each row, as an index into `buckets`, or -1: int32 [rows].

        Resolutions are tried from most to fewest pixels, lengths from longest to shortest. A row that is not accepted at a
        resolution goes on to the next, so that a length with probability 0 sends longer clips to smaller sizes.
        """
        return self.explain(num_frames, height, width, frame_interval=frame_interval, seed=seed, epoch=epoch)[0]

    def explain(
        self, num_frames: Integers, height: Integers, width: Integers, *, frame_interval: int, seed: int, epoch: int
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int8]]:
        """As `assign`, and how far each row came: the highest `Fate` that any resolution had for it, int8 [rows]."""
        found = np.empty(len(num_frames), np.int32)
        fates = np.empty(len(num_frames), np.int8)
        odds = Odds.of(self.resolutions, frame_interval)
        key = seed_for("bucket of a row", seed, epoch)
        for start in range(0, len(num_frames), _CHUNK):
            part = slice(start, start + _CHUNK)
            columns = num_frames[part], height[part], width[part]
            found[part], fates[part] = odds.draw(*columns, uniform(key, start, len(columns[0])))
        return found, fates

    def in_use(self) -> Iterator[Bucket]:
        """The buckets that clips can fall into."""
        for resolution in self.resolutions:
            for length in resolution.lengths:
                if length.accept and length.choose:
                    yield from self.buckets[length.first_bucket : length.first_bucket + len(resolution.aspects)]


@frozen(eq=False)
class _Keys(Sequence[SampleKey]):
    """The keys of one batch, made when they are asked for: most batches belong to other processes."""

    _rows: npt.NDArray[np.int32]
    _seed: int
    _epoch: int
    _size: Size

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> SampleKey:  # type: ignore[override]  # one by one
        return SampleKey(self._seed, int(self._rows[index]), self._epoch, self._size)


class EpochBatches(Sequence[Sequence[SampleKey]]):
    """The batches of one epoch in their order, each of one bucket; the last of a bucket may be smaller than the others."""

    def __init__(self, assigned: npt.NDArray[np.int32], buckets: Sequence[Bucket], *, seed: int, epoch: int) -> None:
        """``assigned`` is what `Buckets.assign` returns."""
        self._buckets, self._seed, self._epoch = buckets, seed, epoch
        generator = np.random.default_rng(seed_for("order of batches", seed, epoch))
        self._rows, counts = shuffle_within_buckets(assigned, len(buckets), generator)
        sizes = np.array([bucket.batch_size for bucket in buckets])
        batches = -(-counts // sizes)
        bucket_of = np.repeat(np.arange(len(buckets)), batches)
        number = np.arange(len(bucket_of)) - np.repeat(np.cumsum(batches) - batches, batches)  # within its bucket
        first = np.cumsum(counts) - counts
        start = first[bucket_of] + number * sizes[bucket_of]
        stop = np.minimum(start + sizes[bucket_of], (first + counts)[bucket_of])
        order = generator.permutation(len(bucket_of))
        self._start, self._stop, self._bucket_of = start[order], stop[order], bucket_of[order]

    def __len__(self) -> int:
        return len(self._start)

    def __getitem__(self, index: int) -> Sequence[SampleKey]:  # type: ignore[override]  # batches are taken one by one
        if not 0 <= index < len(self):
            raise IndexError(index)
        size = self._buckets[self._bucket_of[index]].size
        return _Keys(self._rows[self._start[index] : self._stop[index]], self._seed, self._epoch, size)

    @property
    def num_samples(self) -> int:
        """Rows that are in a batch of this epoch."""
        return int((self._stop - self._start).sum())

    def count_by_bucket(self) -> list[tuple[Bucket, int, int]]:
        """The buckets in use, and how many rows and batches each has."""
        batches = np.bincount(self._bucket_of, minlength=len(self._buckets))
        rows = np.bincount(self._bucket_of, self._stop - self._start, minlength=len(self._buckets)).astype(np.int64)
        return [(self._buckets[each], int(rows[each]), int(batches[each])) for each in np.flatnonzero(batches).tolist()]

    def rows_before(self, index: int) -> npt.NDArray[np.int32]:
        """The rows of the batches before that one, in their order."""
        pieces = [self._rows[a:b] for a, b in zip(self._start[:index], self._stop[:index], strict=True)]
        return np.concatenate([np.empty(0, np.int32), *pieces])


def shuffle_within_buckets(
    assigned: npt.NDArray[np.int32], num_buckets: int, generator: np.random.Generator
) -> tuple[npt.NDArray[np.int32], Integers]:
    """The rows that have a bucket, bucket after bucket and shuffled within each, and how many each bucket has."""
    narrow = np.uint16 if num_buckets < 2**16 else np.uint32  # of 16 bits is sorted in one pass; NO_BUCKET comes last
    order = np.argsort(assigned.astype(narrow), kind="stable")
    counts = np.bincount(assigned[assigned != NO_BUCKET], minlength=num_buckets)
    rows = order[: counts.sum()].astype(np.int32)
    for piece in np.split(rows, np.cumsum(counts[:-1])):
        if len(piece) > 1:
            generator.shuffle(piece)
    return rows, counts


def _frames(resolution: str, frames: int | str) -> int:
    try:
        number = int(frames)
    except ValueError:
        number = 0
    if number < 1:
        raise ConfigError(f'bucket_config["{resolution}"]: {frames!r} is no number of frames.')
    return number


def _probabilities(resolution: str, frames: int, value: Any) -> tuple[float, float, int]:
    """Of the resolution and of the length, and the batch size.

    Raises:
        ConfigError: Another form than (probability, batch size), or numbers out of range.
    """
    place = f'bucket_config["{resolution}"][{frames}]'
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ConfigError(f"{place} is {value!r}; it must be (probability, batch size).")
    probability, batch_size = value
    pair = tuple(probability) if isinstance(probability, tuple | list) else (probability, 1.0)
    if len(pair) != 2 or not all(isinstance(each, int | float) and 0 <= each <= 1 for each in pair):
        raise ConfigError(
            f"{place}: the probability is {probability!r}; it must be a number from 0 to 1, or two "
            "(of the size, of the length)."
        )
    accept, choose = map(float, pair)
    if batch_size is None and accept == 0:
        return accept, choose, 1
    if type(batch_size) is not int or batch_size < 1:
        raise ConfigError(f"{place}: the batch size is {batch_size!r}; it must be a number from 1.")
    return accept, choose, batch_size
