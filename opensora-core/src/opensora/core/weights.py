"""Reading other people's weights, and saying what became of them.

A source is a local file (``.safetensors``; ``.pt``, ``.pth``, ``.bin`` without code), a folder (one file, or shards with an
index), a run folder or checkpoint of this project (its averaged weights, where it has them), or a Hugging Face hub id.
A model class may define ``adapt_state_dict(self, state)``, which turns published keys and shapes into its own.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from attrs import field, frozen
from torch import Tensor, nn

from opensora.core.checkpoints import find_checkpoint, list_checkpoints
from opensora.core.errors import CheckpointError, WeightsError

__all__ = ["LoadReport", "load_weights", "locate_weights", "read_weights", "unwrap"]

log = logging.getLogger(__name__)
_SAFETENSORS = (".safetensors",)
_PICKLES = (".pt", ".pth", ".bin", ".ckpt")
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


@frozen(kw_only=True)
class LoadReport:
    """What a model took from a file."""

    source: str
    loaded: int
    adapted: list[str] = field(factory=list)
    """Keys whose name or shape was changed to fit."""
    missing: list[str] = field(factory=list)
    """Keys of the model that the file lacks: they keep their initial values."""
    unexpected: list[str] = field(factory=list)
    """Keys of the file that the model doesn't have."""
    misshapen: list[str] = field(factory=list)
    """``key: file has ..., model has ...``."""

    @property
    def is_complete(self) -> bool:
        """Every key of the model was loaded, and every key of the file was used."""
        return not (self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        """One line a kind, keys shortened to eight."""
        lines = [f"{self.source}: {self.loaded} tensors loaded, {len(self.adapted)} of them adapted"]
        for title, keys in (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("of another shape", self.misshapen),
        ):
            if keys:
                rest = f", and {len(keys) - 8} more" if len(keys) > 8 else ""
                lines.append(f"  {len(keys)} {title}: {', '.join(keys[:8])}{rest}")
        return "\n".join(lines)


def load_weights(module: nn.Module, source: str | Path, *, partial: bool = False) -> LoadReport:
    """Load weights into ``module`` and report.

    Args:
        source: File, folder, run folder, checkpoint or hub id.
        partial: Accept missing keys (they keep their initial values) and unexpected ones. Shapes must fit all the same.

    Raises:
        WeightsError: The source can't be read, or does not fit, or has nothing that fits; the module is then unchanged.
    """
    path = locate_weights(source)
    published = unwrap(read_weights(path))
    adapt = getattr(module, "adapt_state_dict", None)
    state = adapt(published) if adapt else published
    own = module.state_dict()
    report = LoadReport(
        source=str(source),
        loaded=sum(
            key in own
            and own[key].shape == tensor.shape
            and own[key].data_ptr() != tensor.data_ptr()  # not its own tables
            for key, tensor in state.items()
        ),
        adapted=[
            key for key in state if key in own and (key not in published or published[key].shape != state[key].shape)
        ],
        missing=[key for key in own if key not in state],
        unexpected=[key for key in state if key not in own],
        misshapen=[
            f"{key}: file has {list(tensor.shape)}, model has {list(own[key].shape)}"
            for key, tensor in state.items()
            if key in own and own[key].shape != tensor.shape
        ],
    )
    if report.misshapen or not report.loaded or not (partial or report.is_complete):
        hint = "" if report.misshapen or not report.loaded else " If that is meant, set model.partial=True."
        raise WeightsError(
            f"These weights don't fit {type(module).__name__}:\n{report}\nIs it another model's file?{hint}"
        )
    module.load_state_dict(state, strict=False)
    log.info("Weights: %s", report)
    return report


def locate_weights(source: str | Path) -> Path:
    """The local file or folder of a source; a hub id is downloaded (to Hugging Face's cache).

    Raises:
        WeightsError: Nothing is there, or the hub can't be reached.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    text = str(source)
    if text.count("/") != 1 or text.startswith((".", "/", "~")) or Path(text).suffix in (*_SAFETENSORS, *_PICKLES):
        raise WeightsError(
            f"There is no file or folder {text}. Give a path, a run folder, or a hub id such as org/name."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, allow_patterns=["*.safetensors", "*.bin", "*.json", "*.pt", "*.pth"]))
    except Exception as error:  # the hub raises its own, requests' and OS errors
        raise WeightsError(
            f'"{text}" is no local path, and the hub has not given it ({type(error).__name__}). '
            "Check the id and the network; set HF_TOKEN for a gated model, or download it by other means and give the folder."
        ) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, of a folder with one weights file or with shards, or of the newest checkpoint of a run.

    Raises:
        WeightsError: Damaged, missing or incomplete files, an unknown kind, or a pickle that needs code.
    """
    if path.is_dir():
        return _read_folder(path)
    if path.suffix in _SAFETENSORS:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path} can't be read ({error}). Is the file cut short? Download it again.") from error
    if path.suffix in _PICKLES:
        return _read_pickle(path)
    raise WeightsError(f"{path} is no weights file: it should end in {', '.join((*_SAFETENSORS, *_PICKLES))}.")


def _read_folder(folder: Path) -> dict[str, Tensor]:
    for name in _INDEXES:
        if (index := folder / name).exists():
            return _read_shards(index)
    for name in _SINGLES:
        if (single := folder / name).exists():
            return read_weights(single)
    if (folder / "model").is_dir():  # Open-Sora's training checkpoints
        return _read_folder(folder / "model")
    weights = [path for path in folder.iterdir() if path.suffix in (*_SAFETENSORS, *_PICKLES)]
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
