"""Files from http, https and ftp addresses, kept so that each is fetched once."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from contextlib import closing
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urlsplit
from urllib.request import Request, urlopen
from uuid import uuid4

from opensora.core.errors import DataError
from opensora.core.run_folder import make_folder

__all__ = ["default_folder", "download"]

log = logging.getLogger(__name__)

_SCHEMES = ("http", "https", "ftp")
_KEPT = "%/:?#[]@!$&'()*+,;=~"  # in an address: all but letters of other alphabets, and blanks
_PIECE = 1 << 20


def default_folder() -> Path:
    """``~/.cache/opensora/downloads``, or wherever ``XDG_CACHE_HOME`` puts caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "opensora" / "downloads"


def download(url: str, folder: Path, *, timeout_s: float = 30.0, max_bytes: int = 4 << 30) -> Path:
    """The file at ``url``, from ``folder`` if it is there already. It appears there whole or not at all.

    Args:
        timeout_s: How long the server may stay silent.
        max_bytes: What is larger is refused.

    Raises:
        DataError: The address is of another kind, the server can't be reached or says no, or the file is too large or cut.
        MachineError: The folder can't be written.
    """
    path = folder / _cache_name(url)
    if path.exists():
        log.info("%s is in %s already", url, path)
        return path
    make_folder(folder)
    temporary = folder / f".{uuid4().hex}.tmp"
    try:
        with temporary.open("wb") as file:
            _fetch(url, file, timeout_s, max_bytes)
        temporary.replace(path)
    except DataError:
        raise
    except HTTPError as error:
        raise DataError(f"{url} can't be downloaded: the server answers {error.code} {error.reason}.") from error
    except (URLError, HTTPException, OSError, ValueError) as error:
        raise DataError(f"{url} can't be downloaded: {_cause(error)}.") from error
    finally:
        temporary.unlink(missing_ok=True)
    log.info("Downloaded %s (%d bytes) to %s", url, path.stat().st_size, path)
    return path


def _fetch(url: str, file: BinaryIO, timeout_s: float, max_bytes: int) -> None:
    request = Request(quote(url, safe=_KEPT), headers={"User-Agent": "opensora-core"})
    with closing(urlopen(request, timeout=timeout_s)) as answer:
        status = getattr(answer, "status", 200)  # ftp has none
        if status not in (200, None):
            raise DataError(f"{url} can't be downloaded: the server answers {status}.")
        announced = answer.headers.get("Content-Length")
        if announced is not None and int(announced) > max_bytes:
            raise DataError(f"{url} has {int(announced):,} bytes, more than the {max_bytes:,} that are taken.")
        size = 0
        while piece := answer.read(_PIECE):
            size += len(piece)
            if size > max_bytes:
                raise DataError(f"{url} has more than the {max_bytes:,} bytes that are taken.")
            file.write(piece)
    if announced is not None and size != int(announced):
        raise DataError(f"{url} was cut off after {size:,} of {int(announced):,} bytes. Try again.")
    if not size:
        raise DataError(f"{url} is empty.")


def _cause(error: Exception) -> str:
    reason = getattr(error, "reason", None) or error
    return str(getattr(reason, "strerror", None) or reason) or type(reason).__name__


def _cache_name(url: str) -> str:
    """A name of its own for each address, ending in the file's, so that people recognize it."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise DataError(f"{url} can't be downloaded: {error}.") from error
    if parts.scheme.lower() not in _SCHEMES or not parts.netloc:
        raise DataError(f"{url} can't be downloaded: addresses start with {', '.join(_SCHEMES)}.")
    name = unquote(parts.path).rpartition("/")[2]
    readable = re.sub(r"[^\w.-]+", "_", name)[-80:].lstrip(".")
    return f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{readable or 'file'}"
