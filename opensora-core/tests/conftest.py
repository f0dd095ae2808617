"""Installed distributions, made up for a test; reference vectors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from opensora.core import components

Install = Callable[..., Path]
GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Any]:
    """Reads a file of reference vectors by name."""
    return lambda name: json.loads((GOLDENS / f"{name}.json").read_text())


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs a distribution: its entry points by group, and its files. Returns the folder to put on ``PYTHONPATH``."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)

    def install(name: str, entry_points: Mapping[str, Mapping[str, str]], files: Mapping[str, str]) -> Path:
        metadata = site / f"{name.replace('-', '_')}-1.5.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
        groups = (
            f"[{group}]\n" + "".join(f"{key} = {target}\n" for key, target in entries.items())
            for group, entries in entry_points.items()
        )
        (metadata / "entry_points.txt").write_text("\n".join(groups))
        for path, text in files.items():
            (site / path).parent.mkdir(parents=True, exist_ok=True)
            (site / path).write_text(text)
        components.refresh()
        return site

    yield install
    components.refresh()
