"""``opensora``: what it lists, in what state, for people and programs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opensora.core.commands.opensora import main

Install = Callable[..., Path]

GOOD = """
from attrs import frozen
@frozen
class GoodSpec:
    '''None.'''
class Good:
    Spec = GoodSpec
"""


@pytest.fixture
def plugins(install: Install) -> None:
    """Distributions with components in all states."""
    models = {
        "Good/2": "good_plugin:Good",
        "Gone/2": "good_plugin.gone:Good",
        "Raises/2": "raising_plugin:Model",
        "Absent/2": "good_plugin:Absent",
        "Twice/2": "good_plugin:Good",
    }
    configs = {"good": "good_plugin_configs", "gone": "good_plugin_configs.gone"}
    files = {
        "good_plugin.py": GOOD,
        "raising_plugin.py": "raise RuntimeError('no such GPU')",
        "good_plugin_configs/sample.py": '"""Samples."""',
    }
    install("good-plugin", {"opensora.models": models, "opensora.configs": configs}, files)
    install("other-plugin", {"opensora.models": {"Twice/2": "good_plugin:Good"}}, {})


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(arguments)
    out, err = capsys.readouterr()
    return status, out, err


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[tuple[str, str], Any]:
    _, out, _ = run(capsys, "plugins", "--json", *arguments)
    return {(one["distribution"], one["name"]): one for one in json.loads(out)}


@pytest.mark.usefixtures("plugins")
def test_plugins_are_listed_with_what_metadata_tells(capsys: pytest.CaptureFixture[str]) -> None:
    found = listed(capsys)
    assert found["good-plugin", "Good/2"] == {
        "kind": "models",
        "name": "Good/2",
        "distribution": "good-plugin",
        "version": "1.5",
        "target": "good_plugin:Good",
        "status": "ok",
        "problem": None,
    }
    problems = {key: one["problem"] for key, one in found.items() if "plugin" in key[0] and one["problem"]}
    assert problems == {
        ("good-plugin", "Gone/2"): "broken: there is no module good_plugin.gone",
        ("good-plugin", "gone"): "broken: there is no package good_plugin_configs.gone",
        ("good-plugin", "Twice/2"): "duplicate: also in other-plugin",
        ("other-plugin", "Twice/2"): "duplicate: also in good-plugin",
    }
    assert found["opensora-core", "train"]["kind"] == "pipelines"


@pytest.mark.usefixtures("plugins")
def test_check_imports_each_and_shows_the_cause(capsys: pytest.CaptureFixture[str]) -> None:
    found = listed(capsys, "--check", "--kind", "models")
    problems = {name: one["problem"] for (owner, name), one in found.items() if owner == "good-plugin"}
    assert problems["Good/2"] is None
    assert problems["Raises/2"] == "broken: RuntimeError: no such GPU"
    assert problems["Absent/2"] == "broken: AttributeError: module 'good_plugin' has no attribute 'Absent'"
    assert main(["plugins", "--check", "--kind", "models"]) == 1
    assert main(["plugins", "--check", "--kind", "pipelines"]) == 0


@pytest.mark.usefixtures("plugins")
def test_plugins_are_a_table_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "plugins", "--kind", "model")
    assert status == 0
    lines = out.splitlines()
    assert lines[0] == "models"
    assert "  Good/2" in {line[:8] for line in lines}
    row = "Gone/2 good-plugin 1.5 broken: there is no module good_plugin.gone"
    assert row in {" ".join(line.split()) for line in lines}


def test_an_unknown_kind_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "plugins", "--kind", "modles")
    assert status == 2
    assert err.startswith('"modles" is no kind of component. Did you mean "models"? Kinds: models, vaes')


@pytest.mark.usefixtures("plugins")
def test_configs_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "configs")
    assert status == 0
    assert "good/sample Samples." in {" ".join(line.split()) for line in out.splitlines()}
    _, out, _ = run(capsys, "configs", "--json")
    (found,) = [one for one in json.loads(out) if one["distribution"] == "good-plugin"]
    assert (found["name"], found["summary"]) == ("good/sample", "Samples.")
    assert Path(found["path"]).name == "sample.py"


def test_the_doctor_reports_versions_devices_and_dtypes(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "doctor", "--json")
    assert status == 0
    found = json.loads(out)
    assert found["packages"]["opensora-core"]
    assert found["torch"]["problem"] is None
    cpu = found["devices"][0]
    assert (cpu["device"], cpu["dtypes"]["fp32"], set(cpu["dtypes"])) == ("cpu", None, {"fp32", "fp16", "bf16"})
    assert cpu["memory_bytes"] > 0
    assert found["optional"]["flash-attn"]["install"] == "pip install flash-attn --no-build-isolation"


def test_the_doctor_speaks_to_people(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "doctor")
    assert "  opensora-core " in out
    assert "    fp32 works\n" in out


def test_the_doctor_survives_a_broken_torch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    status, out, _ = run(capsys, "doctor")
    assert status == 0
    assert "ModuleNotFoundError: import of torch halted" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "modles", "X"], '"modles" is no kind of component'),
        (["verify", "models", "No-such-model"], 'No model is named "No-such-model"'),
        (["verify", "models", "X", "depth"], '"depth" is no option. Write KEY=VALUE'),
        (["verify", "configs", "X"], 'There are no checks for kind "configs"'),
        (["verify", "models"], "NAME is missing; it goes before the flags. See opensora verify --help"),
        (["plguins"], "COMMAND: invalid choice: 'plguins'"),
        (["plugins", "--jsno"], "unrecognized arguments: --jsno"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert err.startswith(message)


def test_a_component_that_does_not_conform_is_exit_code_1(capsys: pytest.CaptureFixture[str], install: Install) -> None:
    install("good-plugin", {"opensora.models": {"Good/2": "good_plugin:Good"}}, {"good_plugin.py": GOOD})
    status, _, err = run(capsys, "verify", "model", "Good/2")
    assert status == 1
    assert err.startswith("FAILED  Good/2: ")


def test_without_a_command_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys)
    assert status == 0
    assert "all installed components" in out


def test_the_version_is_the_distributions(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.startswith("opensora-core 0.")


COMMAND = """
class Greet:
    summary = "say hello"
    def add_arguments(self, parser):
        parser.add_argument("name")
    def run(self, options):
        print(f"hello {options.name}")
        return 3
