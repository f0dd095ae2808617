"""How a command ends: messages for what has a name, a traceback for what has none, and exit codes."""

from __future__ import annotations

import argparse
import logging
import os
import select
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn, TextIO

from opensora.core.errors import ConfigError, OpenSoraError

__all__ = ["Parser", "run_command", "set_up_logging"]


class Parser(argparse.ArgumentParser):
    """Whose errors are ours: one line, without the usage of every flag."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting.

        Raises:
            ConfigError: Always.
        """
        message = message.removeprefix("argument ")
        if message.startswith("the following arguments are required: "):
            missing = message.partition(": ")[2].partition(",")[0]
            message = f"{missing} is missing; it goes before the flags"
        raise ConfigError(f"{message.removesuffix('.')}. See {self.prog} --help")


def run_command(command: Callable[[], int], *, debug: bool) -> int:
    """Run a command and return its exit code: 2 for what the user can mend, 1 for other errors, 130 for Ctrl-C.

    Args:
        debug: Show the traceback of errors that have a message too.
    """
    try:
        status = command()
        sys.stdout.flush()
        return status
    except OpenSoraError as error:
        if debug:
            traceback.print_exc()
        if not (_rank() and error.is_told_once):
            _say(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        _say("Interrupted.")
        return 130
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit finds a place
        return 141  # as the shell reports SIGPIPE
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's; not imported for this
            _say(f"{error}\nLower batch_size, set grad_checkpoint = True, or give the VAE a smaller micro_batch_size.")
            return 2
        traceback.print_exc()
        _say("This is a mistake in opensora or a plugin. Please report it, with the lines above and opensora doctor's.")
        return 1


def set_up_logging() -> None:
    """Show what ``opensora`` logs on stderr: all of it in the main process, warnings of the others."""
    rank = _rank()
    handler = _StderrHandler()
    handler.setFormatter(_Formatter(f"[rank {rank}] " if rank else ""))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("opensora").setLevel(logging.WARNING if rank else logging.INFO)


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what is stderr at that moment: a progress bar puts itself in between."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]  # looked up at each record
        return sys.stderr


class _Formatter(logging.Formatter):
    def __init__(self, prefix: str) -> None:
        super().__init__("%(message)s")
        self.prefix = prefix

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
        return f"{self.prefix}{level}{super().format(record)}"


def _say(message: str) -> None:
    rank = _rank()
    print(f"[rank {rank}] {message}" if rank else message, file=sys.stderr, flush=True)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _reader_is_gone() -> bool:
    """Whether it is our own stdout that broke, and not a pipe somewhere inside."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))
