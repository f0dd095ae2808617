"""Clips whose latents and embeddings were computed elsewhere: files of tensors in place of videos and captions.

A ``.safetensors`` file holds N samples of one size: ``latents`` [N, C, T', H', W'], ``text_embedding`` [N, L, D] with
``text_mask`` [N, L] (bool; without it all are tokens), or ``labels`` [N]; and of the videos behind them ``num_frames``,
``height``, ``width`` and ``fps``, [N] each. A ``.bin`` of Open-Sora 1.2 holds a list of such batches under other names.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import field, frozen
from attrs.validators import gt, min_len, optional
from safetensors import SafetensorError, safe_open
from torch import Tensor

from opensora.core.conditioning import Conditioning
from opensora.core.errors import DataError
from opensora.core.protocols import Clip, ClipFeatures, Size
from opensora.core.randomness import SampleKey
from opensora.data.buckets import Bucket, EpochBatches

__all__ = ["FeatureDataset", "FeatureDatasetSpec"]

_T5_XXL: int | None = 4096
_SIZES = ("num_frames", "height", "width")
_OPEN_SORA = {"x": "latents", "y": "text_embedding", "mask": "text_mask"}
_CONVERT = (
    'If you trust it, convert it once: python -c "import sys, torch; old = torch.load(sys.argv[1], weights_only=False); '
    "torch.save([{k: v if isinstance(v, (torch.Tensor, list)) else torch.as_tensor(v) for k, v in batch.items()} "
    'for batch in old], sys.argv[2])" OLD.bin NEW.bin'
)


@frozen(kw_only=True)
class FeatureDatasetSpec:
    """Latents and embeddings in files."""

    data_path: str | None = field(default=None, validator=optional(min_len(1)))
    """Folder of .safetensors files, those in folders within it too, or of the .bin files that Open-Sora 1.2 writes. None: to
    be given when it is run."""
    latent_channels: int = field(default=4, validator=gt(0))
    """Of the latents."""
    text_width: int | None = field(default=_T5_XXL, validator=optional(gt(0)))
    """Of what the text encoder gave, also where the files hold what a denoiser's embedder made of it. None: class labels."""
    text_length: int = field(default=300, validator=gt(0))
    """Tokens of an embedding."""


class FeatureDataset:
    """Rows of files, in the order of the files' names. Clips of several sizes come in batches that each have one."""

    Spec = FeatureDatasetSpec

    def __init__(self, spec: FeatureDatasetSpec, *, batch_size: int = 1) -> None:
        """Look at the shapes in all files, but read none.

        Args:
            spec: Options.
            batch_size: Of batches, where clips differ in size.

        Raises:
            DataError: There is no file, or one can't be read, lacks a tensor or does not fit the options.
        """
        self.spec = spec
        self.latent_channels, self.text_width, self.text_length = (
            spec.latent_channels,
            spec.text_width,
            spec.text_length,
        )
        if spec.data_path is None:
            raise DataError("dataset.data_path is not set. Give --data-path FOLDER, with .safetensors files.")
        folder = Path(spec.data_path)
        self._files = sorted(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".bin"))
        if not self._files:
            raise DataError(f"{folder} has no .safetensors or .bin files.")
        self._latent_sizes: dict[Size, Size] = {}
        rows: list[tuple[int, int, int]] = []  # file, batch of that file, index of the size
        lengths: list[int] = []
        for number, path in enumerate(self._files):
            for element, batch in enumerate(_open(path)):
                self._check(batch, path)
                size: Size = tuple(int(_first(batch.row(name, 0))) for name in _SIZES)  # type: ignore[assignment]
                self._latent_sizes[size] = tuple(batch.shape("latents")[2:])  # type: ignore[assignment]  # three
                rows.append((number, element, list(self._latent_sizes).index(size)))
                lengths.append(batch.shape("latents")[0])
        self._rows = np.repeat(np.array(rows), lengths, axis=0)
        self._within = np.concatenate([np.arange(length) for length in lengths])
        if len(self._latent_sizes) > 1:  # whoever asks for `batches` learns from its being there that sizes differ
            self.batches = self._batches
        self._batch_size = batch_size

    @property
    def size(self) -> Size:
        """(T, H, W) in pixels of every clip, or of the first where they differ."""
        return next(iter(self._latent_sizes))

    def latent_size(self, size: Size) -> Size:
        """(T', H', W') of the latents of clips of (T, H, W)."""
        return self._latent_sizes[tuple(size)]  # type: ignore[index]  # three of them

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, key: SampleKey) -> Clip:
        """Row ``key.index``; its video is empty, and `Clip.features` has latents and text.

        Raises:
            DataError: The file can't be read any more, or differs from what it was.
        """
        number, element, kind = (int(each) for each in self._rows[key.index])
        path, index = self._files[number], int(self._within[key.index])
        batch = _open(path)[element]
        return Clip(
            video=torch.empty(0),
            text=batch.caption(index),
            fps=float(_first(batch.row("fps", index))),
            key=key,
            path=f"{path}, row {index}",
            features=ClipFeatures(
                size=list(self._latent_sizes)[kind],
                moments={"latents": batch.row("latents", index)},
                text=self._text(batch, index),
            ),
        )

    def _batches(self, seed: int, epoch: int) -> EpochBatches:
        """The batches of an epoch; see `opensora.core.orders.OwnBatches`."""
        buckets = [
            Bucket(resolution="", aspect="", num_frames=frames, height=height, width=width, batch_size=self._batch_size)
            for frames, height, width in self._latent_sizes
        ]
        return EpochBatches(self._rows[:, 2].astype(np.int32), buckets, seed=seed, epoch=epoch)

    def _text(self, batch: _Batch, index: int) -> Conditioning:
        if self.text_width is None:
            return Conditioning(labels=batch.row("labels", index).reshape(1).long())
        embedding = batch.row("text_embedding", index)
        mask = batch.row("text_mask", index).bool() if batch.has("text_mask") else torch.ones(len(embedding)).bool()
        missing = self.text_length - len(embedding)
        if missing < 0:
            raise DataError(
                f"Embeddings have {len(embedding)} tokens, more than dataset.text_length = {self.text_length}."
            )
        padded = torch.nn.functional.pad(embedding, (0, 0, 0, missing))
        return Conditioning(text_embedding=padded[None], text_mask=torch.nn.functional.pad(mask, (0, missing))[None])

    def _check(self, batch: _Batch, path: Path) -> None:
        text = "labels" if self.text_width is None else "text_embedding"
        if absent := [name for name in ("latents", text, "fps", *_SIZES) if not batch.has(name)]:
            raise DataError(f"{path} lacks {', '.join(absent)}.")
        shape = batch.shape("latents")
        if len(shape) != 5 or shape[1] != self.latent_channels:
            raise DataError(
                f"{path}: latents are {shape}, not [N, {self.latent_channels}, T, H, W]. See dataset.latent_channels."
            )


