"""What a denoiser is told besides the latents and the timestep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import attrs
import torch
from attrs import field, frozen
from torch import Tensor

from opensora.core.errors import ShapeError

if TYPE_CHECKING:
    from typing import Self

__all__ = ["Conditioning"]


@frozen(kw_only=True, eq=False)
class Conditioning:
    """Everything a batch of B videos may be conditioned on. A denoiser takes what it knows and ignores the rest.

    All tensors have B as their first axis; ``None`` means "not given". Guidance, batching and moving work on the whole
    object, so that samplers never look inside.

    Raises:
        ShapeError: A tensor has no axis, or they don't agree on B.
    """

    text_embedding: Tensor | None = None
    """[B, L, D], what the text encoder made of the prompt, padded positions included."""
    text_mask: Tensor | None = None
    """[B, L] bool, True where ``text_embedding`` holds a token. None: all of them are."""
    labels: Tensor | None = None
    """[B] int64, class labels."""
    dropped: Tensor | None = None
    """[B] bool, True where the denoiser replaces text or label by its learned null. The text mask stays as it is."""
    negative_embedding: Tensor | None = None
    """[B, L, D], of what guidance is to lead away from, in place of the learned null. None: the null."""
    negative_mask: Tensor | None = None
    """[B, L] bool, the mask of ``negative_embedding``."""
    frame_mask: Tensor | None = None
    """[B, T] bool over latent frames: True is being denoised, False is a given clean frame. None: all are denoised."""
    fps: Tensor | None = None
    """[B] float32, frames a second; images count as 120."""
    height: Tensor | None = None
    """[B] float32, pixels before the autoencoder."""
    width: Tensor | None = None
    """[B] float32, pixels before the autoencoder."""
    num_frames: Tensor | None = None
    """[B] float32, frames before the autoencoder."""
    latent_frames: Tensor | None = None
    """[B] float32, frames behind the autoencoder."""
    aspect_ratio: Tensor | None = None
    """[B] float32, height / width."""
    extra: Mapping[str, Tensor] = field(factory=dict)
    """Further conditions of third-party denoisers, by name, each [B, ...]."""

    def __attrs_post_init__(self) -> None:
        if scalars := [name for name, tensor in self._tensors() if tensor.ndim == 0]:
            raise ShapeError(f"Conditions need a batch axis; {', '.join(scalars)} has none.")
        sizes = {name: len(tensor) for name, tensor in self._tensors()}
        if len(set(sizes.values())) > 1:
            raise ShapeError(f"Conditions must share their batch size; got {sizes}.")

    def __len__(self) -> int:
        """B, or 0 if nothing is given."""
        return next((len(tensor) for _, tensor in self._tensors()), 0)

    def __getitem__(self, index: slice | Sequence[int] | Tensor) -> Self:
        """The samples that ``index`` selects along the batch axis."""
        selector = list(index) if isinstance(index, Sequence) else index
        return self._map(lambda _, tensor: tensor[selector])

    @property
    def nbytes(self) -> int:
        """Memory of all tensors."""
        return sum(tensor.nbytes for _, tensor in self._tensors())

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move to a device. ``dtype`` applies to the text embedding alone: sizes stay float32, where 853 is still 853."""
        overlap = device is not None and torch.device(device).type != "cpu"  # copies to the CPU are used at once

        def move(name: str, tensor: Tensor) -> Tensor:
            return tensor.to(
                device, dtype if name in ("text_embedding", "negative_embedding") else None, non_blocking=overlap
            )

        return self._map(move)

    def replace(self, **changes: object) -> Self:
        """A copy with some fields changed."""
        return attrs.evolve(self, **changes)  # type: ignore[arg-type]  # the field names are checked by evolve

    def positive(self) -> Self:
        """The same batch without what guidance leads away from: the first half of classifier-free guidance."""
        return self.replace(negative_embedding=None, negative_mask=None)

    def unconditional(self) -> Self:
        """The second half of classifier-free guidance: its negative text, or text or label dropped."""
        if self.negative_embedding is not None:
            return self.positive().replace(text_embedding=self.negative_embedding, text_mask=self.negative_mask)
        device = next((tensor.device for _, tensor in self._tensors()), None)
        return self.replace(dropped=torch.ones(len(self), dtype=torch.bool, device=device))

    @classmethod
    def cat(cls, parts: Sequence[Conditioning]) -> Conditioning:
        """Join batches. A mask that only some parts have is filled in with its default for the others.

        Raises:
            ShapeError: A field other than ``dropped``, ``text_mask`` or ``frame_mask`` is given in some parts only, or
                with another number of tokens or frames.
        """
        joined: dict[str, Tensor] = {}
        for name in dict.fromkeys(name for part in parts for name, _ in part._tensors()):
            filled = [part._filled(name, parts) for part in parts]
            if len({tensor.shape[1:] for tensor in filled}) > 1:
                shapes = ", ".join(str(list(tensor.shape)) for tensor in filled)
                raise ShapeError(f"Can't join conditions: {name} has different shapes: {shapes}.")
            joined[name] = torch.cat(filled)
        extra = {name.removeprefix("extra."): joined.pop(name) for name in list(joined) if name.startswith("extra.")}
        return cls(**joined, extra=extra)

    def _filled(self, name: str, parts: Sequence[Conditioning]) -> Tensor:
        own = dict(self._tensors()).get(name)
        if own is not None:
            return own
        if name not in ("dropped", "text_mask", "frame_mask"):
            raise ShapeError(f"Can't join conditions: {name} is given for some samples only.")
        shape = next(tensor for part in parts for key, tensor in part._tensors() if key == name)
        full = torch.zeros if name == "dropped" else torch.ones
        return full(len(self), *shape.shape[1:], dtype=torch.bool, device=shape.device)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for attribute in attrs.fields(type(self)):
            if attribute.name == "extra":
                yield from ((f"extra.{name}", tensor) for name, tensor in self.extra.items())
            elif (tensor := getattr(self, attribute.name)) is not None:
                yield attribute.name, tensor

    def _map(self, function) -> Self:  # type: ignore[no-untyped-def]  # (name, tensor) -> tensor
        changed = {name: function(name, tensor) for name, tensor in self._tensors()}
        extra = {name.removeprefix("extra."): changed.pop(name) for name in list(changed) if name.startswith("extra.")}
        return self.replace(**changed, extra=extra)
