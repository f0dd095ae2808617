"""What becomes of each row of a dataset in an epoch: its bucket, or why it has none. Computed in columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from attrs import evolve, frozen

from opensora.core.components import build, load
from opensora.core.errors import ConfigError, DataError, UserError
from opensora.core.orders import BatchOrder, SampleOrder, Slicing
from opensora.core.pipelines.train import build_dataset, count_steps, order_of
from opensora.core.pipelines.train_spec import LoopSpec, TrainSpec
from opensora.core.protocols import IMAGE_FPS
from opensora.core.video import is_image, is_video, probe_video, read_image
from opensora.data.bucket_odds import NO_BUCKET, Fate
from opensora.data.buckets import EpochBatches
from opensora.data.tables import find_gaps, read_present, resolve_path
from opensora.data.variable_video_text import VariableVideoTextDataset

__all__ = ["Plan", "Planned", "plan", "write_plan"]

_FATES = {
    Fate.TOO_SMALL: "too small: less than 0.8 of the pixels of every resolution",
    Fate.NO_IMAGES: "an image, and no length 1 where it is large enough",
    Fate.TOO_SHORT: "too short for every length where it is large enough",
    Fate.TOO_LONG: "longer than a length of probability 0",
    Fate.TURNED_AWAY: "turned away by the probabilities, in this epoch",
}
_WAITS = "waits for the next epoch, so that all processes have equal work"
_UNKNOWN = "used if it is long enough: the table has no num_frames (see --probe)"


@frozen
class Plan:
    """What becomes of the rows."""

    rows: pl.DataFrame
    """One row each: row, path, fate (used, dropped, waits, unknown), reason, and asked and used frames, size and rate."""
    summary: str


class Planned(Exception):  # noqa: N818  # a plan and an error in one
    """What is known of the rows, where nothing can be trained: ``error`` is what training raises."""

    def __init__(self, plan: Plan, error: UserError) -> None:
        super().__init__(str(error))
        self.plan, self.error = plan, error


def plan(spec: LoopSpec, *, epoch: int = 0, num_processes: int = 1, probe: bool = False) -> Plan:
    """Plan an epoch of a training.

    Args:
        spec: Of the training pipeline.
        epoch: Which; assignments to buckets are drawn anew in each.
        num_processes: How many share the rows.
        probe: Open each file (or image) to see that it is there, and what it is.

    Raises:
        Planned: Training would refuse the table, or have no step. It has the plan so far.
        ConfigError, DataError: The config or the table can't be used at all.
    """
    dataset = _build(spec)
    rows = _rows_of(dataset)
    if probe:
        rows = _probed(rows, dataset.folder)
    lines = [f"data         {spec.dataset.type}: {len(dataset):,} rows"]
    try:
        slicing = Slicing(
            batch_size=getattr(spec, "batch_size", None) or 1,
            accumulation=spec.accumulation_steps,
            world_size=num_processes,
        )
        if isinstance(dataset, VariableVideoTextDataset):
            rows = _bucketed(rows, dataset, spec.seed, epoch)
            lines += _fate_lines(rows)
            order: Any = order_of(spec, dataset) if isinstance(spec, TrainSpec) else BatchOrder(dataset, spec.seed)
            batches = order.of_epoch(epoch, num_processes)
            rows = _waiting(rows, getattr(batches, "left_out", ()))
            if len(getattr(batches, "left_out", ())):
                lines = [lines[0], *_fate_lines(rows)]
            lines += _bucket_lines(batches)
            steps = len(batches) // (slicing.accumulation * num_processes)
        else:
            rows = _fixed(rows, dataset)
            lines += _fate_lines(rows)
            order = SampleOrder.of(dataset, spec.seed)
            steps = len(dataset) // slicing.samples_per_step
        count_steps(evolve(spec, max_steps=None), order, slicing)
    except UserError as error:
        raise Planned(Plan(rows, "\n".join(lines)), error) from error
    if probe:
        lines += _unreadable_lines(rows, spec.max_unreadable)
    each = f"{slicing.accumulation} micro-batches on each of {num_processes} processes"
    lines.append(f"steps        {steps:,} in epoch {epoch}, each of {each}")
    return Plan(rows, "\n".join(lines))


def write_plan(rows: pl.DataFrame, path: Path) -> None:
    """Write the rows of a plan by the file's ending.

    Raises:
        ConfigError: Another ending than .csv, .parquet and .jsonl.
        DataError: The file can't be written.
    """
    writers: dict[str, Callable[[Path], None]] = {
        ".csv": rows.write_csv,
        ".parquet": rows.write_parquet,
        ".jsonl": rows.write_ndjson,
    }
    if path.suffix.lower() not in writers:
        raise ConfigError(f"--output {path}: the ending must be one of {', '.join(writers)}.")
    try:
        writers[path.suffix.lower()](path)
    except OSError as error:
        raise DataError(f"{path} can't be written: {error}") from error


def _build(spec: LoopSpec) -> Any:
    """The dataset.

    Raises:
        Planned: The table has gaps or wrong values; all such rows are in the plan.
        ConfigError: It is no dataset of rows.
        DataError: The table can't be used.
    """
    try:
        dataset: Any = (
            build_dataset(spec) if isinstance(spec, TrainSpec) else build("datasets", spec.dataset, needs_text=False)
        )
    except DataError as error:
        path = spec.dataset.options.get("data_path")
        columns = getattr(load("datasets", spec.dataset.type), "columns", ())
        gaps = find_gaps(Path(path), columns) if isinstance(path, str) and Path(path).is_file() else None
        if gaps is None or gaps.is_empty():
            raise
        gaps = gaps.with_columns(pl.lit("dropped").alias("fate"))
        counts = _counted(gaps)
        line = (
            f"unreadable   {gaps['row'].n_unique():,} rows have values that can't be used; training refuses the table"
        )
        raise Planned(Plan(gaps, "\n".join([line, *counts])), error) from error
    if not hasattr(dataset, "row_paths"):
        raise ConfigError(f"{spec.dataset.type} has no table of clips or images, so there is nothing to plan.")
    return dataset


def _rows_of(dataset: Any) -> pl.DataFrame:
    """row, path, and num_frames, height, width, fps as far as the table has them (null elsewhere)."""
    rows = pl.DataFrame({"path": dataset.row_paths()}).with_row_index("row")
    table = getattr(dataset.spec, "data_path", None)
    columns = ("num_frames", "height", "width", "fps")
    present = read_present(Path(table), columns) if isinstance(table, str) and Path(table).is_file() else pl.DataFrame()
    types = {name: pl.Float64 if name == "fps" else pl.Int64 for name in columns}
    return rows.with_columns(
        present[name] if name in present.columns else pl.lit(None, types[name]).alias(name) for name in columns
    )


class _Probe(NamedTuple):
    num_frames: int | None
    height: int | None
    width: int | None
    fps: float | None
    problem: str | None


def _look(path: str, folder: Path) -> _Probe:
    """What a file is."""
    try:
        found = resolve_path(path, folder)
        if is_image(found):
            image = read_image(found)
            return _Probe(1, image.height, image.width, None, None)
        if not is_video(found):
            raise DataError(f"{found} is neither a video nor an image by its extension.")
        info = probe_video(found)
        return _Probe(info.num_frames, info.height, info.width, info.fps, None)
    except DataError as error:
        return _Probe(None, None, None, None, str(error))


def _probed(rows: pl.DataFrame, folder: Path) -> pl.DataFrame:
    """With what the files say in place of gaps, and ``problem``: why a file can't be read, or differs from the table."""
    with ThreadPoolExecutor() as pool:
        looked = list(pool.map(lambda path: _look(path, folder), rows["path"]))
    types = {"num_frames": pl.Int64, "height": pl.Int64, "width": pl.Int64, "fps": pl.Float64, "problem": pl.String}
    found = pl.DataFrame(looked, schema=types, orient="row").rename({"num_frames": "file_frames"})
    differs = pl.format("the file has {} frames, the table says {}", "file_frames", "num_frames")
    joined = pl.concat([rows, found.select("file_frames", "problem")], how="horizontal")
    return joined.with_columns(
        pl.coalesce("num_frames", "file_frames").alias("num_frames"),
        *[pl.coalesce(rows[name], found[name]).alias(name) for name in ("height", "width", "fps")],
        pl.when(pl.col("problem").is_null() & (pl.col("file_frames") != pl.col("num_frames")))
        .then(differs)
        .otherwise("problem")
        .alias("problem"),
    )