class _Batch:
    """Samples of one size in a file; tensors are read row by row."""

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name."""
        raise NotImplementedError

    def shape(self, name: str) -> list[int]:
        """Of a tensor, over all samples."""
        raise NotImplementedError

    def row(self, name: str, index: int) -> Tensor:
        """What a tensor says of one sample."""
        raise NotImplementedError

    def caption(self, index: int) -> str:
        """Of one sample, if it is there."""
        return ""


@frozen(eq=False)
class _SafetensorsBatch(_Batch):
    file: Any

    def has(self, name: str) -> bool:
        return name in self.file.keys()  # noqa: SIM118  # no dict

    def shape(self, name: str) -> list[int]:
        return list(self.file.get_slice(name).get_shape())

    def row(self, name: str, index: int) -> Tensor:
        row: Tensor = self.file.get_slice(name)[index : index + 1][0]
        return row


@frozen(eq=False)
class _OpenSoraBatch(_Batch):
    """Of Open-Sora 1.2; embeddings are [N, 1, L, D] or, projected already, packed to [1, tokens of all, D]."""

    values: Mapping[str, Any]

    def has(self, name: str) -> bool:
        return name in self.values

    def shape(self, name: str) -> list[int]:
        return list(self.values[name].shape)

    def row(self, name: str, index: int) -> Tensor:
        value = self.values[name]
        lengths = self.values.get("text_mask")
        if isinstance(lengths, list) and name in ("text_embedding", "text_mask"):
            start = sum(lengths[:index])
            packed = self.values["text_embedding"][0, start : start + lengths[index]]
            return packed.clone() if name == "text_embedding" else torch.ones(len(packed))
        row = torch.as_tensor(value)
        row = row[index] if row.ndim else row
        return row.squeeze(0).clone() if name == "text_embedding" else row.clone()

    def caption(self, index: int) -> str:
        captions = self.values.get("text")
        return str(captions[index]) if isinstance(captions, list | tuple) else ""


@lru_cache(maxsize=8)
def _open(path: Path) -> Sequence[_Batch]:
    """The batches of a file; its tensors are mapped into memory, not read.

    Raises:
        DataError: It can't be read, or needs code to be run.
    """
    try:
        if path.suffix == ".safetensors":
            return [_SafetensorsBatch(safe_open(path, "pt"))]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # it reads those all the same
            batches = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise DataError(f"{path} holds more than tensors, and loading it could run code. {_CONVERT}") from error
    except (SafetensorError, OSError, RuntimeError, EOFError) as error:
        raise DataError(f"{path} can't be read: {str(error).partition(chr(10))[0]}") from error
    if not isinstance(batches, list) or not all(isinstance(each, dict) for each in batches):
        raise DataError(f"{path} is no list of batches, as Open-Sora's extraction writes them.")
    return [_OpenSoraBatch({_OPEN_SORA.get(key, key): value for key, value in each.items()}) for each in batches]


def _first(value: Tensor) -> float:
    return float(value.reshape(-1)[0])
