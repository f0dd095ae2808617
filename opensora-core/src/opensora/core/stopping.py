"""SIGTERM and SIGINT end a run after the step that is being made, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from attrs import define

from opensora.core.errors import OpenSoraError

__all__ = ["Interrupted", "StopRequest", "stopping_on_signals"]


class Interrupted(OpenSoraError):  # noqa: N818  # no error: the user asked for it
    """A signal ended the run in good order. Exit code 128 + signal, as shells expect."""

    is_told_once = True

    def __init__(self, message: str, *, signal_number: int) -> None:
        self.exit_code = 128 + signal_number
        super().__init__(message)


@define
class StopRequest:
    """Whether, and by which signal, this process was asked to stop."""

    signal_number: int = 0

    def __bool__(self) -> bool:
        """True once asked."""
        return self.signal_number != 0


@contextmanager
def stopping_on_signals() -> Iterator[StopRequest]:
    """Turn the first SIGTERM or SIGINT into a request; the second acts as it always did."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield request
        return
    found = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    previous = {number: handler for number, handler in found.items() if handler is not signal.SIG_IGN}  # of a job

    def ask(number: int, _: FrameType | None) -> None:
        request.signal_number = number
        for each, handler in previous.items():
            signal.signal(each, handler)

    for number in previous:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
