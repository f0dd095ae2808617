"""Prompts made longer without a model: always the same, and with the user's words as they are."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from typing import Any

import pytest

from opensora.core import ConfigError, build
from opensora.core.prompters._phrases import ADDITIONS, SCENES
from opensora.core.testing import check_prompter


def refine(*texts: str, **options: Any) -> list[str]:
    return build("prompters", {"type": "templates", **options}).refine(list(texts))


def parts_of(prompt: str) -> list[str]:
    """Which parts were added to a subject, in order."""
    added = [(prompt.find(sentence), part) for part, sentences in ADDITIONS.items() for sentence in sentences]
    return [part for place, part in sorted(added) if place >= 0]


def test_it_conforms() -> None:
    assert len(check_prompter("templates", seed=3).passed) == 5


@pytest.mark.parametrize(
    ("text", "beginning"),
    [
        ("a wave", "a wave. "),
        ("  A cat sleeps!\n", "A cat sleeps! "),
        ('A sign  reads "Caf\u00e9  \u6d77"', 'A sign  reads "Caf\u00e9  \u6d77". '),
        ("one line \r\n and another", "one line and another. "),
        ("\u4e00\u53ea\u732b\u3002", "\u4e00\u53ea\u732b\u3002 "),
    ],
)
def test_the_words_stay_and_a_sentence_of_each_part_follows(text: str, beginning: str) -> None:
    (prompt,) = refine(text)
    assert prompt.startswith(beginning)
    assert parts_of(prompt) == ["shot", "light", "camera", "detail"]
    assert set(prompt.removeprefix(beginning).split()) <= set(
        " ".join(one for each in ADDITIONS.values() for one in each).split()
    )


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a city at Night", ["shot", "camera", "detail"]),
        ("a wave in the sunlight", ["shot", "camera", "detail"]),
        ("Close-up of a flower", ["light", "camera", "detail"]),
        ("a wave, the camera pans left", ["shot", "light", "detail"]),
        ("drone shot of a lit street, zooming in", ["detail"]),
        ("a knight on a panther", ["shot", "light", "camera", "detail"]),  # no words of these
    ],
)
def test_what_a_text_speaks_of_is_not_added(text: str, parts: list[str]) -> None:
    assert parts_of(refine(text)[0]) == parts


def test_parts_can_be_chosen() -> None:
    assert parts_of(refine("a wave", parts=["detail", "shot"])[0]) == ["shot", "detail"]
    assert refine("a wave", parts=[]) == ["a wave."]


def test_the_same_text_and_seed_give_the_same_whatever_else_is_asked() -> None:
    alone = refine("a wave")
    assert refine("a car", "", "a wave")[2:] == alone
    assert refine("a wave", seed=1) != alone


def test_another_process_gives_the_same() -> None:
    code = "from opensora.core import build\nprint(build('prompters', {'type': 'templates'}).refine(['a wave', '']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(refine("a wave", ""))


def test_what_a_seed_gives_does_not_change() -> None:
    """A recipe names seeds; whoever edits the phrases sees it here."""
    wave, scene = refine("a wave", "")
    assert wave == (
        "a wave. The view is from slightly above, a little to one side of the centre. Dim light with a few bright spots "
        "leaves the corners of the frame dark. The camera moves slowly forward. Fine textures are visible, and the colours "
        "are natural."
    )
    assert scene == (
        "A glass of iced tea is turned slowly on a wooden counter. A close-up shows the scene from nearby, with the "
        "background out of focus. Patches of light and shade move slowly over the scene. The camera circles slowly around "
        "the scene. Every movement is clearly visible from beginning to end."
    )


def test_empty_texts_get_scenes_that_differ() -> None:
    prompts = refine(*[""] * 30)
    assert len(set(prompts)) > 25
    assert refine("", seed=1) != refine("", seed=2)
    assert refine("a wave", "")[1] == refine(" \n")[0]
    for prompt in prompts:
        assert re.match(r"[A-Z][^.]+\. [A-Z]", prompt)
        assert prompt.endswith(".")


def test_every_phrase_is_drawn() -> None:
    told = " ".join(refine(*(f"subject {number}" for number in range(400)), *[""] * 400))
    phrases = [one for each in (*ADDITIONS.values(), *(part for scene in SCENES for part in scene)) for one in each]
    assert [phrase for phrase in phrases if phrase not in told] == []


def test_a_scene_is_whole() -> None:
    firsts = {f"{who} {does} {where}" for each in SCENES for who in each[0] for does in each[1] for where in each[2]}
    assert len(firsts) > 250
    for prompt in refine(*[""] * 200):
        assert prompt.partition(". ")[0] in firsts


def test_long_texts_take_no_time() -> None:
    begin = time.perf_counter()
    (prompt,) = refine("wave " * 10_000)
    assert time.perf_counter() - begin < 1
    assert prompt.startswith("wave wave ")


@pytest.mark.parametrize(
    ("options", "words"),
    [({"parts": ["sound"]}, "parts"), ({"seed": "x"}, "seed must be"), ({"sed": 1}, 'Did you mean "seed"')],
    ids=str,
)
def test_wrong_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        refine("a wave", **options)
