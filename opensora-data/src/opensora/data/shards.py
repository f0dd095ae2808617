"""Shards: tar files of samples, as the ``webdataset`` library writes and names them, and an index of what is where in each.

Files of one sample follow one another and share their name up to the first dot: ``000017.mp4``, ``000017.txt``. The index is
made once by reading the headers of a shard, and kept beside it, so that any sample of any shard can be read at once.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
from attrs import frozen

from opensora.core.errors import ConfigError, DataError, MachineError
from opensora.core.video import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS

__all__ = ["ShardIndex", "find_shards", "index_shard"]

log = logging.getLogger(__name__)

_VERSION = 1
_ABSENT = -1


@frozen(eq=False)
class ShardIndex:
    """Where the samples of a shard are, in their order."""

    names: Sequence[str]
    """Of each sample's video or image; without one, of the sample."""
    media: npt.NDArray[np.int64]
    """[samples, 2]: first byte and number of bytes of the video or image; -1 without one."""
    texts: npt.NDArray[np.int64]
    """[samples, 2]: likewise of the caption."""
    is_json: npt.NDArray[np.bool_]
    """[samples]: whether that is JSON, instead of plain text."""

    def __len__(self) -> int:
        return len(self.names)


def find_shards(pattern: str | Sequence[str]) -> list[Path]:
    """The shards that a folder, a name with braces (``clips-{000..127}.tar``) or a list of names means, in its order.

    Raises:
        ConfigError: One of them is no file's name: an URL or a command, which ``webdataset`` would run.
        DataError: One is missing, or there are none.
        MachineError: The library ``webdataset`` is missing.
    """
    if isinstance(pattern, str) and Path(pattern).is_dir():
        shards = sorted(Path(pattern).glob("*.tar"))
        if not shards:
            raise DataError(f"{pattern} has no .tar files in it.")
        return shards
    names = _expand([pattern] if isinstance(pattern, str) else pattern)
    for name in names:
        if "://" in name or name.startswith("pipe:"):
            raise ConfigError(f"dataset.data_path: {name} is no file. Shards are read from disks; copy or mount them.")
        if not Path(name).is_file():
            raise DataError(f"The shard {name} is {'a folder' if Path(name).is_dir() else 'missing'}.")
    if not names:
        raise DataError("dataset.data_path lists no shards.")
    return [Path(name) for name in names]


def _expand(patterns: Sequence[str]) -> list[str]:
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise MachineError(_MISSING) from error
    try:
        return [str(name) for pattern in patterns for name in expand_urls(pattern)]
    except AssertionError as error:  # its word for a variable of the environment that isn't set
        raise ConfigError(f"dataset.data_path: {error}.") from error


_MISSING = "The dataset WebDataset needs the library webdataset: pip install 'opensora-data[webdataset]'"


def index_shard(shard: Path, cache: Path | None = None) -> ShardIndex:
    """The index of a shard, as it was kept, or made anew if the shard is another by size or time.

    Args:
        shard: A .tar file, not compressed.
        cache: Folder to keep the index in; None: beside the shard. If it can't be written, nothing is kept.

    Raises:
        DataError: The shard is damaged, cut short or compressed.
        MachineError: The library ``webdataset`` is missing.
    """
    stat = shard.stat()
    stamp = np.array([_VERSION, stat.st_size, stat.st_mtime_ns])
    kept = _place(shard, cache)
    if (index := _load(kept, stamp)) is not None:
        return index
    index = _make(shard)
    try:
        _save(index, kept, stamp)
    except OSError as error:
        log.info(
            "The index of %s is not kept: %s. dataset.index_folder can name another folder.", shard, error.strerror
        )
    return index


def _place(shard: Path, cache: Path | None) -> Path:
    if cache is None:
        return shard.with_name(f"{shard.name}.index.npz")
    digest = hashlib.blake2b(str(shard.resolve()).encode(), digest_size=6).hexdigest()
    return cache / f"{shard.name}.{digest}.index.npz"


def _load(path: Path, stamp: npt.NDArray[np.int64]) -> ShardIndex | None:
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            if not np.array_equal(file["stamp"], stamp):
                return None
            names = file["names"].tobytes().decode().split("\0")
            return ShardIndex(names if len(file["media"]) else [], file["media"], file["texts"], file["is_json"])
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None  # not made yet, or cut short by a kill long ago


def _save(index: ShardIndex, path: Path, stamp: npt.NDArray[np.int64]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            names = np.frombuffer("\0".join(index.names).encode(), np.uint8)
            np.savez(file, stamp=stamp, names=names, media=index.media, texts=index.texts, is_json=index.is_json)
        temporary.replace(path)  # processes that make it at the same time make the same
    finally:
        temporary.unlink(missing_ok=True)


def _make(shard: Path) -> ShardIndex:
    """Read the headers of a shard."""
    names, media, texts, is_json = [], [], [], []
    for key, files in _iter_samples(shard):
        kinds = sorted(files, key=lambda ending: ending not in VIDEO_EXTENSIONS)
        own = next((each for each in kinds if each in VIDEO_EXTENSIONS | IMAGE_EXTENSIONS), None)
        caption = next((each for each in (".txt", ".json") if each in files), None)
        names.append(f"{key}{own or ''}")
        media.append(files[own] if own else (_ABSENT, _ABSENT))
        texts.append(files[caption] if caption else (_ABSENT, _ABSENT))
        is_json.append(caption == ".json")
    return ShardIndex(
        names,
        np.array(media, np.int64).reshape(-1, 2),
        np.array(texts, np.int64).reshape(-1, 2),
        np.array(is_json, bool),
    )


def _iter_samples(shard: Path) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """(key, {ending: (first byte, bytes)}) of each sample."""
    try:
        from webdataset.tariterators import base_plus_ext
    except ImportError as error:
        raise MachineError(_MISSING) from error
    size = shard.stat().st_size
    key, files = None, dict[str, tuple[int, int]]()
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                own, endings = base_plus_ext(member.name)
                if not member.isfile() or own is None or member.name.startswith("__"):
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                if own != key and key is not None:
                    yield key, files
                    files = {}
                key = own
                files[f".{endings.rpartition('.')[2]}".lower()] = (member.offset_data, member.size)
    except tarfile.ReadError as error:
        raise DataError(
            f"The shard {shard} can't be read: {error}. It must be a whole .tar, not compressed."
        ) from error
    if key is not None:
        yield key, files
