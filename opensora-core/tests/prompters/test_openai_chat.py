"""Refinement by a language model, against a real server: what is sent, what becomes of the answers, and each failure."""

from __future__ import annotations

import logging
import os
import pickle
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import Any

import pytest

from opensora.core import ConfigError, DataError, MachineError, build, components
from opensora.core.config.structure import structure, unstructure
from opensora.core.testing import check_prompter

KEY = "sk-Secret.0123456789"


@pytest.fixture
def prompter(server: Any) -> Callable[..., Any]:
    """Builds one that asks the server, once."""

    def build_one(**options: Any) -> Any:
        return build("prompters", {"type": "openai", "base_url": server.url, "max_retries": 0, **options})

    return build_one


# ---- what is sent


def test_each_text_is_refined_by_a_request_of_its_own(server: Any, prompter: Any) -> None:
    assert prompter().refine(["a wave", "a red car"]) == ["Refined: a wave", "Refined: a red car"]
    assert [request.idea for request in server.requests] == ["a wave", "a red car"]
    assert {request.path for request in server.requests} == {"/v1/chat/completions"}


def test_a_request_has_the_options_and_the_shipped_instruction(server: Any, prompter: Any) -> None:
    prompter(model="toy", temperature=0.5, seed=7, max_tokens=90).refine([" a wave\n"])
    (request,) = server.requests
    system, user = request.body.pop("messages")
    assert request.body == {"model": "toy", "temperature": 0.5, "seed": 7, "max_tokens": 90}
    assert system["role"] == "system"
    assert system["content"].startswith("You write prompts for a model that makes short videos")
    assert len(system["content"]) > 2000
    assert user == {"role": "user", "content": "a wave"}


def test_what_is_none_is_not_sent(server: Any, prompter: Any) -> None:
    prompter(max_tokens=None, instruction="Be brief.").refine(["a wave"])
    assert set(server.requests[0].body) == {"model", "messages"}
    assert server.requests[0].body["model"] == "gpt-4o"
    assert server.requests[0].body["messages"][0]["content"] == "Be brief."


def test_an_empty_text_asks_for_a_prompt_of_its_own_each_with_another_seed(server: Any, prompter: Any) -> None:
    prompts = prompter(seed=5).refine(["", "a wave", " \n", ""])
    assert [request.body["seed"] for request in server.requests] == [5, 5, 6, 7]
    assert server.requests[0].idea.startswith("There is no idea this time.")
    assert prompts[1] == "Refined: a wave"
    assert all(prompts)
    server.requests.clear()
    prompter().refine(["", ""])
    assert not any("seed" in request.body for request in server.requests)


def test_no_texts_need_no_request(server: Any, prompter: Any) -> None:
    assert prompter().refine([]) == []
    assert server.requests == []


