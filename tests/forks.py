"""The commands without the seconds that importing torch takes: in a copy of a process that has imported it already.

`ForkedCommands` is for most tests. What a new process alone shows (hash seeds, the console scripts, other variables of the
environment, several processes) is shown by the tests that start real ones: of resuming, faults, several processes, and the
documentation's blocks.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import entry_points
from multiprocessing import forkserver
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

from runs import environment

PRELOADED = [
    "torch._dynamo",  # by torch's optimizers
    "diffusers.models.autoencoders.autoencoder_kl",
    "opensora.core.commands.opensora_run",
    "opensora.core.pipelines.train",
    "opensora.core.pipelines.sample",
    "opensora.data",
    "opensora.models",
    "opensora.schedulers",
]


class ForkedCommands:
    """Runs commands in forks of one process."""

    def __init__(self) -> None:
        self._environment = _comparable(environment())
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        with patch.dict(os.environ, environment()):
            forkserver.ensure_running()

    def suits(self, variables: Mapping[str, str]) -> bool:
        """Whether a command needs no other environment than the one in which modules were imported."""
        return _comparable(variables) == self._environment

    def run(self, command_line: list[str], folder: Path, timeout_s: float) -> subprocess.CompletedProcess[str]:
        """Run a command of opensora in a folder, as `subprocess.run` does.

        Raises:
            subprocess.TimeoutExpired: It took longer; it is killed.
        """
        with TemporaryDirectory() as temporary:
            out, err = Path(temporary, "stdout"), Path(temporary, "stderr")
            process = self._context.Process(target=_become, args=(command_line, folder, out, err))
            process.start()
            process.join(timeout_s)
            if process.exitcode is None:
                process.kill()
                process.join()
                raise subprocess.TimeoutExpired(command_line, timeout_s, out.read_text(), err.read_text())
            return subprocess.CompletedProcess(command_line, process.exitcode, out.read_text(), err.read_text())


def _comparable(variables: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name != "PYTEST_CURRENT_TEST"}


def _become(command_line: list[str], folder: Path, out: Path, err: Path) -> None:
    """Make this process the command's."""
    multiprocessing.set_start_method(None, force=True)  # else the command's own workers would be made by a fork server
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
    os.chdir(folder)
    sys.argv = command_line
    (script,) = entry_points(group="console_scripts", name=Path(command_line[0]).name)
    try:
        sys.exit(script.load()())
    finally:
        atexit._run_exitfuncs()  # a process of multiprocessing ends without them
