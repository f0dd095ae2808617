"""A server on this machine that speaks OpenAI's protocol of chat completions, and fails as it is told."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from attrs import define, field


@define
class Request:
    """What came in."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def idea(self) -> str:
        """What the user's message says."""
        return self.body["messages"][-1]["content"]


@define
class Reply:
    """What goes out."""

    body: object
    """An object that becomes JSON, or bytes as they are."""
    status: int = 200
    content_type: str = "application/json"
    headers: dict[str, str] = field(factory=dict)


def completion(content: object, *, finish_reason: str = "stop", **message: object) -> dict[str, Any]:
    """A chat completion as servers write it."""
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "toy",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": content, **message},
                "finish_reason": finish_reason,
            }
        ],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }


@define
class Server:
    """A chat server. Unless told otherwise, it answers that it has refined what it was given."""

    url: str
    requests: list[Request] = field(factory=list)
    replies: list[Reply] = field(factory=list)
    """The next ones, in order; then the usual."""
    hangs: threading.Event = field(factory=threading.Event)
    """Set from the beginning; while it is cleared, there is no reply."""

    def reply(self, request: Request) -> Reply:
        self.requests.append(request)
        self.hangs.wait(20)
        if self.replies:
            return self.replies.pop(0)
        return Reply(completion(f"Refined: {request.idea}"))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The server, running; and an environment that says nothing about one."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_CUSTOM_HEADERS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            reply = running.reply(Request(self.path, {k.lower(): v for k, v in self.headers.items()}, body))
            if reply.status == 0:  # hangs up without a word
                self.close_connection = True
                return
            data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            self.send_response(reply.status)
            headers = {"Content-Type": reply.content_type, "Content-Length": str(len(data)), **reply.headers}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        running = Server(f"http://127.0.0.1:{listener.server_port}/v1")
        running.hangs.set()
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.hangs.set()
        listener.shutdown()
        thread.join()


@pytest.fixture
def reply_with() -> Callable[..., Reply]:
    """Makes a chat completion with this content."""
    return lambda content, **options: Reply(completion(content, **options))


@pytest.fixture
def fail_with() -> Callable[..., Reply]:
    """Makes a failure as OpenAI words it."""
    return lambda status, message, **headers: Reply({"error": {"message": message}}, status=status, headers=headers)