def test_the_key_goes_to_the_server(server: Any, prompter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")  # as `export KEY=$(cat file)` may leave it
    monkeypatch.setenv("OTHER_KEY", "sk-other")
    prompter().refine(["a wave"])
    prompter(api_key_variable="OTHER_KEY").refine(["a wave"])
    prompter(api_key_variable=None).refine(["a wave"])
    sent = [request.headers["authorization"] for request in server.requests]
    assert sent == [f"Bearer {KEY}", "Bearer sk-other", "Bearer not-needed"]


def test_a_local_server_needs_no_key(server: Any, prompter: Any) -> None:
    assert prompter().refine(["a wave"]) == ["Refined: a wave"]
    assert server.requests[0].headers["authorization"] == "Bearer not-needed"


def test_the_address_can_come_from_the_environment(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/")
    assert build("prompters", {"type": "openai"}).refine(["a wave"]) == ["Refined: a wave"]


def test_it_conforms(server: Any) -> None:
    assert len(check_prompter("openai", base_url=server.url).passed) == 5


def test_where_prompts_go_is_said(server: Any, prompter: Any, caplog: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.INFO)
    prompter(model="toy").refine(["a wave", "a car"])
    assert f"2 prompts for toy at {server.url}, with no key" in caplog.text
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    prompter().refine(["a wave"])
    assert "with the key in OPENAI_API_KEY" in caplog.text
    assert KEY not in caplog.text


# ---- what becomes of an answer


@pytest.mark.parametrize(
    ("answer", "prompt"),
    [
        (" A tall wave breaks.\n", "A tall wave breaks."),
        ("A tall wave\n\nbreaks  on a beach.", "A tall wave breaks on a beach."),
        ('"A tall wave breaks."', "A tall wave breaks."),
        ("\u201cA tall wave breaks.\u201d", "A tall wave breaks."),
        ("'It's a wave,' says a sign.", "'It's a wave,' says a sign."),
        ("A tall\x1b[2J wave\x00 \ud800breaks.", "A tall [2J wave breaks."),
        ('"Sea" and "wave"', '"Sea" and "wave"'),
        ("<think>\nA wave? Yes.\n</think>\n\nA tall wave breaks.", "A tall wave breaks."),
        ('A shop with a sign "<think>no</think>".', 'A shop with a sign "<think>no</think>".'),
        ("Eine Welle \u2013 \u6ce2", "Eine Welle \u2013 \u6ce2"),
    ],
)
def test_an_answer_becomes_one_line(server: Any, prompter: Any, reply_with: Any, answer: str, prompt: str) -> None:
    server.replies = [reply_with(answer)]
    assert prompter().refine(["a wave"]) == [prompt]


def reply(body: object, **options: Any) -> Any:
    from types import SimpleNamespace

    return SimpleNamespace(
        **{"body": body, "status": 200, "content_type": "application/json", "headers": {}, **options}
    )


CHOICE = {"index": 0, "finish_reason": "stop"}
ODD_ANSWERS = {
    "no text": ({"choices": [{**CHOICE, "message": {"content": None}}]}, "has no text (finish_reason: stop)"),
    "tool call": (
        {"choices": [{"finish_reason": "tool_calls", "message": {"content": None, "tool_calls": []}}]},
        "has no text (finish_reason: tool_calls). Take another prompter.model",
    ),
    "parts": ({"choices": [{**CHOICE, "message": {"content": [{"type": "text", "text": "A wave"}]}}]}, "has no text"),
    "no message": ({"choices": [CHOICE]}, "has no text"),
    "odd message": ({"choices": [{**CHOICE, "message": "A wave"}]}, "has no text"),
    "odd choice": ({"choices": ["A wave"]}, "has no text"),
    "cut by length": (
        {"choices": [{"finish_reason": "length", "message": {"content": "A tall wave br"}}]},
        "The answer was cut after 1000 tokens. Raise prompter.max_tokens.",
    ),
    "empty": ({"choices": [{**CHOICE, "message": {"content": ""}}]}, "The answer is empty. Try again"),
    "blank": ({"choices": [{**CHOICE, "message": {"content": ' \n"" '}}]}, "The answer is empty. Try again"),
    "thoughts alone": ({"choices": [{**CHOICE, "message": {"content": "<think>Hm.</think>"}}]}, "The answer is empty"),
    "refusal": (
        {"choices": [{**CHOICE, "message": {"content": None, "refusal": "I can't help with that."}}]},
        "gpt-4o refuses this text (I can't help with that). Word it differently.",
    ),
    "content filter": (
        {"choices": [{"finish_reason": "content_filter", "message": {"content": ""}}]},
        "gpt-4o refuses this text (its content filter)",
    ),
    "no choices": ({"choices": []}, "answers no chat completion. Is that server running"),
    "choices of a kind": ({"choices": {"0": "A wave"}}, "answers no chat completion"),
    "something else": ({"hello": "there"}, "answers no chat completion"),
    "a list": ([1, 2], "answers no chat completion"),
    "an error with status 200": (
        {"error": {"message": "Provider returned error", "code": 502}},
        "answers no chat completion (Provider returned error)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD_ANSWERS)
def test_an_answer_that_is_no_prompt(server: Any, prompter: Any, name: str) -> None:
    body, words = ODD_ANSWERS[name]
    server.replies = [reply(body)]
    with pytest.raises(DataError) as caught:
        prompter().refine(["a wave"])
    assert str(caught.value).startswith('Prompt 1 of 1 ("a wave") was not refined. ')
    assert words in str(caught.value)


def test_an_answer_without_end_by_the_servers_own_limit(server: Any, prompter: Any, reply_with: Any) -> None:
    server.replies = [reply_with("A tall", finish_reason="length")]
    with pytest.raises(DataError, match=r"cut by the server's own limit\. Set prompter.max_tokens"):
        prompter(max_tokens=None).refine(["a wave"])


def test_a_web_page_is_no_answer(server: Any, prompter: Any) -> None:
    server.replies = [reply(b"<html>Hello</html>", content_type="text/html")]
    with pytest.raises(
        DataError, match=r"/v1 answers no chat completion\. Is that server running, and prompter.base_url"
    ):
        prompter().refine(["a wave"])


def test_broken_json_is_no_answer(server: Any, prompter: Any) -> None:
    server.replies = [reply(b'{"choices": [')]
    with pytest.raises(DataError, match="calls its answer JSON, but it is none"):
        prompter().refine(["a wave"])


# ---- failures of the server

STATUS = {
    400: (DataError, r"refuses the request \(HTTP 400: it says no\)\. If that is about the model, see prompter.model"),
    401: (MachineError, r"wants a key \(HTTP 401\), and none was sent\. Set OPENAI_API_KEY\."),
    403: (MachineError, r"wants a key \(HTTP 403\)"),
    404: (MachineError, r'has no model "gpt-4o", or is no such endpoint \(HTTP 404: it says no\).*ends with /v1'),
    422: (DataError, r"refuses the request \(HTTP 422: it says no\)"),
    429: (MachineError, r"takes no more requests \(HTTP 429: it says no\)\. Wait, raise prompter.max_retries"),
    500: (MachineError, r"failed \(HTTP 500: it says no\)\. Try later"),
    503: (MachineError, r"failed \(HTTP 503: it says no\)"),
}


@pytest.mark.parametrize("status", STATUS)
def test_a_status_says_what_to_do(server: Any, prompter: Any, fail_with: Any, status: int) -> None:
    kind, words = STATUS[status]
    server.replies = [fail_with(status, "it says no.")]
    with pytest.raises(kind, match=rf'^Prompt 1 of 2 \("a wave"\) was not refined\. http://127.0.0.1:\d+/v1 {words}'):
        prompter().refine(["a wave", "a car"])
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"error": "no such thing"}, "no such thing"),
        ({"detail": "no such thing"}, "no such thing"),
        ({"detail": [{"loc": ["body"], "msg": "no such thing"}]}, "no such thing"),
        ({"object": "error", "message": "no such thing"}, "no such thing"),
        (b"no such thing", "no such thing"),
        ({"error": "no\n\x1b[2Jsuch thing"}, "no [2Jsuch thing"),
        (b"<html><h1>Nope</h1></html>", "Bad Request"),
        (b"", "Bad Request"),
        ({"error": {}}, "Bad Request"),
        ({"error": None, "detail": []}, "Bad Request"),
        ({"error": {"message": "long " * 100}}, "long " * 39 + "lo..."),
    ],
    ids=str,
)
def test_servers_word_reasons_in_different_places(server: Any, prompter: Any, body: object, reason: str) -> None:
    server.replies = [reply(body, status=400)]
    with pytest.raises(DataError) as caught:
        prompter().refine(["a wave"])
    assert f"(HTTP 400: {reason.rstrip('.')})" in str(caught.value)


