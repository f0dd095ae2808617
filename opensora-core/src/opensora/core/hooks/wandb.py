"""Weights & Biases: a run there, or offline in the run folder."""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from attrs import frozen

from opensora.core.errors import MachineError
from opensora.core.hookspecs import hook
from opensora.core.run_folder import write_atomically
from opensora.core.validation import scalars

if TYPE_CHECKING:
    from opensora.core.pipelines.loop import LoopRun, Update

__all__ = ["WandB", "WandBSpec"]

log = logging.getLogger(__name__)
_ID = "wandb.json"


@frozen(kw_only=True)
class WandBSpec:
    """Log to Weights & Biases: records, validation, previews. `wandb login` once, or mode="offline"."""

    project: str = "opensora"
    """Of the run."""
    entity: str | None = None
    """User or team; None: that of the account."""
    mode: Literal["online", "offline"] | None = None
    """offline needs no network and no account: `wandb sync RUN_FOLDER/wandb/offline-*` sends it later. None: as the variable
    WANDB_MODE of the environment says, or else online."""


class WandB:
    """One run of Weights & Biases for a run folder: when training resumes, it goes on too."""

    Spec = WandBSpec

    def __init__(self, spec: WandBSpec) -> None:
        self.spec = spec
        self._run: Any = None

    @hook
    def train_start(self, run: LoopRun) -> None:
        """Begin the run, or go on with that of the run folder.

        Raises:
            MachineError: The package is missing, or it can't begin: no account, no network.
        """
        if not run.accelerator.is_main:
            return
        try:
            import wandb
        except ImportError as error:
            raise MachineError(
                "Logging to Weights & Biases needs a package: pip install 'opensora-core[wandb]', or wandb = False."
            ) from error
        mode: Any = self.spec.mode or os.environ.get("WANDB_MODE") or "online"
        if mode == "online" and not wandb.api.api_key:  # it would ask, and wait for the answer
            raise MachineError(
                'Weights & Biases has no account here: run "wandb login", set WANDB_API_KEY, or use mode="offline" '
                "(WANDB_MODE=offline)."
            )
        try:
            self._run = wandb.init(
                project=self.spec.project,
                entity=self.spec.entity,
                mode=mode,
                dir=str(run.folder),
                name=run.folder.name,
                id=_run_id(run.folder),
                resume="allow" if mode == "online" else None,
                config=_config(run),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except (wandb.Error, OSError) as error:
            raise MachineError(f"Weights & Biases can't begin a run: {error}") from error
        for name in ("*", "validation/*"):
            self._run.define_metric(name, step_metric="step")

    @hook
    def log(self, record: Mapping[str, float]) -> None:
        """Log the record's numbers."""
        if self._run:
            self._run.log(dict(record))

    @hook
    def validated(self, record: Mapping[str, Any]) -> None:
        """Log the validation's numbers."""
        if self._run:
            self._run.log({"step": record["step"], **scalars(record)})

    @hook(trylast=True)
    def step_end(self, run: LoopRun, update: Update) -> None:
        """Log the preview of this step, if there is one."""
        path = run.folder / "previews" / f"step-{update.step:06d}.png"
        if self._run and path.exists():
            import wandb

            self._run.log({"step": update.step, "previews": wandb.Image(str(path))})

    @hook
    def train_end(self, run: LoopRun) -> None:
        """End the run; one that failed or was stopped is marked so."""
        if self._run:
            self._run.finish(exit_code=0 if run.counters.step >= run.max_steps else 1)
            self._run = None


def _run_id(folder: Path) -> str:
    """That of the run folder, so that a resumed run goes on in the same chart."""
    path = folder / _ID
    if path.exists():
        return str(json.loads(path.read_text(encoding="utf-8"))["id"])
    made = secrets.token_hex(4)
    write_atomically(path, json.dumps({"id": made}))
    return made


def _config(run: LoopRun) -> dict[str, Any]:
    from opensora.core.config.structure import unstructure

    config: dict[str, Any] = unstructure(run.spec)
    return config
