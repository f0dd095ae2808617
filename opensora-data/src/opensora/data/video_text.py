"""Captioned videos and images from a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import attrs
import torch
from attrs import field, frozen
from attrs.validators import deep_iterable, gt, min_len, optional

from opensora.core.errors import DataError
from opensora.core.protocols import IMAGE_FPS, Clip, ClipRecipe, Size, SourceFacts
from opensora.core.randomness import SampleKey
from opensora.core.transforms import transform_image, transform_video
from opensora.core.video import VideoFile, is_image, is_video, read_image, read_video
from opensora.data.tables import StringColumn, read_table, resolve_path
from opensora.data.temporal import last_start, sample_frames

__all__ = ["VideoTextDataset", "VideoTextSpec", "check_transform", "choose_frames"]


@frozen(kw_only=True)
class VideoTextSpec:
    """Captioned clips, all brought to one length and size."""

    data_path: str | None = field(default=None, validator=optional(min_len(1)))
    """Table with columns path and text (.csv, .parquet, .jsonl). Paths are relative to the working directory or, if
    they aren't there, to the table. None: to be given when it is run."""
    num_frames: int = field(default=16, validator=gt(0))
    """Frames of a clip."""
    frame_interval: int = field(default=1, validator=gt(0))
    """Take about every n-th frame: a longer stretch of time at a lower rate."""
    image_size: tuple[int, int] = field(default=(256, 256), validator=deep_iterable(gt(0)))
    """Height and width in pixels."""
    transform_name: Literal["center", "resize_crop"] = "center"
    """center: the central square. resize_crop: any size, as much of the picture as fits."""
    num_starts: int | None = field(default=None, validator=optional(gt(0)))
    """Stretches of a video that are shown, evenly spread and in turns from epoch to epoch, so that features that were
    computed once are met again. None: one is drawn anew each epoch."""
    keep_in_memory: bool = False
    """Keep each video whole once it is decoded and transformed, in every process that reads: for data that fit."""

    def __attrs_post_init__(self) -> None:
        check_transform(self.transform_name, self.image_size)


class VideoTextDataset:
    """Videos give a stretch of ``num_frames`` frames, its start drawn anew each epoch; images are repeated.

    `Clip.fps` is the file's rate, whatever ``frame_interval`` is, and 120 for images.
    """

    Spec = VideoTextSpec
    columns = ("path", "text")
    """Of the table, that are read."""

    def __init__(self, spec: VideoTextSpec, *, needs_text: bool = True) -> None:
        """Read the table, but none of its files.

        Args:
            spec: Options.
            needs_text: Whether the table must have captions; without, clips have an empty text.

        Raises:
            DataError: The table can't be used, or none is given.
        """
        self.spec = spec
        if spec.data_path is None:
            raise DataError("dataset.data_path is not set. Give --data-path table.csv, with columns path and text.")
        self.folder = Path(spec.data_path).parent
        table = read_table(spec.data_path, self.columns if needs_text else ["path"])
        self._paths = StringColumn(table["path"])
        self._texts = StringColumn(table["text"]) if needs_text else None
        self._kept: dict[int, tuple[torch.Tensor, float, Path]] = {}

    @property
    def size(self) -> Size:
        """(T, H, W) of every clip."""
        return self.spec.num_frames, *self.spec.image_size

    def __len__(self) -> int:
        return len(self._paths)

    def row_paths(self) -> Sequence[str]:
        """The file of each row, as the table names it."""
        return self._paths

    def __getitem__(self, key: SampleKey) -> Clip:
        """The clip of row ``key.index``, video [3, num_frames, *image_size].

        Raises:
            DataError: The row's file can't be used.
        """
        if key.index in self._kept:
            whole, fps, path = self._kept[key.index]
            return self._clip(key, whole[:, self._choose(path, whole.shape[1], key)], fps, path)
        path = resolve_path(self._paths[key.index], self.folder)
        if is_video(path):
            return self._clip(key, *self._read_video(path, key), path)
        if is_image(path):
            image = transform_image(self.spec.transform_name, read_image(path), *self.spec.image_size)
            return self._clip(key, image.repeat(1, self.spec.num_frames, 1, 1), IMAGE_FPS, path)
        raise _neither(path)

    def recipe(self, key: SampleKey, look: Callable[[Path], SourceFacts]) -> ClipRecipe:
        """How the clip of row ``key.index`` is made; see `opensora.core.protocols.Dataset`.

        Raises:
            DataError: The row's file can't be used.
        """
        path = resolve_path(self._paths[key.index], self.folder)
        if not (is_video(path) or is_image(path)):
            raise _neither(path)
        facts = look(path)
        return ClipRecipe(
            path=path,
            frames=self._choose(path, facts.num_frames, key) if is_video(path) else (0,),
            size=self.size,
            transform={"name": self.spec.transform_name},
            text=self._texts[key.index] if self._texts else "",
            fps=facts.fps if is_video(path) else IMAGE_FPS,
        )

    def _clip(self, key: SampleKey, video: torch.Tensor, fps: float, path: Path) -> Clip:
        text = self._texts[key.index] if self._texts else ""
        return Clip(video=video, text=text, fps=fps, key=key, path=str(path))

    def _read_video(self, path: Path, key: SampleKey) -> tuple[torch.Tensor, float]:
        transform = partial(transform_video, self.spec.transform_name)
        if self.spec.keep_in_memory:
            frames, fps = read_video(path)
            whole = transform(frames, *self.spec.image_size)
            self._kept[key.index] = whole, fps, path
            return whole[:, self._choose(path, len(frames), key)], fps
        with VideoFile(path) as file:
            frames = file.read(self._choose(path, file.info.num_frames, key))
            return transform(frames, *self.spec.image_size), file.info.fps

    def _choose(self, path: Path, total: int, key: SampleKey) -> list[int]:
        spec = self.spec
        return choose_frames(
            path, total, spec.num_frames, frame_interval=spec.frame_interval, key=key, num_starts=spec.num_starts
        )


def choose_frames(
    path: Path, total: int, num_frames: int, *, frame_interval: int, key: SampleKey, num_starts: int | None = None
) -> list[int]:
    """Frames of a file of ``total`` frames that make this showing's clip; where it starts is drawn from ``key``.

    Args:
        num_starts: Of so many evenly spread starts, each in turn, epoch by epoch.

    Raises:
        DataError: The file is too short.
    """
    highest = last_start(total, num_frames, frame_interval=frame_interval)
    if num_starts is None:
        start = int(torch.randint(highest + 1, (), generator=key.generator("start")))
    else:
        first = int(torch.randint(num_starts, (), generator=attrs.evolve(key, epoch=0).generator("start")))
        start = (first + key.epoch) % num_starts * highest // max(1, num_starts - 1)
    try:
        return sample_frames(total, num_frames, frame_interval=frame_interval, start=start)
    except DataError as error:
        raise DataError(f"{path} {error}") from error


def _neither(path: Path) -> DataError:
    return DataError(f"{path} is neither a video nor an image by its extension.")


def check_transform(name: str, image_size: tuple[int, int]) -> None:
    """Refuse a size that the transform can't make.

    Raises:
        ValueError: ``center`` with a height other than the width.
    """
    if name == "center" and image_size[0] != image_size[1]:
        raise ValueError(f'transform_name="center" makes squares, not image_size={image_size}. Use "resize_crop".')
