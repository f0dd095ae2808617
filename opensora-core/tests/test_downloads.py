"""Downloads, from real servers on this machine: once, whole or not at all, and with the cause if they fail."""

import gc
import re
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

from opensora.core import DataError, MachineError
from opensora.core.downloads import default_folder, download

DATA = bytes(range(256)) * 10_000


@contextmanager
def serving(server: socketserver.TCPServer) -> Iterator[str]:
    """Host and port of a server that runs for the length of the block."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Server(ThreadingHTTPServer):
    """Answers by the path's first part."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []
        self.agents: list[str] = []
        self.data = DATA


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = unquote(self.path)
        self.server.asked.append(path)
        self.server.agents.append(self.headers["User-Agent"])
        kind = path.split("/")[1]
        answer: Callable[[], None] = getattr(self, f"answer_{kind}", self.answer_file)
        answer()

    def answer_file(self) -> None:
        self.start(200, len(self.server.data))
        self.wfile.write(self.server.data)

    def answer_cut(self) -> None:
        self.start(200, len(DATA) + 1)
        self.wfile.write(DATA)

    def answer_unannounced(self) -> None:
        self.start(200, None)
        self.wfile.write(DATA)

    def answer_empty(self) -> None:
        self.start(200, 0)

    def answer_missing(self) -> None:
        self.start(404, 0)

    def answer_forbidden(self) -> None:
        self.start(403, 0)

    def answer_part(self) -> None:
        self.start(206, len(DATA))
        self.wfile.write(DATA)

    def answer_moved(self) -> None:
        self.start(302, 0, Location="/file/after%20moving.mp4")

    def answer_local(self) -> None:
        self.start(302, 0, Location="file:///etc/hostname")

    def answer_silent(self) -> None:
        time.sleep(1)

    def answer_nonsense(self) -> None:
        self.wfile.write(b"220 this is another protocol\r\n")

    def start(self, status: int, length: int | None, **headers: str) -> None:
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # theirs
        """Silent."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server, serving(server):
        yield server


def address(server: Server, path: str) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}/{path}"


def test_a_file_is_downloaded_once(server, tmp_path):
    url = address(server, "file/clip.mp4?size=large")
    path = download(url, tmp_path / "cache")
    assert path.read_bytes() == DATA
    assert re.fullmatch(r"[0-9a-f]{16}-clip\.mp4", path.name)
    assert download(url, tmp_path / "cache") == path
    assert server.asked == ["/file/clip.mp4?size=large"]
    assert list((tmp_path / "cache").iterdir()) == [path]


def test_files_of_one_name_are_told_apart(server, tmp_path):
    one, server.data = download(address(server, "a/clip.mp4"), tmp_path), b"another"
    other = download(address(server, "b/clip.mp4"), tmp_path)
    assert one != other
    assert (one.read_bytes(), other.read_bytes()) == (DATA, b"another")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("file/Grüße 波.png", "Grüße_波.png"),
        ("file/a%2Fb%2e%2e.png", "a_b...png"),
        ("file/..%2f..%2fetc%2fpasswd", "_.._etc_passwd"),
        ("file/" + "x" * 300 + ".mp4", "x" * 76 + ".mp4"),
        ("file/", "file"),
    ],
)
def test_names_in_the_cache_are_harmless(server, tmp_path, path, name):
    found = download(address(server, path), tmp_path)
    assert found.parent == tmp_path
    assert len(found.name) < 120
    assert found.read_bytes() == DATA
    if name not in ("a_b...png", "_.._etc_passwd"):
        assert found.name[17:] == name


def test_redirections_are_followed(server, tmp_path):
    path = download(address(server, "moved/clip.mp4"), tmp_path)
    assert path.read_bytes() == DATA
    assert server.asked == ["/moved/clip.mp4", "/file/after moving.mp4"]
    assert server.agents == ["opensora-core"] * 2


def test_a_length_need_not_be_announced(server, tmp_path):
    assert download(address(server, "unannounced/a.png"), tmp_path).read_bytes() == DATA


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("missing/a.png", "can't be downloaded: the server answers 404 Not Found"),
        ("forbidden/a.png", "can't be downloaded: the server answers 403 Forbidden"),
        ("part/a.png", "can't be downloaded: the server answers 206"),
        ("cut/a.png", "was cut off after 2,560,000 of 2,560,001 bytes"),
        ("empty/a.png", "is empty"),
        ("local/a.png", "can't be downloaded: "),
        ("silent/a.png", "can't be downloaded: timed out"),
        ("nonsense/a.png", "can't be downloaded: "),
    ],
)
def test_what_a_server_refuses_is_told_and_leaves_nothing(server, tmp_path, path, says):
    url = address(server, path)
    with pytest.raises(DataError, match=f"{re.escape(url)} {says}"):
        download(url, tmp_path, timeout_s=0.2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", ["file/a.png", "unannounced/a.png"])
def test_what_is_too_large_is_refused(server, tmp_path, path):
    with pytest.raises(DataError, match=r"a\.png has .*more than the 1,000,000"):
        download(address(server, path), tmp_path, max_bytes=1_000_000)
    assert list(tmp_path.iterdir()) == []
    assert download(address(server, path), tmp_path, max_bytes=len(DATA)).exists()


def test_a_server_that_is_not_there_is_told(tmp_path):
    with Server() as gone:
        url = address(gone, "a.png")
    with pytest.raises(DataError, match=r"a\.png can't be downloaded: Connection refused"):
        download(url, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "url", ["s3://bucket/a.png", "file:///etc/hostname", "http://[::1/a.png", "http:///a.png", "://a"]
)
def test_other_addresses_are_refused(tmp_path, url):
    with pytest.raises(DataError, match=rf"{re.escape(url)} can't be downloaded: "):
        download(url, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_can_not_be_written_is_an_error(server, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MachineError, match="Can't write to"):
        download(address(server, "a.png"), tmp_path / "file" / "cache")
    assert server.asked == []


def test_the_folder_is_where_caches_are(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "opensora" / "downloads"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path.home() / ".cache" / "opensora" / "downloads"


class FtpHandler(socketserver.StreamRequestHandler):
    """As much of RFC 959 as it takes to fetch a file."""

    def handle(self) -> None:
        self.say("220 ready")
        data: socketserver.TCPServer | None = None
        while command := self.rfile.readline().decode().strip():
            verb, _, argument = command.partition(" ")
            if verb == "PASV":
                data = socketserver.TCPServer(("127.0.0.1", 0), socketserver.BaseRequestHandler)
                port = data.server_address[1]
                self.say(f"227 Entering Passive Mode (127,0,0,1,{port // 256},{port % 256})")
            elif verb == "RETR" and argument == "clip.mp4" and data is not None:
                self.say(f"150 Opening connection ({len(DATA)} bytes)")
                connection, _ = data.get_request()
                connection.sendall(DATA)
                connection.close()
                data.server_close()
                self.say("226 done")
            else:
                known = {"USER": "331 password", "PASS": "230 in", "TYPE": "200 ok", "CWD": "250 ok", "QUIT": "221 bye"}
                self.say(known.get(verb, "550 no"))
        if data is not None:
            data.server_close()

    def say(self, line: str) -> None:
        self.wfile.write(f"{line}\r\n".encode())


@pytest.fixture
def ftp() -> Iterator[str]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), FtpHandler) as server, serving(server) as host:
        yield f"ftp://{host}/videos"


def test_files_come_by_ftp_too(ftp, tmp_path):
    assert download(f"{ftp}/clip.mp4", tmp_path).read_bytes() == DATA


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # urllib leaves its socket to the collector
def test_what_an_ftp_server_refuses_is_told(ftp, tmp_path):
    with pytest.raises(DataError, match=r"gone\.mp4 can't be downloaded: .*550"):
        download(f"{ftp}/gone.mp4", tmp_path)
    gc.collect()
    assert list(tmp_path.iterdir()) == []
