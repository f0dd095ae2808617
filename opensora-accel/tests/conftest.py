"""Starting real processes, as torchrun does; a small world to sample in."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from opensora.core import components

WORKERS = Path(__file__).parent / "workers"


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    def find() -> int:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            return listener.getsockname()[1]

    return find


@pytest.fixture(scope="session")
def torchrun(free_port: Callable[[], int]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a file of ``workers/`` in two processes on this machine."""

    def start(worker: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        options = ["--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
        return subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *options, WORKERS / worker, *map(str, arguments)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    return start


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """``toys/toy_world.py``, whose scheduler is installed as any plugin's."""
    site = tmp_path_factory.mktemp("site")
    metadata = site / "toy_world-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-world\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[opensora.schedulers]\ntoy-flow = toy_world:Flow\n")
    added = [str(site), str(Path(__file__).parent / "toys")]
    sys.path[:0] = added
    components.refresh()
    yield import_module("toy_world")
    for path in added:
        sys.path.remove(path)
    components.refresh()
