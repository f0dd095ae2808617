"""The pipeline ``grade``: how many samples show the digit and the direction that their prompt asks for."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs
from attrs import field, frozen
from attrs.validators import min_len

from opensora.core.config.evaluate import Config
from opensora.core.errors import DataError
from opensora.core.run_folder import write_atomically
from opensora.core.video import read_video
from opensora.data.digits.clips import DIGITS, captions, need_scikit_learn
from opensora.data.digits.grader import CHANCE, Grader
from opensora.data.tables import read_table, resolve_path

__all__ = ["Grade", "GradeSpec", "Report", "Score", "find_samples", "grade"]

log = logging.getLogger(__name__)

_TRUSTED = {"digit": 0.95, "direction": 0.99}  # what the grader must reach on real clips


@frozen(kw_only=True)
class GradeSpec:
    """Grade samples of moving digits."""

    pipeline: Literal["grade"] = "grade"
    samples: str = field(default="outputs", validator=min_len(1))
    """Folder of mp4 files, each with its prompt in a .json beside it; or a run folder, whose samples/ is taken; or a
    folder of run folders: the newest with samples."""
    held_out: str | None = None
    """Table of real clips to check the grader on; None: data/held_out.csv of the run folder, if it is there."""
    save_path: str | None = None
    """Where to write the grades; None: grade.json in the run folder."""


@frozen
class Score:
    """Shares of clips, in [0, 1]."""

    clips: int
    digit: float
    direction: float
    both: float


@frozen(kw_only=True)
class Report:
    """All that was graded."""

    samples: Score | None
    """Of samples whose prompt is a caption of the data."""
    other_prompts: Score | None
    """Of samples with any other prompt, or none, against captions in turn: chance, if the model ignores the caption."""
    held_out: Score | None
    """Of real clips: how far the grader is to be trusted."""
    classifier: float
    """Share of real scans, none of which it has seen, that the grader's classifier reads right."""

    def table(self) -> str:
        """For people."""
        rows = [
            ("samples", self.samples),
            ("samples of other prompts", self.other_prompts),
            ("real held-out clips", self.held_out),
        ]
        lines = [f"{'':26}{'clips':>6}{'digit':>10}{'direction':>11}{'both':>9}"]
        lines += [
            f"{name:26}{score.clips:6}{score.digit:10.1%}{score.direction:11.1%}{score.both:9.1%}"
            for name, score in rows
            if score
        ]
        digit, direction = CHANCE["digit"], CHANCE["direction"]
        lines.append(f"{'chance':26}{'':6}{digit:10.1%}{direction:11.1%}{digit * direction:9.1%}")
        lines.append(f"The grader's classifier reads {self.classifier:.1%} of real digits that it has never seen.")
        return "\n".join(lines)


class Grade:
    """Reads each sample's digit and direction from its pixels and compares them with its prompt."""

    Spec = GradeSpec

    def __init__(self, spec: GradeSpec, *, config: Config) -> None:
        """Check that the grader can be built. The samples need not be there yet.

        Raises:
            MachineError: scikit-learn is missing.
        """
        need_scikit_learn()
        self.spec, self.config = spec, config

    def run(self) -> dict[str, Path]:
        """Grade, log the table, write grade.json, and return where that is.

        Raises:
            DataError: No samples, or a sample or its prompt can't be read.
        """
        folder = find_samples(Path(self.spec.samples))
        run_folder = folder.parent if folder.name == "samples" else folder
        held_out = Path(self.spec.held_out) if self.spec.held_out else run_folder / "data" / "held_out.csv"
        report, records = grade(folder, held_out if self.spec.held_out or held_out.exists() else None)
        save_path = Path(self.spec.save_path) if self.spec.save_path else run_folder / "grade.json"
        write_atomically(save_path, json.dumps(_as_json(report, records), indent=1))
        log.info("Grades of %s, also in %s:\n%s", folder, save_path, report.table())
        if report.held_out is None:
            log.warning("No real clips to check the grader on; give held_out.")
        elif any(getattr(report.held_out, fact) < least for fact, least in _TRUSTED.items()):
            log.warning("The grader fails on real clips: digit needs 95 %, direction 99 %. Don't trust these grades.")
        return {"grades": save_path}

    def dry_run(self) -> str:
        """What `run` would read."""
        return f"Grade the samples in {self.spec.samples}"


def grade(folder: Path, held_out: Path | None) -> tuple[Report, list[dict[str, Any]]]:
    """The report, and for each sample its file, prompt and what it shows.

    Args:
        folder: mp4 files, each with a .json beside it.
        held_out: Table of real clips with their captions.

    Raises:
        DataError: A file can't be read.
    """
    grader = Grader()
    records = [_record(grader, path, _prompt_of(path)) for path in sorted(folder.glob("*.mp4"))]
    real: list[dict[str, Any]] = []
    if held_out is not None:
        table = read_table(held_out, ["path", "text"])
        real = [_record(grader, resolve_path(path, held_out.parent), text) for path, text in table.iter_rows()]
    report = Report(
        samples=_score(record for record in records if record["is_caption"]),
        other_prompts=_score(record for record in records if not record["is_caption"]),
        held_out=_score(real),
        classifier=grader.accuracy_on_scans(),
    )
    return report, records


def find_samples(folder: Path) -> Path:
    """The folder itself if it has mp4 files, else its samples/, else the newest samples/ of its sub-folders.

    Raises:
        DataError: No mp4 files in any of them.
    """
    candidates = [folder, folder / "samples"]
    candidates += sorted(folder.glob("*/samples"), key=lambda path: path.stat().st_mtime, reverse=True)
    found = next((path for path in candidates if any(path.glob("*.mp4"))), None)
    if found is None:
        raise DataError(
            f"No samples in {folder}: neither mp4 files nor a folder samples with some. Give --samples FOLDER."
        )
    return found


_EXPECTED = {caption: (digit, direction) for digit, direction, caption in captions()}


def _record(grader: Grader, path: Path, prompt: str) -> dict[str, Any]:
    frames, _ = read_video(path)
    try:
        reading = grader.read(frames.numpy())
    except DataError as error:
        raise DataError(f"{path} {error}") from error
    return {
        "path": path.name,
        "prompt": prompt,
        "is_caption": _plain(prompt) in _EXPECTED,
        "digit": DIGITS[reading.digit],
        "direction": reading.direction,
    }


def _score(records: Iterable[Mapping[str, Any]]) -> Score | None:
    """Shares of records that show what their prompt says, or, where it says nothing, what captions in turn say."""
    in_turn = list(_EXPECTED.values())
    right: list[Sequence[bool]] = []
    for index, record in enumerate(records):
        digit, direction = _EXPECTED.get(_plain(record["prompt"]), in_turn[index % len(in_turn)])
        facts = (record["digit"] == DIGITS[digit], record["direction"] == direction)
        right.append((*facts, all(facts)))
    if not right:
        return None
    return Score(len(right), *(sum(column) / len(right) for column in zip(*right, strict=True)))


def _plain(prompt: str) -> str:
    return " ".join(prompt.lower().split())


def _prompt_of(path: Path) -> str:
    beside = path.with_suffix(".json")
    try:
        return str(json.loads(beside.read_text(encoding="utf-8"))["prompt"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{path} has no prompt: {beside.name} beside it must hold one ({error}).") from error


def _as_json(report: Report, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {**attrs.asdict(report), "chance": CHANCE, "records": list(records)}
