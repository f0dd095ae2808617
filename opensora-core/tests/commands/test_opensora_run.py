"""``opensora-run``: from a command line to a pipeline that runs, or to a message and an exit code."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opensora.core.commands.opensora_run import main

Install = Callable[..., Path]

ECHO = """
import json, os, sys
from attrs import field, frozen
from attrs.validators import gt
from opensora.core.config.structure import ComponentConfig, unstructure
from opensora.core.errors import DataError, OpenSoraError

@frozen(kw_only=True)
class EchoSpec:
    seed: int = field(default=1, validator=gt(0))
    depth: int = 2
    fail: str | None = None
    model: ComponentConfig | None = None
    accelerator: ComponentConfig | None = None

class Echo:
    Spec = EchoSpec

    def __init__(self, spec, *, config):
        self.spec, self.config = spec, config

    def run(self):
        rank = os.environ.get("RANK", "none")
        if self.spec.fail == "user":
            raise DataError("clips.csv: no column path")
        if self.spec.fail == "named":
            raise OpenSoraError("the disk is full")
        if self.spec.fail == "bug":
            raise RuntimeError("oops")
        if self.spec.fail == "interrupt":
            raise KeyboardInterrupt
        if self.spec.fail == "rank1" and rank == "1":
            raise DataError("only here")
        values = {**unstructure(self.spec), "rank": rank, "world": os.environ.get("WORLD_SIZE", "none")}
        sys.stdout.write(json.dumps(values) + "\\n")

    def dry_run(self):
        return f"would echo {self.spec.depth}"
"""


@pytest.fixture(autouse=True)
def site(install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pipeline that prints its spec; the current folder has a config for it."""
    folder = install("echo-plugin", {"opensora.pipelines": {"echo": "echo_plugin:Echo"}}, {"echo_plugin.py": ECHO})
    monkeypatch.delitem(sys.modules, "echo_plugin", raising=False)
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    Path("config.py").write_text('pipeline = "echo"\nseed = 3\nmodel = dict(type="A", depth=1)\n')
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(["config.py", *arguments])
    out, err = capsys.readouterr()
    return status, out, err


def test_a_config_runs_its_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys)
    assert status == 0
    assert json.loads(out) == {
        "seed": 3,
        "depth": 2,
        "fail": None,
        "model": {"type": "A", "depth": 1},
        "accelerator": None,
        "rank": "none",
        "world": "none",
    }


def test_flags_and_keys_go_over_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--seed", "7", "--model.depth", "12", "--ckpt-path", "a.pt", "--depth=4")
    assert status == 0
    assert json.loads(out)["seed"] == 7
    assert json.loads(out)["depth"] == 4
    assert json.loads(out)["model"] == {"type": "A", "depth": 12, "from_pretrained": "a.pt"}


def test_older_keys_are_replaced_with_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--flash-attn", "yes", "--plugin", "zero2-seq", "--sp_size", "2")
    assert status == 0
    assert json.loads(out)["model"] == {"type": "A", "depth": 1}
    assert json.loads(out)["accelerator"] == {"type": "zero2-seq", "sp_size": 2}


def test_dry_run_prints_and_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--dry-run", "--depth", "5", "--fail", "user") == (0, "would echo 5\n", "")


@pytest.mark.parametrize(
    ("text", "pipeline"),
    [("dataset = 1", "train"), ("model = 1", "sample"), ("dataset = 1\npipeline = 'sample'", "sample")],
)
def test_the_pipeline_follows_from_the_config(capsys: pytest.CaptureFixture[str], text: str, pipeline: str) -> None:
    Path("config.py").write_text(text)
    other = "--prompt" if pipeline == "train" else "--lr"
    status, _, err = run(capsys, other, "1")
    assert (status, f'the pipeline "{pipeline}"' in err) == (2, True)


