"""``opensora-run CONFIG``: load a config, change it by the command line, check it, and run its pipeline."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from opensora.core.commands._launch import is_launched, launch
from opensora.core.commands._main import Parser, run_command, set_up_logging
from opensora.core.config.evaluate import Config, evaluate
from opensora.core.config.names import resolve
from opensora.core.config.overrides import (
    FLAGS,
    Override,
    add_flags,
    apply_flags,
    apply_overrides,
    given_flags,
    split_overrides,
)
from opensora.core.errors import ConfigError
from opensora.core.machine import die_with_parent

__all__ = ["compose", "load_config", "main"]

_OWN_FLAGS = ("--help", "--from", "--nproc", "--port", "--dry-run", "--trust-config", "--debug")
_EXAMPLES = """\
any key of the config can be set by its path: --model.depth 12, --log_every 5, --scheduler.loc 1.0

examples:
  opensora-run quickstart
  opensora-run train.py --lr 5e-5 --batch-size 8 --nproc 2
  opensora-run train.py --dry-run
  opensora-run stdit3/sample --prompt "a wave" "a cat" --resolution 240p --aspect-ratio 9:16 --num-frames 2s
  opensora-run outputs/003-STDiT3-XL-2/config.py
  opensora-run --from outputs/004-samples/samples/sample_0000.mp4

all configs that are installed: opensora configs
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return run_command(lambda: _run(given), debug="--debug" in given)


def _run(arguments: list[str]) -> int:
    rest, overrides = split_overrides(arguments, {*_OWN_FLAGS, *(flag.name for flag in FLAGS)})
    parser = _parser(_defaults(rest) if {"-h", "--help"} & set(rest) else {})
    options = parser.parse_args(rest)
    if options.port is not None and options.nproc is None:
        raise ConfigError("--port is where several processes meet; it needs --nproc.")
    set_up_logging()
    if is_launched():
        die_with_parent()  # the launcher: left alone, we would go on writing into the run folder
    pipeline = compose(load_config(options, overrides))
    if options.dry_run:
        named = inspect.signature(pipeline.dry_run).parameters
        print(pipeline.dry_run(**{"world_size": options.nproc or 1} if "world_size" in named else {}))
    elif options.nproc is not None and not is_launched():
        return launch(arguments, nproc=options.nproc, port=options.port)
    else:
        pipeline.run()
    return 0


def load_config(options: argparse.Namespace, overrides: Sequence[Override] = ()) -> Config:
    """The config with all that the command line changes, and its older keys modernized.

    Raises:
        ConfigError: See `evaluate`, `apply_overrides`, `apply_flags` and `modernize`.
    """
    from opensora.core.config.legacy import modernize, nest_dataset

    if options.config is None and options.sample is None:
        raise ConfigError("CONFIG is missing; it goes before the flags. See opensora-run --help")
    if options.config is not None and options.sample is not None:
        raise ConfigError("CONFIG and --from are both given, but a sample has its own config. Leave one out.")
    config = apply_overrides(_read(options), overrides)
    config = nest_dataset(config)
    return modernize(apply_flags(config, given_flags(options), pipeline_name(config.values)))


def _read(options: argparse.Namespace) -> Config:
    """The config file's values, or those of a sample's recipe."""
    if options.sample is None:
        return evaluate(resolve(options.config), trust=options.trust_config)
    from opensora.core.pipelines.sample_recipes import config_of_recipe

    path = Path(options.sample)
    return Config(config_of_recipe(path), {(): str(path)}, path)


def pipeline_name(values: Mapping[str, Any]) -> str:
    """The pipeline that a config is for: as it says, or ``train`` if it has a dataset, or ``sample``.

    Where ``model`` is an autoencoder, as in Open-Sora's configs for training one: ``train-vae`` or ``sample-vae``.
    """
    name = values.get("pipeline", "train" if "dataset" in values else "sample")
    if "pipeline" not in values and _is_vae(values.get("model")):
        name = "train-vae" if "lr" in values else "sample-vae"
    if not isinstance(name, str):
        raise ConfigError(f"pipeline must be a pipeline's name, not {name!r}.")
    return name


def _is_vae(model: Any) -> bool:
    from opensora.core.components import available

    name = model.get("type") if isinstance(model, dict) else None
    return {kind for kind in ("models", "vaes") for one in available(kind) if one.name == name} == {"vaes"}


def compose(config: Config) -> Any:
    """The pipeline, with its config checked down to every component's options.

    Raises:
        ComponentError: The pipeline or a component can't be had.
        ConfigError: A key is unknown, missing or wrong.
    """
    import attrs

    from opensora.core.components import load
    from opensora.core.config.structure import structure

    pipeline = load("pipelines", pipeline_name(config.values))
    values = dict(config.values)
    if "pipeline" not in attrs.fields_dict(pipeline.Spec):
        values.pop("pipeline", None)
    return pipeline(structure(pipeline.Spec, values, locations=config.locations), config=config)


def _parser(defaults: Mapping[str, str]) -> Parser:
    parser = Parser(
        prog="opensora-run",
        usage="opensora-run CONFIG [flags] [--any.key VALUE]",
        description="Train, sample, evaluate: whatever the config says.",
        epilog=_EXAMPLES,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=110),
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="a config file, or the name of an installed one")
    parser.add_argument("--from", dest="sample", metavar="SAMPLE", help="make this sample again, instead of CONFIG")
    parser.add_argument("--nproc", type=_positive, metavar="N", help="processes to run on this machine [just this one]")
    parser.add_argument("--port", type=_port, metavar="N", help="port on which they meet [a free one]")
    parser.add_argument("--dry-run", action="store_true", help="check it, and print sizes and costs; writes nothing")
    parser.add_argument("--trust-config", action="store_true", help="execute the config as Python")
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    add_flags(parser, defaults)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'must be a whole number from 1, not "{text}"')
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f'must be a port from 1 to 65535, not "{text}"')
    return int(text)


def _defaults(arguments: Sequence[str]) -> dict[str, str]:
    """What each key is without a flag, for the help: in the config if one is named, else in the specs."""
    from opensora.core.config.structure import spec_fields
    from opensora.core.config.write import format_value
    from opensora.core.pipelines.sample_spec import SampleSpec
    from opensora.core.pipelines.train_spec import TrainSpec

    fields = [one for spec in (SampleSpec, TrainSpec) for one in spec_fields(spec)]
    defaults = {one.name: one.default for one in fields if one.default not in (None, "None")}
    if arguments and not arguments[0].startswith("-"):
        with suppress(ConfigError):  # running it without --help will say what's wrong
            for key, value in evaluate(resolve(arguments[0])).values.items():
                below = {f"{key}.{name}": part for name, part in value.items()} if isinstance(value, dict) else {}
                defaults |= {name: format_value(part) for name, part in {key: value, **below}.items()}
    return {key: text for key, text in defaults.items() if text and len(text) <= 40}
