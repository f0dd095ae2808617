"""The conformance kit passes prompters that conform, and says of others which promise they break."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from opensora.core.commands.opensora import main
from opensora.core.testing import check, check_prompter

PROMPTERS = """
from attrs import frozen
from opensora.core import MachineError

@frozen(kw_only=True)
class Spec:
    ending: str = ", seen from above"

class Good:
    Spec = Spec

    def __init__(self, spec):
        self.ending = spec.ending

    def refine(self, texts):
        return [" ".join(text.split() or ["a tree"]) + self.ending for text in texts]

class Generator(Good):
    def refine(self, texts):
        return iter(super().refine(texts))

class Joined(Good):
    def refine(self, texts):
        return super().refine([" ".join(texts)])

class SameLines(Good):
    def refine(self, texts):
        return [(text.strip() or "a tree") + self.ending for text in texts]

class Blanks(Good):
    def refine(self, texts):
        return [f"{text} " for text in super().refine(texts)]

class Numbers(Good):
    def refine(self, texts):
        return [len(text) for text in texts]

class KeepsEmpty(Good):
    def refine(self, texts):
        return [text and new for text, new in zip(texts, super().refine(texts))]

class AddsToNone(Good):
    def refine(self, texts):
        return super().refine(texts or ["a tree"])

class InPlace(Good):
    def refine(self, texts):
        texts[:] = super().refine(texts)
        return list(texts)

class Away(Good):
    def __init__(self, spec):
        raise MachineError("The server is not there.")
"""


@pytest.fixture(autouse=True)
def kit(install: Callable[..., Path]) -> None:
    names = [
        line.split()[1].partition("(")[0].rstrip(":") for line in PROMPTERS.splitlines() if line.startswith("class")
    ]
    entries = {name: f"prompters_of_testing_kit:{name}" for name in names if name != "Spec"}
    install("kit-prompters", {"opensora.prompters": entries}, {"prompters_of_testing_kit.py": PROMPTERS})


def test_a_good_one_passes() -> None:
    passed: list[str] = []
    report = check_prompter("Good", ending=" by night", on_pass=passed.append)
    assert report.passed == passed
    assert passed == [
        "builds from its options",
        "gives one prompt for each text, of one line",
        "takes one text as well, and none",
        "gives an empty text a prompt of its own",
        "leaves the texts that it is given as they are",
    ]
    assert check("prompters", "Good", texts=["a wave"]).passed == passed


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Generator", "got a list_iterator, expected a list"),
        ("Joined", "got 1 prompts for 5 texts"),
        (
            "SameLines",
            "\"two lines\nof text\" became a prompt of several lines: 'two lines\\nof text, seen from above'",
        ),
        ("Blanks", "became a prompt with blanks around it"),
        ("Numbers", '"a wave" became a int, expected a string'),
        ("KeepsEmpty", 'gives an empty text a prompt of its own: AssertionError: "" became an empty prompt'),
        ("AddsToNone", "takes one text as well, and none: AssertionError: got 1 prompts for 0 texts"),
        ("InPlace", "leaves the texts that it is given as they are"),
        ("Away", "builds from its options: MachineError: The server is not there."),
    ],
)
def test_a_broken_one_fails_in_readable_words(name: str, words: str) -> None:
    with pytest.raises(AssertionError) as caught:
        check_prompter(name)
    assert str(caught.value).startswith(f"{name}: ")
    assert words in str(caught.value)


def test_verify_knows_the_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "prompter", "Good", "ending= by night"]) == 0
    assert "Good conforms: 5 checks passed." in capsys.readouterr().out
    assert main(["verify", "prompters", "Joined"]) == 1
    assert capsys.readouterr().err.startswith("FAILED  Joined: gives one prompt for each text")


def test_what_a_component_needs_and_lacks_says_nothing_about_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "prompters", "Away"]) == 2
    assert capsys.readouterr().err == "The server is not there.\n"
