"""The first signal asks, the second acts as it always did."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from opensora.core.stopping import Interrupted, StopRequest, stopping_on_signals

SIGNALS = [signal.SIGTERM, signal.SIGINT]


@pytest.fixture(autouse=True)
def _usual_handlers() -> Iterator[None]:
    """As in a shell's foreground; a job in the background is started with SIGINT ignored."""
    before = [signal.signal(signal.SIGTERM, signal.SIG_DFL), signal.signal(signal.SIGINT, signal.default_int_handler)]
    yield
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_becomes_a_request(number: signal.Signals) -> None:
    with stopping_on_signals() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        assert stop.signal_number == number


def test_handlers_are_as_before_after_the_block() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with stopping_on_signals():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
    with pytest.raises(ValueError, match="stop"), stopping_on_signals():
        raise ValueError("stop")
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_the_second_interrupt_is_a_keyboard_interrupt() -> None:
    with stopping_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_second_termination_ends_the_process() -> None:
    program = (
        "import os, signal\nfrom opensora.core.stopping import stopping_on_signals\n"
        "with stopping_on_signals() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print('asked', bool(stop), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print('still here')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "asked True\n"
    assert done.returncode == -signal.SIGTERM


def test_a_signal_that_the_shell_ignores_stays_ignored() -> None:
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stopping_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)


def test_other_threads_get_a_request_that_nobody_makes() -> None:
    requests: list[StopRequest] = []

    def work() -> None:
        with stopping_on_signals() as stop:
            requests.append(stop)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not requests[0]


def test_the_exit_code_is_the_shells() -> None:
    assert Interrupted("Stopped.", signal_number=signal.SIGTERM).exit_code == 143
    assert Interrupted("Stopped.", signal_number=signal.SIGINT).exit_code == 130
