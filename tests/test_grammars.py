"""Whatever people write into prompts, strategies and prompt files gives a result, or an error that opensora raises.

Each property is tried with 200 cases, and with 4,000 among the slow tests: more than 20,000 in all.
"""

from __future__ import annotations

import csv
import io
import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from opensora.core import OpenSoraError
from opensora.core.frame_conditions import given_frames_of
from opensora.core.mask_strategy import FrameEdit, parse_mask_strategy, place_edits, print_mask_strategy
from opensora.core.prompt_files import PromptSettings, read_prompt_file
from opensora.core.prompt_syntax import (
    Rounds,
    check_rounds,
    join_references,
    parse_rounds,
    print_rounds,
    split_references,
    split_suffix,
)

CASES = [200, pytest.param(4000, marks=pytest.mark.slow)]


def examine(cases: int, strategy: SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    """Run ``check`` on so many values of the strategy."""
    options = settings(max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    options(given(strategy)(check))()


def near(*written: str, signs: str) -> SearchStrategy[str]:
    """Texts that look right, and are often a little wrong: any text, signs of the grammar, and changed examples."""
    alphabet = st.sampled_from(signs) | st.characters()
    return st.one_of(
        st.text(max_size=30),
        st.text(st.sampled_from(signs), max_size=30),
        st.builds(
            lambda text, place, cut, inserted: text[:place] + inserted + text[place + cut :],
            st.sampled_from(written),
            st.integers(0, 60),
            st.integers(0, 4),
            st.text(alphabet, max_size=4),
        ),
    )


def points_into(error: OpenSoraError, text: str) -> bool:
    """Whether the message ends with a part of the text, and a caret under it or its end."""
    _, shown, pointer = str(error).rsplit("\n", 2)
    wide = 2 * (len(text) + len("......"))  # letters may take two columns
    return shown[:4] == "    " and pointer.strip() == "^" and 4 <= pointer.index("^") <= 4 + wide


def result_of(read: Callable[[], Any]) -> Any:
    """What it returns, or the error that it raises on purpose."""
    try:
        return read()
    except OpenSoraError as error:
        return error


EDITS = st.lists(
    st.builds(
        FrameEdit,
        loop=st.integers(0, 10**9),
        reference=st.integers(-3, 3),
        reference_start=st.integers(),
        target_start=st.integers(),
        length=st.integers(1),
        edit_ratio=st.floats(0, 1),
    ),
    max_size=4,
)
STRATEGIES = near("0;0,1,0,-1,1", "0,0,-8,0,8", " 1 , 2,3 ,4,5,0.25;2", "0,0,0,0,1,1e-3", signs="0123456789,;.-+e_ ")


@pytest.mark.parametrize("cases", CASES)
def test_any_mask_strategy_is_read_or_pointed_at(cases: int) -> None:
    def check(text: str) -> None:
        edits = result_of(lambda: parse_mask_strategy(text))
        if isinstance(edits, OpenSoraError):
            assert points_into(edits, text)
        else:
            assert parse_mask_strategy(print_mask_strategy(edits)) == edits

    examine(cases, STRATEGIES, check)


@pytest.mark.parametrize("cases", CASES)
def test_mask_strategies_come_back_as_they_were_printed(cases: int) -> None:
    def check(edits: list[FrameEdit]) -> None:
        printed = print_mask_strategy(edits)
        assert parse_mask_strategy(printed) == edits
        assert print_mask_strategy(parse_mask_strategy(printed)) == printed

    examine(cases, EDITS, check)


@pytest.mark.parametrize("cases", CASES)
def test_any_edit_is_placed_inside_or_refused(cases: int) -> None:
    small = st.builds(
        FrameEdit,
        reference=st.integers(-3, 3),
        reference_start=st.integers(-20, 20),
        target_start=st.integers(-20, 20),
        length=st.integers(1, 20),
    )

    def check(drawn: tuple[FrameEdit, list[int], int, int | None]) -> None:
        edit, frames, target, align = drawn
        placements = result_of(lambda: place_edits([edit], frames, target_frames=target, align=align))
        if isinstance(placements, OpenSoraError):
            return
        (placed,) = placements
        assert 0 <= placed.reference_start < placed.reference_start + placed.length <= frames[placed.reference]
        assert 0 <= placed.target_start < placed.target_start + placed.length <= target
        assert placed.length + placed.num_missing == min(edit.length, target - placed.target_start)
        assert align is None or placed.reference_start % align == placed.target_start % align == 0

    frames = st.lists(st.integers(0, 18), max_size=3)
    examine(cases, st.tuples(small, frames, st.integers(0, 18), st.none() | st.integers(0, 6)), check)


PROMPTS = near(
    'a cat {"reference_path": "x.png", "mask_strategy": "0"}',
    'é 🎬{"reference_path": ["a{1}.png", "b"]}  ',
    "|0|a|2|b|3|c",
    '|0| a |1| b {"mask_strategy": "1,0,-5,0,5"}',
    signs='{}[]":,|\\0123456789 abn',
)


@pytest.mark.parametrize("cases", CASES)
def test_any_prompt_is_read_or_pointed_at(cases: int) -> None:
    def check(prompt: str) -> None:
        split = result_of(lambda: split_suffix(prompt))
        if isinstance(split, OpenSoraError):
            assert points_into(split, prompt)
            return
        text, values = split
        assert prompt.startswith(text)
        assert split_suffix(f"{text}{json.dumps(values)}") == split
        assert result_of(lambda: given_frames_of(length=5, loop=3, **values))
        rounds = result_of(lambda: parse_rounds(text))
        if isinstance(rounds, OpenSoraError):
            assert points_into(rounds, text)
        else:
            assert parse_rounds(print_rounds(rounds)) == rounds
            missing = result_of(lambda: check_rounds(rounds, 3))
            assert missing is None or points_into(missing, print_rounds(rounds))

    examine(cases, PROMPTS, check)


@pytest.mark.parametrize("cases", CASES)
def test_rounds_come_back_as_they_were_printed(cases: int) -> None:
    texts = st.text(st.characters(exclude_characters="|")).map(str.strip)
    later = st.dictionaries(st.integers(1, 10**9 - 1), texts, max_size=4)
    programmes = st.tuples(texts, later).map(
        lambda drawn: Rounds((drawn[0], *(drawn[1][key] for key in sorted(drawn[1]))), (0, *sorted(drawn[1])))
    )

    def check(rounds: Rounds) -> None:
        assert parse_rounds(print_rounds(rounds)) == rounds
        for start, text in zip(rounds.starts or (0,), rounds.texts, strict=True):
            assert rounds.at(start) == text

    examine(
        cases, programmes | st.text().filter(lambda text: text[:3] != "|0|").map(lambda text: Rounds((text,))), check
    )


@pytest.mark.parametrize("cases", CASES)
def test_any_references_are_read_or_pointed_at(cases: int) -> None:
    def check(text: str) -> None:
        paths = result_of(lambda: split_references(text))
        if isinstance(paths, OpenSoraError):
            assert points_into(paths, text)
        else:
            assert split_references(join_references(paths)) == paths

    examine(cases, near("a.png;b c.mp4", "https://d/e.png ; f", signs=";:/. ab"), check)


LINES = near(
    '{"prompt": "a cat", "seed": 7, "image_size": [240, 426], "connect": ["a", "b"]}',
    '{"text": "a", "num_frames": "2s", "strength": 0.4, "name": null}',
    signs='{}[]":,|\\0123456789 entuxs\n',
)
ROWS = near(
    'prompt,seed,num_frames\na cat,7,2s\n"a, ""b""",,51\n',
    "text,image_size,connect\na,240x426,a;b\n",
    "prompt,mask_strategy,fps\n",
    signs=',"\n\r0123456789x;promtsed ',
)


@pytest.mark.parametrize("cases", CASES)
@pytest.mark.parametrize(
    ("name", "texts"), [("prompts.jsonl", LINES), ("prompts.csv", ROWS), ("prompts.txt", st.text())]
)
def test_any_prompt_file_is_read_or_named(cases: int, name: str, texts: SearchStrategy[str], tmp_path: Path) -> None:
    path = tmp_path / name

    def check(content: bytes) -> None:
        path.write_bytes(content)
        entries = result_of(lambda: read_prompt_file(path))
        if isinstance(entries, OpenSoraError):
            assert name in str(entries)
        else:
            assert entries
            assert all(entry.location.startswith(f"{path}:") for entry in entries)

    encoded = texts.map(lambda text: text.encode(errors="surrogatepass"))
    examine(cases, encoded | st.binary(max_size=60), check)


@pytest.mark.parametrize("cases", CASES)
def test_settings_come_back_from_files(cases: int, tmp_path: Path) -> None:
    words = st.text(string.ascii_letters + ' ,"é波', min_size=1).map(str.strip).filter(bool)
    some = st.builds(
        PromptSettings,
        seed=st.none() | st.integers(0, 2**63),
        num_frames=st.none() | st.integers(1, 10**6) | st.sampled_from(["2s", "4x"]),
        image_size=st.none() | st.tuples(st.integers(1, 9999), st.integers(1, 9999)),
        fps=st.none() | st.floats(0.1, 1000),
        negative_prompt=st.none() | words,
        connect=st.none() | st.tuples(words, words),
        strength=st.none() | st.floats(0.01, 1),
        name=st.none() | words,
    )

    def check(drawn: tuple[str, PromptSettings]) -> None:
        text, wanted = drawn
        values = {"prompt": text, **attrs.asdict(wanted)}
        (tmp_path / "prompts.jsonl").write_text(json.dumps(values), encoding="utf-8")
        cells = {key: "" if value is None else value for key, value in values.items()}
        cells |= {"image_size": "x".join(map(str, wanted.image_size or ())), "connect": ";".join(wanted.connect or ())}
        table = io.StringIO()
        csv.writer(table).writerows([cells.keys(), cells.values()])
        (tmp_path / "prompts.csv").write_text(table.getvalue(), encoding="utf-8")
        for name in ("prompts.jsonl", "prompts.csv"):
            (entry,) = read_prompt_file(tmp_path / name)
            assert (entry.text, entry.settings) == (text, wanted)

    examine(cases, st.tuples(words, some), check)
