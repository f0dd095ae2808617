"""The pipeline ``make-digits``: a dataset of moving digits as mp4 files and a table."""

from __future__ import annotations

import csv
import json
import logging
import shutil
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import attrs
from attrs import field, frozen
from attrs.validators import ge, gt, le, min_len

from opensora.core.config.evaluate import Config
from opensora.core.errors import DataError, MachineError
from opensora.core.video import write_video
from opensora.data.digits.clips import DigitClip, check_path, make_clips, need_scikit_learn

__all__ = ["MakeDigits", "MakeDigitsSpec"]

log = logging.getLogger(__name__)

_RECIPE = "recipe.json"
_FORMAT = 1  # changes when the same spec gives other files


@frozen(kw_only=True)
class MakeDigitsSpec:
    """Write captioned clips of handwritten digits on the move."""

    pipeline: Literal["make-digits"] = "make-digits"
    save_dir: str = field(validator=min_len(1))
    """Folder to make: clips.csv with path, text, num_frames, height, width and fps, held_out.csv, and the mp4 files."""
    num_clips: int = field(default=2000, validator=gt(0))
    """Clips in clips.csv. A multiple of 40 holds each caption equally often."""
    num_held_out: int = field(default=200, validator=ge(0))
    """Further clips in held_out.csv, not to be trained on."""
    seed: int = field(default=0, validator=ge(0))
    """Of handwriting, line and start of each clip."""
    canvas: int = 16
    """Height and width in pixels, a multiple of 16."""
    num_frames: int = 8
    """Frames of a clip; as many as the path across the canvas allows, 9 at most."""
    jitter: int = 1
    """How far off the middle a path may be, in eighths of the digit."""
    fps: float = field(default=8, validator=gt(0))
    """Frames a second."""
    crf: int = field(default=4, validator=[ge(0), le(51)])
    """H.264's quality; 4 keeps single pixels nearly as they are."""

    def __attrs_post_init__(self) -> None:
        check_path(canvas=self.canvas, num_frames=self.num_frames, jitter=self.jitter)


class MakeDigits:
    """Writes the folder whole or not at all, and leaves one that holds the same dataset as it is."""

    Spec = MakeDigitsSpec

    def __init__(self, spec: MakeDigitsSpec, *, config: Config) -> None:
        """Check that the digits are there.

        Raises:
            MachineError: scikit-learn is missing.
        """
        need_scikit_learn()
        self.spec, self.config = spec, config
        self.folder = Path(spec.save_dir)

    def run(self) -> dict[str, Path]:
        """Write the dataset, and return where it is.

        Raises:
            DataError: Another dataset, or anything else, is in the folder.
            MachineError: The folder can't be written.
        """
        if self._is_there():
            log.info("%s holds these clips already", self.folder)
            return {"clips": self.folder / "clips.csv"}
        started = time.monotonic()
        temporary = self.folder.with_name(f".{self.folder.name}.{uuid4().hex}.tmp")
        try:
            self._write(temporary)
            temporary.replace(self.folder)
        except OSError as error:
            raise MachineError(f"{self.folder} can't be written: {error.strerror}.") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        log.info(
            "Wrote %d clips and %d held-out ones to %s in %.1f s",
            self.spec.num_clips,
            self.spec.num_held_out,
            self.folder,
            time.monotonic() - started,
        )
        return {"clips": self.folder / "clips.csv"}

    def dry_run(self) -> str:
        """What `run` would write."""
        spec = self.spec
        return (
            f"{spec.num_clips} clips and {spec.num_held_out} held-out ones in {self.folder}: "
            f"{spec.num_frames} frames of {spec.canvas} x {spec.canvas} at {spec.fps:g} frames a second"
        )

    def _is_there(self) -> bool:
        if not self.folder.exists() or (self.folder.is_dir() and not any(self.folder.iterdir())):
            return False
        try:
            found = json.loads((self.folder / _RECIPE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self.folder} is in the way: it holds no clips of ours. Choose another save_dir."
            ) from error
        if found == (wanted := self._recipe()):
            return True
        differing = ", ".join(f"{key}={found.get(key)!r}" for key in wanted if found.get(key) != wanted[key])
        raise DataError(f"{self.folder} holds clips made with {differing}. Remove it or choose another save_dir.")

    def _recipe(self) -> dict[str, Any]:
        options = attrs.asdict(self.spec, filter=lambda attribute, _: attribute.name not in ("pipeline", "save_dir"))
        return {"format": _FORMAT, **options}

    def _write(self, folder: Path) -> None:
        spec = self.spec
        make = partial(make_clips, canvas=spec.canvas, num_frames=spec.num_frames, jitter=spec.jitter)
        folder.mkdir(parents=True)
        self._write_clips(folder, "clips", make(spec.num_clips, seed=spec.seed))
        self._write_clips(folder, "held_out", make(spec.num_held_out, seed=(spec.seed, 1)))
        (folder / _RECIPE).write_text(json.dumps(self._recipe(), indent=1), encoding="utf-8")

    def _write_clips(self, folder: Path, name: str, clips: Iterable[DigitClip]) -> None:
        """``name``.csv, and its files in the folder ``name``."""
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["path", "text", "num_frames", "height", "width", "fps"])
            for index, clip in enumerate(clips):
                path = Path(name, f"{index:05d}.mp4")
                write_video(folder / path, clip.frames, self.spec.fps, crf=self.spec.crf)
                table.writerow([path.as_posix(), clip.caption, *clip.frames.shape[:3], f"{self.spec.fps:g}"])
