"""Checkpoints: whole or not there.

    checkpoints/step-000500/
      model.safetensors       weights, float32
      ema.safetensors         what hooks add; the averaged weights, where EMA is on
      optimizer.pt            optimizer and loss-scale state
      state.json              step, samples and what else the loop counts
      manifest.json           size and SHA-256 of each file above; written last

A checkpoint is written under a temporary name, synced, and renamed. So a crash at any moment, in the middle of a save too,
leaves the last whole one, and a file that was damaged later is found by its checksum.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import field, frozen
from torch import Tensor

from opensora.core.errors import CheckpointError

__all__ = [
    "Checkpoint",
    "find_checkpoint",
    "list_checkpoints",
    "prune_checkpoints",
    "read_checkpoint",
    "save_checkpoint",
    "sweep",
]

log = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d+)")
_MANIFEST = "manifest.json"


@frozen(kw_only=True)
class Checkpoint:
    """All that a run needs to go on."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    """Tensor files by stem: ``model``, and what hooks added."""
    optimizer: Mapping[str, Any] = field(factory=dict)
    state: Mapping[str, Any] = field(factory=dict)
    """Plain numbers and strings."""


def save_checkpoint(folder: Path, step: int, checkpoint: Checkpoint) -> Path:
    """Write ``folder/step-NNNNNN``.

    Raises:
        CheckpointError: The disk is full or the folder can't be written; earlier checkpoints are untouched.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    final = folder / f"step-{step:06d}"
    temporary = folder / f".step-{step:06d}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _discard(temporary)
        temporary.mkdir()
        for stem, tensors in checkpoint.tensors.items():
            save_file(_apart(tensors), temporary / f"{stem}.safetensors")
        with (temporary / "optimizer.pt").open("wb") as file:  # torch's own file hides why writing failed
            torch.save(dict(checkpoint.optimizer), file)
        (temporary / "state.json").write_text(json.dumps(dict(checkpoint.state), indent=1), encoding="utf-8")
        _seal(temporary)
        _discard(final)  # the same step again, after resuming from an earlier one
        temporary.rename(final)
        _sync(folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # the last two: torch and safetensors on a full disk
        _discard(temporary)
        raise CheckpointError(
            f"Checkpoint of step {step} can't be written to {folder}: {_reason(error)}. "
            f"Earlier checkpoints are untouched. Free some space, then go on with --load {folder.parent}"
        ) from error
    return final


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that ``path`` means: itself, or the newest whole one of a run folder.

    Raises:
        CheckpointError: There is none.
    """
    if (path / _MANIFEST).exists():
        return path
    for candidate in reversed(list_checkpoints(path)):
        if problem := next(_damage(candidate, quick=True), None):
            log.warning("%s is left out: %s", candidate, problem)
        else:
            return candidate
    raise CheckpointError(
        f"{path} is no checkpoint, and has no whole one under checkpoints/. Give a run folder or a step-* folder."
    )


def list_checkpoints(run_folder: Path) -> list[Path]:
    """Checkpoints of a run folder (or of its ``checkpoints`` folder), oldest first."""
    home = run_folder / "checkpoints" if (run_folder / "checkpoints").is_dir() else run_folder
    found = {int(match[1]): path for path in home.glob("step-*") if (match := _NAME.fullmatch(path.name))}
    return [found[step] for step in sorted(found)]


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint, all of it, after checking every file's checksum.

    Raises:
        CheckpointError: A file is missing or damaged; the message says which.
    """
    from safetensors.torch import load_file

    if damage := list(_damage(path, quick=False)):
        raise CheckpointError(
            f"{path} is damaged: {'; '.join(damage)}. Use an earlier checkpoint: --load {path.parent}/step-..."
        )
    return Checkpoint(
        tensors={file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))},
        optimizer=torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True),
        state=json.loads((path / "state.json").read_text(encoding="utf-8")),
    )


def prune_checkpoints(run_folder: Path, keep: Callable[[int], bool], *, newest: int) -> None:
    """Delete all but the ``newest`` checkpoints and those whose step ``keep`` wants. 0 newest keeps all."""
    if newest < 1:
        return
    for path in list_checkpoints(run_folder)[:-newest]:
        if not keep(int(path.name.removeprefix("step-"))):
            try:
                _discard(path)
            except OSError as error:
                log.warning("%s can't be removed: %s", path, _reason(error))


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, each in memory of its own: tied weights are written as often as they have names."""
    apart: dict[str, Tensor] = {}
    taken: set[int] = set()
    for key, value in tensors.items():
        tensor = value.detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        apart[key] = tensor.clone() if address in taken else tensor
        taken.add(address)
    return apart


def _seal(folder: Path) -> None:
    """Sync every file, then write the manifest, so that it vouches for bytes that are on the disk."""
    manifest = {}
    for path in sorted(folder.iterdir()):
        _sync(path)
        manifest[path.name] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _sync(folder / _MANIFEST)
    _sync(folder)


def _damage(path: Path, *, quick: bool) -> Iterator[str]:
    """What is wrong with a checkpoint; ``quick`` compares sizes, not checksums."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        files = [(name, entry["bytes"], entry["sha256"]) for name, entry in manifest.items()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        yield f"{_MANIFEST} can't be read ({_reason(error)})"
        return
    for name, size, digest in files:
        file = path / name
        if not file.exists():
            yield f"{name} is missing"
        elif file.stat().st_size != size:
            yield f"{name} has {file.stat().st_size} bytes, not {size}"
        elif not quick and _digest(file) != digest:
            yield f"{name} has another checksum than when it was saved"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(folder: Path) -> None:
    """Remove a folder so that a kill half way leaves nothing that looks like a checkpoint: first its name, then its files."""
    if folder.exists():
        doomed = folder.with_name(f".doomed-{folder.name.lstrip('.')}-{os.getpid()}")
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _reason(error: BaseException) -> str:
    if isinstance(error.__context__, OSError):  # torch: "unexpected pos", in place of what the file said
        error = error.__context__
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).strip().splitlines()[0]


def sweep(run_folder: Path) -> None:
    """Remove what a killed run left half written. Call it from one process, before training."""
    for pattern in (".step-*", ".doomed-*"):
        for leftover in (run_folder / "checkpoints").glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)
