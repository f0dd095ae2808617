"""Sources of weights: the hub (a small one, on this machine), published files by name, and what can't be had."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from opensora.core import WeightsError
from opensora.core.weight_files import choose_files
from opensora.core.weight_sources import locate_weights

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "org/single": ["model.safetensors", "config.json", "sample.png"],
    "org/many": ["a.pth", "b.pth", "README.md"],
    "org/parts": ["README.md", "vae/config.json", "vae/diffusion_pytorch_model.safetensors", "other/model.safetensors"],
    "org/shards": ["model.safetensors.index.json", "model-1-of-2.safetensors", "model-2-of-2.safetensors", "big.pth"],
    "org/pipeline": ["model_index.json", "transformer/diffusion_pytorch_model.safetensors", "transformer/config.json",
                     "text_encoder/model.safetensors"],
    "org/training": ["model/pytorch_model.bin.index.json", "model/pytorch_model-00001.bin", "ema.json"],
    "org/empty": ["README.md"],
}  # fmt: skip


class Hub(BaseHTTPRequestHandler):
    """The few answers that downloading needs."""

    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        headers: dict[str, str] = {}
        if found := re.fullmatch(r"/api/models/([\w-]+/[\w-]+)(/revision/[\w.]+)?", path):
            repo = found[1]
            listed = [{"rfilename": name} for name in FILES.get(repo, [])]
            body = json.dumps({"id": repo, "sha": COMMIT, "siblings": listed}).encode()
            known = repo in FILES
        elif found := re.fullmatch(r"/api/models/([\w-]+/[\w-]+)/tree/[\w.]+/?", path):
            tree = [{"type": "file", "path": name, "size": len(name), "oid": "0"} for name in FILES.get(found[1], [])]
            body, known = json.dumps(tree).encode(), found[1] in FILES
        elif found := re.fullmatch(r"/([\w-]+/[\w-]+)/resolve/[\w.]+/(.+)", path):
            body, known = found[2].encode(), found[2] in FILES.get(found[1], [])
            headers = {"ETag": f'"{abs(hash(path))}"', "X-Repo-Commit": COMMIT}
            if known and with_body:
                self.asked.append(f"{found[1]}/{found[2]}")
        elif path == "/files/whole.pt":
            body, known = b"whole", True
        elif path == "/files/cut.pt":
            body, known = b"cut", True
            headers = {"Content-Length": "100"}
        else:
            body, known = b"{}", False
        self.send_response(200 if known else 404)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base class's name
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


Locate = Callable[..., dict[str, Any]]

PROGRAM = """
import json, sys
from opensora.core import WeightsError
from opensora.core.weight_sources import locate_weights
results = {}
for source in json.loads(sys.argv[1]):
    try:
        path = locate_weights(source, published=json.loads(sys.argv[2]))
        inside = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
        results[source] = [str(path), sorted(str(one.relative_to(path)) for one in inside if one != path)]
    except WeightsError as error:
        results[source] = str(error)
print(json.dumps(results))
"""


@pytest.fixture
def locate(hub: str, tmp_path: Path) -> Locate:
    """Locates sources in a fresh process, since the hub's client reads HF_ENDPOINT when it is imported."""

    def locate(sources: list[str], published: dict[str, str] | None = None, **changes: str) -> dict[str, Any]:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", **changes}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, json.dumps(sources), json.dumps(published or {})],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=100,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        results: dict[str, Any] = json.loads(done.stdout)
        return results

    return locate


def test_the_hub_gives_what_is_asked_for_and_no_more(locate: Locate) -> None:
    found = locate(
        [
            "org/single",
            "org/single@main",
            "org/parts/vae",
            "org/many/b.pth",
            "org/shards",
            "org/pipeline",
            "org/training",
        ]
    )
    assert found["org/single"][1] == ["config.json", "model.safetensors"]
    assert found["org/single@main"] == found["org/single"]
    assert found["org/parts/vae"][0].endswith("/vae")
    assert found["org/parts/vae"][1] == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert found["org/many/b.pth"][0].endswith("/b.pth")
    assert found["org/shards"][1] == sorted(set(FILES["org/shards"]) - {"big.pth"})
    assert found["org/pipeline"][1] == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert found["org/training"][1] == ["pytorch_model-00001.bin", "pytorch_model.bin.index.json"]
    assert "org/many/a.pth" not in Hub.asked
    assert "org/pipeline/text_encoder/model.safetensors" not in Hub.asked


