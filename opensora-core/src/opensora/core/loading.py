"""How the samples of a step are read, and what becomes of those that can't be. Which they are: `opensora.core.orders`."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from attrs import define, field, frozen

from opensora.core.conditioning import Conditioning
from opensora.core.errors import DataError, ShapeError, UserError
from opensora.core.machine import die_with_parent
from opensora.core.orders import Order, Place, Slicing
from opensora.core.protocols import IMAGE_FPS, Clip, ClipFeatures, Dataset, Size, batch_conditioning
from opensora.core.randomness import SampleDraws, SampleKey
from opensora.core.run_folder import append_jsonl, read_jsonl

__all__ = [
    "Batch",
    "UnreadableFiles",
    "iter_batches",
    "read_batches",
    "stand_in",
]

log = logging.getLogger(__name__)

_Failed = tuple[SampleKey, str]
"""A sample that could not be read, and the reason."""


@frozen(kw_only=True, eq=False)
class Batch:
    """What the loader hands over: the clips that could be read, stacked, and what could not."""

    video: torch.Tensor
    """[B, 3, T, H, W] in [-1, 1]; with ``features``, of those clips alone whose moments aren't there."""
    texts: Sequence[str]
    conditioning: Conditioning
    """Sizes and rates, no text yet."""
    keys: Sequence[SampleKey]
    paths: Sequence[str]
    failed: Sequence[_Failed] = ()
    """Samples that could not be read, with the reason."""
    features: Sequence[ClipFeatures] = ()
    """One a sample, if the run uses features; those that all samples have are stacked in the next two instead."""
    moments: Mapping[str, torch.Tensor] | None = None
    """`ClipFeatures.moments` of all samples, each [B, ...]."""
    text: Conditioning | None = None
    """`ClipFeatures.text` of all samples."""

    def __len__(self) -> int:
        """Samples that were read."""
        return len(self.keys)

    @property
    def nominal_size(self) -> int:
        """Samples that were to be read."""
        return len(self.keys) + len(self.failed)

    def draws(self, device: torch.device) -> SampleDraws:
        """The random numbers of these samples."""
        return SampleDraws(self.keys, device)

    def pin_memory(self) -> Batch:
        """Called by torch's loader, so that the copy to a GPU needn't wait."""
        object.__setattr__(self, "video", self.video.pin_memory())
        if self.moments is not None:
            moments = {name: tensor.pin_memory() for name, tensor in self.moments.items()}
            object.__setattr__(self, "moments", moments)
        return self


def _collate(items: Sequence[Clip | _Failed | UserError]) -> Batch | UserError:
    """Stack clips; those that failed stand in ``failed``. An error is returned: raised here, it would lose its words."""
    if error := next((item for item in items if isinstance(item, UserError)), None):
        return error
    clips = [item for item in items if isinstance(item, Clip)]
    sizes = {clip.size: clip.path for clip in clips}
    if len(sizes) > 1:
        listed = ", ".join(f"{size} of {path}" for size, path in sizes.items())
        return ShapeError(f"Clips of one batch must share frames, height and width; got {listed}.")
    videos = [clip.video for clip in clips if clip.video.numel()]
    return Batch(
        video=torch.stack(videos) if videos else torch.empty(0),
        texts=[clip.text for clip in clips],
        conditioning=batch_conditioning(clips) if clips else Conditioning(),
        keys=[clip.key for clip in clips],
        paths=[clip.path for clip in clips],
        failed=[item for item in items if isinstance(item, tuple)],
        **_stack_features([clip.features for clip in clips if clip.features is not None]),
    )


