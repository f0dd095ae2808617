"""Prompts come from files as written, and go to files that are safe to write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opensora.core import DataError
from opensora.core.prompts import add_scores, file_stem, plan_requests, read_prompts

FOLDER = Path("out/dir")


def plan(prompts: list[str], folder: Path = FOLDER, **options: object) -> list[Any]:
    return plan_requests(prompts, folder, **{"extension": ".mp4", "seed": 42, **options})


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


def test_files_are_named_as_published(golden: Callable[[str], Any]) -> None:
    for row in golden("save_names"):
        if "error" in row or ("prompt" in row and row["prompt"] is None):
            continue  # neither index nor prompt
        by_prompt = row.get("prompt_as_path", False)
        index = 0 if by_prompt else row["sample_idx"]
        requests = plan(
            [row.get("prompt", "unused")],
            Path(row["save_dir"]),
            extension="",
            first_index=index,
            num_sample=row.get("num_sample", 1),
            sample_name=row.get("sample_name"),
            prompt_as_path=by_prompt,
        )
        path = requests[row.get("k", 0)].path
        if "/" in row.get("prompt", ""):  # upstream writes to other folders
            assert path.parent == Path(row["save_dir"])
            assert path.name == row["prompt"].replace("/", "_")
        else:
            assert str(path) == row["ok"]


@pytest.mark.parametrize(
    "prompt", ["/etc/passwd", "../../up", "a\\b", ".hidden", "..", "", "  ", "a\x00b\nc", "x" * 400, "波" * 200]
)
@pytest.mark.parametrize("sample_name", [None, "", "p-", "../p"])
def test_a_prompt_never_leaves_its_folder(prompt: str, sample_name: str | None, tmp_path: Path) -> None:
    (request,) = plan([prompt], tmp_path, prompt_as_path=True, sample_name=sample_name)
    assert request.path.parent == tmp_path
    request.path.write_bytes(b"")
    assert [path.name for path in tmp_path.iterdir()] == [request.path.name]
    assert not request.path.name.startswith(".")
    assert request.prompt == prompt


def test_a_sample_name_never_leaves_its_folder() -> None:
    assert plan(["a"], sample_name="../../a/b")[0].path.parent == FOLDER


@given(st.text(max_size=300).filter(lambda text: text.isprintable()))
def test_any_prompt_makes_a_file_name(prompt: str) -> None:
    stem = file_stem(prompt, None)
    assert stem
    assert len(stem.encode()) <= 150
    assert not {"/", "\\", "\x00", "\n"} & set(stem)
    assert file_stem(prompt, None) == stem


def test_long_prompts_with_a_common_start_get_names_of_their_own() -> None:
    paths = {request.path for request in plan(["a" * 200 + "b", "a" * 200 + "c"], prompt_as_path=True)}
    assert len(paths) == 2


def test_each_prompt_and_repeat_has_a_seed_of_its_own() -> None:
    requests = plan(["a", "b"], num_sample=3, first_index=5)
    assert [request.seed for request in requests] == [57, 58, 59, 60, 61, 62]
    assert [request.path.name for request in requests] == [
        *("sample_0005-0.mp4", "sample_0005-1.mp4", "sample_0005-2.mp4"),
        *("sample_0006-0.mp4", "sample_0006-1.mp4", "sample_0006-2.mp4"),
    ]


def test_a_part_of_the_prompts_makes_the_same_videos_as_the_whole() -> None:
    whole = plan(["a", "b", "c"], num_sample=2)
    assert plan(["c"], num_sample=2, first_index=2) == whole[4:]


def test_scores_go_to_the_encoder_and_not_into_names() -> None:
    (request,) = plan(["a cat."], aes=6.5, prompt_as_path=True)
    assert request.text == "a cat. aesthetic score: 6.5."
    assert request.prompt == "a cat."
    assert request.path == FOLDER / "a cat.mp4"


def test_two_prompts_for_one_file_are_refused_before_anything_is_made() -> None:
    with pytest.raises(DataError, match=r"out/dir/a cat\.mp4"):
        plan(["a cat", "a dog", "a cat"], prompt_as_path=True)
    assert len(plan(["a cat", "a cat"])) == 2
