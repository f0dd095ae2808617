"""Captioned videos and images in shards: tar files, read in sequence."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from attrs import field, frozen
from attrs.validators import deep_iterable, ge, gt, min_len

from opensora.core.errors import DataError
from opensora.core.protocols import IMAGE_FPS, Clip, Size
from opensora.core.randomness import SampleKey, seed_for
from opensora.core.transforms import transform_image, transform_video
from opensora.core.video import VideoFile, is_image, read_image
from opensora.data.bucket_odds import Integers
from opensora.data.shards import find_shards, index_shard
from opensora.data.tables import StringColumn
from opensora.data.video_text import check_transform, choose_frames

__all__ = ["WebDataset", "WebDatasetSpec"]


@frozen(kw_only=True)
class WebDatasetSpec:
    """Captioned clips in tar files, all brought to one length and size."""

    data_path: str | list[str] | None = field(default=None)
    """Folder of .tar files, or one or more names, with braces for many: clips-{000..127}.tar. None: to be given when it is
    run."""
    text_field: str = field(default="text", validator=min_len(1))
    """Where samples have a .json instead of a .txt: the caption's name in it."""
    num_frames: int = field(default=16, validator=gt(0))
    """Frames of a clip."""
    frame_interval: int = field(default=1, validator=gt(0))
    """Take about every n-th frame: a longer stretch of time at a lower rate."""
    image_size: tuple[int, int] = field(default=(256, 256), validator=deep_iterable(gt(0)))
    """Height and width in pixels."""
    transform_name: Literal["center", "resize_crop"] = "center"
    """center: the central square. resize_crop: any size, as much of the picture as fits."""
    shuffle_window: int = field(default=1000, validator=ge(0))
    """A sample is shown at most so many places from where it is in its shard: more is better mixed, less reads more in
    sequence. 0: as in the shard. Shards themselves come in random order."""
    index_folder: str | None = None
    """Where the index of each shard is kept, to be made once. None: beside the shard."""

    def __attrs_post_init__(self) -> None:
        check_transform(self.transform_name, self.image_size)


class WebDataset:
    """Shards in random order, each read nearly in sequence; clips as a `VideoTextDataset` makes them.

    An index of each shard says where its samples are, so that the order of an epoch is known before a shard is read:
    processes and loader workers each read their own samples, once, however many they are.
    """

    Spec = WebDatasetSpec

    def __init__(self, spec: WebDatasetSpec, *, needs_text: bool = True) -> None:
        """Index the shards, or read the indices that were made before.

        Args:
            spec: Options.
            needs_text: Whether samples must have captions; without, clips have an empty text.

        Raises:
            ConfigError: A name is no file's.
            DataError: A shard is missing or can't be read, or none has a sample.
            MachineError: The library ``webdataset`` is missing.
        """
        self.spec = spec
        if not spec.data_path:
            raise DataError(
                "dataset.data_path is not set. Give --data-path 'clips-{000..127}.tar', or a folder of .tar files."
            )
        self._needs_text = needs_text
        self._shards = find_shards(spec.data_path)
        cache = Path(spec.index_folder) if spec.index_folder else None
        indices = [index_shard(shard, cache) for shard in self._shards]
        self._counts: Integers = np.array([len(index) for index in indices])
        if not self._counts.sum():
            raise DataError(f"None of the {len(indices)} shards of {spec.data_path} has a sample.")
        self._shard_of: npt.NDArray[np.int32] = np.repeat(np.arange(len(indices), dtype=np.int32), self._counts)
        self._names = StringColumn(pl.Series([name for index in indices for name in index.names]))
        self._media = np.concatenate([index.media for index in indices])
        self._texts = np.concatenate([index.texts for index in indices])
        self._is_json = np.concatenate([index.is_json for index in indices])

    @property
    def size(self) -> Size:
        """(T, H, W) of every clip."""
        return self.spec.num_frames, *self.spec.image_size

    def __len__(self) -> int:
        return len(self._shard_of)

    def row_paths(self) -> Sequence[str]:
        """The file of each sample, as a name within its shard's."""
        return [str(self._path(index)) for index in range(len(self))]

    def order(self, seed: int, epoch: int) -> Integers:
        """The samples of an epoch: shard after shard, in random order, moved by at most ``shuffle_window`` places."""
        generator = np.random.default_rng(seed_for("order of shards", seed, epoch))
        shards = generator.permutation(len(self._counts))
        counts = self._counts[shards]
        begins = (np.cumsum(self._counts) - self._counts)[shards]
        order: Integers = np.arange(len(self)) + np.repeat(begins - (np.cumsum(counts) - counts), counts)
        if self.spec.shuffle_window:
            moved = np.arange(len(self)) + generator.random(len(self)) * self.spec.shuffle_window
            order = order[np.argsort(moved, kind="stable")]
        return order

    def __getitem__(self, key: SampleKey) -> Clip:
        """The clip of sample ``key.index``, video [3, num_frames, *image_size].

        Raises:
            DataError: The sample can't be used.
        """
        path = self._path(key.index)
        text = self._read_text(key.index, path) if self._needs_text else ""
        content = self._read(key.index, self._media[key.index], "video or image")
        if is_image(path):
            image = transform_image(self.spec.transform_name, read_image(path, content=content), *self.spec.image_size)
            return Clip(
                video=image.repeat(1, self.spec.num_frames, 1, 1), text=text, fps=IMAGE_FPS, key=key, path=str(path)
            )
        video, fps = self._read_video(content, path, key)
        return Clip(video=video, text=text, fps=fps, key=key, path=str(path))

    def _read_video(self, content: bytes, path: Path, key: SampleKey) -> tuple[torch.Tensor, float]:
        transform = partial(transform_video, self.spec.transform_name)
        with VideoFile(path, content=content) as file:
            interval = self.spec.frame_interval
            total = file.info.num_frames
            frames = choose_frames(path, total, self.spec.num_frames, frame_interval=interval, key=key)
            return transform(file.read(frames), *self.spec.image_size), file.info.fps

    def _path(self, index: int) -> Path:
        return self._shard(index) / self._names[index]

    def _shard(self, index: int) -> Path:
        return self._shards[int(self._shard_of[index])]

    def _read_text(self, index: int, path: Path) -> str:
        content = self._read(index, self._texts[index], "caption (.txt or .json)")
        try:
            if not self._is_json[index]:
                return content.decode().strip()
            text = json.loads(content)[self.spec.text_field]
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: the caption is not UTF-8: {error}.") from error
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f'{path}: the .json has no "{self.spec.text_field}" (dataset.text_field).') from error
        if not isinstance(text, str):
            raise DataError(f'{path}: "{self.spec.text_field}" of the .json is {text!r:.40}, not text.')
        return text.strip()

    def _read(self, index: int, place: Integers, what: str) -> bytes:
        """Bytes of a sample's shard."""
        begin, size = place.tolist()
        if begin < 0:
            raise DataError(f"{self._path(index)} has no {what}.")
        try:
            with self._shard(index).open("rb") as file:
                file.seek(begin)
                return file.read(size)
        except OSError as error:
            raise DataError(f"{self._path(index)} can't be read: {error.strerror}.") from error
