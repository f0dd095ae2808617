"""Several pipelines one after the other, in one run folder: make data, train, sample, grade."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, Literal

import attrs
from attrs import field, frozen
from attrs.validators import min_len

from opensora.core.components import load
from opensora.core.config.evaluate import Config
from opensora.core.config.structure import locate, structure
from opensora.core.config.write import write_config
from opensora.core.errors import ConfigError
from opensora.core.run_folder import make_folder, new_run_folder, write_atomically
from opensora.core.stopping import Interrupted

__all__ = ["Stages", "StagesSpec"]

log = logging.getLogger(__name__)


@frozen(kw_only=True)
class StagesSpec:
    """Run pipelines one after the other."""

    pipeline: Literal["stages"] = "stages"
    stages: dict[str, Any] = field(validator=min_len(1))
    """Name to config: each a dict with ``pipeline`` and that pipeline's keys. "{run}" in a string is the run folder."""
    seed: int | None = None
    """Of every stage that has one; None: as each says."""
    device: str | None = None
    """Of every stage that has one; None: as each says."""
    dtype: Literal["auto", "fp32", "fp16", "bf16"] | None = None
    """Of every stage that has one; None: as each says."""
    name: str = "stages"
    """Of the run folder."""
    outputs: str = "outputs"
    """Parent of run folders."""
    run_folder: str | None = None
    """This very folder instead of a numbered one."""


class Stages:
    """Checks the configs of all stages before the first runs."""

    Spec = StagesSpec

    def __init__(self, spec: StagesSpec, *, config: Config) -> None:
        """Build each stage's pipeline once, with a stand-in for the run folder, to find mistakes early.

        Raises:
            ConfigError, ComponentError: In any of the stages.
        """
        self.spec, self.config = spec, config
        for name in spec.stages:
            self.build(name, Path(spec.run_folder or Path(spec.outputs, spec.name)))

    def build(self, name: str, folder: Path) -> Any:
        """The pipeline of one stage."""
        values = self.spec.stages[name]
        path = ("stages", name)
        if not isinstance(values, dict) or not isinstance(values.get("pipeline"), str):
            raise ConfigError(
                f"stages.{name} must be a dict with a pipeline.", location=locate(self.config.locations, path)
            )
        pipeline = load("pipelines", values["pipeline"])
        filled = fill(values, folder)
        for key in ("seed", "device", "dtype"):
            if (common := getattr(self.spec, key)) is not None and key in attrs.fields_dict(pipeline.Spec):
                filled[key] = common
        locations = {key[2:]: place for key, place in self.config.locations.items() if key[:2] == path}
        spec = structure(pipeline.Spec, filled, locations=locations)
        return pipeline(spec, config=Config(values=filled, locations=locations))

    def run(self) -> dict[str, Path]:
        """Run the stages in order, and return where the results are; an error or a signal in one ends all."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError("Stages run in one process. Run the config of each stage by itself with --nproc.")
        folder = make_folder(Path(self.spec.run_folder)) if self.spec.run_folder else None
        folder = folder or new_run_folder(Path(self.spec.outputs), self.spec.name)
        values = {key: value for key, value in self.config.values.items() if key != "run_folder"}
        write_config(folder / "config.py", values, f"Again: opensora-run {folder}/config.py")
        results: dict[str, Path] = {}
        for number, name in enumerate(self.spec.stages, start=1):
            log.info("Stage %d of %d: %s", number, len(self.spec.stages), name)
            try:
                results |= self.build(name, folder).run() or {}
            except Interrupted as error:
                raise Interrupted(
                    f"Stopped in stage {name}. Go on with: opensora-run {folder}/config.py --run-folder {folder}",
                    signal_number=error.exit_code - 128,
                ) from error
        listed = "".join(f"  {what + ':':15}{path}\n" for what, path in {**results, "run folder": folder}.items())
        write_atomically(folder / "summary.txt", listed)
        log.info("Where everything is (also in %s):\n%s", folder / "summary.txt", listed.rstrip())
        return {"run folder": folder, **results}

    def dry_run(self) -> str:
        """What each stage would do."""
        folder = Path(self.spec.run_folder or Path(self.spec.outputs, self.spec.name))
        return "\n\n".join(f"[{name}]\n{self.build(name, folder).dry_run()}" for name in self.spec.stages)


def fill(value: Any, folder: Path) -> Any:
    """``value`` with "{run}" replaced by the folder in every string inside it."""
    if isinstance(value, str):
        return value.replace("{run}", str(folder))
    if isinstance(value, dict):
        return {key: fill(each, folder) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(fill(each, folder) for each in value)
    return value
