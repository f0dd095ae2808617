"""Images with class labels: a folder for each class, or a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
from attrs import field, frozen
from attrs.validators import deep_iterable, gt, min_len

from opensora.core.errors import DataError
from opensora.core.protocols import IMAGE_FPS, Clip, ClipRecipe, Size, SourceFacts
from opensora.core.randomness import SampleKey
from opensora.core.transforms import transform_image
from opensora.core.video import is_image, read_image
from opensora.data.tables import StringColumn, read_table, resolve_path
from opensora.data.video_text import check_transform

__all__ = ["ClassImages", "ClassImagesSpec"]


@frozen(kw_only=True)
class ClassImagesSpec:
    """Images with class labels, as clips of one frame."""

    data_path: str = field(validator=min_len(1))
    """Folder with a folder of images for each class, numbered in the order of their names; or a table (.csv, .parquet,
    .jsonl) with columns path and label, labels being whole numbers."""
    image_size: tuple[int, int] = field(default=(256, 256), validator=deep_iterable(gt(0)))
    """Height and width in pixels."""
    transform_name: Literal["center", "resize_crop"] = "center"
    """center: the central square. resize_crop: any size, as much of the picture as fits."""

    def __attrs_post_init__(self) -> None:
        check_transform(self.transform_name, self.image_size)


class ClassImages:
    """Images whose `Clip.text` is the label's number, for the text encoder ``classes``."""

    Spec = ClassImagesSpec
    columns = ("path", "label")
    """Of the table, that are read."""

    def __init__(self, spec: ClassImagesSpec) -> None:
        """List the images, but read none.

        Raises:
            DataError: The folder or table can't be used.
        """
        self.spec = spec
        data_path = Path(spec.data_path)
        self.classes: tuple[str, ...] = ()
        """Names of the classes by number; empty where a table gives numbers."""
        if data_path.is_dir():
            self.folder = data_path
            self.classes, table = _listed(data_path)
        else:
            self.folder = data_path.parent
            table = read_table(data_path, self.columns)
        self._paths = StringColumn(table["path"])
        self._labels = table["label"].to_numpy().astype(np.int64)
        if (lowest := self._labels.min()) < 0:
            raise DataError(f"{data_path}: label {lowest} is negative; labels count from 0.")

    @property
    def size(self) -> Size:
        """(T, H, W) of every clip."""
        return (1, *self.spec.image_size)

    def __len__(self) -> int:
        return len(self._paths)

    def row_paths(self) -> Sequence[str]:
        """The file of each row, as the table names it."""
        return self._paths

    def __getitem__(self, key: SampleKey) -> Clip:
        """The image of row ``key.index``, video [3, 1, *image_size].

        Raises:
            DataError: The row's file can't be used.
        """
        path = resolve_path(self._paths[key.index], self.folder)
        video = transform_image(self.spec.transform_name, read_image(path), *self.spec.image_size)
        return Clip(video=video, text=str(self._labels[key.index]), fps=IMAGE_FPS, key=key, path=str(path))

    def recipe(self, key: SampleKey, look: Callable[[Path], SourceFacts]) -> ClipRecipe:
        """How the image of row ``key.index`` is made; see `opensora.core.protocols.Dataset`.

        Raises:
            DataError: The row's file is missing.
        """
        return ClipRecipe(
            path=resolve_path(self._paths[key.index], self.folder),
            frames=(0,),
            size=self.size,
            transform={"name": self.spec.transform_name},
            text=str(self._labels[key.index]),
            fps=IMAGE_FPS,
        )


def _listed(folder: Path) -> tuple[tuple[str, ...], pl.DataFrame]:
    """Names of the classes, and a table of absolute paths and labels."""
    classes = tuple(
        sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    )
    if not classes:
        raise DataError(f"{folder} has no folders in it; one for each class was expected.")
    rows = [
        (str(path.absolute()), label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).rglob("*"))
        if is_image(path)
    ]
    if empty := sorted(set(range(len(classes))) - {label for _, label in rows}):
        raise DataError(f"{folder / classes[empty[0]]} has no images. Classes without images: {len(empty)}.")
    return classes, pl.DataFrame(rows, schema={"path": pl.String, "label": pl.Int64}, orient="row")