def _stack_features(features: Sequence[ClipFeatures]) -> dict[str, Any]:
    """The fields of a `Batch` about features. Few large tensors come out of a loader worker faster than many small ones."""
    stacked: dict[str, Any] = {}
    moments = [each.moments for each in features if each.moments is not None]
    if moments and len(moments) == len(features):
        stacked["moments"] = {name: torch.stack([each[name] for each in moments]) for name in moments[0]}
        features = [attrs.evolve(each, moments=None) for each in features]
    texts = [each.text for each in features if each.text is not None]
    if texts and len(texts) == len(features):
        stacked["text"] = Conditioning.cat(texts)
        features = [attrs.evolve(each, text=None) for each in features]
    return {"features": features, **stacked}


def stand_in(size: Size) -> Batch:
    """A batch of one black clip of (T, H, W), for a process that has nothing to read but must keep step with the others."""
    batch = _collate([Clip(video=torch.zeros(3, *size), text="", fps=IMAGE_FPS, key=SampleKey(0, 0))])
    assert isinstance(batch, Batch)  # one clip can't disagree with itself
    return batch


@frozen
class _Reading(torch.utils.data.Dataset[Any]):
    """Hands errors over instead of raising them: a loader worker that raises ends the run, with its traceback as message."""

    dataset: Dataset

    def __getitem__(self, key: SampleKey) -> Clip | _Failed | UserError:
        try:
            return self.dataset[key]
        except DataError as error:
            return key, str(error)
        except UserError as error:
            return error


def _start_worker(_: int) -> None:
    """Torch's own check whether the training process lives is made between samples: not by a worker that hangs in one."""
    die_with_parent()


_START = Place()


def iter_batches(
    dataset: Dataset,
    order: Order,
    slicing: Slicing,
    *,
    place: Place = _START,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """This process's micro-batches from ``place`` on, for ever, read ahead by ``num_workers`` worker processes.

    Raises:
        ShapeError: Clips of one batch differ in size.
    """
    micro_batches = order.iter_micro_batches(slicing, place)
    yield from read_batches(dataset, micro_batches, num_workers=num_workers, pin_memory=pin_memory)


def read_batches(
    dataset: Dataset, batches: Iterable[list[SampleKey]], *, num_workers: int = 0, pin_memory: bool = False
) -> Iterator[Batch]:
    """These batches, read ahead by ``num_workers`` worker processes.

    Raises:
        ShapeError: Clips of one batch differ in size.
    """
    loader = torch.utils.data.DataLoader(
        _Reading(dataset),
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # the loader seeds its workers from it; the global one is not its to use
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


@define
class UnreadableFiles:
    """The policy for clips that can't be read: skip, count and list them; too many of them stop the run."""

    listing: Path
    """``skipped.jsonl``."""
    num_samples: int
    limit: float
    """Share of the data's rows."""
    lists: bool = True
    """Whether this process writes the listing of its samples. One does of those that share them."""
    _rows: set[int] = field(factory=set)

    def record(self, batch: Batch) -> None:
        """List what ``batch`` lacks.

        Raises:
            DataError: More rows than allowed can't be read.
        """
        for key, reason in batch.failed:
            if key.index in self._rows:
                continue
            self._rows |= {int(str(record["row"])) for record in read_jsonl(self.listing)}  # of other processes too
            if key.index not in self._rows:
                self._rows.add(key.index)
                if not self.lists:
                    continue
                append_jsonl(self.listing, {"row": key.index, "epoch": key.epoch, "reason": reason})
                count = f"{len(self._rows)} of {self.num_samples} rows so far"
                log.warning("%s Skipped; %s, listed in %s", reason, count, self.listing)
        if batch.failed and len(self._rows) == self.num_samples:
            raise DataError(
                f"None of the {self.num_samples} rows can be read, listed in {self.listing}: {batch.failed[0][1]}"
            )
        allowed = math.ceil(self.limit * self.num_samples - 1e-9)  # 0.07 of 100 is 7, not the float's 7.000000000000001
        if len(self._rows) > allowed:
            raise DataError(
                f"{len(self._rows)} of {self.num_samples} rows can't be read, more than max_unreadable={self.limit:g} allows "
                f"({allowed}). They are listed in {self.listing}; mend or remove them, or raise max_unreadable."
            )
