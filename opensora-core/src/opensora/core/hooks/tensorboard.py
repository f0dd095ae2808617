"""TensorBoard events in the run folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attrs import frozen

from opensora.core.errors import MachineError
from opensora.core.hookspecs import hook
from opensora.core.validation import scalars

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

    from opensora.core.pipelines.loop import LoopRun

__all__ = ["TensorBoard", "TensorBoardSpec"]

log = logging.getLogger(__name__)


@frozen(kw_only=True)
class TensorBoardSpec:
    """Log to TensorBoard: ``tensorboard --logdir outputs``."""

    required: bool = False
    """Fail if the tensorboard package is missing, instead of saying so once."""


class TensorBoard:
    """Writes each number of a log record as a scalar."""

    Spec = TensorBoardSpec

    def __init__(self, spec: TensorBoardSpec) -> None:
        self.spec = spec
        self.writer: SummaryWriter | None = None

    @hook
    def train_start(self, run: LoopRun) -> None:
        """Open the event file; after a resume, later events of the old one are hidden."""
        if not run.accelerator.is_main:
            return
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            message = "No TensorBoard events: pip install 'opensora-core[tensorboard]'"
            if self.spec.required:
                raise MachineError(message) from error
            log.info(message)
            return
        self.writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.counters.step + 1)

    @hook
    def log(self, run: LoopRun, record: Mapping[str, float]) -> None:
        """Write the record's numbers."""
        if self.writer:
            for name, value in record.items():
                self.writer.add_scalar(name, value, int(record["step"]))

    @hook
    def validated(self, record: Mapping[str, Any]) -> None:
        """Write the validation's numbers."""
        if self.writer:
            for name, value in scalars(record).items():
                self.writer.add_scalar(name, value, int(record["step"]))

    @hook
    def train_end(self, run: LoopRun) -> None:
        """Close the file."""
        if self.writer:
            self.writer.close()
