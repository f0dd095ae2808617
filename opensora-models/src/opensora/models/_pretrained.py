"""Weights that diffusers and transformers read: what they and the hub raise, turned into messages that say what to do."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from opensora.core.errors import WeightsError


def expand_home(source: str) -> str:
    """``~/weights`` as a whole path; a hub id as it is."""
    return str(Path(source).expanduser()) if source.startswith("~") else source


@contextmanager
def reading(what: str, source: str, *, key: str, local_files_only: bool = False, meta: bool = False) -> Iterator[None]:
    """Around a ``from_pretrained`` call.

    Args:
        what: What is being read, for the message: "T5 encoder".
        source: Folder or hub id.
        key: The config key that names the source.
        meta: Nothing is going to be read, so that the source needn't be there.

    Raises:
        WeightsError: There is no such folder or hub repository, it can't be reached, or its files can't be read.
    """
    folder = Path(source).expanduser()
    is_path = source.startswith((".", "/", "~")) or source.count("/") != 1
    if is_path and not meta and not folder.is_dir():
        raise WeightsError(f'{what}: there is no folder "{source}". Set {key} to a folder or hub id (owner/name).')
    try:
        with warnings.catch_warnings():
            # diffusers still passes this to the hub
            warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")
            yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if folder.is_dir():
            advice = f"Check that the folder is whole; it should hold the {what}."
        elif local_files_only:
            advice = f"It isn't in the local cache: set local_files_only = False to download it, or {key} to a folder."
        else:
            advice = f"Check the name and the network (HF_ENDPOINT chooses a mirror), or set {key} to a folder."
        raise WeightsError(f'{what} "{source}" can\'t be read: {cause} {advice}') from error
