"""Short names of the configs that packages ship: ``stdit3/sample`` is ``sample.py`` in the config folder ``stdit3``.

A folder is an entry point of the group ``opensora.configs``: its name, and the dotted path of a package or a plain
folder. It is found without importing anything.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator
from pathlib import Path

from attrs import frozen

from opensora.core import components
from opensora.core.config._modules import find_folders
from opensora.core.config._origins import shown_path
from opensora.core.errors import ComponentError, ConfigError

__all__ = ["ShippedConfig", "find_text", "iter_configs", "resolve"]

_DEFAULT = "default"


@frozen
class ShippedConfig:
    """A config that came with an installed distribution."""

    name: str
    """What ``opensora-run`` takes: ``stdit3/sample``; ``quickstart`` for ``quickstart/default.py``."""
    path: Path
    summary: str
    """The first line of its docstring."""
    distribution: str


def resolve(name: str) -> Path:
    """The file that ``name`` means: a file on disk if there is one, else a shipped config.

    Raises:
        ConfigError: There is neither; the message has the nearest names.
    """
    path = Path(name)
    if path.is_file():
        return path
    folder, _, inner = name.removesuffix(".py").partition("/")
    if shipped := _shipped(folder, f"{inner or _DEFAULT}.py"):
        return shipped
    if path.is_dir():
        return path  # reading it says what is wrong, and what is in it
    raise ConfigError(_unknown_message(name, folder))


def find_text(name: str) -> Path | None:
    """A file such as a list of prompts: the one on disk, or one in an installed config folder; None if there is neither."""
    if (path := Path(name)).is_file():
        return path
    folder, _, inner = name.partition("/")
    return _shipped(folder, inner)


def _shipped(folder: str, inner: str) -> Path | None:
    """The file of that path in an installed config folder."""
    if not any(one.name == folder for one in components.available("configs")):
        return None
    path = _folder(components.find("configs", folder)) / inner
    return path if path.is_file() and ".." not in path.parts else None


def iter_configs() -> Iterator[ShippedConfig]:
    """All shipped configs by name. Files and folders that start with an underscore are parts, and left out."""
    for component in components.available("configs"):
        try:
            folder = _folder(component)
        except ComponentError:
            continue  # `opensora plugins` shows it as broken
        for path in sorted(folder.rglob("*.py")):
            inner = path.relative_to(folder).with_suffix("")
            if not any(part.startswith("_") for part in inner.parts):
                name = component.name if str(inner) == _DEFAULT else f"{component.name}/{inner.as_posix()}"
                yield ShippedConfig(name, path, _summary(path), component.distribution)


def _folder(component: components.Component) -> Path:
    """Where the folder of an ``opensora.configs`` entry is."""
    folders = find_folders(component.target)
    if not folders:
        raise ComponentError(
            f'The config folder "{component.name}" of {component.distribution} {component.version} is broken: '
            f"there is no package {component.target}. Mend or uninstall {component.distribution}."
        )
    return folders[0]


def _summary(path: Path) -> str:
    try:
        docstring = ast.get_docstring(ast.parse(path.read_bytes()))
    except (OSError, SyntaxError, ValueError):
        return "(can't be read)"
    return docstring.partition("\n")[0] if docstring else ""


def _unknown_message(name: str, folder: str) -> str:
    if hint := components.install_hint("configs", folder):
        return f'The configs "{folder}" are part of a package that is not installed: {hint}'
    names = [config.name for config in iter_configs()]
    near = difflib.get_close_matches(name.removesuffix(".py"), names, n=3, cutoff=0.5)
    near += [one for one in names if one.startswith(f"{folder}/") and one not in near][: 3 - len(near)]
    nearest = f" Nearest: {', '.join(near)}." if near else ""
    file = shown_path(Path(name))
    return f"There is no file {file}, and no shipped config of that name.{nearest} All: opensora configs"
