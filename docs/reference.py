"""Writes the reference pages from what is installed: every component and its options, every hook, every command.

python docs/reference.py [FOLDER]          # docs/reference, if not given
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from opensora.core import components
from opensora.core.config import SpecField, spec_fields
from opensora.core.config.names import iter_configs
from opensora.core.hookspecs import HookSpecs

Page = list[str]

INTRODUCTIONS = {
    "models": 'Denoisers: `model = dict(type="...")`. Besides their own options, all take `from_pretrained` (a file, a run '
    "folder, a folder, a published name or a hub id), `partial` (accept missing and unexpected keys) and `grow` (the file "
    "is of a smaller model). More: [Models](../models.md), [Weights](../weights.md).",
    "vaes": 'Video autoencoders: `vae = dict(type="...")`; `model` in the pipelines `train-vae` and `sample-vae`. The '
    "default is `identity`. More: [Autoencoders](../autoencoders.md).",
    "discriminators": 'Adversaries of an autoencoder in training: `discriminator = dict(type="...")`. More: '
    "[Autoencoders](../autoencoders.md#training-one).",
    "text_encoders": 'Text encoders: `text_encoder = dict(type="...")`. Besides their own options, all take `device` and '
    "`dtype`. The default is `hashed-words`. More: [Text encoders](../text-encoders.md).",
    "schedulers": 'Training objectives and samplers: `scheduler = dict(type="...")`. More: [Schedulers](../schedulers.md).',
    "prompters": 'What rewrites prompts: `prompter = dict(type="...")`. More: [Prompters](../prompters.md).',
    "datasets": 'Datasets: `dataset = dict(type="...")`.',
    "accelerators": 'How a step runs on the hardware: `accelerator = dict(type="...")`. The default is '
    "`single`, and `ddp` with several processes.",
    "pipelines": "What `opensora-run` runs. Their options are the top-level keys of a config. `pipeline` chooses; without "
    "it, a config with a `dataset` trains and any other samples, or the same for an autoencoder if `model` is one.",
    "hooks": 'What takes part in a run: `hooks = [dict(type="...")]`, or as a default of the pipeline.',
}


def main() -> None:
    """Write all pages into a folder of nothing else."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "reference"
    folder.mkdir(parents=True, exist_ok=True)
    pages = {"index": list_of_components(), "commands": commands(), "configs": configs()}
    pages |= {kind: component_page(kind, introduction) for kind, introduction in INTRODUCTIONS.items()}
    pages["hooks"] += hook_contract()
    for stale in folder.glob("*.md"):
        stale.unlink()
    for name, page in pages.items():
        (folder / f"{name}.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")


def list_of_components() -> Page:
    """All kinds with their components."""
    page = [
        "# All components",
        "What is installed where these pages were made. For your environment: `opensora plugins`.",
    ]
    for kind in components.KINDS:
        found = components.available(kind)
        if not found:
            continue
        title = f"[{kind}]({kind}.md)" if kind in INTRODUCTIONS or kind == "configs" else kind
        rows = [(f"`{one.name}`", one.distribution, summary(kind, one.name)) for one in found]
        page += [f"## {title}", f"Entry-point group `opensora.{kind}`.", table(("name", "distribution", "what"), rows)]
    return page


def component_page(kind: str, introduction: str) -> Page:
    """All components of a kind with their options."""
    page = [f"# {kind.replace('_', ' ').capitalize()}", introduction]
    for one in components.available(kind):
        loaded = components.load(kind, one.name)
        page += [f"## `{one.name}`", f"{summary(kind, one.name)} From {one.distribution}."]
        page += options(kind, loaded)
    return page


def options(kind: str, loaded: Any) -> Page:
    """The options of a component; of a preset, those that differ from the component that it is made of."""
    fields = spec_fields(loaded.Spec)
    base = preset_base(kind, loaded)
    if base is not None:
        known = {field.name: field for field in spec_fields(base[1].Spec)}
        fields = tuple(field for field in fields if field.default != known[field.name].default)
        if not fields:
            return [f"Another name of [`{base[0]}`](#{anchor(base[0])}), with the same defaults."]
        return [f"[`{base[0]}`](#{anchor(base[0])}) with other defaults:", field_table(fields)]
    return [field_table(fields)] if fields else ["No options."]


