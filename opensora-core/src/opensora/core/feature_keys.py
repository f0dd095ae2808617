"""What a computed feature is named by: all that it depends on.

Latents depend on the bytes of the source file, the frames that were chosen of it, how they were brought to their size, the
autoencoder (its class, options and every bit of its weights) and the dtype that it computed in; the embedding of a caption on
the caption, the text encoder and its dtype. The name is a digest of that, so a feature can't be stale: what changes has
another name.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs
import torch
from attrs import define, field
from torch import nn

from opensora.core.config.structure import ComponentConfig, unstructure
from opensora.core.errors import DataError, MachineError
from opensora.core.feature_cache import hash_tensor
from opensora.core.protocols import IMAGE_FPS, ClipRecipe, SourceFacts
from opensora.core.run_folder import write_atomically
from opensora.core.video import VideoFile, is_video

__all__ = ["IdentityRecords", "Sources", "digest", "identify", "latents_name", "text_name"]

VERSION = 1
"""Part of each name; to be raised whenever what is computed from the same input changes."""
_SETTLED_AFTER_S = 2.0
_KEPT_IN_MEMORY = 100_000
_PIECE = 1 << 20
_WHERE_FROM = frozenset({"from_pretrained", "cache_dir", "local_files_only"})
"""Options that say where weights are, not what they are: the weights themselves are looked at."""


def digest(facts: object) -> str:
    """40 hex digits that stand for ``facts``, which JSON can write."""
    text = json.dumps([VERSION, facts], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


def latents_name(recipe: ClipRecipe, source: SourceFacts, encoder: str) -> str:
    """The name of the latents of a clip. ``encoder``: its identity, dtype included."""
    made = {"frames": list(recipe.frames), "size": list(recipe.size), "transform": dict(recipe.transform)}
    return digest(["latents", source.digest, made, encoder])


def text_name(caption: str, encoder: str) -> str:
    """The name of the embedding of a caption. ``encoder``: its identity, dtype included."""
    return digest(["text", caption, encoder])


@define(eq=False)
class Sources:
    """What files are, looked at once: remembered by path, size, times of change and inode, for other runs too.

    A file whose time of last change is the same is taken to be the same. To forge that one must set the clock back, since the
    time counts that the file system itself keeps (ctime) and no tool can set. A file that changed within the last two seconds
    is looked at again, because the times may be too coarse to tell a further change.
    """

    folder: Path
    """Where it is remembered."""
    is_kept: bool = True
    """Whether to write what is new."""
    _known: dict[str, SourceFacts] = field(factory=dict)

    def look(self, path: Path) -> SourceFacts:
        """Digest, length and rate of a video or image.

        Raises:
            DataError: It can't be read.
        """
        stat = _stat(path)
        name = digest(_marks(path, stat))
        if facts := self._known.get(name):
            return facts
        record = self.folder / name[:2] / f"{name}.json"
        facts = _read_record(record) or self._examine(path, stat, record)
        if len(self._known) >= _KEPT_IN_MEMORY:
            self._known.clear()
        if _is_settled(stat):
            self._known[name] = facts
        return facts

    def _examine(self, path: Path, stat: os.stat_result, record: Path) -> SourceFacts:
        content = _hash_file(path)
        num_frames, fps = 1, IMAGE_FPS
        if is_video(path):
            with VideoFile(path) as file:
                num_frames, fps = file.info.num_frames, file.info.fps
        if _marks(path, _stat(path)) != _marks(path, stat):
            raise DataError(f"{path} was changed while it was read.")
        facts = SourceFacts(digest=content, num_frames=num_frames, fps=fps)
        if self.is_kept and _is_settled(stat):
            with suppress(OSError, MachineError):  # only speed is lost; an entry that can't be written is reported
                record.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(record, json.dumps(attrs.asdict(facts)))
        return facts


def identify(encoder: object, *, dtype: torch.dtype) -> str:
    """What an encoder is: class, options, settings, each bit of its weights, and the dtype that it is to compute in.

    Args:
        encoder: As it was built: on the CPU, before it is cast.
        dtype: That it will be cast to.
    """
    cls = type(encoder)
    facts: dict[str, object] = {
        "class": f"{cls.__module__}.{cls.__qualname__}",
        "options": _without(unstructure(getattr(encoder, "spec", None)), _ignored(encoder)),
        "dtype": str(dtype),
    }
    if isinstance(encoder, nn.Module):
        facts["settings"] = [_settings(module) for module in encoder.modules() if hasattr(module, "config")]
        facts["weights"] = _hash_weights(encoder)
    if hasattr(encoder, "fingerprint"):
        facts["fingerprint"] = encoder.fingerprint()
    return digest(facts)


@define(eq=False)
class IdentityRecords:
    """Identities of encoders by how a config names them, so that a run that finds all its features needn't load them.

    A record holds while the files that the options name are the same (see `Sources`) or, of a hub id, the commit that was
    downloaded. Weights that are random are those of a seed.
    """

    folder: Path

    def find(self, config: ComponentConfig, *, dtype: torch.dtype, seed: int) -> str | None:
        """The identity, if it is known."""
        try:
            text = self._path(config, dtype, seed).read_text(encoding="utf-8")
            identity: str = json.loads(text)["identity"]
        except (OSError, ValueError, LookupError, TypeError):
            return None
        return identity

    def keep(self, config: ComponentConfig, identity: str, *, dtype: torch.dtype, seed: int) -> None:
        """Remember an identity, unless its files changed just now."""
        if any(not _is_settled(path.stat()) for path in _local_files(config.options)):
            return
        path = self._path(config, dtype, seed)
        with suppress(OSError, MachineError):  # of a folder that we may only read; then it is found out again
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps({"identity": identity, **unstructure(config)}, default=str))

    def _path(self, config: ComponentConfig, dtype: torch.dtype, seed: int) -> Path:
        facts = {
            "config": unstructure(config),
            "files": [_marks(path, path.stat()) for path in _local_files(config.options)],
            "commits": sorted(_hub_commits(config.options)),
            "dtype": str(dtype),
            "seed": None if config.options.get("from_pretrained") else seed,
        }
        return self.folder / f"{digest(facts)}.json"


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}.") from error


def _marks(path: Path, stat: os.stat_result) -> list[object]:
    """By what a file is recognised without reading it."""
    return [os.path.abspath(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _is_settled(stat: os.stat_result) -> bool:
    """Whether a further change would show in the file's times."""
    return time.time() - max(stat.st_mtime, stat.st_ctime) > _SETTLED_AFTER_S


