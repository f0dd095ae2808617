"""Where a run writes: numbered folders, lines that survive a kill, files that are whole."""

from __future__ import annotations

import json
import logging
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from opensora.core import MachineError
from opensora.core.run_folder import (
    append_jsonl,
    held,
    logging_to,
    make_folder,
    new_run_folder,
    read_jsonl,
    write_atomically,
)


def test_folders_are_numbered_and_named_as_published(golden: Callable[[str], Any], tmp_path: Path) -> None:
    outputs = tmp_path / "a" / "outputs"
    for case in golden("training_misc")["experiment_folder"]:
        if isinstance(case["existing"], int):
            assert new_run_folder(outputs, case["model_type"]) == outputs / case["name"]
            assert (outputs / case["name"]).is_dir()


def test_the_next_number_follows_the_highest_whatever_else_is_there(tmp_path: Path) -> None:
    for name in ("000-A", "007-B", "1003-C", "2000", "notes-9999"):
        (tmp_path / name).mkdir()
    (tmp_path / "9-stray.txt").touch()
    assert new_run_folder(tmp_path, "X").name == "1004-X"


def test_runs_that_start_at_once_get_folders_of_their_own(tmp_path: Path) -> None:
    start = threading.Barrier(8)
    for number in range(2000):  # so that looking takes a while, and all look before the first has made its folder
        (tmp_path / f"stray-{number}").touch()

    def make(_: int) -> Path:
        start.wait()
        return new_run_folder(tmp_path, "X")

    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(make, range(8)))
    assert sorted(folder.name for folder in folders) == [f"{number:03d}-X" for number in range(8)]
    assert sorted(path for path in tmp_path.iterdir() if path.is_dir()) == sorted(folders)


@pytest.mark.parametrize("place", ["file/outputs", "file", "/proc/outputs"], ids=["under a file", "a file", "proc"])
@pytest.mark.parametrize(
    "make", [make_folder, lambda folder: new_run_folder(folder, "X")], ids=["folder", "run folder"]
)
def test_a_place_that_can_not_be_written_is_named(make: Callable[[Path], Path], place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match=f"Can't write to .*{place}: .*--outputs or --save-dir"):
        make(tmp_path / place)


def test_making_a_folder_leaves_nothing_in_it(tmp_path: Path) -> None:
    assert make_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    make_folder(tmp_path / "a" / "b")
    assert not list((tmp_path / "a" / "b").iterdir())


def test_lines_come_back_as_they_went(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_jsonl(path) == []
    records = [{"step": step, "loss": 0.1 * step, "text": "ä\n波"} for step in range(3)]
    for record in records:
        append_jsonl(path, record)
    assert read_jsonl(path) == records
    assert len(path.read_text().splitlines()) == 3


@pytest.mark.parametrize("cut", range(1, 15))
def test_a_cut_line_is_left_out_and_the_next_one_is_whole(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in range(2):
        append_jsonl(path, {"step": step})
    whole = path.read_bytes()  # 12 bytes a line
    path.write_bytes(whole[: len(whole) - cut])
    before = read_jsonl(path)
    assert before == ([{"step": 0}] if cut <= 12 else [])
    append_jsonl(path, {"step": 2})
    after = [record["step"] for record in read_jsonl(path)]
    assert after[-1] == 2
    assert after[:-1] == [0, 1][: len(after) - 1]
    assert len(after) > len(before)


def test_processes_may_append_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    text = "x" * 5000
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: append_jsonl(path, {"number": number, "text": text}), range(64)))
    assert sorted(record["number"] for record in read_jsonl(path)) == list(range(64))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "config.py"
    write_atomically(path, "old")
    write_atomically(path, "new ä")
    assert path.read_text(encoding="utf-8") == "new ä"
    program = (
        "import sys, pathlib; from opensora.core.run_folder import write_atomically\n"
        "write_atomically(pathlib.Path(sys.argv[1]), 'x' * 100_000)"
    )
    limited = subprocess.run(
        [sys.executable, "-c", program, path],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "config.py can't be written: File too large" in limited.stderr
    assert path.read_text(encoding="utf-8") == "new ä"
    assert list(tmp_path.iterdir()) == [path]


def test_the_log_file_has_what_opensora_said_inside_the_block(tmp_path: Path) -> None:
    logger, other = logging.getLogger("opensora.core.a_test"), logging.getLogger("another_library")
    level = logging.getLogger("opensora").level
    logger.warning("before")
    with logging_to(tmp_path / "run.log"):
        logger.info("inside %d ä", 7)
        logger.debug("too fine")
        other.warning("not ours")
    logger.warning("after")
    (line,) = (tmp_path / "run.log").read_text(encoding="utf-8").splitlines()
    assert line.endswith("INFO opensora.core.a_test: inside 7 ä")
    assert logging.getLogger("opensora").level == level


def test_a_resumed_run_goes_on_with_its_log(tmp_path: Path) -> None:
    for part in ("first", "second"):
        with logging_to(tmp_path / "run.log"):
            logging.getLogger("opensora").warning(part)
    assert [line.split()[-1] for line in (tmp_path / "run.log").read_text().splitlines()] == ["first", "second"]


def test_records_are_plain_json(tmp_path: Path) -> None:
    append_jsonl(tmp_path / "a.jsonl", {"row": 3, "reason": 'it said "no"'})
    assert json.loads((tmp_path / "a.jsonl").read_text()) == {"row": 3, "reason": 'it said "no"'}


def test_two_runs_can_not_be_in_one_folder(tmp_path: Path) -> None:
    with held(tmp_path), pytest.raises(MachineError, match=f"Another run is writing to {tmp_path}"), held(tmp_path):
        pytest.fail("both are in")
    with held(tmp_path):
        pass


def test_a_killed_run_lets_its_folder_go(tmp_path: Path) -> None:
    program = (
        "import os, pathlib, signal, sys; from opensora.core.run_folder import held\n"
        "with held(pathlib.Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path], check=False)
    with held(tmp_path):
        pass


def test_a_line_that_can_not_be_written_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(MachineError, match=r"metrics\.jsonl can't be written: Is a directory"):
        append_jsonl(tmp_path / "metrics.jsonl", {"step": 1})