def preset_base(kind: str, loaded: Any) -> tuple[str, Any] | None:
    """Name and class of the registered component that ``loaded`` only gives other defaults."""
    for one in components.available(kind):
        other = components.load(kind, one.name)
        is_preset = inspect.isclass(loaded) and loaded.__bases__ == (other,) and loaded.__doc__ == other.__doc__
        if is_preset:  # a subclass of its own has words of its own
            return one.name, other
    return None


def field_table(fields: Iterable[SpecField]) -> str:
    """Fields of a spec."""
    return table(
        ("key", "type", "default", "what"),
        [
            (
                f"`{field.name}`",
                f"`{field.type}`",
                f"`{field.default}`" if field.default else "*must be given*",
                field.help,
            )
            for field in fields
        ],
    )


def hook_contract() -> Page:
    """The methods that a hook may have, with their arguments."""
    page = [
        "## The hooks to write",
        "A hook is a class whose methods carry `@hook` and have these names. A method takes only what it needs.",
        "More: [Writing a plugin](../plugins.md#hooks).",
    ]
    for name, method in vars(HookSpecs).items():
        if name.startswith("_"):
            continue
        signature = inspect.signature(method)
        arguments = [str(each) for each in signature.parameters.values() if each.name != "self"]
        returns = "" if signature.return_annotation in ("None", None) else f" -> {signature.return_annotation}"
        text = f"```text\n{name}({', '.join(arguments)}){returns}\n```".replace("'", "")
        page += [f"### `{name}`", text, inspect.cleandoc(method.__doc__ or "")]
    return page


def configs() -> Page:
    """All shipped configs with their docstrings."""
    page = ["# Shipped configs", "`opensora-run NAME` runs them; `_base_` may name them too."]
    for one in iter_configs():
        text = inspect.cleandoc(docstring(one.path))
        page += [f"## `{one.name}`", f"From {one.distribution}.", f"```text\n{text}\n```"]
    return page


def docstring(path: Path) -> str:
    """A config's, without running it."""
    import ast

    return ast.get_docstring(ast.parse(path.read_bytes()), clean=False) or ""


def commands() -> Page:
    """The help of every command."""
    page = ["# Commands"]
    for command in iter_commands():
        page += [f"## `{' '.join(command)}`", f"```text\n{help_of(command)}\n```"]
    return page


def iter_commands() -> Iterator[list[str]]:
    """Each command, and the subcommands of each."""
    waiting = [["opensora-run"], ["opensora"]]
    while waiting:
        command = waiting.pop(0)
        yield command
        waiting += [[*command, name] for name in re.findall(r"^    ([a-z]+)  ", help_of(command), re.MULTILINE)]


def help_of(command: list[str]) -> str:
    """What ``--help`` prints."""
    program = str(Path(sys.executable).with_name(command[0]))
    done = subprocess.run(
        [program, *command[1:], "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "100"},
    )
    return done.stdout.strip()


def summary(kind: str, name: str) -> str:
    """The first sentence about a component."""
    if kind == "configs":
        return (
            f"`opensora-run {name}`"
            if any(one.name == name for one in iter_configs())
            else f"`opensora-run {name}/...`"
        )
    loaded = components.load(kind, name)
    told_by = loaded.Spec if kind in ("hooks", "pipelines") else loaded  # what it is for; the class says how
    text = inspect.cleandoc(told_by.__doc__ or "")
    return " ".join(text.partition("\n\n")[0].split())


def anchor(text: str) -> str:
    """What Markdown makes of a heading."""
    return re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", text.lower()))


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(map(escaped, line))} |" for line in lines)


def escaped(cell: str) -> str:
    """A cell whose pipes don't end it; those in code are safe, and would show their backslash."""
    parts = cell.split("`")
    return "`".join(part if index % 2 else part.replace("|", "\\|") for index, part in enumerate(parts))


if __name__ == "__main__":
    main()
