"""How it is said what of a prompt is cut."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from opensora.core import Conditioning
from opensora.core.text_cuts import cut_off, describe_cut, max_tokens


class Plain:
    """A text encoder with nothing optional."""

    width: int | None = 4
    max_length = 7

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        raise NotImplementedError


class OneVector(Plain):
    """As CLIP: one vector of some tokens."""

    max_length = 1
    max_tokens = 3

    def cut_off(self, prompt: str) -> str:
        return " ".join(prompt.split()[3:])


def test_encoders_are_asked_for_what_they_can_tell() -> None:
    assert cut_off(Plain(), "a b c d e f g h i") == ""
    assert cut_off(OneVector(), "a b c d e") == "d e"
    assert (max_tokens(Plain()), max_tokens(OneVector())) == (7, 3)


def test_a_long_cut_is_told_by_its_ends_and_by_numbers() -> None:
    words = [f"word{number}" for number in range(10_000)]
    said = describe_cut(" ".join(words), " ".join(words[377:]), max_tokens=300, which="prompt 3")
    assert said == (
        "prompt 3: 9,623 of 10,000 words don't fit the text encoder's 300 tokens and are cut: "
        '"word377 word378 word379 word380 word381 word382 ... word9994 word9995 word9996 word9997 word9998 word9999"'
    )


@pytest.mark.parametrize(
    ("prompt", "cut", "said"),
    [
        (
            "one two three",
            "two three",
            "prompt: 2 of 3 words don't fit the text encoder's 4 tokens and are cut: \"two three\"",
        ),
        ("one two", "two", "prompt: 1 of 2 words doesn't fit the text encoder's 4 tokens and is cut: \"two\""),
        ("one", "e", "prompt: 1 of 1 word doesn't fit the text encoder's 4 tokens and is cut: \"e\""),
        (
            "one\ntwo\n three",
            "two\n three",
            "2 of 3 words don't fit the text encoder's 4 tokens and are cut: \"two three\"",
        ),
        ("a-b-c-d-e", "c d e", "prompt: 3 of 3 words don't fit"),  # cleaning took them apart
    ],
    ids=["some", "one", "all", "lines", "more than there were"],
)
def test_a_short_cut_is_shown_whole(prompt: str, cut: str, said: str) -> None:
    assert said in describe_cut(prompt, cut, max_tokens=4)


def test_text_without_blanks_is_counted_in_characters() -> None:
    end = "\u6ce2" * 1000
    said = describe_cut("\u6d77" * 200 + end, end, max_tokens=77)
    assert said == (
        "prompt: 1,000 of 1,200 characters don't fit the text encoder's 77 tokens and are cut: "
        f'"{end[:40]}...{end[:40]}"'
    )


def test_no_message_grows_with_the_prompt() -> None:
    texts = ["x" * 100_000, "x " * 50_000, ("x" * 59 + " ") * 1000, "x" * 50_000 + " y" * 3000]
    texts.append(" ".join(["x" * 59] * 12))
    assert max(len(describe_cut(text, text, max_tokens=300)) for text in texts) < 900
