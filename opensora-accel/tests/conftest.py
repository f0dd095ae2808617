"""Starting real processes, as torchrun does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

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
