"""Core knows which official package has a name, so that it can say what to install; that list must not go stale."""

from __future__ import annotations

import json
import tomllib
from importlib import resources
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def registered() -> dict[str, dict[str, str]]:
    """{kind: {name: distribution}} of the packages that plug into core."""
    found: dict[str, dict[str, str]] = {}
    for path in sorted(REPOSITORY.glob("opensora-*/pyproject.toml")):
        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        if project["name"] == "opensora-core":
            continue
        for group, entries in project.get("entry-points", {}).items():
            kind = group.removeprefix("opensora.")
            for name in entries:
                assert name not in found.get(kind, {}), (
                    f"{project['name']} and {found[kind][name]} both register {name}"
                )
                found.setdefault(kind, {})[name] = project["name"]
    return found


def test_the_list_of_official_components_is_what_the_packages_register() -> None:
    text = resources.files("opensora.core").joinpath("official_components.json").read_text(encoding="utf-8")
    expected = registered()
    assert json.loads(text) == expected, f"Write this instead:\n{json.dumps(expected, indent=1, sort_keys=True)}"


def test_every_package_is_found() -> None:
    packages = {path.parent.name for path in REPOSITORY.glob("opensora-*/pyproject.toml")}
    owners = {distribution for names in registered().values() for distribution in names.values()}
    assert owners == packages - {"opensora-core"}
    assert len(owners) == 4
