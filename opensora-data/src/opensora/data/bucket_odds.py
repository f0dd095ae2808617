"""The rule by which a row falls into a bucket, as odds: where rows of each class may end, and with which probability.

The rule: resolutions are tried from most to fewest pixels, lengths from longest to shortest. A row that is not accepted at a
resolution goes on to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import numpy.typing as npt
from attrs import frozen

__all__ = ["ENLARGED", "NO_BUCKET", "Fate", "Integers", "Length", "Odds", "Resolution", "uniform"]

Integers = npt.NDArray[np.int64]
NO_BUCKET = -1
"""In place of a bucket's number."""
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


@frozen(kw_only=True)
class _Place:
    """Where rows of a class may end."""

    probability: float
    resolution: Resolution | None = None
    """None: in no bucket."""
    first_bucket: int = NO_BUCKET
    fate: Fate = Fate.USED


@frozen(kw_only=True)
class Odds:
    """Where rows may end, and how likely, for each class of rows: those between two thresholds of length and of pixels.

    Trying resolution after resolution, each with its own draw, comes to one draw among the places where the row may end.
    """

    lengths: Sequence[int]
    """A video's class is one more than how many of these its number of frames exceeds; that of images is 0."""
    pixels: Sequence[float]
    """How many of these a row's pixels reach is the other half of its class."""
    place: _Grid
    """Of the number of the class plus the probability of this place or an earlier one of the class."""
    first_bucket: npt.NDArray[np.int32]
    """[places]"""
    fate: npt.NDArray[np.int8]
    """[places]"""
    table: npt.NDArray[np.int8]
    """[places]: which of ``tables``."""
    tables: Sequence[_Nearest]
    """Of the aspect ratios of resolutions."""

    @classmethod
    def of(cls, resolutions: Sequence[Resolution], frame_interval: int) -> Odds:
        """Those of a config."""
        lengths = {
            each.num_frames * frame_interval for one in resolutions for each in one.lengths if each.num_frames > 1
        }
        pixels = sorted({ENLARGED * one.pixels for one in resolutions})
        tables = {one.aspects.tobytes(): one.aspects for one in resolutions}
        numbers = {key: number for number, key in enumerate(tables)}
        bounds: list[npt.NDArray[np.float64]] = []
        places: list[_Place] = []
        for lowest in (0.0, *pixels):
            tried = [one for one in resolutions if ENLARGED * one.pixels <= lowest]
            for exceeded in (None, 0, *sorted(lengths)):
                of_class = [each for each in _places(tried, exceeded, frame_interval) if each.probability]
                shares = np.cumsum([place.probability for place in of_class])
                bounds.append(len(bounds) + np.append(np.minimum(shares[:-1], 1.0), 1.0))
                places += of_class
        return cls(
            lengths=sorted(lengths),
            pixels=pixels,
            place=_Grid.of(np.concatenate(bounds)),
            first_bucket=np.array([place.first_bucket for place in places], np.int32),
            fate=np.array([place.fate for place in places], np.int8),
            table=np.array(
                [numbers[place.resolution.aspects.tobytes()] if place.resolution else -1 for place in places], np.int8
            ),
            tables=[_Nearest.of(aspects) for aspects in tables.values()],
        )

    def draw(
        self, num_frames: Integers, height: Integers, width: Integers, uniform: npt.NDArray[np.float64]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int8]]:
        """Bucket and fate of rows, each by its number ``uniform`` in [0, 1)."""
        classes = np.zeros(len(num_frames), np.int16)
        size = height * width
        for pixels in self.pixels:
            classes += size >= pixels
        classes *= np.int16(len(self.lengths) + 2)
        classes += num_frames != 1
        for length in self.lengths:
            classes += num_frames > length
        place = self.place.find(classes + uniform)
        found, table = self.first_bucket[place], self.table[place]
        for number, aspects in enumerate(self.tables):
            rows = np.flatnonzero(table == number)
            found[rows] += aspects.find(height[rows] / width[rows])
        return found, self.fate[place]


