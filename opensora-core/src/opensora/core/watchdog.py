"""A process that hangs ends itself, and says where it hung; its launcher and the others' broken connections end the rest.

The stacks are written by a thread of ``faulthandler``, which needs no cooperation of Python: a process that waits inside a
collective, a driver or a file system is ended as well as one that sleeps.
"""

from __future__ import annotations

import faulthandler
import logging
import math
import time
from threading import Event, Thread
from types import TracebackType
from typing import Self

__all__ = ["Watchdog"]

log = logging.getLogger(__name__)
STDERR = 2  # not sys.stderr, which a progress bar may have replaced by what is no file
_REARM = 0.05
"""Of the limit: arming starts a thread, so it isn't done more often than this."""


class Watchdog:
    """While entered, ends this process (exit code 1) if `beat` isn't called for longer than the limit.

    First one line says what took so long, then all threads' stacks follow, on stderr; at the latest a tenth of the limit
    after it. One of a process is on guard at a time.
    """

    def __init__(self, limit_s: float, *, option: str = "step_timeout_s") -> None:
        """Stand by.

        Args:
            limit_s: Seconds between beats; 0 waits without limit.
            option: Where the limit is set, for the message.
        """
        self.limit_s, self.option = limit_s, option
        self._doing, self._beat_at, self._allowed_s, self._armed_at = "", 0.0, limit_s, -math.inf
        self._left = Event()
        self._left.set()

    def __enter__(self) -> Self:
        """Begin to watch: the first beat."""
        if self.limit_s:
            self._left.clear()
            self.beat("starting")
            Thread(target=self._tell_when_late, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Watch no longer."""
        self._left.set()
        self._armed_at = -math.inf
        if self.limit_s:
            faulthandler.cancel_dump_traceback_later()

    def beat(self, doing: str, *, times: float = 1.0) -> None:
        """The process is alive, and the limit begins anew. Without effect on one that isn't entered.

        Args:
            doing: What comes now: "step 12".
            times: How many limits that may take.
        """
        if not self.limit_s or self._left.is_set():
            return
        now, allowed_s = time.monotonic(), self.limit_s * times
        if allowed_s != self._allowed_s or now - self._armed_at >= _REARM * allowed_s:
            faulthandler.dump_traceback_later(allowed_s * (1 + 2 * _REARM), exit=True, file=STDERR)
            self._armed_at = now
        self._doing, self._beat_at, self._allowed_s = doing, now, allowed_s

    def _tell_when_late(self) -> None:
        """Name what hangs, in words; the stacks alone don't say which limit was meant, or how to raise it."""
        while not self._left.wait(min(1.0, self.limit_s * _REARM / 2)):
            if time.monotonic() - self._beat_at > self._allowed_s:
                log.error(
                    "%s has taken longer than %g s (%s = %g): this process ends. Where its threads are:",
                    self._doing, self._allowed_s, self.option, self.limit_s,
                )  # fmt: skip
                return
