"""One picture of many videos: each row a caption and its frames from left to right."""

from __future__ import annotations

import math
import unicodedata
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
from attrs import frozen
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from opensora.core.errors import ShapeError
from opensora.core.video import write_image

__all__ = ["draw_contact_sheet", "write_contact_sheet"]

_PAPER, _INK, _FAINT = (255, 255, 255), (20, 20, 20), (130, 130, 130)
_FONT_SIZE, _TITLE_SIZE, _LINE_HEIGHT = 17, 26, 21
_MARGIN, _GAP = 20, 3  # around the sheet; between frames
_CAPTION_WIDTH = 215
_BLOCK_GAP = 36  # between two columns of rows
_WIDTH_TO_HEIGHT = 1.5  # what the number of columns aims at
_MAX_ROWS = 400


def write_contact_sheet(
    path: str | Path,
    rows: Sequence[tuple[str, Tensor | NDArray[np.uint8]]],
    *,
    title: str | None = None,
    frame_size: int = 64,
    max_frames: int = 12,
) -> None:
    """Write `draw_contact_sheet`'s picture as a png.

    Raises:
        ShapeError: See `draw_contact_sheet`.
        MachineError: The file can't be written.
    """
    write_image(
        path, np.asarray(draw_contact_sheet(rows, title=title, frame_size=frame_size, max_frames=max_frames), np.uint8)
    )