def test_what_the_hub_has_not_is_said(locate: Locate) -> None:
    found = locate(["org/many", "org/empty", "org/parts/nothing", "org/absent", "org/single/absent.pth"])
    assert (
        found["org/many"]
        == "org/many on the hub has several weights files: name one of org/many/a.pth, org/many/b.pth."
    )
    assert found["org/empty"] == "org/empty on the hub has no weights."
    assert found["org/parts/nothing"] == "org/parts on the hub has no weights in nothing."
    for absent in ("org/absent", "org/single/absent.pth"):
        assert f'"{absent}" is no local path, and the hub has not given it' in found[absent]


def test_what_was_downloaded_serves_offline(locate: Locate) -> None:
    sources = ["org/parts/vae", "org/many/b.pth", "org/single", "org/pipeline", "org/training"]
    before = locate(sources)
    asked = list(Hub.asked)
    offline = locate([*sources, "org/shards", "org/parts/other"], HF_HUB_OFFLINE="1")
    for source in sources:
        assert offline[source][1] == before[source][1]
        assert Path(offline[source][0]) == Path(before[source][0])
    assert "has not given it (OfflineModeIsEnabled)" in offline["org/shards"]
    assert "has not given it (OfflineModeIsEnabled)" in offline["org/parts/other"]
    assert Hub.asked == asked


def test_published_files_come_by_name_and_stay(locate: Locate, hub: str, tmp_path: Path) -> None:
    published = {"whole.pt": f"{hub}/files/whole.pt", "named.pth": "org/many/b.pth", "b.pth": "org/many/b.pth"}
    found = locate([*published, "pretrained_models/whole.pt"], published)
    for name in published:
        assert found[name] == [f"pretrained_models/{name}", []]
    assert found["pretrained_models/whole.pt"] == found["whole.pt"]
    downloads = tmp_path / "pretrained_models"
    assert (downloads / "whole.pt").read_bytes() == b"whole"
    assert (downloads / "named.pth").read_bytes() == b"b.pth"
    asked = list(Hub.asked)
    assert locate(list(published), published, HF_HUB_OFFLINE="1") == {name: found[name] for name in published}
    assert Hub.asked == asked


def test_a_download_is_whole_or_not_there(locate: Locate, hub: str, tmp_path: Path) -> None:
    found = locate(["cut.pt", "absent.pt"], {"cut.pt": f"{hub}/files/cut.pt", "absent.pt": f"{hub}/files/absent.pt"})
    assert f"cut.pt is not in pretrained_models/, and can't be downloaded from {hub}/files/cut.pt" in found["cut.pt"]
    assert "404" in found["absent.pt"]
    assert not list((tmp_path / "pretrained_models").iterdir())


def test_offline_the_message_names_the_address_and_the_place(locate: Locate, hub: str) -> None:
    published = {"a.pt": f"{hub}/files/whole.pt", "b.pth": "org/many/b.pth"}
    found = locate(list(published), published, HF_HUB_OFFLINE="1")
    assert f"can't be downloaded from {hub}/files/whole.pt" in found["a.pt"]
    assert f"can't be downloaded from {hub}/org/many/resolve/main/b.pth" in found["b.pth"]
    for name, message in found.items():
        assert message.endswith(f"Put the file at pretrained_models/{name}, or give its path.")


def test_a_local_file_goes_before_a_published_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pt").touch()
    assert locate_weights("a.pt", published={"a.pt": ""}) == Path("a.pt")


@pytest.mark.parametrize("source", ["nowhere", "./org/name", "/a/b", "../a/b", "folder/file.safetensors", "a b/c"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(source: str) -> None:
    with pytest.raises(WeightsError, match=f"There is no file or folder {re.escape(source)}"):
        locate_weights(source)


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(WeightsError, match=r"Published files known by name: a\.pt, b\.pth"):
        locate_weights("c.pt", published={"a.pt": "", "b.pth": ""})


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["a.pt", "model.safetensors"], ["model.safetensors"]),
        (["pytorch_model.bin.index.json", "x.pt"], ["pytorch_model.bin.index.json", "pytorch_model*.bin"]),
        (["b.pt", "a.pth", "README.md", "opensora_extra.safetensors", "deeper/c.pt"], ["a.pth", "b.pt"]),
        ([], []),
    ],
)
def test_files_of_a_folder_are_chosen_as_they_are_read(names: list[str], chosen: list[str]) -> None:
    assert choose_files(names) == chosen
