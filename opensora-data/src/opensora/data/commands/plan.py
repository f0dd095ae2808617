"""``opensora data plan CONFIG``: before training, what becomes of every row of the data."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from opensora.core.commands.opensora_run import compose, load_config
from opensora.core.config.overrides import FLAGS, add_flags, split_overrides
from opensora.core.errors import ConfigError, OpenSoraError

__all__ = ["run"]

_OWN_FLAGS = ("--help", "--output", "--nproc", "--epoch", "--probe", "--trust-config", "--debug")
_EXAMPLES = """\
any key of the config can be set by its path: --dataset.frame_interval 2

examples:
  opensora data plan train.py
  opensora data plan train.py --nproc 8 --output plan.parquet
  opensora data plan train.py --data-path clips.csv --probe
"""


def run(arguments: Sequence[str]) -> int:
    """Print the plan and, if asked, write it as a table.

    Raises:
        ConfigError, DataError: What training with this config would raise, or nothing would be trained.
    """
    rest, overrides = split_overrides(arguments, {*_OWN_FLAGS, *(flag.name for flag in FLAGS)})
    options = _parser().parse_args(rest)
    pipeline = compose(load_config(options, overrides))
    from opensora.data.planning import Planned, plan, write_plan

    problem: OpenSoraError | None = None
    try:
        planned = plan(_training_spec(pipeline), epoch=options.epoch, num_processes=options.nproc, probe=options.probe)
    except Planned as stopped:  # what is known is said all the same
        planned, problem = stopped.plan, stopped.error
    print(planned.summary)
    if options.output:
        write_plan(planned.rows, options.output)
        print(f"written      {options.output}: {len(planned.rows):,} rows")
    if problem:
        raise problem
    return 0


def _training_spec(pipeline: Any) -> Any:
    spec = pipeline.spec
    if not {"dataset", "batch_size", "accumulation_steps"} <= attrs.fields_dict(type(spec)).keys():
        raise ConfigError(
            f"{type(pipeline).__name__} is no training with a dataset: there are no rows to plan. Give a training's config."
        )
    return spec


def _parser() -> argparse.ArgumentParser:
    from opensora.core.commands._main import Parser

    parser = Parser(
        prog="opensora data plan",
        usage="opensora data plan CONFIG [flags] [--any.key VALUE]",
        description="What becomes of each row of the data when a config is trained, without training.",
        epilog=_EXAMPLES,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=110),
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG", help="a config file, or the name of an installed one")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write a table: .csv, .parquet or .jsonl, one row each"
    )
    parser.add_argument("--nproc", type=_whole(1), default=1, metavar="N", help="processes that it is trained on [1]")
    parser.add_argument("--epoch", type=_whole(0), default=0, metavar="N", help="which epoch is planned [0]")
    parser.add_argument("--probe", action="store_true", help="open every file, to see what it is; decodes nothing")
    parser.add_argument("--trust-config", action="store_true", help="execute the config as Python")
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    parser.set_defaults(sample=None)
    add_flags(parser, {})
    return parser


def _whole(lowest: int) -> Any:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f'must be a whole number from {lowest}, not "{text}"')
        return int(text)

    return parse
