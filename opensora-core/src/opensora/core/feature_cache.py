"""A folder of tensors that were computed once, shared by runs and processes.

Each entry is a safetensors file of its own, ``<kind>/ab/abcd....safetensors``, whose name says what it is (see
`opensora.core.feature_keys`). It is written under another name and renamed, so it is there whole or not at all, and whoever
of several processes comes first makes it. A checksum is compared at each reading: an entry that a disk or a crash has damaged
is removed, and made again. Entries that were unused for longest go when the folder grows above its limit.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from attrs import define, frozen
from torch import Tensor

from opensora.core.errors import MachineError

__all__ = ["CacheUsage", "FeatureCache", "hash_tensor"]

log = logging.getLogger(__name__)
_SUFFIX = ".safetensors"
_TOUCHED_EVERY_S = 600  # reading an entry notes its time of use no more often: that is a write
_ABANDONED_AFTER_S = 3600
_KEPT_SHARE = 0.9  # of the limit, so that not every new entry has to look for an old one


class _DamagedError(Exception):
    """An entry that is not what was written; the reason is its text."""


@frozen(kw_only=True)
class CacheUsage:
    """What a cache's folder holds."""

    entries: Mapping[str, int]
    """Number by kind."""
    size: int
    """Bytes of all of them."""


@define(eq=False)
class FeatureCache:
    """Entries by kind and name. Several processes may use one folder at once; each has an object of its own."""

    folder: Path
    max_bytes: int | None = None
    """Of all entries; None: no limit. Enforced by whoever writes one."""
    damaged: int = 0
    """Entries that this object found damaged."""
    evicted: int = 0
    """Entries that this object removed to stay within the limit."""

    def get(self, kind: str, name: str) -> dict[str, Tensor] | None:
        """The tensors of an entry, on the CPU; None if it isn't there, or was damaged and is gone now.

        Raises:
            MachineError: The file is there but the machine can't read it.
        """
        path = self.path(kind, name)
        try:
            with path.open("rb") as file:
                used = os.fstat(file.fileno()).st_mtime
                data = file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise MachineError(f"{path} can't be read: {error.strerror}.") from error
        try:
            tensors = _decode(data)
        except _DamagedError as error:
            self.damaged += 1
            log.warning("%s is damaged (%s) and is made again", path, error)
            with suppress(OSError):
                path.unlink()
            return None
        if time.time() - used > _TOUCHED_EVERY_S:
            with suppress(OSError):  # of a folder that we may only read
                os.utime(path)
        return tensors

    def put(self, kind: str, name: str, tensors: Mapping[str, Tensor], *, about: str = "") -> None:
        """Write an entry, unless another process has done so meanwhile.

        Args:
            about: What it is, for people who look into the file.

        Raises:
            MachineError: It can't be written.
        """
        path = self.path(kind, name)
        if path.exists():
            return
        data = _encode(tensors, about)
        temporary = path.with_name(f".{name}.{socket.gethostname()}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_bytes(data)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
            self._account(len(data))
        except OSError as error:
            raise MachineError(f"{path} can't be written: {error.strerror}.") from error

    def path(self, kind: str, name: str) -> Path:
        """Where an entry is, or would be."""
        return self.folder / kind / name[:2] / f"{name}{_SUFFIX}"

    def usage(self) -> CacheUsage:
        """Count what is there."""
        entries: dict[str, int] = {}
        size = 0
        for path, _, bytes_ in self._entries():
            kind = path.parent.parent.name
            entries[kind] = entries.get(kind, 0) + 1
            size += bytes_
        return CacheUsage(entries=entries, size=size)

    def _account(self, added: int) -> None:
        """Keep the folder's size, a number in a file that processes write in turns, and the folder within its limit."""
        with self._locked():
            counter = self.folder / ".size"
            try:
                size = int(counter.read_text(encoding="ascii")) + added
            except (OSError, ValueError):  # the first entry, or a counter that a kill cut short
                size = sum(bytes_ for _, _, bytes_ in self._entries())
            if self.max_bytes is not None and size > self.max_bytes:
                size = self._evict(int(_KEPT_SHARE * self.max_bytes))
            counter.write_text(str(size), encoding="ascii")

    def _evict(self, allowed: int) -> int:
        """Remove what was unused for longest, and return how many bytes are left."""
        entries = sorted(self._entries(), key=lambda entry: entry[1])
        size = sum(bytes_ for _, _, bytes_ in entries)
        for path, _, bytes_ in entries:
            if size <= allowed:
                break
            path.unlink(missing_ok=True)
            size -= bytes_
            self.evicted += 1
        return size

    def _entries(self) -> Iterator[tuple[Path, float, int]]:
        """Path, time of last use and bytes of each entry. Files that a killed process left behind are removed."""
        for kind in self.folder.iterdir():
            for folder in kind.iterdir() if kind.is_dir() else ():
                with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as files:
                    for file in files:
                        with suppress(FileNotFoundError):  # evicted by another process, or renamed
                            stat = file.stat()
                            if file.name.startswith("."):
                                if time.time() - stat.st_mtime > _ABANDONED_AFTER_S:
                                    os.unlink(file.path)
                            elif file.name.endswith(_SUFFIX):
                                yield Path(file.path), stat.st_mtime, stat.st_size

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def hash_tensor(tensor: Tensor) -> bytes:
    """16 bytes that stand for dtype, shape and every bit of a tensor."""
    data = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    digest = hashlib.blake2b(f"{tensor.dtype} {list(tensor.shape)}".encode(), digest_size=16)
    digest.update(data.numpy().data)
    return digest.digest()


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(name.encode() + b"\0" + hash_tensor(tensors[name]))
    return digest.hexdigest()


def _encode(tensors: Mapping[str, Tensor], about: str) -> bytes:
    from safetensors.torch import save

    whole = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}
    return save(whole, metadata={"checksum": _checksum(whole), "about": about})


def _decode(data: bytes) -> dict[str, Tensor]:
    """The tensors of a file's bytes.

    Raises:
        _DamagedError: They are not those that were written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, ValueError) as error:
        raise _DamagedError(str(error)) from error
    if header.get("__metadata__", {}).get("checksum") != _checksum(tensors):
        raise _DamagedError("its checksum differs")
    return tensors
