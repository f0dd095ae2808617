"""Log lines for people who read a file or a terminal without a progress bar."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from attrs import field, frozen
from attrs.validators import ge

from opensora.core.hookspecs import hook

if TYPE_CHECKING:
    from opensora.core.pipelines.loop import LoopRun

__all__ = ["Console", "ConsoleSpec"]

log = logging.getLogger(__name__)


@frozen(kw_only=True)
class ConsoleSpec:
    """Plain log lines."""

    every_s: float = field(default=10.0, validator=ge(0))
    """Seconds between lines at least; 0 logs every record."""


class Console:
    """Logs the step, the mean loss, the rate and the time left; quiet where a progress bar shows the same."""

    Spec = ConsoleSpec

    def __init__(self, spec: ConsoleSpec) -> None:
        self.spec = spec
        self._last = 0.0

    @hook
    def log(self, run: LoopRun, record: Mapping[str, float]) -> None:
        """Log the record, if the last line is long enough ago or it is the last step's."""
        is_last = record["step"] == run.max_steps
        if not run.accelerator.is_main or (time.monotonic() - self._last < self.spec.every_s and not is_last):
            return
        self._last = time.monotonic()
        left = (run.max_steps - record["step"]) / max(record["steps_per_second"], 1e-9)
        log.log(
            logging.DEBUG if sys.stderr.isatty() and not is_last else logging.INFO,
            "step %d/%d  loss %.4f  lr %.2e  grad norm %.2f  %.2f steps/s  %s left",
            record["step"],
            run.max_steps,
            record["avg_loss"],
            record["lr"],
            record["grad_norm"],
            record["steps_per_second"],
            duration(left),
        )


def duration(seconds: float) -> str:
    """``1:02:03`` or ``02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"
