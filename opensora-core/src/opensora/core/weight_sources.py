"""Where weights come from: this disk, the Hugging Face hub, or the address of a published file."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

from opensora.core.errors import WeightsError
from opensora.core.weight_files import EXTRA, SUFFIXES, choose_files

__all__ = ["DOWNLOADS", "locate_weights"]

log = logging.getLogger(__name__)
DOWNLOADS = Path("pretrained_models")
"""Where files that are known by name are kept, in the working directory."""
_HUB = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w.-]+))?(?P<inside>(?:/[\w.-]+)*)")
_TIMEOUT_S = 60.0


def locate_weights(source: str | Path, *, published: Mapping[str, str] | None = None) -> Path:
    """The local file or folder of a source, downloaded if it isn't one.

    Args:
        source: A path; a name in ``published``; or from the hub a repository ``org/name``, a folder of it
            ``org/name/folder``, or a file of it ``org/name/file.pth``; ``org/name@revision`` for another than the newest.
        published: File names that the field knows, and their addresses (see `opensora.core.interop.Interop`). They are kept
            in ``pretrained_models/``.

    Raises:
        WeightsError: Nothing is there, or it can't be downloaded.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    text = str(source)
    if path.name in (published or {}) and path.parent in (Path(), DOWNLOADS):
        return _fetch(path.name, (published or {})[path.name])
    found = _HUB.fullmatch(text)
    if not found or ".." in text or (text.count("/") == 1 and path.suffix in SUFFIXES):
        known = (
            f" Published files known by name: {', '.join(published)}." if published and path.suffix in SUFFIXES else ""
        )
        raise WeightsError(
            f"There is no file or folder {text}. Give a path, a run folder, or a hub id such as org/name, "
            f"org/name/folder or org/name/file.pth.{known}"
        )
    try:
        return _from_hub(found["repo"], found["inside"].removeprefix("/"), found["revision"])
    except WeightsError:
        raise
    except Exception as error:  # the hub raises its own, its http library's and OS errors
        raise WeightsError(
            f'"{text}" is no local path, and the hub has not given it ({type(error).__name__}). '
            "Check the id and the network (HF_ENDPOINT chooses a mirror); set HF_TOKEN for a gated model, or download it by "
            "other means and give the path."
        ) from error


def _fetch(name: str, address: str) -> Path:
    """A published file: the one in ``pretrained_models/``, else it is downloaded there, whole or not at all."""
    target = DOWNLOADS / name
    if target.exists():
        return target
    by_hand = f"Put the file at {target}, or give its path."
    if not address:
        raise WeightsError(f"{name} was never published, so it can't be downloaded. {by_hand}")
    log.info("%s: downloading %s to %s", name, address, target)
    try:
        if "://" in address:
            _download(address, target)
        else:
            _download_from_hub(address, target)
    except Exception as error:  # the hub raises its own, its http library's and OS errors
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise WeightsError(
            f"{name} is not in {DOWNLOADS}/, and can't be downloaded from {_url(address)} "
            f"({type(error).__name__}: {reason}). {by_hand}"
        ) from error
    return target


def _download(url: str, target: Path) -> None:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        raise OSError("HF_HUB_OFFLINE is set")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with urlopen(url, timeout=_TIMEOUT_S) as response, part.open("wb") as file:  # the table's addresses
            shutil.copyfileobj(response, file, 1 << 20)
            expected = response.headers.get("Content-Length")
        if expected is not None and part.stat().st_size != int(expected):
            raise HTTPException(f"{part.stat().st_size} of {expected} bytes came")
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _download_from_hub(address: str, target: Path) -> None:
    from huggingface_hub import hf_hub_download

    owner, name, file = address.split("/", 2)
    got = Path(hf_hub_download(f"{owner}/{name}", file, local_dir=target.parent))
    if got != target:
        got.replace(target)


def _url(address: str) -> str:
    if "://" in address:
        return address
    from huggingface_hub import hf_hub_url

    owner, name, file = address.split("/", 2)
    return hf_hub_url(f"{owner}/{name}", file)


def _from_hub(repo: str, inside: str, revision: str | None) -> Path:
    """A file, a folder or the whole of a repository, in the hub's own cache; of folders only what will be read."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    if inside.endswith(SUFFIXES):
        return Path(hf_hub_download(repo, inside, revision=revision))
    try:
        names = [file.rfilename for file in HfApi().model_info(repo, revision=revision).siblings or ()]
    except HfHubHTTPError:  # it has answered
        raise
    except Exception as unreachable:  # its http library's and OS errors: what was downloaded before will do
        return _from_cache(repo, inside, revision, unreachable)
    prefix = f"{inside}/" if inside else ""
    here = _under(prefix, names)
    if "model_index.json" in here:
        prefix += "transformer/"
        here = _under(prefix, names)
    if not choose_files(here) and (inner := _under("model/", here)):  # Open-Sora's training checkpoints
        prefix, here = f"{prefix}model/", inner
    chosen = choose_files(here)
    if not chosen:
        raise WeightsError(f"{repo} on the hub has no weights{f' in {inside}' if inside else ''}.")
    if len(chosen) > 1 and not chosen[0].endswith(".json"):
        listed = ", ".join(f"{repo}/{prefix}{name}" for name in chosen)
        raise WeightsError(f"{repo} on the hub has several weights files: name one of {listed}.")
    patterns = [f"{prefix}{pattern}" for pattern in (*chosen, "config.json", EXTRA)]
    return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns)) / prefix


def _from_cache(repo: str, inside: str, revision: str | None, unreachable: Exception) -> Path:
    """What `_from_hub` downloaded before. Whether it is whole, reading it will tell."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    found = f"{inside}/config.json".removeprefix(
        "/"
    )  # all files of a repository are never there, so don't ask for them
    try:
        root = snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[found])
    except LocalEntryNotFoundError:
        raise unreachable from None
    folder = Path(root) / inside
    if not folder.is_dir():
        raise unreachable
    return next((folder / deeper for deeper in ("transformer", "model") if (folder / deeper).is_dir()), folder)


def _under(prefix: str, names: Iterable[str]) -> list[str]:
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
