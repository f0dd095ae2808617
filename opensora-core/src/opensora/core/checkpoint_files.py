"""Folders that are whole or not there: a manifest of their files, checksums, and removal that leaves no halves."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["MANIFEST", "describe", "discard", "find_damage", "reason", "seal", "sync", "temporary_name"]

MANIFEST = "manifest.json"


def temporary_name(final: Path) -> Path:
    """Where ``final`` is written before it gets its name. `opensora.core.checkpoints.sweep` knows such."""
    return final.with_name(f".{final.name}.{os.getpid()}")


def describe(paths: Iterable[Path]) -> dict[str, Any]:
    """Bring files to the disk, and return what the manifest says of them: name, size and SHA-256."""
    entries = {}
    for path in sorted(paths):
        sync(path)
        entries[path.name] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
    return entries


def seal(folder: Path, entries: Mapping[str, Any]) -> None:
    """Write the manifest, which vouches for bytes that are on the disk."""
    (folder / MANIFEST).write_text(json.dumps(dict(sorted(entries.items())), indent=1), encoding="utf-8")
    sync(folder / MANIFEST)
    sync(folder)


def find_damage(folder: Path, *, quick: bool, share: slice = slice(None)) -> Iterator[str]:
    """What is wrong with a sealed folder.

    Args:
        folder: The folder.
        quick: Compare sizes, not checksums.
        share: Of which of its files, in the order of the manifest.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = [(name, entry["bytes"], entry["sha256"]) for name, entry in manifest.items()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        yield f"{MANIFEST} can't be read ({reason(error)})"
        return
    for name, size, digest in files[share]:
        file = folder / name
        if not file.exists():
            yield f"{name} is missing"
        elif file.stat().st_size != size:
            yield f"{name} has {file.stat().st_size} bytes, not {size}"
        elif not quick and _digest(file) != digest:
            yield f"{name} has another checksum than when it was saved"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(folder: Path) -> None:
    """Remove a folder so that a kill half way leaves nothing that looks like a checkpoint: first its name, then its files."""
    if folder.exists():
        doomed = folder.with_name(f".doomed-{folder.name.lstrip('.')}-{os.getpid()}")
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def reason(error: BaseException) -> str:
    """Why, in a line."""
    if isinstance(error.__context__, OSError):  # torch: "unexpected pos", in place of what the file said
        error = error.__context__
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).strip().splitlines()[0]
