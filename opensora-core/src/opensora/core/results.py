"""One result of a sampling run: its frames as they come, its recipe, its marked copy, and how well its rounds meet."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from opensora.core.recipes import recipe_text, write_recipe
from opensora.core.seams import Seam, measure_seam
from opensora.core.video import Sink, open_sink
from opensora.core.watermark import Watermark, watermarked_path

__all__ = ["ResultWriter"]

_AROUND_SEAM = 8  # frames on either side that a seam is measured by


class ResultWriter:
    """Writes the file, and beside it its recipe and, if wanted, a marked copy. A context manager.

    The files appear when the block ends well, whole, or not at all. Memory does not grow with the number of frames.
    """

    def __init__(
        self, path: Path, *, fps: float, crf: int, recipe: Mapping[str, Any], watermark: bool | str = False
    ) -> None:
        """Writes nothing yet.

        Args:
            path: Its ending says the format: .mp4, .gif, .png; none: a folder of png files.
            fps: Frames a second.
            crf: H.264's quality.
            recipe: See `opensora.core.recipes`.
            watermark: True for the built-in mark, or the path of a png.
        """
        self.path, self.fps, self.crf, self.recipe = path, fps, crf, recipe
        self._mark = Watermark.load(watermark) if watermark else None
        self._stack = ExitStack()
        self._last: Tensor | None = None
        self._before: Tensor | None = None
        self._after: list[Tensor] = []
        self.seams: list[Seam] = []
        """Of all rounds after the first; whole once the block has ended."""

    def __enter__(self) -> Self:
        metadata = {"comment": recipe_text(self.recipe)}
        paths = [self.path] if self._mark is None else [self.path, watermarked_path(self.path)]
        with ExitStack() as stack:
            sinks = [open_sink(path, fps=self.fps, crf=self.crf, metadata=metadata) for path in paths]
            self._sinks: list[Sink] = [stack.enter_context(sink) for sink in sinks]
            stack.push(self._conclude)  # before the files appear; if it fails they don't
            self._stack = stack.pop_all()
        return self

    def append(self, frames: Tensor, *, is_new_round: bool = False) -> None:
        """Write the next frames.

        Args:
            frames: uint8 [T, H, W, 3].
            is_new_round: Whether a round that isn't the first begins with them.
        """
        if is_new_round:
            self._close_seam()
            self._before = self._last
        if self._before is not None:
            self._after.append(frames)
            if sum(map(len, self._after)) >= _AROUND_SEAM:
                self._close_seam()
        self._last = frames if self._last is None else torch.cat([self._last, frames])[-_AROUND_SEAM:]
        self._sinks[0].append(frames)
        if self._mark is not None:
            self._sinks[1].append(self._mark.put_on(frames))

    def _close_seam(self) -> None:
        if self._before is not None and self._after:
            self.seams.append(measure_seam(self._before, torch.cat(self._after)[:_AROUND_SEAM]))
        self._before, self._after = None, []

    def _conclude(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self._close_seam()
            write_recipe(self.path, self.recipe)  # first, so that what is there always has one

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)