def draw_contact_sheet(
    rows: Sequence[tuple[str, Tensor | NDArray[np.uint8]]],
    *,
    title: str | None = None,
    frame_size: int = 64,
    max_frames: int = 12,
) -> Image.Image:
    """Captions and frames in as many columns of rows as make a sheet of ordinary proportions.

    The rows read down the first column, then down the next. After 400 rows the rest is only counted.

    Args:
        rows: Caption and frames uint8 [T, H, W, 3]; rows may differ in length and size.
        title: A line at the top.
        frame_size: About how many pixels a frame's shorter side gets. Small frames are enlarged by a whole number
            without smoothing, so that their pixels stay visible; large ones are reduced.
        max_frames: Longer videos are shown by this many frames, evenly spaced, first and last included.

    Raises:
        ShapeError: No rows, or frames that aren't uint8 [T, H, W, 3].
    """
    if not rows:
        raise ShapeError("A contact sheet needs at least one row.")
    strips = [_Strip.of(caption, frames, frame_size, max_frames) for caption, frames in rows[:_MAX_ROWS]]
    layout = _Layout.of(strips, has_title=title is not None, has_note=len(rows) > len(strips))
    sheet = Image.new("RGB", (layout.width, layout.height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    if title is not None:
        draw.text((_MARGIN, _MARGIN), _plain(title), _INK, _font(_TITLE_SIZE))
    if len(rows) > len(strips):
        note = f"{len(rows) - len(strips)} more rows are not shown."
        draw.text((_MARGIN, layout.height - _MARGIN - _LINE_HEIGHT), note, _FAINT, _font(_FONT_SIZE))
    for index, strip in enumerate(strips):
        left, top = layout.places[index]
        text_top = top + (strip.row_height - len(strip.lines) * _LINE_HEIGHT) // 2
        for number, line in enumerate(strip.lines):
            draw.text((left, text_top + number * _LINE_HEIGHT), line, _INK, _font(_FONT_SIZE))
        frame_top = top + (strip.row_height - strip.height) // 2
        for number, picture in enumerate(strip.pictures):
            sheet.paste(picture, (left + _CAPTION_WIDTH + number * (strip.width + _GAP), frame_top))
    return sheet


@frozen
class _Strip:
    """A row: the caption's lines and the scaled frames."""

    lines: list[str]
    pictures: list[Image.Image]

    @classmethod
    def of(cls, caption: str, frames: Tensor | NDArray[np.uint8], frame_size: int, max_frames: int) -> _Strip:
        array = frames.detach().cpu().numpy() if isinstance(frames, Tensor) else frames
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3 or 0 in array.shape:
            raise ShapeError(f"Frames must be uint8 [T, H, W, 3]; got {array.dtype} {list(array.shape)} ({caption!r}).")
        count = min(len(array), max_frames)
        shown = np.linspace(0, len(array) - 1, count).round().astype(int)
        pictures = [_scaled(Image.fromarray(np.ascontiguousarray(array[index])), frame_size) for index in shown]
        max_lines = max(3, pictures[0].height // _LINE_HEIGHT)
        return cls(_wrapped(caption, _CAPTION_WIDTH - 12, max_lines), pictures)

    @property
    def width(self) -> int:
        return self.pictures[0].width

    @property
    def height(self) -> int:
        return self.pictures[0].height

    @property
    def row_height(self) -> int:
        """Of the frames or the caption, whichever is higher."""
        return max(self.height, len(self.lines) * _LINE_HEIGHT)


@frozen(kw_only=True)
class _Layout:
    """Where each row goes, and the size of the sheet."""

    width: int
    height: int
    places: list[tuple[int, int]]
    """Left and top of each row."""

    @classmethod
    def of(cls, strips: Sequence[_Strip], *, has_title: bool, has_note: bool) -> _Layout:
        frames_width = max(len(strip.pictures) * (strip.width + _GAP) for strip in strips)
        block_width = _CAPTION_WIDTH + frames_width - _GAP
        heights = [strip.row_height + _GAP for strip in strips]
        columns = _in_columns(heights, math.sqrt(_WIDTH_TO_HEIGHT * sum(heights) / (block_width + _BLOCK_GAP)))
        top = _MARGIN + (2 * _TITLE_SIZE if has_title else 0)
        bottom = _MARGIN + (2 * _LINE_HEIGHT if has_note else 0)
        places = []
        for number, column in enumerate(columns):
            left = _MARGIN + number * (block_width + _BLOCK_GAP)
            places += [(left, top + above - height) for above, height in zip(accumulate(column), column, strict=True)]
        return cls(
            width=2 * _MARGIN + len(columns) * (block_width + _BLOCK_GAP) - _BLOCK_GAP,
            height=top + max(map(sum, columns)) - _GAP + bottom,
            places=places,
        )


def _in_columns(heights: Sequence[int], wanted: float) -> list[list[int]]:
    """Heights of rows, in order, cut into about ``wanted`` columns, the highest of which is as low as can be."""
    number = min(len(heights), max(1, round(wanted)))
    limits = range(max(heights), sum(heights) + 1)
    return _cut(heights, limits[bisect_left(limits, True, key=lambda limit: len(_cut(heights, limit)) <= number)])


def _cut(heights: Sequence[int], limit: int) -> list[list[int]]:
    columns: list[list[int]] = [[]]
    for height in heights:
        if sum(columns[-1]) + height > limit:
            columns.append([])
        columns[-1].append(height)
    return columns


def _scaled(picture: Image.Image, frame_size: int) -> Image.Image:
    factor = frame_size / min(picture.size)
    if factor >= 1:
        return picture.resize((picture.width * round(factor), picture.height * round(factor)), Image.Resampling.NEAREST)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    return picture.resize(size, Image.Resampling.BOX)


def _wrapped(text: str, width: int, max_lines: int) -> list[str]:
    """Lines of at most ``width`` pixels; long words are broken, and what doesn't fit ends in an ellipsis."""
    measure = _font(_FONT_SIZE).getlength
    lines = [""]
    for word in _plain(text).split():
        if measure(f"{lines[-1]} {word}".lstrip()) <= width:
            lines[-1] = f"{lines[-1]} {word}".lstrip()
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if measure(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) <= max_lines:
        return lines
    last = lines[max_lines - 1]
    while measure(f"{last}...") > width:
        last = last[:-1]
    return [*lines[: max_lines - 1], f"{last}..."]


def _plain(text: str) -> str:
    """Letters without accents: Pillow's built-in font has no others. Scripts that it lacks show as boxes."""
    return "".join(letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
