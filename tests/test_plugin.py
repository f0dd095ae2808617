"""A stranger's plugin: built as a wheel, installed in an environment of its own, listed, trained, sampled from, broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import environment, tiny_training

from opensora.core.config.write import write_config

EXAMPLE = Path(__file__).parents[1] / "docs" / "example-plugin"
Run = Callable[..., subprocess.CompletedProcess[str]]


def pip(python: Path, *arguments: object) -> None:
    done = subprocess.run(
        [python, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a new environment that sees this one's packages and has the example's wheel installed."""
    folder = tmp_path_factory.mktemp("fresh")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "tiny_video_model.py"):  # not in place: building leaves files behind
        (source / name).write_bytes((EXAMPLE / name).read_bytes())
    pip(Path(sys.executable), "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source)
    (wheel,) = folder.glob("tiny_video_model-*.whl")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    site = folder / "venv" / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    # addsitedir follows the .pth files of editable installs, which a plain path would not
    (site / "parent.pth").write_text(f"import site; site.addsitedir({sysconfig.get_paths()['purelib']!r})\n")
    pip(python, "install", "--no-deps", "--no-index", wheel)
    return python.parent


@pytest.fixture
def run(fresh: Path, tmp_path: Path) -> Run:
    """Runs one of the commands in the fresh environment."""

    def run(command: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        module = "opensora.core.commands." + command.replace("-", "_")
        start = f"import sys; from {module} import main; sys.exit(main())"
        return subprocess.run(
            [fresh / "python", "-c", start, *map(str, arguments)],
            cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False,
        )  # fmt: skip

    return run


def test_plugin_is_listed(run: Run) -> None:
    done = run("opensora", "plugins", "--json")
    assert done.returncode == 0, done.stderr
    listed = {(plugin["kind"], plugin["name"]): plugin for plugin in json.loads(done.stdout)}
    assert listed["models", "Tiny/2"]["distribution"] == "tiny-video-model"
    assert listed["hooks", "best-loss"]["version"] == "0.1"


def test_plugin_conforms(run: Run) -> None:
    done = run("opensora", "verify", "models", "Tiny/2", "width=8")
    assert done.returncode == 0, done.stdout + done.stderr


def test_plugin_trains_and_samples(run: Run, clips: Path, tmp_path: Path) -> None:
    model = {"type": "Tiny/2", "width": 8}
    values = tiny_training(clips, model=model, hooks=[{"type": "best-loss", "after": 2}], max_steps=5)
    write_config(tmp_path / "train.py", values, "Train the example.")
    done = run("opensora-run", "train.py", "--run-folder", "run")
    assert done.returncode == 0, done.stderr
    assert "Lowest loss" in done.stderr
    sampling = {
        "model": {**model, "from_pretrained": "run"},
        "scheduler": {"type": "rflow", "num_sampling_steps": 2},
        "num_frames": 4,
        "image_size": (16, 16),
        "save_dir": "samples",
    }
    write_config(tmp_path / "sample.py", sampling, "Sample from the example.")
    done = run("opensora-run", "sample.py", "--prompt", "a square of size 2")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "samples" / "sample_0000.mp4").stat().st_size > 0


def test_plugin_that_fails_to_import_breaks_only_itself(run: Run, fresh: Path, clips: Path, tmp_path: Path) -> None:
    folder = fresh.parent / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    info = folder / "broken_model-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-model\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[opensora.models]\nBroken = broken_model:Broken\nTiny/2 = broken_model:Other\n"
    )
    (folder / "broken_model.py").write_text("import a_package_that_is_missing\n")
    try:
        assert run("opensora", "plugins").returncode == 0
        write_config(tmp_path / "broken.py", tiny_training(clips, model={"type": "Broken"}), "Broken.")
        done = run("opensora-run", "broken.py")
        assert done.returncode == 2
        assert "broken-model" in done.stderr
        assert "a_package_that_is_missing" in done.stderr

        write_config(tmp_path / "twice.py", tiny_training(clips, model={"type": "Tiny/2"}), "Claimed twice.")
        done = run("opensora-run", "twice.py")
        assert done.returncode == 2
        assert "broken-model" in done.stderr
        assert "tiny-video-model:Tiny/2" in done.stderr

        chosen = tiny_training(clips, model={"type": "tiny-video-model:Tiny/2", "width": 8}, max_steps=1)
        write_config(tmp_path / "chosen.py", chosen, "Chosen.")
        done = run("opensora-run", "chosen.py")
        assert done.returncode == 0, done.stderr
    finally:
        for path in (info / "METADATA", info / "entry_points.txt", folder / "broken_model.py"):
            os.remove(path)
        info.rmdir()
