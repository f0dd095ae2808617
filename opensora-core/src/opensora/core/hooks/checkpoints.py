"""When checkpoints are written, and which are kept."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import field, frozen
from attrs.validators import ge

from opensora.core.checkpoints import prune_checkpoints
from opensora.core.hookspecs import hook

if TYPE_CHECKING:
    from opensora.core.pipelines.loop import LoopRun, Update

__all__ = ["Checkpoints", "CheckpointsSpec"]

log = logging.getLogger(__name__)


@frozen(kw_only=True)
class CheckpointsSpec:
    """A checkpoint every so many steps. One is written at the end and on signals in any case."""

    every: int = field(default=0, validator=ge(0))
    """Steps; 0 is never."""
    keep_last: int = field(default=2, validator=ge(0))
    """How many to keep; 0 keeps all."""
    keep_every: int = field(default=0, validator=ge(0))
    """Besides the last ones, keep those whose step is a multiple of this; 0 keeps none."""


class Checkpoints:
    """Saves and prunes."""

    Spec = CheckpointsSpec

    def __init__(self, spec: CheckpointsSpec) -> None:
        self.spec = spec

    @hook(trylast=True)
    def step_end(self, run: LoopRun, update: Update) -> None:
        """Save, unless this step's gradients were not finite: then the next step's turn comes at the next multiple."""
        if self.spec.every and update.step % self.spec.every == 0 and not update.is_left_out:
            run.save_checkpoint()

    @hook
    def checkpoint_saved(self, run: LoopRun, path: Path) -> None:
        """Remove what is no longer wanted; the new checkpoint is whole by now."""
        log.info("Saved %s", path)
        if run.accelerator.is_main:
            every = self.spec.keep_every
            prune_checkpoints(run.folder, lambda step: bool(every) and step % every == 0, newest=self.spec.keep_last)
