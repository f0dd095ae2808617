"""What every prompter must do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from opensora.core.components import build
from opensora.core.protocols import Prompter
from opensora.core.testing._report import Report

__all__ = ["check_prompter"]

_TEXTS = (
    "a wave",
    "A cat sleeps on a sofa. It wakes up.",
    'a shop window with a sign that reads "OPEN", at night',
    "eine Katze \u2013 \u6d77\u8fb9\u7684\u732b",
    "two lines\nof text",
)


def check_prompter(
    name: str, *, texts: Sequence[str] = _TEXTS, on_pass: Callable[[str], None] | None = None, **options: Any
) -> Report:
    """A prompt for each text, of one line; none for none; for an empty text one of its own.

    One that asks a server is tried on that server: give the options that it needs.

    Args:
        name: As in ``type=``.
        texts: What it is tried on, none of them empty.
        on_pass: Called with each check's title as it passes.
        options: Of the component's ``Spec``.

    Raises:
        AssertionError: A check failed.
    """
    report = Report(name, on_pass=on_pass)
    with report.checking("builds from its options"):
        prompter: Prompter = build("prompters", {"type": name, **options})
    with report.checking("gives one prompt for each text, of one line"):
        _check_prompts(prompter.refine(list(texts)), texts)
    with report.checking("takes one text as well, and none"):
        _check_prompts(prompter.refine([texts[0]]), texts[:1])
        _check_prompts(prompter.refine([]), [])
    with report.checking("gives an empty text a prompt of its own"):
        mixed = ["", texts[0], " "]
        _check_prompts(prompter.refine(mixed), mixed)
    with report.checking("leaves the texts that it is given as they are"):
        given = ["", *texts]
        prompter.refine(given)
        assert given == ["", *texts], f"they became {given}"
    return report


def _check_prompts(prompts: object, texts: Sequence[str]) -> None:
    assert isinstance(prompts, list), f"got a {type(prompts).__name__}, expected a list"
    assert len(prompts) == len(texts), f"got {len(prompts)} prompts for {len(texts)} texts"
    for text, prompt in zip(texts, prompts, strict=True):
        assert isinstance(prompt, str), f'"{text}" became a {type(prompt).__name__}, expected a string'
        assert prompt.strip(), f'"{text}" became an empty prompt'
        assert prompt == prompt.strip(), f'"{text}" became a prompt with blanks around it: {prompt!r}'
        assert not set("\r\n") & set(prompt), f'"{text}" became a prompt of several lines: {prompt!r}'