"""


def test_a_distribution_can_bring_a_command(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    entries = {"greet": "greeting:Greet", "broken": "greeting.gone:Gone"}
    install("greeting-plugin", {"opensora.commands": entries}, {"greeting.py": COMMAND})
    assert run(capsys, "greet", "you") == (3, "hello you\n", "")
    for arguments, said in (
        (["--help"], "of greeting-plugin: opensora greet --help"),
        (["greet", "--help"], "Say hello."),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["greet"], "name is missing; it goes before the flags"),
        (["broken"], 'The command "broken" can\'t be loaded'),
        (["formless"], "it must be a class with methods `add_arguments` and `run`"),
        (["plugins"], 'greeting-plugin brings a command "plugins" too. Uninstall it'),
        (["twice"], 'Two distributions have a command named "twice"'),
    ],
    ids=["its own mistakes", "broken", "no command", "of core's name", "of two"],
)
def test_a_command_that_cannot_be_had(
    install: Install, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    entries = dict.fromkeys(("greet", "plugins", "twice"), "greeting:Greet")
    others = {"broken": "greeting.gone:Gone", "formless": "builtins:dict"}
    install("greeting-plugin", {"opensora.commands": entries | others}, {"greeting.py": COMMAND})
    install("second-plugin", {"opensora.commands": {"twice": "greeting:Greet"}}, {})
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert message in err
    assert run(capsys, "configs")[0] == 0  # nothing else is broken by it
