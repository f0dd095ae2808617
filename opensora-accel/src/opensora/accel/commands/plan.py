"""``opensora plan CONFIG``: what each bucket of a training config takes, and what of it would fit into a device."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opensora.core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from opensora.core.pipelines.train_spec import TrainSpec
    from opensora.core.protocols import Size

__all__ = ["Plan"]


class Plan:
    """The command."""

    summary = "memory and compute of each bucket of a training config; with --fit, a config that fits a device"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the flags."""
        parser.add_argument("config", metavar="CONFIG", help="a config file, or the name of an installed one")
        parser.add_argument("--fit", metavar="SIZE", help="memory of each process's device, such as 24GiB")
        parser.add_argument("--margin", type=float, default=0.05, help="share of it that is left free [0.05]")
        parser.add_argument("--nproc", type=int, default=1, metavar="N", help="processes of the run [1]")
        parser.add_argument("--output", metavar="FILE", help="where to write the config that fits")

    def run(self, options: argparse.Namespace) -> int:
        """Print the plan.

        Raises:
            ConfigError: A flag is wrong, or the config trains no denoiser.
            MachineError: Nothing fits.
        """
        from opensora.accel.planner import Planner, parse_bytes
        from opensora.core.composing import resolved_values
        from opensora.core.config.write import write_config

        if options.nproc < 1 or not 0 <= options.margin < 1:
            raise ConfigError("--nproc must be at least 1, and --margin a share from 0 up to but not 1.")
        if options.output and not options.fit:
            raise ConfigError("--output is for the config that fits; it needs --fit.")
        limit = int(parse_bytes(options.fit) * (1 - options.margin)) if options.fit else None
        spec = _training_spec(options.config)
        planner = Planner(spec, _size(spec), world_size=options.nproc)
        if limit is None:
            from opensora.core.pipelines.plan import describe_costs

            print("\n".join(describe_costs(planner.costs(), options.nproc)))
            return 0
        fit = planner.fit(limit)
        print("\n".join(fit.describe(options.nproc)))
        if options.output:
            path = Path(options.output)
            header = f"{options.config}, fitted into {options.fit} a process by opensora plan.\n\nopensora-run {path}\n"
            write_config(path, {**resolved_values(spec), **fit.changes(spec)}, header)
            print(f"written      {path}")
        return 0


def _training_spec(name: str) -> TrainSpec:
    """The checked spec of a config for the pipeline ``train``."""
    from opensora.core.commands.opensora_run import compose
    from opensora.core.config.evaluate import evaluate
    from opensora.core.config.legacy import modernize, nest_dataset
    from opensora.core.config.names import resolve
    from opensora.core.pipelines.train_spec import TrainSpec

    pipeline: Any = compose(modernize(nest_dataset(evaluate(resolve(name)))))
    if not isinstance(pipeline.spec, TrainSpec):
        raise ConfigError(f"{name} is for another pipeline. Plans are for those that train denoisers.")
    return pipeline.spec


def _size(spec: TrainSpec) -> Size:
    """(T, H, W) of the clips; of buckets, which have their own, any."""
    from opensora.core.pipelines.dry_run import declared_size
    from opensora.core.pipelines.train import build_dataset, clip_size

    if spec.bucket_config:
        return 1, 1, 1
    if (size := declared_size(spec.dataset)) is not None:
        return size
    try:
        return clip_size(build_dataset(spec), spec.seed)
    except DataError as error:
        raise ConfigError(f"The size of the clips is not known: {error} Set dataset.image_size.") from error
