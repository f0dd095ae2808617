"""Checkpoints of which each process writes its part: files of ``torch.distributed.checkpoint`` in a sealed folder.

    checkpoints/step-000500/
      __0_0.distcp ...   of each process the shards that it held: weights, averages, optimizer state
      .metadata          which part of which tensor is where
      optimizer.pt       the rest of the optimizer's state: options, loss scale
      state.json         as in a checkpoint of one process
      manifest.json      size and SHA-256 of each file above; written last

They are read on any number of processes, each of which reads what it needs. Tensors' names are ``model/...``, ``ema/...``,
and ``optimizer/...`` with their place in the optimizer's nested state.
"""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from attrs import frozen
from torch import Tensor

from opensora.core.checkpoint_files import describe, discard, reason, seal, sync, temporary_name
from opensora.core.sharding import Like, map_tensors

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

__all__ = ["METADATA", "is_sharded_checkpoint", "read_optimizer", "read_tensors", "save_shards", "stems"]

METADATA = ".metadata"
_OPTIMIZER = "optimizer"
_SEPARATOR = "/"
_IN_SHARDS = "in the shards"
"""Stands for a tensor in ``optimizer.pt``."""
T = TypeVar("T")


def is_sharded_checkpoint(folder: Path) -> bool:
    """Whether ``folder`` holds shards."""
    return (folder / METADATA).is_file()


# ---- writing


@frozen
class _Peers:
    """The processes that save together. What fails in one fails in all, with the same reason."""

    group: Any

    def each(self, work: Callable[[], T]) -> list[T]:
        """What every process's ``work`` returns, in all of them.

        Raises:
            OSError: It failed in one.
        """
        from torch.distributed.checkpoint.api import CheckpointException

        problem, value = None, None
        try:
            value = work()
        except CheckpointException as error:  # known to all by now; its words are a page
            problem = next((reason(failure) for failure, _ in error.failures.values()), "unknown")
        except (OSError, RuntimeError) as error:
            problem = reason(error)
        outcomes: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(outcomes, (problem, value), group=self.group)
        if problem := next((problem for problem, _ in outcomes if problem), None):
            raise OSError(problem)
        return [value for _, value in outcomes]

    def main(self, work: Callable[[], T]) -> T:
        """What the main process's ``work`` returns, in all of them; see `each`."""
        return self.each(lambda: work() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)


def save_shards(
    final: Path, tensors: Mapping[str, Mapping[str, Tensor]], optimizer: Any, state: Mapping[str, Any], *, group: Any
) -> None:
    """Write a folder together; all processes of ``group`` must call it. See `opensora.core.checkpoints.Checkpoint`.

    Args:
        final: What the folder is to be called; one of that name is replaced.
        tensors: DTensors, of which each process writes its part, and tensors that all have, of which one writes each.
        optimizer: Nested dicts and lists.
        state: Plain numbers and strings.
        group: A group of CPU processes that nothing else uses meanwhile.

    Raises:
        OSError: It can't be written by one of them; nothing is left.
    """
    from torch.distributed.checkpoint.state_dict_saver import save

    peers = _Peers(group)
    flat = {f"{stem}{_SEPARATOR}{key}": each.detach() for stem, own in tensors.items() for key, each in own.items()}
    rest = map_tensors(optimizer, lambda path, tensor: _take(flat, path, tensor), (_OPTIMIZER,))
    temporary = peers.main(lambda: _make(temporary_name(final)))
    try:
        peers.each(lambda: _ignore(save(flat, storage_writer=_writer(temporary), process_group=group)))
        peers.main(lambda: _write_rest(temporary, rest, state))
        own = [*temporary.glob(f"__{peers.rank}_*.distcp")]
        own += [temporary / name for name in (METADATA, "optimizer.pt", "state.json")] if peers.rank == 0 else []
        entries = {name: entry for part in peers.each(lambda: describe(own)) for name, entry in part.items()}
        peers.main(lambda: _finish(temporary, final, entries))
    except OSError:
        if peers.rank == 0:
            discard(temporary)
        raise


def _take(flat: dict[str, Tensor], path: tuple[str | int, ...], tensor: Tensor) -> str:
    flat[_SEPARATOR.join(map(str, path))] = tensor.detach()
    return _IN_SHARDS


def _make(folder: Path) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    discard(folder)
    folder.mkdir()
    return folder


def _writer(folder: Path) -> Any:
    """Writes as torch does, but says why it couldn't."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    class Writer(FileSystemWriter):
        def write_data(self, *arguments: Any, **keywords: Any) -> Any:
            try:
                return super().write_data(*arguments, **keywords)
            except RuntimeError as error:  # "unexpected pos", in place of what the file said
                cause: BaseException | None = error
                while cause is not None and not isinstance(cause, OSError):
                    cause = cause.__context__
                raise cause or error from None

    return Writer(folder)


def _ignore(_: object) -> None:
    """What torch returns of a save is large, and nobody's here."""


