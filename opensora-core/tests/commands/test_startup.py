"""What the commands must not import, so that help and lists are there at once."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {"torch", "numpy", "transformers", "diffusers", "av", "polars", "rich", "cattrs", "pluggy"}


def imported(statement: str) -> set[str]:
    """Modules in a fresh interpreter after a statement, which may exit and print."""
    code = f"""
import contextlib, io, json, sys
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    {statement}
print(json.dumps(sorted(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return set(json.loads(done.stdout))


@pytest.mark.parametrize(
    "statement",
    [
        "import opensora.core",
        "import opensora.core.run",
        "from opensora.core.commands.opensora import main; main(['--help'])",
        "from opensora.core.commands.opensora import main; main(['--version'])",
        "from opensora.core.commands.opensora import main; main(['plugins'])",
        "from opensora.core.commands.opensora import main; main(['plugins', '--json'])",
        "from opensora.core.commands.opensora import main; main(['configs'])",
        "from opensora.core.commands.opensora_run import main; main(['--help'])",
        "from opensora.core.commands.opensora_run import main; main(['no-such-file.py', '--help'])",
        "from opensora.core.commands.opensora_run import main; main(['no-such-file.py'])",
    ],
)
def test_start_up_imports_nothing_heavy(statement: str) -> None:
    assert not HEAVY & imported(statement)


def test_reading_and_writing_a_config_needs_no_torch() -> None:
    statement = (
        "from opensora.core.config import ComponentConfig, structure, format_config; "
        "format_config({'a': 1}, ''); structure(ComponentConfig, {'type': 'a'})"
    )
    assert not {"torch", "numpy"} & imported(statement)


@pytest.mark.parametrize("command", ["opensora", "opensora_run"])
def test_a_reader_that_goes_away_is_no_error(command: str) -> None:
    code = f"import sys; from opensora.core.commands.{command} import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["plugins", "--json"] if command == "opensora" else ["--help"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) in (0, 141)
    assert errors == ""
