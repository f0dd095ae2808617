"""Checkpoints: whole or not there.

    checkpoints/step-000500/
      model.safetensors       weights, float32
      ema.safetensors         what hooks add; the averaged weights, where EMA is on
      optimizer.pt            optimizer and loss-scale state
      state.json              step, samples and what else the loop counts, and the config
      manifest.json           size and SHA-256 of each file above; written last

A checkpoint is written under a temporary name, synced, and renamed. So a crash at any moment, in the middle of a save too,
leaves the last whole one, and a file that was damaged later is found by its checksum. Where an accelerator spreads the state
over processes, each writes its part: see `opensora.core.sharded_checkpoints`. What is read here may be of either kind.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from attrs import evolve, field, frozen
from torch import Tensor

from opensora.core.checkpoint_files import (
    MANIFEST,
    describe,
    discard,
    find_damage,
    reason,
    seal,
    sync,
    temporary_name,
)
from opensora.core.errors import CheckpointError
from opensora.core.sharded_checkpoints import is_sharded_checkpoint, read_optimizer, read_tensors, save_shards, stems
from opensora.core.sharding import Like, map_tensors, shard_like

if TYPE_CHECKING:
    from opensora.core.accelerator import Accelerator

__all__ = [
    "Checkpoint",
    "find_checkpoint",
    "list_checkpoints",
    "prune_checkpoints",
    "read_checkpoint",
    "read_state",
    "save_checkpoint",
    "save_checkpoint_together",
    "sweep",
    "verify_checkpoint",
]

log = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d+)")


@frozen(kw_only=True)
class Checkpoint:
    """All that a run needs to go on."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    """Tensor files by stem: ``model``, and what hooks added."""
    optimizer: Mapping[str, Any] = field(factory=dict)
    state: Mapping[str, Any] = field(factory=dict)
    """Plain numbers and strings."""

    def copied(self) -> Checkpoint:
        """With all tensors copied to the CPU's memory, so that what they are of may change."""

        def copy(_: object, tensor: Tensor) -> Tensor:
            return tensor.detach().to("cpu", copy=True)

        tensors = {stem: map_tensors(dict(own), copy) for stem, own in self.tensors.items()}
        return evolve(self, tensors=tensors, optimizer=map_tensors(dict(self.optimizer), copy))


def save_checkpoint(folder: Path, step: int, checkpoint: Checkpoint) -> Path:
    """Write ``folder/step-NNNNNN`` from one process.

    Raises:
        CheckpointError: The disk is full or the folder can't be written; earlier checkpoints are untouched.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    final = folder / f"step-{step:06d}"
    temporary = temporary_name(final)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        discard(temporary)
        temporary.mkdir()
        for stem, tensors in checkpoint.tensors.items():
            save_file(_apart(tensors), temporary / f"{stem}.safetensors")
        with (temporary / "optimizer.pt").open("wb") as file:  # torch's own file hides why writing failed
            torch.save(dict(checkpoint.optimizer), file)
        (temporary / "state.json").write_text(json.dumps(dict(checkpoint.state), indent=1), encoding="utf-8")
        seal(temporary, describe(temporary.iterdir()))
        discard(final)  # the same step again, after resuming from an earlier one
        temporary.rename(final)
        sync(folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # the last two: torch and safetensors on a full disk
        discard(temporary)
        raise _not_written(folder, step, error) from error
    return final


def save_checkpoint_together(folder: Path, step: int, checkpoint: Checkpoint, *, group: Any) -> Path:
    """Write ``folder/step-NNNNNN`` from all processes of a group, which must all call it: each writes its own shards.

    Raises:
        CheckpointError: One of them can't; earlier checkpoints are untouched. The same in all of them.
    """
    final = folder / f"step-{step:06d}"
    try:
        save_shards(final, checkpoint.tensors, checkpoint.optimizer, checkpoint.state, group=group)
    except OSError as error:
        failure = _not_written(folder, step, error)
        failure.is_told_once = True
        raise failure from error
    return final


def _not_written(folder: Path, step: int, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"Checkpoint of step {step} can't be written to {folder}: {reason(error)}. "
        f"Earlier checkpoints are untouched. Free some space, then go on with --load {folder.parent}"
    )


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that ``path`` means: itself, or the newest whole one of a run folder.

    Raises:
        CheckpointError: There is none.
    """
    if (path / MANIFEST).exists():
        return path
    for candidate in reversed(list_checkpoints(path)):
        if problem := next(find_damage(candidate, quick=True), None):
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


