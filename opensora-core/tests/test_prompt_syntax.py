"""References and rounds in prompts are read as published, and what is wrong in them is pointed at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from opensora.core import ConfigError
from opensora.core.prompt_syntax import (
    Rounds,
    check_rounds,
    is_url,
    join_references,
    parse_rounds,
    print_rounds,
    split_references,
    split_suffix,
)
from opensora.core.prompts import add_scores

# Defects of upstream, as the specification says: it stops at the first, and takes the second.
BRACE_IN_PATH = 'x{"reference_path": "a{1}.png"}'
NULL = 'x{"reference_path": null}'


def caret(error: pytest.ExceptionInfo[ConfigError]) -> tuple[str, int]:
    """The text that an error shows, and the column that it points at."""
    _, text, pointer = str(error.value).split("\n")
    assert pointer.strip() == "^"
    return text[4:], pointer.index("^") - 4


def test_json_in_prompts_is_read_as_published(golden: Callable[[str], Any]) -> None:
    for row in golden("prompts")["json_in_prompt"]:
        if "error" in row or row["prompt"] == NULL:
            continue
        text, values = split_suffix(row["prompt"])
        paths = row["ok"]["reference_path"]
        assert text == row["ok"]["prompt"]
        assert values.get("reference_path", "") == (";".join(paths) if isinstance(paths, list) else paths)
        assert values.get("mask_strategy", "") == row["ok"]["mask_strategy"]


def test_json_that_is_wrong_is_an_error_with_its_place(golden: Callable[[str], Any]) -> None:
    wrong = [row["prompt"] for row in golden("prompts")["json_in_prompt"] if "error" in row]
    for prompt in {*wrong, NULL} - {BRACE_IN_PATH}:
        with pytest.raises(ConfigError, match=r"^prompt: .*\n") as caught:
            split_suffix(prompt)
        assert caret(caught)[0] == prompt
        assert prompt.find("{") < caret(caught)[1] <= len(prompt)


def test_a_path_may_hold_a_brace() -> None:
    assert split_suffix(BRACE_IN_PATH) == ("x", {"reference_path": "a{1}.png"})


@pytest.mark.parametrize(
    ("prompt", "column", "message"),
    [
        ("a {b} c", 3, 'a "{" starts the JSON at a prompt\'s end, which is wrong here: expecting property name'),
        ("a cat{", 6, "expecting property name"),
        ('a{"reference_path": "x', 20, "unterminated string"),
        ('a{"mask_strategy": "0"', 22, "expecting ',' delimiter"),
        ('a{"mask_strategy": "0"}  b c', 25, "text goes on after its JSON"),
        (
            'a{"mask_strategy": "fps", "fps": 3}',
            26,
            '"fps" is no key of a prompt\'s JSON. It may have reference_path and',
        ),
        (
            'a{"Reference_path": "b"}',
            2,
            '"Reference_path" is no key of a prompt\'s JSON. Did you mean "reference_path"?',
        ),
        ('a{"mask_strategy": null}', 19, "mask_strategy can't be null. Leave it out"),
        ('a{"mask_strategy" : 0}', 20, 'mask_strategy must be a text, not "0"'),
        ('a{"mask_strategy": ["0"]}', 19, 'mask_strategy must be a text, not "["0"]"'),
        ('a{"reference_path": ["b", 1]}', 20, 'reference_path must be a text, not "["b", 1]"'),
        (
            'a{"mask_strategy": "0",\n"reference_path": {"b": "}"}}',
            42,
            'reference_path must be a text, not "{"b": "}"}"',
        ),
    ],
)
def test_mistakes_in_json_are_pointed_at(prompt: str, column: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        split_suffix(prompt)
    assert message in str(caught.value)
    assert caret(caught) == (prompt.replace("\n", " "), column)


@pytest.mark.parametrize(("text", "columns"), [("波が", 4), ("e\u0301", 1), ("a\tb\nc", 5), ("🎬", 2), ("ﬀ", 1)])
def test_the_caret_stands_under_the_place_on_a_terminal(text: str, columns: int) -> None:
    """Wide letters take two columns there, combining accents none; a line break would end the line."""
    with pytest.raises(ConfigError) as caught:
        split_suffix(f"{text}{{x")
    _, _, pointer = str(caught.value).split("\n")
    assert pointer.index("^") == 4 + columns + 1


@pytest.mark.parametrize("value", ["[" * 100_000, "9" * 5000, '{"a":' * 900 + "1" + "}" * 900])
def test_json_beyond_all_measure_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"^prompt: .*\n    a\{"):
        split_suffix(f'a{{"mask_strategy": {value}}}')


def test_of_a_prompt_of_ten_thousand_words_the_surroundings_are_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        split_suffix("word " * 5000 + "{x} " + "word " * 5000)
    shown, column = caret(caught)
    assert shown[column - 1 : column + 2] == "{x}"
    assert len(shown) < 120


def test_an_empty_text_takes_away_what_the_run_says() -> None:
    assert split_suffix('a {"reference_path": ""}') == ("a ", {"reference_path": ""})
    assert split_suffix("a {}") == ("a ", {})


def test_several_paths_may_be_a_list() -> None:
    _, values = split_suffix('a{"reference_path": ["b c.png", "https://d/e.mp4"]}')
    assert split_references(values["reference_path"]) == ["b c.png", "https://d/e.mp4"]


def test_rounds_are_read_as_published(golden: Callable[[str], Any]) -> None:
    checked = 0
    for row in golden("prompts")["loop_prompts"]:
        if "error" in row["split"] or row["prompt"] in ("|0|a|0|b", "|0|a|5|b|3|c"):
            with pytest.raises(ConfigError, match=r"^prompt: .*\n"):
                parse_rounds(row["prompt"])
            continue
        texts, starts = row["split"]["ok"]
        rounds = parse_rounds(row["prompt"])
        assert list(rounds.texts) == texts
        assert rounds.starts == (None if starts is None else tuple(starts))
        assert print_rounds(rounds) == row["merged"]["ok"]
        for loop, text in row["at_loop"].items():
            assert rounds.at(int(loop)) == text["ok"]
        checked += 1
    assert checked == 12


@pytest.mark.parametrize(
    ("prompt", "column", "message"),
    [
        ("|0|a|x|b", 5, 'after a "|" comes the number of a round, not "x". Texts can\'t hold "|"'),
        ("|0|a||b", 5, "comes the number of a round, not nothing"),
        ("|0|a|-1|b", 5, 'not "-1"'),
        ("|0|a|²|b", 5, 'not "²"'),
        ("|0|a|1234567890|b", 5, 'not "1234567890"'),
        ("|0|a|2", 6, 'round 2 has no text. Write "|" and it'),
        ("|0|a|0|b", 5, "round 0 comes after round 0"),
        ("|0|a| 5 |b|3|c", 11, "round 3 comes after round 5. Write rounds in rising order"),
    ],
)
def test_mistakes_in_rounds_are_pointed_at(prompt: str, column: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_rounds(prompt)
    assert message in str(caught.value)
    assert caret(caught) == (prompt, column)


def test_texts_for_rounds_that_are_not_made_are_refused() -> None:
    rounds = parse_rounds("|0|a seed|2| a flower |03|c")
    check_rounds(rounds, 4)
    with pytest.raises(ConfigError, match="round 3 of 3 is none; they count from 0") as caught:
        check_rounds(rounds, 3)
    assert caret(caught) == ("|0|a seed|2|a flower|3|c", 21)
    check_rounds(parse_rounds("one for all"), 1)


def test_scores_go_to_the_text_of_each_round() -> None:
    rounds = parse_rounds("|0|a seed.|2|a flower.").map(
        lambda text: add_scores(text, aes=6.5, flow=None, camera_motion=None)
    )
    assert print_rounds(rounds) == "|0|a seed. aesthetic score: 6.5.|2|a flower. aesthetic score: 6.5."
    assert parse_rounds("a").map(str.upper) == Rounds(("A",))


def test_a_text_that_could_not_be_printed_is_refused() -> None:
    with pytest.raises(ConfigError, match="a text can't hold"):
        parse_rounds("|0|a|1|b").map(lambda text: f"{text}|")
    with pytest.raises(ConfigError, match="Rounds can't have the texts"):
        parse_rounds("a").map("|0|{}".format)
    assert parse_rounds("|0|a|1|b").map(lambda text: f" {text} ").texts == ("a", "b")


@pytest.mark.parametrize("starts", [(), (1, 2), (0, 0), (0, 2, 1), (0,)])
def test_rounds_out_of_order_cannot_be_made(starts: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="rounds rise from 0"):
        Rounds(("a", "b", "c")[: max(len(starts), 2)], starts)


def test_references_are_separated_by_semicolons() -> None:
    assert split_references(" a b.png ;c{1}.mp4; https://d/e.png?f=1 ") == [
        "a b.png",
        "c{1}.mp4",
        "https://d/e.png?f=1",
    ]
    assert split_references(None) == split_references("") == split_references("  ") == []


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [("a;;b", 2, "a path is empty"), ("a;", 2, "a path is empty"), ("a; b\x00.png", 4, "character 0x0 can't be part")],
)
def test_mistakes_in_references_are_pointed_at(text: str, column: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        split_references(text)
    assert message in str(caught.value)
    assert caret(caught) == (text.replace("\x00", " "), column)


@pytest.mark.parametrize("path", ["", "a;b", " a"])
def test_a_path_that_could_not_be_read_again_is_not_joined(path: str) -> None:
    with pytest.raises(ConfigError, match="is no path"):
        join_references(["ok.png", path])


def test_urls_are_told_as_published(golden: Callable[[str], Any]) -> None:
    for row in golden("paths")["urls"]:
        assert is_url(row["value"]) is row["is_url"], row
