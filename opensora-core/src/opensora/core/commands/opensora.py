"""``opensora``: what is installed, what this machine can do, whether a component conforms, weights into other layouts."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import Any

from opensora.core import components
from opensora.core.commands import _convert
from opensora.core.commands._main import Parser, run_command, set_up_logging
from opensora.core.errors import ComponentError, ConfigError, MachineError, did_you_mean

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return run_command(lambda: _run(given), debug="--debug" in given)


def _run(arguments: list[str]) -> int:
    parser = _parser(arguments)
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    set_up_logging()
    return int(options.command(options))


def _parser(arguments: Sequence[str]) -> Parser:
    parser = Parser(prog="opensora", description="Video diffusion from installed pieces. To run one: opensora-run.")
    parser.add_argument("--version", action="version", version=f"opensora-core {metadata.version('opensora-core')}")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")

    plugins = _command(commands, "plugins", _plugins, "all installed components, and what is broken")
    plugins.add_argument("--kind", metavar="KIND", help=f"only these: {', '.join(components.KINDS)}")
    plugins.add_argument("--check", action="store_true", help="import each, and show the cause where it fails")
    _command(commands, "configs", _configs, "all installed configs that opensora-run takes by name")
    _command(commands, "doctor", _doctor, "versions, devices, dtypes that work, optional packages")
    verify = _command(commands, "verify", _verify, "check that a component behaves as its kind must", as_json=False)
    verify.add_argument("kind", metavar="KIND", help="such as models")
    verify.add_argument("name", metavar="NAME", help='such as "STDiT3-XL/2"')
    verify.add_argument("options", nargs="*", metavar="KEY=VALUE", help="of the component's Spec, such as depth=2")
    convert = _command(
        commands, "convert", _convert.run, "weights from one project's layout into another's", as_json=False
    )
    _convert.add_arguments(convert)
    _add_installed(commands, arguments)
    return parser


def _add_installed(commands: Any, arguments: Sequence[str]) -> None:
    """The commands that distributions bring. Only the one that is called is imported, so that no other can break it."""
    called = arguments[0] if arguments else None
    own = set(commands.choices)
    for one in components.available("commands"):
        if one.name == called and one.name in own:
            raise ComponentError(f'{one.distribution} brings a command "{one.name}" too. Uninstall it to have core\'s.')
        if one.name == called:
            command = components.load("commands", one.name)()
            parser = _command(commands, one.name, command.run, command.summary, as_json=False)
            command.add_arguments(parser)
        elif one.name not in commands.choices:
            commands.add_parser(one.name, help=f"of {one.distribution}: opensora {one.name} --help", add_help=False)
    if called not in commands.choices and components.install_hint("commands", str(called)):
        components.find("commands", str(called))  # says which package to install


def _command(commands: Any, name: str, function: Any, summary: str, *, as_json: bool = True) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=f"{summary.capitalize()}.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    if as_json:
        parser.add_argument("--json", action="store_true", help="for programs")
    parser.set_defaults(command=function)
    return parser


def _plugins(options: argparse.Namespace) -> int:
    from opensora.core.commands._plugins import list_plugins

    kinds = list(components.KINDS) if options.kind is None else [_kind(options.kind)]
    plugins = list_plugins(kinds, check=options.check)
    if options.json:
        print(json.dumps([plugin.as_dict() for plugin in plugins], indent=1))
    else:
        for kind in kinds:
            rows = [plugin.as_row() for plugin in plugins if plugin.component.kind == kind]
            if rows:
                print(f"{kind}\n{_table(rows)}\n")
    return 1 if options.check and any(plugin.problem for plugin in plugins) else 0


def _configs(options: argparse.Namespace) -> int:
    from opensora.core.config.names import iter_configs

    configs = list(iter_configs())
    if options.json:
        rows = [
            {"name": one.name, "path": str(one.path), "summary": one.summary, "distribution": one.distribution}
            for one in configs
        ]
        print(json.dumps(rows, indent=1))
    elif configs:
        print(_table([(one.name, one.summary) for one in configs]))
    else:
        print("No installed distribution brings configs. The official ones: pip install opensora-models opensora-data")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from opensora.core.commands._doctor import examine, report

    findings = examine()
    print(json.dumps(findings, indent=1) if options.json else report(findings))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from opensora.core.config.evaluate import evaluate_literal
    from opensora.core.testing import check

    keywords: dict[str, Any] = {}
    for option in options.options:
        key, equals, text = option.partition("=")
        if not equals or not key.isidentifier():
            raise ConfigError(f'"{option}" is no option. Write KEY=VALUE, such as depth=2.')
        keywords[key] = evaluate_literal(text)
    try:
        report = check(_kind(options.kind), options.name, on_pass=lambda title: print(f"ok  {title}"), **keywords)
    except AssertionError as error:
        if isinstance(error.__cause__, ConfigError | ComponentError | MachineError):
            raise error.__cause__ from None  # what was asked for can't be, which says nothing about the component
        print(f"FAILED  {error}", file=sys.stderr)
        return 1
    print(f"{options.name} conforms: {len(report.passed)} checks passed.")
    return 0


def _kind(name: str) -> str:
    """A kind by the name of its group or by what one of them is called: ``models``, ``model``."""
    names = {kind: kind for kind in components.KINDS} | {
        noun.replace(" ", "_").casefold(): kind for kind, noun in components.KINDS.items()
    }
    if name.casefold() not in names:
        raise ConfigError(
            f'"{name}" is no kind of component.{did_you_mean(name, names)} Kinds: {", ".join(components.KINDS)}.'
        )
    return names[name.casefold()]


def _table(rows: Iterable[tuple[str, ...]]) -> str:
    """Rows in aligned columns, indented."""
    listed = list(rows)
    widths = [max(map(len, column)) for column in zip(*listed, strict=True)]
    lines = (
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in listed
    )
    return "\n".join(lines)
