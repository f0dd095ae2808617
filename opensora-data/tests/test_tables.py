"""Tables of clips: what is read, and what each fault says."""

import pickle

import polars as pl
import pytest

from opensora.core import DataError
from opensora.data.tables import StringColumn, read_table, resolve_path

ROWS = {"path": ["a.mp4", "b, c.mp4"], "text": ["a wave", 'x "y"'], "num_frames": [16, 51]}


def write(folder, name: str, content: str | bytes):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("ending", ["csv", "CSV", "parquet", "parquet.gzip", "jsonl", "ndjson"])
def test_every_format_gives_the_same_rows(tmp_path, ending):
    path = tmp_path / f"clips.{ending}"
    table = pl.DataFrame({"aes": [5.0, 6.0], **ROWS})
    kind = ending.lower().partition(".")[0]
    {"csv": table.write_csv, "parquet": table.write_parquet}.get(kind, table.write_ndjson)(path)
    assert read_table(path, ["path", "text", "num_frames"]).to_dict(as_series=False) == ROWS


def test_blanks_around_names_and_values_are_taken_away(tmp_path):
    path = write(tmp_path, "clips.csv", "path, text , num_frames\na.mp4, a wave ,  16\n")
    assert read_table(path, ["path", "text", "num_frames"]).rows() == [("a.mp4", "a wave", 16)]


def test_numbers_in_captions_stay_text(tmp_path):
    path = write(tmp_path, "clips.csv", "path,text\n1.mp4,007\n2.mp4,1e3\n")
    assert read_table(path, ["text"])["text"].to_list() == ["007", "1e3"]


def test_whole_numbers_may_be_written_as_decimals(tmp_path):
    path = write(tmp_path, "clips.csv", "path,num_frames\na.mp4,16.0\n")  # as pandas does to columns with gaps
    assert read_table(path, ["num_frames"])["num_frames"].to_list() == [16]


def test_a_byte_order_mark_and_empty_captions_are_fine(tmp_path):
    path = write(tmp_path, "clips.csv", b'\xef\xbb\xbfpath,text\na.mp4,""\n')
    assert read_table(path, ["path", "text"]).rows() == [("a.mp4", "")]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("clips.csv", "path,caption\na.mp4,b\n", r'no column "text"\. It has: path, caption\.$'),
        ("clips.csv", "path,txt\na.mp4,b\n", r'no column "text"\. It has: path, txt\. Did you mean "txt"\?'),
        ("clips.csv", "path,text\n", "has no rows"),
        ("clips.csv", "", "is empty"),
        ("clips.csv", "path, path,text\na,b,c\n", '2 columns named "path"'),
        ("clips.csv", "path,text\na,b\n,c\n,d\n", "path is empty in data row 2, and 1 more rows"),
        ("clips.csv", "path,text\na,b\nc,\n", "text is empty in data row 2"),
        ("clips.csv", "path,text\na,b,c\n", "can't be read as a table: found more fields"),
        ("clips.csv", "path,text\na,\xe9\n".encode("latin1"), "can't be read as a table: invalid utf-8"),
        ("clips.parquet", "path,text\na,b\n", "can't be read as a table"),
        ("clips.jsonl", '{"path": "a", "text"\n', "can't be read as a table"),
        ("clips.jsonl", "", "is empty"),
        ("clips.jsonl", '{"path": "a", "text": ["b"]}\n', "column text holds List"),
        ("clips.txt", "path,text\na,b\n", r"no table that can be read\. Endings: \.csv, \.parquet, .*\.jsonl"),
    ],
    ids=[
        "missing column",
        "misspelt column",
        "no rows",
        "empty",
        "column twice",
        "no path",
        "no caption",
        "too many fields",
        "not UTF-8",
        "CSV as Parquet",
        "broken JSON",
        "empty JSON lines",
        "list as caption",
        "unknown ending",
    ],
)
def test_faults_are_named(tmp_path, name, content, says):
    path = write(tmp_path, name, content)
    with pytest.raises(DataError, match=says) as caught:
        read_table(path, ["path", "text"])
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("many", "num_frames is 'many', not a whole number in data row 2"),
        ("", "num_frames is empty"),
        ("1.5", "'1.5', not"),
    ],
)
def test_wrong_numbers_are_named(tmp_path, value, says):
    path = write(tmp_path, "clips.csv", f"path,num_frames\na,1\nb,{value}\n")
    with pytest.raises(DataError, match=says):
        read_table(path, ["path", "num_frames"])


@pytest.mark.parametrize("gap", [None, float("nan")], ids=["null", "NaN"])
def test_gaps_in_parquet_are_named(tmp_path, gap):
    pl.DataFrame({"path": ["a", "b"], "fps": [24.0, gap]}, strict=False).write_parquet(tmp_path / "clips.parquet")
    with pytest.raises(DataError, match=r"fps is .* in data row 2"):
        read_table(tmp_path / "clips.parquet", ["fps"])


def test_a_missing_table_and_a_folder_are_named(tmp_path):
    with pytest.raises(DataError, match=r"gone.csv is missing; a table was expected"):
        read_table(tmp_path / "gone.csv", ["path"])
    with pytest.raises(DataError, match=r"is a folder"):
        read_table(tmp_path, ["path"])


def test_files_are_found_from_the_working_directory_first(tmp_path, monkeypatch):
    (tmp_path / "table").mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table" / "beside.mp4").touch()
    (tmp_path / "table" / "both.mp4").touch()
    (tmp_path / "both.mp4").touch()
    folder = tmp_path / "table"
    assert resolve_path("beside.mp4", folder) == folder / "beside.mp4"
    assert resolve_path("both.mp4", folder).resolve() == tmp_path / "both.mp4"
    assert resolve_path(str(folder / "both.mp4"), tmp_path) == folder / "both.mp4"
    with pytest.raises(DataError, match=r"gone\.mp4 is missing: it is neither in the working directory nor in "):
        resolve_path("gone.mp4", folder)


def test_string_columns_keep_every_string():
    strings = ["", "a", "Grüße 波", "x" * 1000, ""]
    column = StringColumn(pl.Series(strings))
    assert list(column) == strings
    assert column[-1] == ""
    assert column[-2] == "x" * 1000
    assert list(pickle.loads(pickle.dumps(column))) == strings
    with pytest.raises(IndexError):
        column[5]