def test_a_refused_key_is_named_by_its_variable(server: Any, prompter: Any, fail_with: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.replies = [fail_with(401, "Incorrect API key provided: sk-Se***********6789.")]
    with pytest.raises(
        MachineError, match=r'refuses the key in OPENAI_API_KEY \(HTTP 401\)\. .* and may use "gpt-4o"\.$'
    ):
        prompter().refine(["a wave"])


def test_a_key_that_is_wanted_after_all(server: Any, prompter: Any, fail_with: Any) -> None:
    server.replies = [fail_with(401, "no")]
    with pytest.raises(
        MachineError, match=r"none was sent\. Name its environment variable by prompter.api_key_variable\."
    ):
        prompter(api_key_variable=None).refine(["a wave"])


def test_nothing_listens(server: Any) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound and not listening: refused, and nobody else's
        url = f"http://127.0.0.1:{held.getsockname()[1]}/v1"
        prompter = build("prompters", {"type": "openai", "base_url": url, "max_retries": 1})
        with pytest.raises(MachineError) as caught:
            prompter.refine(["a wave"])
    assert f"{url} can't be reached in up to 2 tries: " in str(caught.value)
    assert "onnection refused. Is that server running, and prompter.base_url right?" in str(caught.value)


def test_the_server_hangs_up(server: Any, prompter: Any) -> None:
    server.replies = [reply(b"", status=0)]
    with pytest.raises(MachineError, match=r"can't be reached: .*disconnected"):
        prompter().refine(["a wave"])


def test_no_answer_in_time(server: Any, prompter: Any) -> None:
    server.hangs.clear()
    with pytest.raises(MachineError, match=r"gave no answer within 0\.2 s\. Raise prompter\.timeout_s"):
        prompter(timeout_s=0.2).refine(["a wave"])


def test_a_passing_failure_is_tried_again(server: Any, prompter: Any, fail_with: Any) -> None:
    server.replies = [fail_with(500, "restarting")]
    assert prompter(max_retries=1).refine(["a wave"]) == ["Refined: a wave"]
    assert [request.idea for request in server.requests] == ["a wave", "a wave"]


def test_too_many_failures_are_not(server: Any, prompter: Any, fail_with: Any) -> None:
    server.replies = [fail_with(429, "slow down", **{"Retry-After": "0.01"}) for _ in range(3)]
    with pytest.raises(MachineError, match=r"no more requests in up to 3 tries \(HTTP 429: slow down\)"):
        prompter(max_retries=2).refine(["a wave"])
    assert len(server.requests) == 3


def test_text_that_is_none(server: Any, prompter: Any) -> None:
    with pytest.raises(DataError, match="characters that are no Unicode text"):
        prompter().refine(["a \udcff wave"])
    assert server.requests == []


def test_a_long_prompt_makes_no_long_message(server: Any, prompter: Any, fail_with: Any) -> None:
    server.replies = [fail_with(400, "This model's maximum context length is 8192 tokens.")]
    with pytest.raises(DataError) as caught:
        prompter().refine(["wave\n" * 10_000])
    assert 'Prompt 1 of 1 ("wave wave' in str(caught.value)
    assert len(str(caught.value)) < 500


# ---- keeping what can't be refined


def test_a_prompt_that_is_refused_is_kept_with_a_warning(
    server: Any, prompter: Any, fail_with: Any, reply_with: Any, caplog: Any
) -> None:
    server.replies = [fail_with(400, "too rude"), reply_with("A car drives."), reply_with("")]
    assert prompter(on_error="keep").refine(["a rude wave", "a car", ""]) == ["a rude wave", "A car drives.", ""]
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 2
    assert warnings[0].startswith('Prompt 1 of 3 ("a rude wave") stays as it is. ')
    assert "too rude" in warnings[0]
    assert warnings[1] == (
        'Prompt 3 of 3 ("") stays as it is. The answer is empty. Try again, or take another prompter.model.'
    )


def test_a_server_that_fails_is_not_asked_for_the_rest(server: Any, prompter: Any, fail_with: Any, caplog: Any) -> None:
    texts = ["a wave", "a car", "a dog", "a cat"]
    good = reply({"choices": [{"finish_reason": "stop", "message": {"content": "A wave breaks."}}]})
    server.replies = [good, fail_with(500, "out of memory")]
    assert prompter(on_error="keep").refine(texts) == ["A wave breaks.", *texts[1:]]
    assert len(server.requests) == 2
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [f"Prompt {number} of 4" in warning for number, warning in zip((2, 3, 4), warnings, strict=True)] == [
        True
    ] * 3
    assert all("out of memory" in warning for warning in warnings)


def test_each_call_tries_anew(server: Any, prompter: Any, fail_with: Any) -> None:
    server.replies = [fail_with(500, "out of memory")]
    keeper = prompter(on_error="keep")
    assert keeper.refine(["a wave"]) == ["a wave"]
    assert keeper.refine(["a wave"]) == ["Refined: a wave"]


# ---- what is wrong from the beginning


def test_without_a_key_for_the_default_endpoint(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for options in ({}, {"base_url": "https://api.openai.com/v1/"}, {"on_error": "keep"}):
        with pytest.raises(
            MachineError, match=r"has no key: OPENAI_API_KEY is not set\. Set that environment variable"
        ):
            build("prompters", {"type": "openai", **options})
    monkeypatch.setenv("OPENAI_API_KEY", "  ")
    with pytest.raises(MachineError, match="OPENAI_API_KEY is not set"):
        build("prompters", {"type": "openai"})
    with pytest.raises(MachineError, match="has no key: api_key_variable is None"):
        build("prompters", {"type": "openai", "api_key_variable": None})


def test_without_the_package(server: Any, prompter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(MachineError, match=r'"openai" needs the openai package: pip install "opensora-core\[openai\]"'):
        prompter()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 3}, "temperature must be <= 2"),
        ({"max_tokens": 0}, "max_tokens must be > 0"),
        ({"timeout_s": 0}, "timeout_s must be > 0"),
        ({"max_retries": -1}, "max_retries must be >= 0"),
        ({"model": ""}, "model"),
        ({"on_error": "skip"}, 'on_error must be one of "stop", "keep", not "skip"'),
        ({"api_key": KEY}, "api_key is not a field"),
        ({"base_url": "localhost:8000"}, 'base_url is "localhost:8000", which is no address of a server, such as http'),
        ({"base_url": "ftp://x/v1"}, "no address of a server"),
        ({"base_url": "http://"}, "no address of a server"),
        ({"base_url": "http://a b/v1"}, "no address of a server"),
        ({"base_url": "http://x:99999/v1"}, "no address of a server"),
        ({"base_url": "http://[x/v1"}, "no address of a server"),
        ({"base_url": ""}, "no address of a server"),
    ],
    ids=str,
)
def test_wrong_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build("prompters", {"type": "openai", **options})
    assert words in str(caught.value)


