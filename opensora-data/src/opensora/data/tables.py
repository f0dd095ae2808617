"""Tables of clips and images: CSV, Parquet or JSON lines, one row a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from opensora.core.errors import DataError, did_you_mean

__all__ = ["COLUMN_TYPES", "StringColumn", "find_gaps", "read_present", "read_table", "resolve_path"]

COLUMN_TYPES: dict[str, type[pl.DataType]] = {
    "path": pl.String,
    "text": pl.String,
    "label": pl.Int64,
    "num_frames": pl.Int64,
    "height": pl.Int64,
    "width": pl.Int64,
    "aspect_ratio": pl.Float64,
    "fps": pl.Float64,
}
"""The columns that datasets read, and what they hold. Other columns may be there and are ignored."""

_COUNTS = ("num_frames", "height", "width")


def read_table(path: str | Path, columns: Sequence[str]) -> pl.DataFrame:
    """The named columns of a table, each as its type in `COLUMN_TYPES`, without gaps; at least one row.

    Blanks around the names in the header and around strings are taken away.

    Args:
        path: .csv with a header, .parquet (or .parquet.gzip), .jsonl or .ndjson.

    Raises:
        DataError: The file is missing, unreadable or empty, lacks a column, or has a gap or a value of another type.
    """
    table = _read(Path(path), columns)
    return table.select(_checked(table[column], Path(path)) for column in columns)


def read_present(path: Path, columns: Sequence[str]) -> pl.DataFrame:
    """As `read_table`, but only of those columns that are there, and null where a value can't be used.

    Raises:
        DataError: The file is missing, unreadable or empty.
    """
    header = {name.strip() for name in _read(path, []).columns}
    present = [column for column in columns if column in header]
    table = _read(path, present)
    return table.select(_typed(table[column], path)[0].alias(column) for column in present)


def find_gaps(path: Path, columns: Sequence[str]) -> pl.DataFrame:
    """The values for which `read_table` refuses those columns: row (from 0), path, reason; a row of it for each value.

    Columns that aren't there are passed over.

    Raises:
        DataError: The file is missing, unreadable or empty.
    """
    header = {name.strip() for name in _read(path, []).columns}
    table = _read(path, [column for column in columns if column in header])
    found = [pl.DataFrame(schema={"row": pl.UInt32, "reason": pl.String})]
    for values in table.get_columns():
        typed, gaps = _typed(values, path)
        wrong = {"": gaps, "less than 1": (typed < 1) & ~gaps} if values.name in _COUNTS else {"": gaps}
        for what, mask in wrong.items():
            rows = mask.arg_true()
            texts = [f"{values.name} {what or _describe(values[row], values.name)}" for row in rows]
            found.append(pl.DataFrame({"row": rows, "reason": pl.Series(texts, dtype=pl.String)}))
    paths = (
        table["path"].cast(pl.String) if "path" in header else pl.repeat(None, len(table), dtype=pl.String, eager=True)
    )
    gaps_of_all = pl.concat(found).sort("row")
    return gaps_of_all.select("row", paths[gaps_of_all["row"]].alias("path"), "reason")


def _read(path: Path, columns: Sequence[str]) -> pl.DataFrame:
    """The named columns as they are; where none is named, the first row with all of them."""
    if not path.is_file():
        raise DataError(f"{path} is {'a folder' if path.is_dir() else 'missing'}; a table was expected.")
    read = _reader_of(path)
    try:
        table = read(path, columns)
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path} can't be read as a table: {reason}.") from error
    if table.is_empty():
        raise DataError(f"{path} has no rows.")
    return table


def resolve_path(path: str, folder: Path) -> Path:
    """Where a row's file is: relative to the working directory if it is there, else to the table's folder.

    Raises:
        DataError: It is in neither.
    """
    here = Path(path)
    if here.is_absolute() or here.exists():
        return here
    beside = folder / path
    if not beside.exists():
        raise DataError(f"{path} is missing: it is neither in the working directory nor in {folder}.")
    return beside


class StringColumn(Sequence[str]):
    """Strings packed in two arrays, which loader workers share; reference counts would copy a list into each."""

    def __init__(self, strings: pl.Series) -> None:
        """``strings`` has no nulls."""
        ends = strings.str.len_bytes().cast(pl.Int64).cum_sum().to_numpy()
        self._bounds = np.concatenate([np.zeros(1, np.int64), ends])
        self._bytes = np.frombuffer(str(strings.str.join("").item()).encode(), np.uint8)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # rows are read one by one; no slices
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return self._bytes[self._bounds[index] : self._bounds[index + 1]].tobytes().decode()


_Reader = Callable[[Path, Sequence[str]], pl.DataFrame]


def _reader_of(path: Path) -> _Reader:
    for endings, reader in _READERS.items():
        if path.name.lower().endswith(endings):
            return reader
    known = ", ".join(ending for endings in _READERS for ending in endings)
    raise DataError(f"{path} is no table that can be read. Endings: {known}.")


def _read_csv(path: Path, columns: Sequence[str]) -> pl.DataFrame:
    if not path.stat().st_size:
        raise DataError(f"{path} is empty.")
    header = pl.read_csv(path, n_rows=0, infer_schema=False).columns
    if not columns:
        return pl.read_csv(path, n_rows=1, infer_schema=False)
    names = _found(header, columns, path)
    # Everything as text: a caption or label column must not become numbers because its first rows look like some.
    return pl.read_csv(path, columns=list(names), infer_schema=False).rename(names)


def _read_parquet(path: Path, columns: Sequence[str]) -> pl.DataFrame:
    if not columns:
        return pl.read_parquet(path, n_rows=1)
    names = _found(list(pl.read_parquet_schema(path)), columns, path)
    return pl.read_parquet(path, columns=list(names)).rename(names)


def _read_jsonl(path: Path, columns: Sequence[str]) -> pl.DataFrame:
    if not path.stat().st_size:
        raise DataError(f"{path} is empty.")
    table = pl.read_ndjson(path, infer_schema_length=None)
    if not columns:
        return table.head(1)
    names = _found(table.columns, columns, path)
    return table.select(list(names)).rename(names)


_READERS: dict[tuple[str, ...], _Reader] = {
    (".csv",): _read_csv,
    (".parquet", ".parquet.gzip", ".parquet.gz"): _read_parquet,
    (".jsonl", ".ndjson"): _read_jsonl,
}


def _found(header: Sequence[str], columns: Sequence[str], path: Path) -> dict[str, str]:
    """{name in the file: column} of the wanted columns."""
    found: dict[str, str] = {}
    for column in columns:
        matches = [name for name in header if name.strip() == column]
        if not matches:
            listed = ", ".join(name.strip() for name in header)
            hint = did_you_mean(column, [name.strip() for name in header])
            raise DataError(f'{path} has no column "{column}". It has: {listed}.{hint}')
        if len(matches) > 1:
            raise DataError(f'{path} has {len(matches)} columns named "{column}".')
        found[matches[0]] = column
    return found


def _checked(values: pl.Series, path: Path) -> pl.Series:
    """The column as its type.

    Raises:
        DataError: A gap, or a value of another type or too low; the message has the first such row.
    """
    typed, gaps = _typed(values, path)
    if (first := gaps.arg_max()) is not None and gaps[first]:
        what = _describe(values[first], values.name)
        more = f", and {gaps.sum() - 1} more rows" if gaps.sum() > 1 else ""
        raise DataError(f"{path}: {values.name} {what} in data row {first + 1}{more}.")
    if values.name in _COUNTS and (few := typed < 1).any():
        first = int(few.arg_max() or 0)
        more = f", and in {few.sum() - 1} more rows" if few.sum() > 1 else ""
        raise DataError(
            f"{path}: {values.name} is {typed[first]} in data row {first + 1}{more}; it must be at least 1. Tools write "
            "0 for files that can't be read: take those rows out."
        )
    return typed.rename(values.name)


def _typed(values: pl.Series, path: Path) -> tuple[pl.Series, pl.Series]:
    """The column as its type, and where it is null for want of such a value.

    Raises:
        DataError: It holds lists or the like.
    """
    wanted = COLUMN_TYPES[values.name]
    if values.dtype.is_nested():
        raise DataError(f"{path}: column {values.name} holds {values.dtype}, not single values.")
    if values.dtype == pl.String:
        values = values.str.strip_chars()
    typed = values.cast(wanted, strict=False)
    if wanted == pl.Int64 and values.dtype != pl.Int64:
        numbers = values.cast(pl.Float64, strict=False)
        typed = pl.select(pl.when(numbers == numbers.round()).then(numbers)).to_series().cast(pl.Int64, strict=False)
    gaps = typed.is_null() | (
        typed.eq("") if values.name == "path" else typed.is_nan() if wanted == pl.Float64 else False
    )
    return typed, gaps


def _describe(value: object, column: str) -> str:
    """What is wrong with a value that is a gap."""
    if isinstance(value, str):
        value = value.strip()
    wanted = COLUMN_TYPES[column]
    kind = "text" if wanted == pl.String else "a whole number" if wanted == pl.Int64 else "a number"
    return "is empty" if value in (None, "") else f"is {value!r}, not {kind}"
