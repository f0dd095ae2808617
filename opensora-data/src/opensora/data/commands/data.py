"""``opensora data SUBCOMMAND``: tools for tables and files. Each is imported when it is called."""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Any

__all__ = ["DataCommand"]

_SUBCOMMANDS = {
    "plan": ("opensora.data.commands.plan", "what becomes of each row when a config is trained"),
}
"""Name -> (module with ``run(arguments: list[str]) -> int``, summary)."""


class DataCommand:
    """The command ``data``, and its subcommands."""

    summary = "tools for tables of clips and images"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the subcommands; each parses its own arguments, ``--help`` included."""
        subcommands = parser.add_subparsers(metavar="SUBCOMMAND", title="subcommands", required=True)
        for name, (module, summary) in _SUBCOMMANDS.items():
            # No prefix: what looks like a flag is the subcommand's business too.
            own: Any = subcommands.add_parser(name, help=summary, add_help=False, prefix_chars="\0")
            own.add_argument("arguments", nargs="*")
            own.set_defaults(module=module)

    def run(self, options: argparse.Namespace) -> int:
        """Run the subcommand, and return the exit code."""
        return int(import_module(options.module).run(options.arguments))