def test_an_address_in_the_environment_that_is_none(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "localhost")
    with pytest.raises(ConfigError, match='OPENAI_BASE_URL is "localhost", which is no address'):
        build("prompters", {"type": "openai"})


# ---- the key stays where it is


@pytest.mark.parametrize(
    "options",
    [
        {"api_key_variable": KEY},
        {"api_key_variable": "0123abcdSecret"},
        {"api_key_variable": "abcdef0123456789Secret"},
        {"base_url": f"http://me:{KEY}@127.0.0.1/v1"},
        {"base_url": f"http://me:{KEY}@127.0.0.1:99999/v1"},
        {"base_url": f"http://127.0.0.1/v1?key={KEY}"},
        {"base_url": f"http://127.0.0.1/v1#{KEY}"},
    ],
    ids=str,
)
def test_a_key_in_a_config_is_refused_and_not_repeated(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        build("prompters", {"type": "openai", **options})
    assert "Secret" not in "".join(traceback.format_exception(caught.value))
    assert "api_key_variable" in str(caught.value)


@pytest.mark.parametrize("key", ["sk-Secret with blank", "sk-Secret\n\nX: y", "sk-Secret-\u00e9", "sk-Secret\x00"])
def test_a_key_that_can_not_be_sent_is_not_repeated(key: str, prompter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ, "OPENAI_API_KEY": key})  # the real one takes no zero byte
    with pytest.raises(MachineError, match="What the environment variable OPENAI_API_KEY holds is no key") as caught:
        prompter()
    assert "Secret" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("status", [200, 400, 401, 404, 429, 500])