def _write_rest(folder: Path, optimizer: Any, state: Mapping[str, Any]) -> None:
    with (folder / "optimizer.pt").open("wb") as file:  # torch's own file hides why writing failed
        torch.save(optimizer, file)
    (folder / "state.json").write_text(json.dumps(dict(state), indent=1), encoding="utf-8")


def _finish(temporary: Path, final: Path, entries: Mapping[str, Any]) -> None:
    seal(temporary, entries)
    discard(final)  # the same step again, after resuming from an earlier one
    temporary.rename(final)
    sync(final.parent)


# ---- reading


def stems(folder: Path) -> list[str]:
    """Which tensor files a checkpoint of one process would have: ``model``, and what hooks added.

    Raises:
        ValueError: The metadata can't be read.
    """
    found = dict.fromkeys(key.partition(_SEPARATOR)[0] for key in _read_metadata(folder).state_dict_metadata)
    return [stem for stem in found if stem != _OPTIMIZER]


def read_tensors(folder: Path, stem: str, like: Like | None = None) -> dict[str, Tensor]:
    """Tensors of one stem.

    Args:
        folder: The checkpoint.
        stem: See `stems`.
        like: Which of them are wanted as DTensors: then of these each process reads its part. None: all are wanted whole.

    Raises:
        ValueError, OSError: They can't be read.
    """
    prefix = f"{stem}{_SEPARATOR}"
    keys = [key for key in _read_metadata(folder).state_dict_metadata if key.startswith(prefix)]
    names = {key: key.removeprefix(prefix) for key in keys}
    read = _read(folder, {key: (stem, name) for key, name in names.items()}, like)
    return {names[key]: tensor for key, tensor in read.items()}


def read_optimizer(folder: Path, like: Like | None = None) -> Any:
    """The optimizer's nested state; see `read_tensors`."""
    rest = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    paths: dict[str, tuple[str | int, ...]] = {}
    _find(rest, (_OPTIMIZER,), paths)
    read = _read(folder, paths, like)
    return _fill(rest, (_OPTIMIZER,), read)


def _find(value: Any, path: tuple[str | int, ...], found: dict[str, tuple[str | int, ...]]) -> None:
    if value == _IN_SHARDS:
        found[_SEPARATOR.join(map(str, path))] = path
    elif isinstance(value, dict | list | tuple):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            _find(each, (*path, key), found)


def _fill(value: Any, path: tuple[str | int, ...], read: Mapping[str, Tensor]) -> Any:
    if value == _IN_SHARDS:
        return read[_SEPARATOR.join(map(str, path))]
    if isinstance(value, dict):
        return {key: _fill(each, (*path, key), read) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_fill(each, (*path, index), read) for index, each in enumerate(value))
    return value


def _read(folder: Path, paths: Mapping[str, tuple[str | int, ...]], like: Like | None) -> dict[str, Tensor]:
    """Tensors by their name in the metadata, given their places."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    metadata = _read_metadata(folder)
    targets: dict[str, Tensor] = {}
    for key, path in paths.items():
        saved = metadata.state_dict_metadata[key]
        template = like(path, saved.size) if like else None  # type: ignore[union-attr]  # only tensors were saved
        if template is None:
            targets[key] = torch.empty(saved.size, dtype=saved.properties.dtype)  # type: ignore[union-attr]
        else:
            targets[key] = torch.empty_like(template.detach(), dtype=saved.properties.dtype, device="cpu")  # type: ignore[union-attr]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning)  # of torch: that no other process takes part
            load(targets, storage_reader=_reader(folder), no_dist=True)
    except CheckpointException as error:
        raise ValueError(next((reason(failure) for failure, _ in error.failures.values()), "unknown")) from error
    return targets


def _reader(folder: Path) -> Any:
    """Reads a folder as torch does, but runs no code that its metadata, a pickle, may ask for."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    class Reader(FileSystemReader):
        def read_metadata(self, *_: Any, **__: Any) -> Metadata:
            return _read_metadata(folder)

    return Reader(folder)


def _read_metadata(folder: Path) -> Metadata:
    try:
        with (folder / METADATA).open("rb") as file:
            metadata: Metadata = _Unpickler(file).load()
            metadata.state_dict_metadata.items()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, ImportError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / METADATA} can't be read ({reason(error)})") from error
    return metadata


class _Unpickler(pickle.Unpickler):
    """Of what torch writes into the metadata, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        ours = module.startswith("torch.distributed.checkpoint.") and name in _CLASSES
        paths = module.partition(".")[0] == "pathlib" and name in ("PosixPath", "WindowsPath")
        of_torch = module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype))
        if ours or paths or of_torch or (module, name) == ("torch.serialization", "_get_layout"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")


_CLASSES = {
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
    "_MEM_FORMAT_ENCODING",
    "_StorageInfo",
}
