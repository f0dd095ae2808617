"""Captioned videos and images of any size and length, in batches that each have one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from attrs import field, frozen
from attrs.validators import gt, min_len, optional

from opensora.core.errors import ConfigError, DataError
from opensora.core.protocols import IMAGE_FPS, Clip, ClipRecipe, Size, SourceFacts
from opensora.core.randomness import SampleKey
from opensora.core.transforms import transform_image, transform_video
from opensora.core.video import VideoFile, is_image, is_video, read_image
from opensora.data.balancing import BalancedBatches, balanced_batches
from opensora.data.bucket_advice import smallest_change
from opensora.data.bucket_odds import NO_BUCKET
from opensora.data.buckets import Buckets, EpochBatches
from opensora.data.tables import StringColumn, read_table, resolve_path
from opensora.data.video_text import choose_frames

__all__ = ["VariableVideoTextDataset", "VariableVideoTextSpec"]


@frozen(kw_only=True)
class VariableVideoTextSpec:
    """Captioned clips, each brought to the size and length of the bucket that it falls into."""

    data_path: str | None = field(default=None, validator=optional(min_len(1)))
    """Table with columns path, text, num_frames, height and width (.csv, .parquet, .jsonl). Paths are relative to the
    working directory or, if they aren't there, to the table. None: to be given when it is run."""
    frame_interval: int = field(default=1, validator=gt(0))
    """Take about every n-th frame: a longer stretch of time at a lower rate."""
    transform_name: Literal["resize_crop"] = "resize_crop"
    """As much of the picture as fits the bucket's size."""
    num_starts: int | None = field(default=None, validator=optional(gt(0)))
    """Stretches of a video that are shown at each length, evenly spread and in turns from epoch to epoch, so that features
    that were computed once are met again. None: one is drawn anew each epoch."""
    num_frames: None = None
    """Accepted as None from older configs: buckets have their own."""
    image_size: tuple[None, None] | None = None
    """Accepted without numbers from older configs: buckets have their own."""