def _bucketed(rows: pl.DataFrame, dataset: VariableVideoTextDataset, seed: int, epoch: int) -> pl.DataFrame:
    """With the bucket of each row, or the reason why there is none."""
    assigned, fates = dataset.explain(seed, epoch)
    buckets = dataset.buckets.buckets
    columns = {
        "resolution": [bucket.resolution for bucket in buckets],
        "aspect_ratio": [bucket.aspect for bucket in buckets],
        "used_num_frames": [bucket.num_frames for bucket in buckets],
        "used_height": [bucket.height for bucket in buckets],
        "used_width": [bucket.width for bucket in buckets],
    }
    place = pl.Series(np.where(assigned == NO_BUCKET, len(buckets), assigned))
    taken = pl.DataFrame({name: pl.Series([*values, None])[place] for name, values in columns.items()})  # type: ignore[misc]  # lists of one type each
    reasons = pl.Series([_FATES.get(fate) for fate in Fate], dtype=pl.String)[pl.Series(fates.astype(np.int64))]
    rows = pl.concat([rows, taken, pl.DataFrame({"reason": reasons})], how="horizontal")
    rows = rows.with_columns(
        pl.when(pl.col("num_frames") == 1)
        .then(pl.lit(IMAGE_FPS))
        .otherwise((pl.col("fps") / dataset.spec.frame_interval).floor())
        .alias("used_fps"),
        pl.when(pl.col("reason").is_null()).then(pl.lit("used")).otherwise(pl.lit("dropped")).alias("fate"),
    )
    return _finished(rows)