BAD = {
    "unknown key": ("dept = 3", [], 'config.py:4: dept is not a field of EchoSpec. Did you mean "depth"?'),
    "wrong type": ("depth = '3'", [], 'config.py:4: depth must be int, not "3" (str).'),
    "validator": ("seed = 0", [], "config.py:4: seed must be > 0, not 0."),
    "import": ("import os", [], "config.py:4: import os is not allowed in a config"),
    "call": ("depth = open('x')", [], "config.py:4: calling open() is not allowed in a config"),
    "syntax": ("depth = ", [], "config.py:4: not valid Python: invalid syntax"),
    "undefined": ("depth = sed", [], 'config.py:4: the name sed is not defined. Did you mean "seed"?'),
    "unknown pipeline": ("pipeline = 'ehco'", [], 'No pipeline is named "ehco". Nearest: "echo".'),
    "pipeline of wrong type": ("pipeline = 3", [], "pipeline must be a pipeline's name, not 3."),
    "flag of wrong type": ("", ["--seed", "x"], '--seed: must be a whole number, not "x". See opensora-run --help'),
    "key of wrong type": ("", ["--depth", "x"], '--depth: depth must be int, not "x" (str).'),
    "unknown flag": ("", ["--dept", "3"], '--dept: dept is not a field of EchoSpec. Did you mean "depth"?'),
    "flag of another pipeline": (
        "",
        ["--lr", "1"],
        '--lr is a flag for training; the pipeline "echo" has no use for it.',
    ),
    "flag without its component": (
        "",
        ["--data-path", "x"],
        "--data-path sets dataset.data_path, but the config has no",
    ),
    "surplus": ("", ["more"], "unrecognized arguments: more. See opensora-run --help"),
    "port alone": ("", ["--port", "29500"], "--port is where several processes meet; it needs --nproc."),
    "no processes": ("", ["--nproc", "0"], '--nproc: must be a whole number from 1, not "0". See opensora-run --help'),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_bad_input_is_one_message_and_exit_code_2(capsys: pytest.CaptureFixture[str], name: str) -> None:
    text, flags, message = BAD[name]
    with open("config.py", "a") as file:
        file.write(text)
    status, out, err = run(capsys, *flags)
    assert (status, out) == (2, "")
    assert err.startswith(message)
    assert "Traceback" not in err


def test_a_missing_config_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nowhere.py"]) == 2
    assert capsys.readouterr().err.startswith("There is no file nowhere.py, and no shipped config of that name.")


def test_a_config_swallowed_by_a_flag_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--prompt", "a wave", "config.py"]) == 2
    message = "CONFIG is missing; it goes before the flags. See opensora-run --help\n"
    assert capsys.readouterr().err == message


def test_all_mistakes_of_a_config_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    Path("config.py").write_text("pipeline = 'echo'\nseed = 'a'\ndepht = 3\n")
    status, _, err = run(capsys, "--depth", "1.5")
    assert status == 2
    assert sorted(err.splitlines()) == [
        "--depth: depth must be int, not 1.5 (float).",
        'config.py:2: seed must be int, not "a" (str).',
        'config.py:3: depht is not a field of EchoSpec. Did you mean "depth"?',
    ]


def test_a_trusted_config_is_executed(capsys: pytest.CaptureFixture[str]) -> None:
    Path("config.py").write_text("import math\npipeline = 'echo'\ndepth = math.ceil(2.5)\n")
    status, out, _ = run(capsys, "--trust-config")
    assert (status, json.loads(out)["depth"]) == (0, 3)


@pytest.mark.parametrize(
    ("fail", "status", "message"),
    [
        ("user", 2, "clips.csv: no column path\n"),
        ("named", 1, "the disk is full\n"),
        ("interrupt", 130, "Interrupted.\n"),
    ],
)
def test_an_error_with_a_name_is_its_message(
    capsys: pytest.CaptureFixture[str], fail: str, status: int, message: str
) -> None:
    assert run(capsys, "--fail", fail) == (status, "", message)
    found, _, err = run(capsys, "--fail", fail, "--debug")
    assert found == status
    assert err.startswith("Traceback")
    assert err.endswith(message)


def test_an_error_without_a_name_is_a_traceback_and_a_request(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "--fail", "bug")
    assert status == 1
    assert "RuntimeError: oops\nThis is a mistake in opensora or a plugin. Please report it" in err


def test_help_shows_the_values_of_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    Path("config.py").write_text("lr = 0.25\nscheduler = dict(cfg_scale=7.5)")
    with pytest.raises(SystemExit, match="0"):
        main(["config.py", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "learning rate after warm-up [0.25]" in text
    assert "follows the prompt closely [7.5]" in text
    assert "where random numbers start [1024]" in text


@pytest.mark.parametrize("broken", ["import os", "(("])
def test_help_survives_a_broken_config(capsys: pytest.CaptureFixture[str], broken: str) -> None:
    Path("config.py").write_text(broken)
    with pytest.raises(SystemExit, match="0"):
        main(["config.py", "--help"])
    assert "opensora-run CONFIG" in capsys.readouterr().out


# ---- several processes


def subprocess_run(site: Path, *arguments: str, module: str = "opensora.core.run") -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def test_nproc_starts_that_many_processes(site: Path) -> None:
    done = subprocess_run(site, "config.py", "--nproc", "2", "--seed", "5")
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert sorted((one["rank"], one["world"], one["seed"]) for one in found) == [("0", "2", 5), ("1", "2", 5)]


def test_nproc_passes_on_the_exit_code_and_one_message(site: Path) -> None:
    done = subprocess_run(site, "config.py", "--nproc", "2", "--fail", "rank1")
    assert done.returncode == 2, done.stderr
    assert "[rank 1] only here" in done.stderr


def test_torchrun_starts_the_module(site: Path) -> None:
    arguments = ["--standalone", "--nproc-per-node=2", "-m", "opensora.core.run", "config.py"]
    done = subprocess_run(site, *arguments, module="torch.distributed.run")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2


def test_a_wrong_config_is_found_before_any_process_starts(site: Path) -> None:
    done = subprocess_run(site, "config.py", "--nproc", "2", "--dept", "3")
    assert done.returncode == 2
    assert done.stderr == '--dept: dept is not a field of EchoSpec. Did you mean "depth"?\n'


def test_a_port_in_use_is_named(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        status, _, err = run(capsys, "--nproc", "2", "--port", port)
    assert status == 2
    assert err.startswith(f"Port {port} can't be used: Address already in use. Choose another")


def test_a_chosen_port_is_used(site: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    done = subprocess_run(site, "config.py", "--nproc", "2", "--port", port)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("port", ["0", "99999", "1000000000000"])
def test_a_port_that_can_not_be(capsys: pytest.CaptureFixture[str], port: str) -> None:
    status, _, err = run(capsys, "--nproc", "2", "--port", port)
    assert status == 2
    assert "--port: must be a port from 1 to 65535" in err