def _read_record(record: Path) -> SourceFacts | None:
    try:
        return SourceFacts(**json.loads(record.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _hash_file(path: Path) -> str:
    content = hashlib.blake2b(digest_size=20)
    try:
        with path.open("rb") as file:
            while piece := file.read(_PIECE):
                content.update(piece)
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}.") from error
    return content.hexdigest()


def _hash_weights(module: nn.Module) -> str:
    """Of all parameters and buffers that are saved, several at a time."""
    state = {key: value for key, value in sorted(module.state_dict().items()) if isinstance(value, torch.Tensor)}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        hashes = list(pool.map(hash_tensor, state.values()))
    return digest([[key, value.hex()] for key, value in zip(state, hashes, strict=True)])


def _settings(module: Any) -> object:
    """The config of a network of diffusers or transformers, which has numbers that are no weights, such as a scale."""
    config = module.config.to_dict() if hasattr(module.config, "to_dict") else module.config
    if not isinstance(config, Mapping):
        return str(config)
    return {
        str(key): value
        for key, value in config.items()
        if not str(key).startswith("_") and key not in ("transformers_version", "torch_dtype", "dtype")
    }


def _ignored(encoder: object) -> frozenset[str]:
    return _WHERE_FROM | frozenset(getattr(encoder, "memory_options", ()))


def _without(options: Any, ignored: frozenset[str]) -> Any:
    if isinstance(options, Mapping):
        return {key: _without(value, ignored) for key, value in options.items() if key not in ignored}
    if isinstance(options, list | tuple):
        return [_without(value, ignored) for value in options]
    return options


def _strings(options: Any) -> Iterator[str]:
    """Strings within options that may name weights."""
    if isinstance(options, str):
        yield options
    elif isinstance(options, Mapping):
        for key, value in options.items():
            if key not in ("cache_dir", "subfolder", "type"):
                yield from _strings(value)
    elif isinstance(options, list | tuple):
        for value in options:
            yield from _strings(value)
    elif isinstance(options, ComponentConfig):
        yield from _strings(options.options)


def _local_files(options: Any) -> list[Path]:
    """The files that options name, and those in folders that they name."""
    found: list[Path] = []
    for text in _strings(options):
        path = os.path.expanduser(text)
        if os.path.isdir(path):  # unlike Path's, it takes whatever text
            found += (each for each in Path(path).rglob("*") if each.is_file())
        elif os.path.isfile(path):
            found.append(Path(path))
    return sorted(found)


def _hub_commits(options: Any) -> Iterator[str]:
    """What the download of each hub id that options name is of."""
    from huggingface_hub.constants import HF_HUB_CACHE

    for text in _strings(options):
        if text.count("/") == 1:
            refs = Path(HF_HUB_CACHE, f"models--{text.replace('/', '--')}", "refs")
            for ref in refs.iterdir() if refs.is_dir() else ():
                yield f"{text}@{ref.name}: {ref.read_text(encoding='utf-8').strip()}"
