"""Prompts rewritten by a language model, behind any endpoint that speaks OpenAI's protocol of chat completions.

The key is read from the environment and goes to the endpoint, nowhere else. It is no option, so that no config or recipe has
it; what a server says is passed on without it; and exceptions of the client, which may quote it, end here.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from importlib import resources
from itertools import accumulate
from typing import TYPE_CHECKING, ClassVar, Literal

from attrs import Attribute, field, frozen
from attrs.validators import and_, ge, gt, le, min_len, optional

from opensora.core.errors import ConfigError, DataError, MachineError
from opensora.core.prompters._endpoint import check_package, check_url, find_endpoint, shorten

if TYPE_CHECKING:
    import openai

__all__ = ["OpenAIChat", "OpenAIChatSpec"]

log = logging.getLogger(__name__)

_NO_IDEA = "There is no idea this time. Think of a video of your own, and write its prompt."
_THOUGHTS = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
_NO_LETTERS = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]+")
"""Control characters, and halves of others, which no file takes."""
_QUOTES = {'"': '"', "'": "'", "\u201c": "\u201d", "\u00ab": "\u00bb"}


def _is_variable(_: object, __: Attribute[str], name: str | None) -> None:
    """Keys have small letters or dashes. The message doesn't quote the value, which may be one."""
    if name is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", name):
        raise ConfigError(
            "api_key_variable must be the name of an environment variable, in capitals, such as OPENAI_API_KEY. "
            "The key itself has no place in a config."
        )


def _is_url(_: object, __: Attribute[str | None], url: str | None) -> None:
    if url is not None:
        check_url(url, "base_url")


@frozen(kw_only=True)
class OpenAIChatSpec:
    """Options of `OpenAIChat`."""

    model: str = field(default="gpt-4o", validator=min_len(1))
    """As the endpoint names it."""
    base_url: str | None = field(default=None, validator=_is_url)
    """The endpoint, such as http://127.0.0.1:8000/v1. None: the environment's OPENAI_BASE_URL, or else OpenAI's."""
    api_key_variable: str | None = field(default="OPENAI_API_KEY", validator=_is_variable)
    """The environment variable that holds the key; it may be unset where there is a base_url. None: no key is sent."""
    instruction: str | None = None
    """The system message: how prompts are to be written, best with examples. None: one for captions of videos."""
    temperature: float | None = field(default=None, validator=optional(and_(ge(0), le(2))))
    """How freely it writes: 0 hardly, 1 usual. None: as the endpoint does by default."""
    seed: int | None = None
    """Many endpoints answer alike for the same. Each empty text of a call is given the next number. None: none is sent."""
    max_tokens: int | None = field(default=1000, validator=optional(gt(0)))  # type: ignore[arg-type]  # None too
    """Length of an answer, with what a reasoning model thinks before; a longer one is an error. None: no limit is sent."""
    timeout_s: float = field(default=60.0, validator=gt(0))
    """Seconds to wait for an answer, at each try."""
    max_retries: int = field(default=2, validator=ge(0))
    """Further tries, with pauses, after a timeout, a lost connection, HTTP 408, 409, 429 and from 500 on."""
    on_error: Literal["stop", "keep"] = "stop"
    """A prompt that can't be refined stops the run, or is kept as it is, with a warning."""


class OpenAIChat:
    """A language model behind an endpoint of OpenAI's chat protocol, remote or local, asked prompt by prompt."""

    Spec: ClassVar[type] = OpenAIChatSpec

    def __init__(self, spec: OpenAIChatSpec) -> None:
        """Sends nothing yet.

        Raises:
            MachineError: The package is missing, or the key is.
            ConfigError: The address in the environment is none.
        """
        check_package()
        self.spec = spec
        self._endpoint = find_endpoint(spec)
        self._instruction = _shipped_instruction() if spec.instruction is None else spec.instruction

    def refine(self, texts: Sequence[str]) -> list[str]:
        """See `opensora.core.protocols.Prompter`. One request for each text.

        With ``on_error="keep"``, texts that can't be refined stay as they are. Where that is no fault of the text
        (MachineError), those after it are not sent any more.

        Raises:
            MachineError: The endpoint can't be reached, doesn't answer, or refuses key or model.
            DataError: It refuses a text, or its answer is no prompt.
        """
        if texts:
            key = f"the key in {self.spec.api_key_variable}" if self._endpoint.key else "no key"
            number = f"{len(texts)} prompt{'s' if len(texts) > 1 else ''}"
            log.info("%s for %s at %s, with %s", number, self.spec.model, self._endpoint.url, key)
        with self._endpoint.connect() as client:
            return self._refine_all(client, texts)

    def _refine_all(self, client: openai.OpenAI, texts: Sequence[str]) -> list[str]:
        refined: list[str] = []
        broken: MachineError | None = None
        num_random = accumulate((not text.strip() for text in texts), initial=0)
        for number, (text, before) in enumerate(zip(texts, num_random, strict=False), start=1):
            try:
                if broken:
                    raise broken
                refined.append(self._refine(client, text, before))
            except (MachineError, DataError) as error:
                place = f'Prompt {number} of {len(texts)} ("{shorten(text)}")'
                if self.spec.on_error == "stop":
                    raise type(error)(f"{place} was not refined. {error}") from None
                log.warning("%s stays as it is. %s", place, error)
                broken = error if isinstance(error, MachineError) else None
                refined.append(text)
        return refined

    def _refine(self, client: openai.OpenAI, text: str, before: int) -> str:
        """One text; so many empty ones came ``before`` it, which were sent as the same message."""
        idea = text.strip()
        seed = self.spec.seed if idea or self.spec.seed is None else self.spec.seed + before
        prompt = plain(self._endpoint.ask(client, self._instruction, idea or _NO_IDEA, seed=seed))
        if not prompt:
            raise DataError("The answer is empty. Try again, or take another prompter.model.")
        return prompt


def plain(answer: str) -> str:
    """An answer as a prompt: in one line, without the thoughts that some models begin with, and without quotes around it."""
    text = " ".join(_NO_LETTERS.sub(" ", _THOUGHTS.sub("", answer)).split())
    if len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and not {text[0], text[-1]} & set(text[1:-1]):
        text = text[1:-1].strip()
    return text


def _shipped_instruction() -> str:
    return resources.files("opensora.core.prompters").joinpath("instruction.txt").read_text(encoding="utf-8").strip()
