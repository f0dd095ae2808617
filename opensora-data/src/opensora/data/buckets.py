"""Buckets: clips of any size and length, sorted into batches that each have one.

A bucket is (resolution, number of frames, aspect key). Each epoch every row of a table falls into one bucket or into none, by
its size, its length and the probabilities of the config. All of it is computed in columns, and is a pure function of the
config, the rows, the seed and the epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
from attrs import field, frozen

from opensora.core.errors import ConfigError, did_you_mean
from opensora.core.protocols import Size
from opensora.core.randomness import SampleKey, seed_for
from opensora.core.sizes import RESOLUTIONS, nominal_pixels

__all__ = [
    "ENLARGED",
    "NO_BUCKET",
    "Bucket",
    "Buckets",
    "EpochBatches",
    "Fate",
    "Length",
    "Resolution",
    "shuffle_within_buckets",
]

Integers = npt.NDArray[np.int64]
NO_BUCKET = -1
"""In place of a bucket's number."""
_CHUNK = 1 << 18
"""Rows that are looked at together: what is computed on the way takes memory, and fits the cache, for so many alone."""
ENLARGED = 0.8
"""Clips with at least this share of a resolution's pixels are taken for it, and slightly enlarged."""


class Fate(IntEnum):
    """What becomes of a row; of several resolutions that turn it away, the highest counts: it came nearest there."""

    TOO_SMALL = 0
    """It has too few pixels."""
    NO_IMAGES = 1
    """It is an image, and where it is large enough there is no length 1."""
    TOO_SHORT = 2
    """Where it is large enough, it is not longer than the shortest length."""
    TOO_LONG = 3
    """It has a length of probability 0, which stops longer clips."""
    TURNED_AWAY = 4
    """The draws of this epoch were against it."""
    USED = 5


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


@frozen(kw_only=True)
class Length:
    """One length at one resolution."""

    num_frames: int
    accept: float
    """Probability that a clip is taken at this resolution; otherwise the next smaller one is tried."""
    choose: float
    """Probability that a clip long enough is taken at this length; otherwise the next shorter one is tried."""
    first_bucket: int
    """Number of the bucket of the resolution's first aspect key."""


@frozen
class Resolution:
    """A resolution of a config."""

    name: str
    pixels: int
    lengths: Sequence[Length]
    """Longest first."""
    aspects: npt.NDArray[np.float64]
    """Height / width of each aspect key."""


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
        found = np.full(len(num_frames), NO_BUCKET, np.int32)
        fates = np.full(len(num_frames), Fate.TOO_SMALL, np.int8)
        for start in range(0, len(num_frames), _CHUNK):
            part = slice(start, start + _CHUNK)
            columns = num_frames[part], height[part], width[part]
            self._assign(*columns, found[part], fates[part], start, frame_interval, _Draw(seed, epoch))
        return found, fates

    def _assign(
        self,
        num_frames: Integers,
        height: Integers,
        width: Integers,
        found: npt.NDArray[np.int32],
        fates: npt.NDArray[np.int8],
        offset: int,
        frame_interval: int,
        draw: _Draw,
    ) -> None:
        """Write the buckets and fates of some rows, of which the first is row ``offset`` of the table."""
        pixels = height * width
        for resolution in self.resolutions:
            rows = np.flatnonzero((found == NO_BUCKET) & (pixels >= ENLARGED * resolution.pixels))
            for length in resolution.lengths:
                if not len(rows):
                    break
                frames = num_frames[rows]
                shortest = length.num_frames * frame_interval
                fits = frames == 1 if length.num_frames == 1 else (frames > 1) & (frames > shortest)
                place = resolution.name, length.num_frames
                chosen = draw.below("length", *place, rows[fits] + offset, length.choose)
                if length.choose:  # with probability 0 it is as if it weren't there
                    _raise(fates, rows[fits][~chosen], Fate.TURNED_AWAY)
                fits[fits] = chosen
                fitting = rows[fits]
                accepted = draw.below("resolution", *place, fitting + offset, length.accept)
                taken = fitting[accepted]
                found[taken] = length.first_bucket + _nearest(resolution.aspects, height[taken] / width[taken])
                fates[taken] = Fate.USED
                _raise(fates, fitting[~accepted], Fate.TURNED_AWAY if length.accept else Fate.TOO_LONG)
                rows = rows[~fits]
            _raise(fates, rows, np.where(num_frames[rows] == 1, Fate.NO_IMAGES, Fate.TOO_SHORT).astype(np.int8))

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


@frozen
class _Draw:
    """Random numbers of rows, each a function of the key and the row's number alone."""

    seed: int
    epoch: int

    def below(
        self, name: str, resolution: str, num_frames: int, rows: Integers, probability: float
    ) -> npt.NDArray[np.bool_]:
        """True with the given probability for each row."""
        if probability >= 1 or probability <= 0:
            return np.full(len(rows), probability >= 1)
        key = seed_for(name, self.seed, self.epoch, resolution, num_frames)
        mixed = rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)  # wraps around, as it should
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # SplitMix64's finalizer
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        return (mixed ^ (mixed >> np.uint64(31))) < np.uint64(int(probability * 2**64))


def _raise(fates: npt.NDArray[np.int8], rows: Integers, fate: int | npt.NDArray[np.int8]) -> None:
    """Note a fate for rows that have come less far."""
    fates[rows] = np.maximum(fates[rows], fate)


def _nearest(aspects: npt.NDArray[np.float64], ratios: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """The index of the nearest of a few numbers to each ratio; the first on ties."""
    order = np.argsort(aspects, kind="stable")
    ordered = aspects[order]
    above = np.clip(np.searchsorted(ordered, ratios), 1, len(ordered) - 1)
    below = above - 1
    distance_below, distance_above = np.abs(ratios - ordered[below]), np.abs(ordered[above] - ratios)
    first_on_ties = (distance_below == distance_above) & (order[below] < order[above])
    return np.where((distance_below < distance_above) | first_on_ties, order[below], order[above])


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
