"""Where a run writes: ``outputs/003-STDiT3-XL-2/`` with its config, log, metrics, samples and checkpoints."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from opensora.core.errors import MachineError

__all__ = ["append_jsonl", "held", "logging_to", "make_folder", "new_run_folder", "read_jsonl", "write_atomically"]

_NUMBERED = re.compile(r"(\d{3,})-")


def new_run_folder(outputs: Path, name: str) -> Path:
    """Make ``outputs/NNN-name``, NNN one above the highest there. Two runs started at once get two folders.

    Args:
        name: Slashes become dashes.

    Raises:
        MachineError: The folder can't be written.
    """
    make_folder(outputs)
    while True:
        taken = [int(match[1]) for entry in outputs.iterdir() if (match := _NUMBERED.match(entry.name))]
        folder = outputs / f"{max(taken, default=-1) + 1:03d}-{name.replace('/', '-')}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue  # another run took the number between our look and our step
        except OSError as error:
            raise _unwritable(folder, error) from error
        return folder


def make_folder(folder: Path) -> Path:
    """Make ``folder`` and its parents, and check that files can be written there.

    Raises:
        MachineError: They can't.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise _unwritable(folder, error) from error
    return folder


def _unwritable(folder: Path, error: OSError) -> MachineError:
    return MachineError(
        f"Can't write to {folder}: {error.strerror}. Choose another folder with --outputs or --save-dir."
    )


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Add what ``opensora`` logs inside the block to a file, from level INFO."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.setLevel(logging.INFO)
    logger = logging.getLogger("opensora")
    level = logger.level
    logger.addHandler(handler)
    if level == logging.NOTSET:  # used as a library: the root logger's level would hold INFO back
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        handler.close()


def append_jsonl(path: Path, record: Mapping[str, object]) -> None:
    """Append one line in one write, so that processes may share the file. A line that was cut short before it stays alone."""
    with _writing(path), path.open("ab+", buffering=0) as file:
        is_cut = file.tell() > 0 and _last_byte(file) != b"\n"
        file.write((("\n" if is_cut else "") + json.dumps(record) + "\n").encode())


def _last_byte(file: BinaryIO) -> bytes:
    file.seek(-1, os.SEEK_END)
    return file.read(1)


def read_jsonl(path: Path) -> list[dict[str, object]]:
    """All whole records; a line that a kill or a full disk cut short is left out. A missing file has none."""
    if not path.exists():
        return []
    records = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        with suppress(ValueError):
            records.append(json.loads(line))
    return records


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with _writing(path):
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MachineError(f"{path} can't be written: {error.strerror}.") from error


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other runs out of a run folder for the length of the block, or until this process dies.

    Raises:
        MachineError: Another run is in it.
    """
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MachineError(
                f"Another run is writing to {folder}. Wait for it, end it, or use another folder."
            ) from error
        yield
