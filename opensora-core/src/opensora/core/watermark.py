"""A mark in the lower right corner of frames: the built-in one, or a picture of the user's.

Shapes: T frames, H height, W width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from opensora.core.errors import ShapeError
from opensora.core.video import load_image
from opensora.core.video_writing import RESULT_EXTENSIONS

__all__ = ["Watermark", "draw_mark", "watermarked_path"]

_SHARE = 10  # the mark is a tenth as high as the frame
_MARGIN_SHARE = 40
_TEXT = "opensora"
_INK, _PLATE = (255, 255, 255, 235), (0, 0, 0, 110)
_DRAWN_HEIGHT = 320  # larger than it is shown, so that scaling smooths it


class Watermark:
    """Puts a mark on frames, piece by piece.

    Args:
        mark: RGBA; scaled to a tenth of the frames' height.
    """

    def __init__(self, mark: Image.Image) -> None:
        self._mark = mark.convert("RGBA")
        self._patches: dict[tuple[int, int], _Patch] = {}

    @classmethod
    def load(cls, source: str | Path | bool = True) -> Self:
        """The built-in mark for True, or a picture in a file, with transparency if it has any.

        Raises:
            DataError: The file is missing or no picture.
        """
        if isinstance(source, bool):
            return cls(draw_mark())
        return cls(load_image(source))

    def put_on(self, frames: Tensor) -> Tensor:
        """A copy of frames uint8 [T, H, W, 3], marked.

        Raises:
            ShapeError: They are something else.
        """
        if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise ShapeError(f"Frames must be uint8 [T, H, W, 3]; got {frames.dtype} {list(frames.shape)}.")
        height, width = frames.shape[1:3]
        if (height, width) not in self._patches:
            self._patches[height, width] = _Patch(self._mark, height, width)
        return self._patches[height, width].put_on(frames)


class _Patch:
    """The mark as frames of one size take it."""

    def __init__(self, mark: Image.Image, height: int, width: int) -> None:
        margin = round(height / _MARGIN_SHARE)
        scale = min(height / _SHARE / mark.height, max(1, width - 2 * margin) / mark.width)
        size = (max(1, round(mark.width * scale)), max(1, round(mark.height * scale)))
        scaled = np.array(mark.resize(size, Image.Resampling.LANCZOS), np.float32)
        pixels = torch.from_numpy(scaled)
        opacity = pixels[..., 3:] / 255
        self._added, self._kept = pixels[..., :3] * opacity, 1 - opacity  # [h, w, 3], [h, w, 1]
        bottom, right = height - margin, width - min(margin, width - size[0])
        self._rows, self._columns = slice(bottom - size[1], bottom), slice(right - size[0], right)

    def put_on(self, frames: Tensor) -> Tensor:
        marked = frames.clone()
        place = marked[:, self._rows, self._columns]
        mixed = place.float() * self._kept.to(frames.device) + self._added.to(frames.device)
        place.copy_(mixed.round().clamp(0, 255))
        return marked


def draw_mark() -> Image.Image:
    """The built-in mark: the project's name in white on a rounded, translucent plate. RGBA."""
    font = ImageFont.load_default(round(_DRAWN_HEIGHT * 0.62))
    left, _, right, _ = font.getbbox(_TEXT)
    _, top, _, bottom = font.getbbox("o")  # letters without a tail look centred when this one is
    padding = _DRAWN_HEIGHT * 0.3
    size = (round(right - left + 2 * padding), _DRAWN_HEIGHT)
    plate = Image.new("RGBA", size, (*_PLATE[:3], 0))
    draw = ImageDraw.Draw(plate)
    draw.rounded_rectangle((0, 0, size[0] - 1, size[1] - 1), radius=_DRAWN_HEIGHT * 0.3, fill=_PLATE)
    draw.text((padding - left, (_DRAWN_HEIGHT - top - bottom) / 2), _TEXT, _INK, font)
    return plate


def watermarked_path(path: str | Path) -> Path:
    """``name_watermark.mp4`` beside ``name.mp4``; of a folder of frames ``name``, ``name_watermark``."""
    path = Path(path)
    ending = path.suffix if path.suffix.lower() in RESULT_EXTENSIONS.values() else ""
    return path.with_name(f"{path.name.removesuffix(ending)}_watermark{ending}")