@pytest.mark.parametrize("on_error", ["stop", "keep"])
def test_a_server_that_repeats_the_key(
    status: int, on_error: str, server: Any, prompter: Any, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.replies = [reply({"error": {"message": f"Your key {KEY} is not welcome: {KEY}"}}, status=status)]
    told = ""
    try:
        prompter(on_error=on_error).refine(["a wave"])
    except (MachineError, DataError) as error:
        told = "".join(traceback.format_exception(error))
    assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"
    assert ("is not welcome" in told + caplog.text) == (status != 401)
    assert KEY not in told + caplog.text


def test_config_and_prompter_hold_no_key(prompter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    one = prompter()
    assert KEY not in repr(one.spec) + repr(unstructure(one.spec)) + repr(vars(one))
    assert structure(type(one.spec), unstructure(one.spec)) == one.spec
    assert KEY.encode() not in pickle.dumps(one.spec)


# ---- start-up


def test_listing_and_importing_bring_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from opensora.core import components\n"
        "[components.load('prompters', one.name) for one in components.available('prompters')]\n"
        "print(sorted({'torch', 'openai', 'httpx', 'httpx2', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_both_are_found_by_name() -> None:
    names = {one.name for one in components.available("prompters") if one.distribution == "opensora-core"}
    assert names == {"openai", "templates"}