def _fixed(rows: pl.DataFrame, dataset: Any) -> pl.DataFrame:
    """Rows of a dataset whose clips have one size."""
    num_frames, height, width = dataset.size
    kinds = rows["path"].map_elements(lambda path: is_image(path) - is_video(path), return_dtype=pl.Int64)
    is_still = (kinds == 1).alias("still")
    known = pl.col("num_frames").is_not_null()
    reason = (
        pl.when(pl.lit(kinds == 0))
        .then(pl.lit("neither a video nor an image by its extension"))
        .when(~pl.lit(is_still) & (pl.col("num_frames") < num_frames))
        .then(pl.lit(f"too short: fewer than {num_frames} frames"))
        .when(~pl.lit(is_still) & ~known)
        .then(pl.lit(_UNKNOWN))
    )
    rows = rows.with_columns(
        reason.alias("reason"),
        pl.lit(num_frames).alias("used_num_frames"),
        pl.lit(height).alias("used_height"),
        pl.lit(width).alias("used_width"),
        pl.when(pl.lit(is_still)).then(pl.lit(IMAGE_FPS)).otherwise("fps").alias("used_fps"),
    ).with_columns(
        pl.when(pl.col("reason").is_null())
        .then(pl.lit("used"))
        .when(pl.col("reason") == _UNKNOWN)
        .then(pl.lit("unknown"))
        .otherwise(pl.lit("dropped"))
        .alias("fate")
    )
    return _finished(rows)