def _places(resolutions: Sequence[Resolution], exceeded: int | None, frame_interval: int) -> list[_Place]:
    """Where rows of a class may end; the last is no bucket.

    Args:
        resolutions: Those that they have the pixels for, in the order in which they are tried.
        exceeded: The highest length times interval that they are longer than; None for images.
        frame_interval: Of the dataset.
    """
    places = []
    arriving, fate = 1.0, Fate.TOO_SMALL
    for resolution in resolutions:
        fitting = [
            each
            for each in resolution.lengths
            if each.choose  # of probability 0, it is as if it weren't there
            and (exceeded is None) == (each.num_frames == 1)
            and (exceeded is None or exceeded >= each.num_frames * frame_interval)
        ]
        if not fitting:
            fate = max(fate, Fate.NO_IMAGES if exceeded is None else Fate.TOO_SHORT)
        going_on = 0.0
        for length in fitting:
            chosen = arriving * length.choose
            arriving -= chosen
            going_on += chosen * (1 - length.accept)
            place = _Place(probability=chosen * length.accept, resolution=resolution, first_bucket=length.first_bucket)
            places.append(place)
            if chosen:  # else all were stopped by a longer length
                fate = max(fate, Fate.TURNED_AWAY if length.accept else Fate.TOO_LONG)
        arriving += going_on
    return [*places, _Place(probability=arriving, fate=fate)]


def uniform(key: int, start: int, count: int) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1), of 32 bits, of rows from ``start`` on: each a function of the key and the row's number alone."""
    mixed = np.arange(start, start + count, dtype=np.uint64)
    mixed *= np.uint64(0x9E3779B97F4A7C15)  # wraps around, as it should
    mixed += np.uint64(key)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # SplitMix64's finalizer
        mixed ^= mixed >> np.uint64(shift)
        mixed *= np.uint64(factor)
    return (mixed >> np.uint64(32)).astype(np.float64) * np.float64(2.0**-32)


@frozen
class _Grid:
    """`numpy.searchsorted` for many numbers and few bounds: a grid says where to begin, which is several times as fast."""

    bounds: npt.NDArray[np.float64]
    """Ascending; infinity at the end."""
    begin: Integers
    """[cells]: how many bounds are at most the cell's lowest number."""
    steps: int
    """The most bounds within a cell."""

    @classmethod
    def of(cls, bounds: npt.NDArray[np.float64]) -> _Grid:
        """For bounds from 0 on."""
        lowest = np.arange(int(bounds[-1] + 2) * _CELLS) / _CELLS
        begin = np.searchsorted(bounds, lowest, side="right")
        within = np.searchsorted(bounds, lowest + 1 / _CELLS, side="left") - begin
        return cls(np.append(bounds, np.inf), begin, int(within.max()))

    def find(self, numbers: npt.NDArray[np.float64]) -> Integers:
        """How many bounds are at most each number, which is not negative."""
        cells = (numbers * _CELLS).astype(np.int64)  # exact: a power of two
        place = self.begin[np.minimum(cells, len(self.begin) - 1, out=cells)]
        for _ in range(self.steps):
            place += self.bounds[place] <= numbers
        return place


_CELLS = 64
"""Of a `_Grid`, from one whole number to the next."""


@frozen
class _Nearest:
    """The nearest of a few numbers."""

    ordered: npt.NDArray[np.float64]
    order: npt.NDArray[np.int32]
    """Which number of the original order each is."""
    grid: _Grid

    @classmethod
    def of(cls, numbers: npt.NDArray[np.float64]) -> _Nearest:
        """For two or more numbers from 0 on."""
        order = np.argsort(numbers, kind="stable")
        return cls(numbers[order], order.astype(np.int32), _Grid.of(numbers[order]))

    def find(self, ratios: npt.NDArray[np.float64]) -> npt.NDArray[np.int32]:
        """The index of the nearest number to each; the first on ties."""
        above = np.clip(self.grid.find(ratios), 1, len(self.ordered) - 1)
        below = above - 1
        to_below, to_above = np.abs(ratios - self.ordered[below]), np.abs(self.ordered[above] - ratios)
        ties = np.flatnonzero(to_below == to_above)
        below_first = self.order[below[ties]] < self.order[above[ties]]
        nearest = below + (to_above < to_below)
        nearest[ties] = np.where(below_first, below[ties], above[ties])
        return self.order[nearest]
