"""A server that speaks OpenAI's protocol: its address and key, its replies, and what its failures mean."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from attrs import field, frozen

from opensora.core.errors import ConfigError, DataError, MachineError

if TYPE_CHECKING:
    import openai

    from opensora.core.prompters.openai_chat import OpenAIChatSpec

__all__ = ["Endpoint", "check_package", "check_url", "find_endpoint", "shorten"]

_OWN_URL = "https://api.openai.com/v1"
_NO_KEY = "not-needed"
"""What servers without keys are sent: the client insists on one."""
_EXAMPLE = "such as http://127.0.0.1:8000/v1"
_IS_IT_RIGHT = "Is that server running, and prompter.base_url right?"
_SAID_IN = ("error", "message", "detail", "msg")
"""Where servers put the reason of a failure, nested in any order."""


def check_package() -> None:
    """Import the client.

    Raises:
        MachineError: It is not installed.
    """
    try:
        import openai  # noqa: F401  # whether it can be
    except ImportError as error:
        raise MachineError(
            'The prompter "openai" needs the openai package: pip install "opensora-core[openai]"'
        ) from error


def find_endpoint(spec: OpenAIChatSpec) -> Endpoint:
    """Address and key as options and environment give them.

    Raises:
        ConfigError: The address in the environment is none.
        MachineError: The key is missing, or none.
    """
    url = (spec.base_url or os.environ.get("OPENAI_BASE_URL", "").strip() or _OWN_URL).rstrip("/")
    check_url(url, "OPENAI_BASE_URL")
    variable = spec.api_key_variable
    key = os.environ.get(variable, "").strip() if variable else ""
    if not key and url == _OWN_URL:
        raise MachineError(
            f'The prompter "openai" has no key: {f"{variable} is not set" if variable else "api_key_variable is None"}. '
            "Set that environment variable, name another by prompter.api_key_variable, or give a local server's "
            f"prompter.base_url, {_EXAMPLE}."
        )
    if not re.fullmatch(r"[\x21-\x7e]*", key):  # the client's error would quote it
        raise MachineError(f"What the environment variable {variable} holds is no key: keys have no blanks or accents.")
    return Endpoint(url=url, key=key, spec=spec)


def check_url(url: str, name: str) -> None:
    """Refuse what is no address of a server, and any with a password in it, since addresses are logged.

    Raises:
        ConfigError: ``name`` says where it stands.
    """
    if set("@?#") & set(url):
        raise ConfigError(
            f"{name} must be a bare address, {_EXAMPLE}. A key goes into the variable that api_key_variable names."
        )
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and parts.port != 0
    except ValueError:  # of a port or an IPv6 address
        is_address = False
    if not (is_address and re.fullmatch(r"[\w.:-]+", parts.hostname or "")):
        raise ConfigError(f'{name} is "{url}", which is no address of a server, {_EXAMPLE}.')


@frozen(kw_only=True)
class Endpoint:
    """Where requests go, and with which key."""

    url: str
    key: str = field(repr=False)
    """Empty: none is sent."""
    spec: OpenAIChatSpec

    def connect(self) -> openai.OpenAI:
        """The client; it sends nothing yet."""
        import openai

        return openai.OpenAI(
            api_key=self.key or _NO_KEY,
            base_url=self.url,
            timeout=self.spec.timeout_s,
            max_retries=self.spec.max_retries,
        )

    def ask(self, client: openai.OpenAI, instruction: str, text: str, *, seed: int | None) -> str:
        """What the model answers to a text.

        Raises:
            MachineError: The endpoint can't be reached, doesn't answer, or refuses key or model.
            DataError: It refuses the text, or its answer has none, or only a part.
        """
        import openai

        if re.search("[\ud800-\udfff]", text):  # as a command line leaves them whose bytes are no UTF-8
            raise DataError("It has characters that are no Unicode text, and can't be sent.")
        options = {"temperature": self.spec.temperature, "seed": seed, "max_tokens": self.spec.max_tokens}
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        problem: Exception
        try:
            reply = client.chat.completions.create(
                model=self.spec.model,
                messages=[{"role": "system", "content": instruction}, {"role": "user", "content": text}],
                **given,
            )
        except openai.OpenAIError as error:
            problem = self._explain(error)
        except ValueError:
            problem = DataError(f"{self.url} calls its answer JSON, but it is none. Look into the server's log.")
        else:
            return self._read(reply)
        raise problem  # behind the handlers, so that no traceback shows the client's exception, which may quote the key

    def _read(self, reply: object) -> str:
        """The text of a reply, of which nothing can be relied on: the client doesn't check it.

        Raises:
            DataError: It has none, or only a part.
        """
        choices = getattr(reply, "choices", None)
        if not (isinstance(choices, list) and choices):
            said = _reason(getattr(reply, "error", None))
            raise DataError(
                f"{self.url} answers no chat completion{f' ({self._quote(said)})' if said else ''}. {_IS_IT_RIGHT}"
            )
        message, finish = getattr(choices[0], "message", None), getattr(choices[0], "finish_reason", None)
        if finish == "length":
            limit = self.spec.max_tokens
            cut = f"after {limit} tokens. Raise" if limit else "by the server's own limit. Set"
            raise DataError(f"The answer was cut {cut} prompter.max_tokens.")
        refusal = getattr(message, "refusal", None) or ("its content filter" if finish == "content_filter" else None)
        if refusal:
            raise DataError(f"{self.spec.model} refuses this text ({self._quote(str(refusal))}). Word it differently.")
        content = getattr(message, "content", None)
        if not isinstance(content, str):
            raise DataError(f"The answer has no text (finish_reason: {finish}). Take another prompter.model.")
        return content

    def _explain(self, error: openai.OpenAIError) -> MachineError | DataError:
        """An exception of the client in our words: MachineError if it has nothing to do with the text that was sent."""
        import openai

        tries = f" in up to {self.spec.max_retries + 1} tries" if self.spec.max_retries else ""
        if isinstance(error, openai.APITimeoutError):
            wait = f"{self.spec.timeout_s:g} s"
            return MachineError(f"{self.url} gave no answer within {wait}{tries}. Raise prompter.timeout_s.")
        if isinstance(error, openai.APIConnectionError):
            cause = self._quote(str(error.__cause__ or error))
            return MachineError(f"{self.url} can't be reached{tries}: {cause}. {_IS_IT_RIGHT}")
        if isinstance(error, openai.APIStatusError):
            return self._explain_status(error.status_code, _reason(error.body) or error.response.reason_phrase, tries)
        return DataError(f"{self.url} answers no chat completion ({self._quote(str(error))}). {_IS_IT_RIGHT}")

    def _explain_status(self, status: int, reason: str, tries: str) -> MachineError | DataError:
        said = f"HTTP {status}: {self._quote(reason)}"
        if status in (401, 403):
            return MachineError(self._explain_refused_key(status))  # without the reason: it may quote a part of the key
        if status == 404:
            return MachineError(
                f'{self.url} has no model "{self.spec.model}", or is no such endpoint ({said}). '
                "Check prompter.model, and prompter.base_url, which mostly ends with /v1."
            )
        if status == 429:
            return MachineError(
                f"{self.url} takes no more requests{tries} ({said}). "
                "Wait, raise prompter.max_retries, or see whether the account has credit left."
            )
        if status >= 500:
            return MachineError(f"{self.url} failed{tries} ({said}). Try later, or look into the server's log.")
        return DataError(
            f"{self.url} refuses the request ({said}). If that is about the model, see prompter.model; if about an option, "
            "leave it out: prompter.temperature, prompter.seed or prompter.max_tokens = None."
        )

    def _explain_refused_key(self, status: int) -> str:
        variable = self.spec.api_key_variable
        if self.key:
            return (
                f"{self.url} refuses the key in {variable} (HTTP {status}). "
                f'Check that it is a key of this endpoint, and may use "{self.spec.model}".'
            )
        set_it = f"Set {variable}" if variable else "Name its environment variable by prompter.api_key_variable"
        return f"{self.url} wants a key (HTTP {status}), and none was sent. {set_it}."

    def _quote(self, text: str) -> str:
        """What somebody else says: in one line, not too long, without the key."""
        return shorten(text.replace(self.key, "***") if self.key else text, 200).rstrip(".") or "no reason given"


def shorten(text: str, length: int = 60) -> str:
    """Text in one line of at most so many characters, without those that control a terminal."""
    line = " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", text).split())
    return line if len(line) <= length else f"{line[: length - 3]}..."


def _reason(body: object) -> str:
    """What a server says went wrong; "" if it says nothing, or shows a page."""
    while isinstance(body, dict | list):
        parts = body if isinstance(body, list) else [body[name] for name in _SAID_IN if body.get(name)]
        body = parts[0] if parts else ""
    return body if isinstance(body, str) and not body.lstrip().startswith("<") else ""
