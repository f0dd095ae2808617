"""What to change in a ``bucket_config`` under which no row of a table falls into a bucket."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from opensora.core.sizes import RESOLUTIONS, nominal_pixels
from opensora.data.bucket_odds import ENLARGED, Fate, Integers, Length, Resolution
from opensora.data.buckets import Buckets

__all__ = ["smallest_change"]


def smallest_change(
    buckets: Buckets,
    num_frames: Integers,
    height: Integers,
    width: Integers,
    fates: npt.NDArray[np.int8],
    *,
    frame_interval: int,
) -> str:
    """A sentence or two on how the rows that came nearest to a bucket would fall into one.

    Args:
        buckets: Of the config.
        num_frames: Of each row, as are the others.
        height: In pixels.
        width: In pixels.
        fates: What `Buckets.explain` says of the rows; none is used.
        frame_interval: Of the dataset.
    """
    nearest = Fate(fates.max())
    rows = np.flatnonzero(fates == nearest)
    frames, pixels = num_frames[rows], (height * width)[rows]
    if nearest in (Fate.TURNED_AWAY, Fate.TOO_LONG):
        return _more_probable(buckets, frames, pixels, frame_interval, nearest)
    if nearest == Fate.TOO_SMALL:
        largest = int(pixels.argmax())
        size = f"{height[rows[largest]]} x {width[rows[largest]]}"
        return _smaller(buckets, frames, pixels, frame_interval, size)
    name = next(each.name for each in buckets.resolutions if (pixels >= ENLARGED * each.pixels).any())
    if nearest == Fate.NO_IMAGES:
        return f'{_rows(len(rows))} large enough, but an image: add 1: (1.0, 1) to bucket_config["{name}"].'
    return _shorter(buckets, frames, pixels, frame_interval)


def _more_probable(buckets: Buckets, frames: Integers, pixels: Integers, frame_interval: int, fate: Fate) -> str:
    """Raise the probability that keeps out most rows."""
    counts = {
        (resolution.name, length.num_frames): int(_fitting(resolution, length, frames, pixels, frame_interval).sum())
        for resolution, length in _lengths(buckets)
        if (length.accept == 0) == (fate == Fate.TOO_LONG) and length.accept * length.choose < 1
    }
    (name, length), count = max(counts.items(), key=lambda item: item[1])
    place = f'bucket_config["{name}"][{length}]'
    if fate == Fate.TURNED_AWAY:
        return f"The draws of this epoch were against all that would fit ({count}): raise the probability of {place}."
    return f"{place} has probability 0, which keeps out {count} longer ones: raise it, or add a smaller resolution."


def _shorter(buckets: Buckets, frames: Integers, pixels: Integers, frame_interval: int) -> str:
    """Add the length that is nearest to the shortest of a resolution, or take frames more densely."""
    best: tuple[float, Resolution, int, int] | None = None
    for resolution in buckets.resolutions:
        lengths = [each.num_frames for each in resolution.lengths if each.num_frames > 1]
        large = frames[pixels >= ENLARGED * resolution.pixels]
        if not len(large):
            continue
        longest, shortest = int(large.max()), min(lengths, default=int(large.max()))
        share = longest / (shortest * frame_interval)
        if best is None or share > best[0]:
            best = share, resolution, longest, shortest
    assert best is not None  # these rows were too short at some resolution
    _, resolution, longest, shortest = best
    ways = []
    if (denser := (longest - 1) // shortest) >= 1 and frame_interval > 1:
        ways.append(f"set dataset.frame_interval = {denser}")
    if (length := (longest - 1) // frame_interval) > 1:
        ways.append(f'add {length}: (1.0, 1) to bucket_config["{resolution.name}"]')
    asked = f"{shortest * frame_interval + 1} frames"
    what = f"The longest row that is large enough for {resolution.name} has {longest} frames; at least {asked} are asked for"
    return f"{what}: {' or '.join(ways)}." if ways else f"{what}."


def _smaller(buckets: Buckets, frames: Integers, pixels: Integers, frame_interval: int, size: str) -> str:
    """Add the largest resolution that the largest row has, with a length that it has."""
    names = [name for name in RESOLUTIONS if pixels.max() >= ENLARGED * nominal_pixels(name)]
    smallest = buckets.resolutions[-1]
    what = f"The largest row has {size} pixels, less than {ENLARGED} of {smallest.name}'s"
    if not names:
        return f"{what}, and there is no smaller resolution: a VideoTextDataset takes any size."
    name = max(names, key=nominal_pixels)
    longest = int(frames[pixels >= ENLARGED * nominal_pixels(name)].max())
    lengths = {each.num_frames for each in smallest.lengths}
    fitting = [each for each in lengths if (each == longest == 1) or (1 < each * frame_interval < longest)]
    length = max(fitting, default=1 if longest == 1 else max(1, (longest - 1) // frame_interval))
    return f'{what}: add "{name}": {{{length}: (1.0, 1)}} to bucket_config.'


def _lengths(buckets: Buckets) -> Iterator[tuple[Resolution, Length]]:
    for resolution in buckets.resolutions:
        for length in resolution.lengths:
            yield resolution, length


def _fitting(
    resolution: Resolution, length: Length, frames: Integers, pixels: Integers, frame_interval: int
) -> npt.NDArray[np.bool_]:
    long_enough = frames == 1 if length.num_frames == 1 else frames > length.num_frames * frame_interval
    return (pixels >= ENLARGED * resolution.pixels) & long_enough


def _rows(count: int) -> str:
    return f"{count} row is" if count == 1 else f"{count} rows are"
