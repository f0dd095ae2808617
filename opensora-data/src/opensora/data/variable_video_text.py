"""Captioned videos and images of any size and length, in batches that each have one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from attrs import field, frozen
from attrs.validators import gt, min_len, optional

from opensora.core.errors import ConfigError, DataError
from opensora.core.protocols import IMAGE_FPS, Clip, Size
from opensora.core.randomness import SampleKey
from opensora.core.transforms import transform_image, transform_video
from opensora.core.video import VideoFile, is_image, is_video, read_image
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
    num_frames: None = None
    """Accepted as None from older configs: buckets have their own."""
    image_size: tuple[None, None] | None = None
    """Accepted without numbers from older configs: buckets have their own."""


class VariableVideoTextDataset:
    """A table whose rows are assigned anew, each epoch, to the buckets of the config's ``bucket_config``.

    `Clip.fps` is the file's rate divided by ``frame_interval``, rounded down, and 120 for images.
    """

    Spec = VariableVideoTextSpec

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
        table = read_table(spec.data_path, ["path", "text", "num_frames", "height", "width"])
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

    def batches(self, seed: int, epoch: int) -> EpochBatches:
        """The batches of an epoch: which rows, and at which size."""
        assigned = self.buckets.assign(
            self._num_frames,
            self._height,
            self._width,
            frame_interval=self.spec.frame_interval,
            seed=seed,
            epoch=epoch,
        )
        return EpochBatches(assigned, self.buckets.buckets, seed=seed, epoch=epoch)

    def __getitem__(self, key: SampleKey) -> Clip:
        """The clip of row ``key.index``, video [3, *key.size].

        Raises:
            DataError: The row's file can't be used.
        """
        if key.size is None:
            raise ValueError("A key of this dataset needs a size; take keys from `batches`.")
        num_frames, height, width = key.size
        path = resolve_path(self._paths[key.index], self.folder)
        if is_video(path):
            with VideoFile(path) as file:
                interval = self.spec.frame_interval
                frames = choose_frames(path, file.info.num_frames, num_frames, frame_interval=interval, key=key)
                video = transform_video(self.spec.transform_name, file.read(frames), height, width)
                fps = float(math.floor(file.info.fps / interval))
        elif is_image(path):
            if num_frames > 1:
                raise DataError(f"{path} is an image, but the table says that it has more than one frame.")
            video, fps = transform_image(self.spec.transform_name, read_image(path), height, width), IMAGE_FPS
        else:
            raise DataError(f"{path} is neither a video nor an image by its extension.")
        return Clip(video=video, text=self._texts[key.index], fps=fps, key=key, path=str(path))