def _finished(rows: pl.DataFrame) -> pl.DataFrame:
    """With what `--probe` saw taken into account, how much clips are enlarged, and the columns in their order."""
    if "problem" in rows.columns:
        can_be_read = pl.col("file_frames").is_not_null() & (pl.col("file_frames") >= pl.col("used_num_frames"))
        is_still = pl.col("file_frames") == 1
        lost = (pl.col("fate") != "dropped") & ~(can_be_read | is_still).fill_null(value=False)
        rows = rows.with_columns(
            pl.when(lost).then(pl.lit("dropped")).otherwise("fate").alias("fate"),
            pl.when(pl.col("problem").is_not_null()).then("problem").otherwise("reason").alias("reason"),
        )
    is_dropped = pl.col("fate") == "dropped"
    used = [name for name in rows.columns if name.startswith("used_")]
    scale = pl.max_horizontal(pl.col("used_height") / pl.col("height"), pl.col("used_width") / pl.col("width"))
    rows = rows.with_columns(scale.alias("scale")).with_columns(
        pl.when(~is_dropped).then(name).alias(name) for name in [*used, "scale"]
    )
    first = ["row", "path", "fate", "reason"]
    pairs = [each for name in ("num_frames", "height", "width", "fps") for each in (name, f"used_{name}")]
    others = [name for name in ("resolution", "aspect_ratio") if name in rows.columns]
    return rows.select([*first, *others, *pairs, "scale"])


def _waiting(rows: pl.DataFrame, left_out: Sequence[int]) -> pl.DataFrame:
    """With the rows marked that balanced batches leave out."""
    waits = pl.col("row").is_in(pl.Series(np.asarray(left_out, np.uint32)).implode())
    return rows.with_columns(
        pl.when(waits).then(pl.lit("waits")).otherwise("fate").alias("fate"),
        pl.when(waits).then(pl.lit(_WAITS)).otherwise("reason").alias("reason"),
    )


def _fate_lines(rows: pl.DataFrame) -> list[str]:
    """Rows by what becomes of them, and how many are enlarged."""
    lines = []
    for fate in ("used", "unknown", "waits", "dropped"):
        some = rows.filter(pl.col("fate") == fate)
        if len(some) or fate == "used":
            lines += [f"{fate:<12} {len(some):,} rows", *_counted(some)]
    enlarged = rows.filter((pl.col("fate") != "dropped") & (pl.col("scale") > 1))["scale"]
    if len(enlarged):
        lines.append(f"enlarged     {len(enlarged):,} of them, by up to {float(enlarged.max()):.2f} times")  # type: ignore[arg-type]  # a float column
    return lines


def _unreadable_lines(rows: pl.DataFrame, limit: float) -> list[str]:
    """A warning, where training would stop for the files that can't be used."""
    share = (rows["fate"] == "dropped").sum() / len(rows)
    too_many = f"unreadable   training stops when more than {limit:.0%} of the rows can't be read (max_unreadable)"
    return [too_many] if share > limit else []


def _counted(rows: pl.DataFrame) -> list[str]:
    """A line for each reason, the most frequent first; those of single files in one."""
    counts = rows.filter(pl.col("reason").is_not_null())["reason"].value_counts(sort=True, name="count")
    shown = [f"{count:>12,} {reason}" for reason, count in counts.head(12).iter_rows()]
    rest = counts.slice(12)["count"].sum()
    return [*shown, f"{rest:>12,} for other reasons: see --output"] if rest else shown


def _bucket_lines(batches: EpochBatches) -> list[str]:
    """Rows and batches of each resolution and length."""
    by_bucket = batches.count_by_bucket()
    totals: dict[tuple[str, int], tuple[int, int, int]] = {}
    for bucket, rows, number in by_bucket:
        place = bucket.resolution, bucket.num_frames
        aspects, all_rows, all_batches = totals.get(place, (0, 0, 0))
        totals[place] = aspects + 1, all_rows + rows, all_batches + number
    lines = [f"buckets      {len(by_bucket):,} in use, {len(batches):,} batches"]
    lines.append(f"{'':13}{'':8}frames aspects     rows  batches")
    for (resolution, frames), (aspects, rows, number) in totals.items():
        lines.append(f"{'':13}{resolution:8}{frames:6,}{aspects:8}{rows:9,}{number:9,}")
    return lines