class VariableVideoTextDataset:
    """A table whose rows are assigned anew, each epoch, to the buckets of the config's ``bucket_config``.

    `Clip.fps` is the file's rate divided by ``frame_interval``, rounded down, and 120 for images.
    """

    Spec = VariableVideoTextSpec
    columns = ("path", "text", "num_frames", "height", "width")
    """Of the table, that are read."""

    def __init__(
        self, spec: VariableVideoTextSpec, *, bucket_config: Mapping[str, Mapping[int | str, Any]] | None = None
    ) -> None:
        """Read the table, but none of its files.

        Raises:
            ConfigError: There is no ``bucket_config``, or it is wrong; see `Buckets.from_config`.
            DataError: The table can't be used, or none is given.
        """
        if bucket_config is None:
            raise ConfigError(
                "VariableVideoTextDataset needs bucket_config = {resolution: {frames: (probability, batch size)}}, such as "
                '{"240p": {1: (1.0, 16), 51: (1.0, 2)}}.'
            )
        self.spec = spec
        self.buckets = Buckets.from_config(bucket_config)
        if spec.data_path is None:
            raise DataError(
                "dataset.data_path is not set. Give --data-path table.csv, with columns path, text, num_frames, height and "
                "width."
            )
        self.folder = Path(spec.data_path).parent
        table = read_table(spec.data_path, self.columns)
        self._paths, self._texts = StringColumn(table["path"]), StringColumn(table["text"])
        self._num_frames, self._height, self._width = (
            table[name].to_numpy() for name in ("num_frames", "height", "width")
        )

    @staticmethod
    def bucket_sizes(bucket_config: Mapping[str, Mapping[int | str, Any]]) -> list[tuple[Size, int]]:
        """(T, H, W) and batch size of each bucket that clips can fall into."""
        return [(bucket.size, bucket.batch_size) for bucket in Buckets.from_config(bucket_config).in_use()]

    def __len__(self) -> int:
        return len(self._paths)

    def row_paths(self) -> Sequence[str]:
        """The file of each row, as the table names it."""
        return self._paths

    def batches(self, seed: int, epoch: int) -> EpochBatches:
        """The batches of an epoch: which rows, and at which size.

        Raises:
            DataError: No row falls into a bucket; the message has the smallest change by which some would.
        """
        return EpochBatches(self._assign(seed, epoch), self.buckets.buckets, seed=seed, epoch=epoch)

    def balanced_batches(
        self,
        seed: int,
        epoch: int,
        *,
        num_processes: int,
        cost: Callable[[Size], float],
        begun: Sequence[tuple[int, int]] = (),
    ) -> BalancedBatches:
        """As `batches`, but in groups of nearly one cost; see `opensora.core.orders.BalancesBatches`."""
        assigned = self._assign(seed, epoch)
        options = {"seed": seed, "epoch": epoch, "num_processes": num_processes}
        return balanced_batches(assigned, self.buckets.buckets, cost=cost, begun=begun, **options)

    def explain(self, seed: int, epoch: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int8]]:
        """The bucket and the `Fate` of each row in an epoch; see `Buckets.explain`."""
        columns = self._num_frames, self._height, self._width
        return self.buckets.explain(*columns, frame_interval=self.spec.frame_interval, seed=seed, epoch=epoch)

    def _assign(self, seed: int, epoch: int) -> npt.NDArray[np.int32]:
        assigned, fates = self.explain(seed, epoch)
        if not (assigned != NO_BUCKET).any():
            columns = self._num_frames, self._height, self._width
            change = smallest_change(self.buckets, *columns, fates, frame_interval=self.spec.frame_interval)
            raise DataError(f"None of the {len(self)} rows falls into a bucket in epoch {epoch}. {change}")
        return assigned

    def __getitem__(self, key: SampleKey) -> Clip:
        """The clip of row ``key.index``, video [3, *key.size].

        Raises:
            DataError: The row's file can't be used.
        """
        path, (num_frames, height, width) = self._look_up(key)
        if is_video(path):
            with VideoFile(path) as file:
                frames = self._choose(path, file.info.num_frames, num_frames, key)
                video = transform_video(self.spec.transform_name, file.read(frames), height, width)
                fps = self._rate(file.info.fps)
        else:
            video, fps = transform_image(self.spec.transform_name, read_image(path), height, width), IMAGE_FPS
        return Clip(video=video, text=self._texts[key.index], fps=fps, key=key, path=str(path))

    def recipe(self, key: SampleKey, look: Callable[[Path], SourceFacts]) -> ClipRecipe:
        """How the clip of row ``key.index`` is made; see `opensora.core.protocols.Dataset`.

        Raises:
            DataError: The row's file can't be used.
        """
        path, size = self._look_up(key)
        facts = look(path)
        return ClipRecipe(
            path=path,
            frames=self._choose(path, facts.num_frames, size[0], key) if is_video(path) else (0,),
            size=size,
            transform={"name": self.spec.transform_name},
            text=self._texts[key.index],
            fps=self._rate(facts.fps) if is_video(path) else IMAGE_FPS,
        )

    def _look_up(self, key: SampleKey) -> tuple[Path, Size]:
        """A row's file, and the size that it is to have."""
        if key.size is None:
            raise ValueError("A key of this dataset needs a size; take keys from `batches`.")
        path = resolve_path(self._paths[key.index], self.folder)
        if is_image(path) and key.size[0] > 1:
            raise DataError(f"{path} is an image, but the table says that it has more than one frame.")
        if not (is_video(path) or is_image(path)):
            raise DataError(f"{path} is neither a video nor an image by its extension.")
        return path, key.size

    def _choose(self, path: Path, total: int, num_frames: int, key: SampleKey) -> list[int]:
        interval, starts = self.spec.frame_interval, self.spec.num_starts
        return choose_frames(path, total, num_frames, frame_interval=interval, key=key, num_starts=starts)

    def _rate(self, fps: float) -> float:
        return float(math.floor(fps / self.spec.frame_interval))
