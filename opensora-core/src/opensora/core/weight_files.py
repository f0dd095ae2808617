"""Weights files of all the kinds that the field uses, read without running code from them."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora.core.checkpoints import find_checkpoint, list_checkpoints
from opensora.core.errors import CheckpointError, WeightsError
from opensora.core.sharded_checkpoints import is_sharded_checkpoint, read_tensors, stems

__all__ = ["EXTRA", "SUFFIXES", "choose_files", "model_folder", "read_config", "read_weights", "unwrap"]

_SAFETENSORS = (".safetensors",)
_PICKLES = (".pt", ".pth", ".bin", ".ckpt")
SUFFIXES = (*_SAFETENSORS, *_PICKLES)
"""How weights files end."""
EXTRA = "opensora_extra.safetensors"
"""Beside the weights: tensors that the folder's layout has no place for. Other projects don't look at it."""
_INDEXES = (
    "model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
_SINGLES = (
    "ema.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, of a folder with one weights file or with shards, or of the newest checkpoint of a run.

    Raises:
        WeightsError: Damaged, missing or incomplete files, an unknown kind, or a pickle that needs code.
    """
    if path.is_dir():
        return _read_folder(model_folder(path))
    if path.suffix in _SAFETENSORS:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path} can't be read ({error}). Is the file cut short? Download it again.") from error
    if path.suffix in _PICKLES:
        return _read_pickle(path)
    raise WeightsError(f"{path} is no weights file: it should end in {', '.join(SUFFIXES)}.")


def read_config(path: Path) -> dict[str, Any]:
    """The ``config.json`` of a folder (or beside a file), empty where there is none.

    Raises:
        WeightsError: It is no JSON object.
    """
    folder = model_folder(path) if path.is_dir() else path.parent
    file = folder / "config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{file} can't be read ({type(error).__name__}: {error}). Download it again.") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{file} holds a {type(config).__name__}, not an object. Download it again.")
    return config


def model_folder(folder: Path) -> Path:
    """The denoiser's folder in that of a whole diffusers pipeline; else the folder itself."""
    is_pipeline = (folder / "model_index.json").is_file() and (folder / "transformer").is_dir()
    return folder / "transformer" if is_pipeline else folder


def choose_files(names: Iterable[str]) -> list[str]:
    """Those of a folder's files that `read_weights` would read, as patterns; more than one weights file if it is unclear."""
    present = set(names)
    for index in _INDEXES:
        if index in present:
            stem, suffix = re.fullmatch(r"(.*)(\.\w+)\.index\.json", index).groups()  # type: ignore[union-attr]  # all do
            return [index, f"{stem}*{suffix}"]
    for single in _SINGLES:
        if single in present:
            return [single]
    return sorted(name for name in present if "/" not in name and name.endswith(SUFFIXES) and name != EXTRA)


def _read_folder(folder: Path) -> dict[str, Tensor]:
    for name in _INDEXES:
        if (index := folder / name).exists():
            return _read_shards(index) | _read_extra(folder)
    for name in _SINGLES:
        if (single := folder / name).exists():
            return read_weights(single) | _read_extra(folder)
    if is_sharded_checkpoint(folder):
        return _read_checkpoint_shards(folder)
    if (folder / "model").is_dir():  # Open-Sora's training checkpoints; their averages are in ema.pt beside it
        return _read_folder(folder / "model")
    weights = [path for path in folder.iterdir() if path.suffix in SUFFIXES and path.name != EXTRA]
    if len(weights) == 1:
        return read_weights(weights[0])
    if list_checkpoints(folder):
        try:
            return _read_folder(find_checkpoint(folder))
        except CheckpointError as error:
            raise WeightsError(str(error)) from error
    found = f"There are {', '.join(sorted(path.name for path in weights))}: name one." if weights else ""
    raise WeightsError(
        f"{folder} holds no weights: looked for {', '.join((*_INDEXES, *_SINGLES))} and checkpoints/. {found}".rstrip()
    )


def _read_checkpoint_shards(folder: Path) -> dict[str, Tensor]:
    """The averaged weights of a checkpoint that several processes have written, or the plain ones."""
    try:
        there = stems(folder)
        return read_tensors(folder, "ema" if "ema" in there else "model")
    except (OSError, ValueError, LookupError, RuntimeError) as error:
        raise WeightsError(f"{folder} can't be read ({error}). Use an earlier checkpoint.") from error


def _read_extra(folder: Path) -> dict[str, Tensor]:
    return read_weights(folder / EXTRA) if (folder / EXTRA).exists() else {}


def _read_shards(index: Path) -> dict[str, Tensor]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{index} is no index of shards ({type(error).__name__}: {error}). Download it again."
        ) from error
    if absent := [name for name in names if not (index.parent / name).exists()]:
        raise WeightsError(f"{index.parent} lacks {len(absent)} of {len(names)} shards: {', '.join(absent)}.")
    state: dict[str, Tensor] = {}
    for name in names:
        state |= read_weights(index.parent / name)
    return state


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # it reads those all the same
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and pickle raise a dozen kinds for damaged files
        raise WeightsError(_unreadable(path, error)) from error
    if not isinstance(loaded, Mapping):
        raise WeightsError(f"{path} holds a {type(loaded).__name__}, not a dict of tensors.")
    return dict(loaded)


def _unreadable(path: Path, error: Exception) -> str:
    if needed := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return (
            f"{path} holds more than tensors ({needed[1]}), and loading it could run code. "
            'If you trust it, convert it once: python -c "import sys, torch; from safetensors.torch import save_file; '
            "from opensora.core.weights import unwrap; "
            "state = unwrap(torch.load(sys.argv[1], weights_only=False, map_location='cpu')); "
            'save_file({k: v.clone().contiguous() for k, v in state.items()}, sys.argv[2])" FILE NEW.safetensors'
        )
    own_words = "" if isinstance(error, pickle.UnpicklingError) else str(error)  # torch's are a page on its flags
    reason = f" ({own_words.splitlines()[0]})" if own_words else ""
    return f"{path} can't be read: no file of torch.save, or cut short{reason}. Download it again."


def unwrap(state: Mapping[str, object]) -> dict[str, Tensor]:
    """The tensors inside the usual wrappings: an ``ema``, ``state_dict`` or ``model`` entry, ``module.`` before each key.

    Raises:
        WeightsError: What is left are no tensors.
    """
    for wrapper in ("ema", "state_dict", "model"):
        if isinstance(inner := state.get(wrapper), Mapping):
            return unwrap(inner)
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise WeightsError(f"No tensors found; the file's entries are {', '.join(list(state)[:8])}.")
    if all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return tensors
