"""Short names of configs that distributions ship."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from opensora.core.config import evaluate
from opensora.core.config.names import iter_configs, resolve
from opensora.core.errors import ComponentError, ConfigError

Install = Callable[..., Path]

FILES = {
    "myplugin/__init__.py": "raise RuntimeError('imported')",
    "myplugin/configs/fast/default.py": '"""Trains fast.\n\nMore."""\nlr = 1',
    "myplugin/configs/fast/sample.py": "steps = 1",
    "myplugin/configs/fast/train/stage1.py": '"""Stage one."""',
    "myplugin/configs/fast/_base.py": "lr = 2",
    "myplugin/configs/fast/_parts/a.py": "lr = 2",
    "myplugin/configs/plain/sample.py": '"""Unclosed',
}


@pytest.fixture(autouse=True)
def shipped(install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A distribution with two config folders; the current folder is empty."""
    entries = {"fast": "myplugin.configs.fast", "plain": "myplugin.configs.plain", "gone": "myplugin.configs.gone"}
    site = install("my-plugin", {"opensora.configs": entries}, FILES)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return site / "myplugin" / "configs"


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("fast", "fast/default.py"),
        ("fast/default", "fast/default.py"),
        ("fast/sample", "fast/sample.py"),
        ("fast/sample.py", "fast/sample.py"),
        ("fast/train/stage1", "fast/train/stage1.py"),
    ],
)
def test_a_short_name_is_a_file_of_the_folder_and_nothing_is_imported(shipped: Path, name: str, file: str) -> None:
    assert resolve(name) == shipped / file
    assert "myplugin" not in sys.modules


def test_a_file_here_goes_before_a_short_name_and_a_folder_does_not(shipped: Path) -> None:
    Path("fast").mkdir()
    assert resolve("fast") == shipped / "fast/default.py"
    Path("fast/sample.py").touch()
    assert resolve("fast/sample.py") == Path("fast/sample.py")


def test_a_folder_here_is_left_for_the_reader_to_explain() -> None:
    Path("outputs/run").mkdir(parents=True)
    assert resolve("outputs/run") == Path("outputs/run")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fsat", r"^There is no file fsat, and no shipped config of that name\. Nearest: fast"),
        ("fast/smaple.py", r"Nearest: fast/sample, "),
        (
            "plain",
            r"^There is no file plain, and no shipped config of that name\. Nearest: plain/sample\. All: opensora configs$",
        ),
        ("fast/../plain/sample", "^There is no file"),
        (
            "nowhere/else.py",
            r"^There is no file nowhere/else.py, and no shipped config of that name\. All: opensora configs$",
        ),
    ],
)
def test_an_unknown_name_has_the_nearest(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(name)


def test_a_config_of_an_official_package_that_is_missing_has_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opensora.core.components._official", lambda: {"configs": {"stdit9": "opensora-models"}})
    with pytest.raises(
        ConfigError, match=r"^The configs \"stdit9\" are part .* not installed: pip install opensora-models$"
    ):
        resolve("stdit9/sample")


def test_a_folder_that_is_not_there_is_the_plugins_fault() -> None:
    with pytest.raises(ComponentError, match=r'config folder "gone" of my-plugin 1.5 is broken: there is no package'):
        resolve("gone")


def test_two_distributions_with_one_folder_name_are_an_error(install: Install) -> None:
    install("other-plugin", {"opensora.configs": {"fast": "other.configs"}}, {"other/configs/default.py": ""})
    with pytest.raises(ComponentError, match=r"my-plugin 1.5 and other-plugin 1.5"):
        resolve("fast")


def test_all_configs_are_listed_with_their_first_line() -> None:
    ours = [(one.name, one.summary) for one in iter_configs() if one.distribution == "my-plugin"]
    assert ours == [
        ("fast", "Trains fast."),
        ("fast/sample", ""),
        ("fast/train/stage1", "Stage one."),
        ("plain/sample", "(can't be read)"),
    ]


def test_a_base_may_be_a_shipped_config() -> None:
    Path("mine.py").write_text("_base_ = ['fast/default.py']\nsteps = 5")
    assert evaluate("mine.py").values == {"lr": 1, "steps": 5}