def verify_checkpoint(path: Path, accelerator: Accelerator | None = None) -> None:
    """Compare every file with its checksum, dealt out among the processes if there are several: all of them must call it.

    Raises:
        CheckpointError: A file is missing or damaged; the message says which. The same in all processes.
    """
    share = slice(accelerator.rank, None, accelerator.world_size) if accelerator else slice(None)
    damage = list(find_damage(path, quick=False, share=share))
    if accelerator:
        damage = [each for own in accelerator.gather(damage) for each in own]
    if damage:
        error = CheckpointError(
            f"{path} is damaged: {'; '.join(dict.fromkeys(damage))}. Use an earlier checkpoint: --load {path.parent}/step-..."
        )
        error.is_told_once = True
        raise error


def read_checkpoint(path: Path, *, like: Like | None = None, is_verified: bool = False) -> Checkpoint:
    """Read a checkpoint, after checking every file's checksum.

    Args:
        path: Of either kind.
        like: Which tensors are wanted as DTensors, for which a process keeps its part alone. None: all are wanted whole.
        is_verified: `verify_checkpoint` has been called.

    Raises:
        CheckpointError: A file is missing or damaged; the message says which.
    """
    if not is_verified:
        verify_checkpoint(path)
    if is_sharded_checkpoint(path):
        try:
            tensors = {stem: read_tensors(path, stem, like) for stem in stems(path)}
            return Checkpoint(tensors=tensors, optimizer=read_optimizer(path, like), state=read_state(path))
        except (OSError, ValueError, LookupError) as error:
            raise CheckpointError(f"{path} can't be read: {reason(error)}") from error
    return _read_whole(path, like)


def _read_whole(path: Path, like: Like | None) -> Checkpoint:
    """Read a checkpoint that one process has written; what isn't kept is never all in memory."""
    from safetensors.torch import load_file

    def own(place: tuple[str | int, ...], whole: Tensor) -> Tensor:
        template = like(place, whole.shape) if like else None
        return whole.clone() if template is None else shard_like(whole, template)

    tensors: dict[str, Any] = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
    optimizer = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True, mmap=like is not None)
    if like is not None:
        tensors = {stem: map_tensors(each, own, (stem,)) for stem, each in tensors.items()}
        optimizer = map_tensors(optimizer, own, ("optimizer",))
    return Checkpoint(tensors=tensors, optimizer=optimizer, state=read_state(path))


def read_state(path: Path) -> dict[str, Any]:
    """What a checkpoint's ``state.json`` says.

    Raises:
        CheckpointError: It can't be read.
    """
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / 'state.json'} can't be read: {reason(error)}") from error
    return dict(state)


def prune_checkpoints(run_folder: Path, keep: Callable[[int], bool], *, newest: int) -> None:
    """Delete all but the ``newest`` checkpoints and those whose step ``keep`` wants. 0 newest keeps all."""
    if newest < 1:
        return
    for path in list_checkpoints(run_folder)[:-newest]:
        if not keep(int(path.name.removeprefix("step-"))):
            try:
                discard(path)
            except OSError as error:
                log.warning("%s can't be removed: %s", path, reason(error))


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


def sweep(run_folder: Path) -> None:
    """Remove what a killed run left half written. Call it from one process, before training."""
    for pattern in (".step-*", ".doomed-*"):
        for leftover in (run_folder / "checkpoints").glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)
