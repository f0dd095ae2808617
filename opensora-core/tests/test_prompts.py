"""Prompts come from files as written, and get scores as published."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opensora.core import DataError
from opensora.core.prompts import add_scores, read_prompts


def test_prompt_files_are_read_as_published(golden: Callable[[str], Any], tmp_path: Path) -> None:
    for row in golden("prompts")["prompt_files"]:
        path = tmp_path / "prompts.txt"
        path.write_bytes(row["text"].encode())
        if row["text"]:
            assert read_prompts(path)[row["start"] : row["end"]] == row["prompts"]
        else:  # upstream ends with success and no output
            with pytest.raises(DataError, match=r"prompts\.txt is empty"):
                read_prompts(path)


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        (b"a cat\n\n", ["a cat", ""]),
        ("\ufeffa cat\n".encode(), ["a cat"]),
        ("a wave\u2028at dusk\n\x0cone\n".encode(), ["a wave\u2028at dusk", "one"]),
        ("eine Welle, 波\r\n".encode(), ["eine Welle, 波"]),
    ],
    ids=["empty line", "byte order mark", "other separators", "other letters"],
)
def test_a_line_is_a_prompt(content: bytes, prompts: list[str], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    assert read_prompts(tmp_path / "prompts.txt") == prompts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "can't be read: No such file"),
        (b" \n\t\n", "is empty. Write one prompt a line"),
        (b"caf\xe9\n", "is no UTF-8 text (byte 3)"),
    ],
    ids=["missing", "blank", "latin-1"],
)
def test_bad_prompt_files_say_what_is_wrong(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_prompts(path)
    assert f"{path} {message}" in str(caught.value)


def test_a_folder_is_no_prompt_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="can't be read: Is a directory"):
        read_prompts(tmp_path)


def test_scores_are_added_as_published(golden: Callable[[str], Any]) -> None:
    for row in golden("prompts")["scores"]:
        scores = {"aes": None, "flow": None, "camera_motion": None, **row["scores"]}
        assert add_scores(row["prompt"], **scores) == row["ok"]
