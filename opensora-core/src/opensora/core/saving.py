"""Writing checkpoints while a run goes on, or while it waits."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Thread

from attrs import define, field

from opensora.core.accelerator import Accelerator
from opensora.core.checkpoints import Checkpoint, save_checkpoint, save_checkpoint_together
from opensora.core.errors import UserError

__all__ = ["Saver"]

log = logging.getLogger(__name__)


@define(eq=False)
class Saver:
    """Writes one checkpoint at a time: by the main process or, where the accelerator shards the state, by all."""

    folder: Path
    accelerator: Accelerator
    in_background: bool = False
    """Copy the state to the CPU's memory, and write that in a thread."""
    step: int | None = field(default=None, init=False)
    """Of the checkpoint that was begun and not finished."""
    _thread: Thread | None = field(default=None, init=False)
    _outcome: Path | BaseException | None = field(default=None, init=False)

    @property
    def is_writing(self) -> bool:
        """Whether this process's thread is at it."""
        return self._thread is not None and self._thread.is_alive()

    def begin(self, step: int, build: Callable[[], Checkpoint]) -> None:
        """Begin to write; all processes must call it, and `finish`, by turns. ``build`` is asked by those that write."""
        self.step, self._outcome = step, None
        write: Callable[[Path, int, Checkpoint], Path]
        if self.accelerator.shards_state:
            write = partial(save_checkpoint_together, group=self.accelerator.saving_group)
        elif self.accelerator.is_main or self.accelerator.builds_together:
            write = save_checkpoint
        else:
            return
        checkpoint = build()
        if not (self.accelerator.is_main or self.accelerator.shards_state):
            return
        if not self.in_background:
            self._run(partial(write, self.folder, step, checkpoint))
            return
        work = partial(write, self.folder, step, checkpoint.copied())
        self._thread = Thread(target=self._run, args=(work,), name=f"saving step {step}", daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], Path]) -> None:
        try:
            self._outcome = work()
        except BaseException as error:  # raised again by `check` and `finish`
            self._outcome = error

    def check(self, *, wait: bool = False) -> None:
        """See whether writing has failed in this process; ``wait`` until that is known.

        Raises:
            CheckpointError: It has.
        """
        if wait:
            self._join()
        if not self.is_writing and isinstance(self._outcome, UserError):
            self.step = None
            raise self._outcome

    def finish(self) -> Path:
        """Wait for what was begun to be whole on disk. All processes must call it.

        Raises:
            CheckpointError: It could not be written. The same in all processes.
        """
        self._join()
        self.step = None

        def result() -> Path:
            if isinstance(self._outcome, BaseException):
                raise self._outcome
            assert self._outcome is not None  # it was begun
            return self._outcome

        return result() if self.accelerator.shards_state else self.accelerator.from_main(result)

    def close(self) -> None:
        """Wait for this process's part, whatever became of the others: the run has ended or failed."""
        self._join()
        if self.step is not None and isinstance(self._outcome, BaseException):
            log.warning("%s", self._outcome)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
