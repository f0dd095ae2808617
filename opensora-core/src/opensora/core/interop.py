"""What a model class can say about weights that other projects wrote, or will read.

A class that has a class attribute ``interop`` takes published names as sources, explains files that don't fit, and can be
converted with ``opensora convert``. Each entry may be left out; a class without any loads its own state dict alone.

Four layouts occur: this project's (a folder of ``config.json`` and ``model.safetensors``), the original project's (a file of
``torch.save``), diffusers' (a folder of ``config.json`` and ``diffusion_pytorch_model.safetensors``), and those that
``adapt_state_dict`` of a class understands besides, told apart by their keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attrs import field, frozen
from torch import Tensor, nn

from opensora.core.protocols import Size

__all__ = ["Exported", "Interop", "ModelFacts"]


@frozen(kw_only=True)
class ModelFacts:
    """What a weights file, and the config beside it, say about the model they belong to."""

    options: Mapping[str, Any] = field(factory=dict)
    """Fields of the class's ``Spec``, as far as they can be told."""
    latent_channels: int
    latent_size: Size | None = None
    text_width: int | None = None
    text_length: int | None = None


@frozen(kw_only=True)
class Exported:
    """A model in another project's layout."""

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] = field(factory=dict)
    extra: Mapping[str, Tensor] = field(factory=dict)
    """Tensors that the layout has no place for; kept in a file of their own, so that nothing is lost on the way back."""
    wrapper: str | None = None
    """The entry that holds the tensors, in files of ``torch.save``."""
    notes: tuple[str, ...] = ()
    """What whoever uses the result must know; logged, and written on the model card."""


@frozen(kw_only=True)
class Interop:
    """See the module's docstring."""

    published: Mapping[str, str] = field(factory=dict)
    """File names that the field knows, and where each is: ``org/name/file`` on the hub, an ``https://`` address, or "" for
    what was never published."""
    new_parts: str = ""
    """A regular expression of keys that image models lack. Where a file has none of them, they keep their initial values,
    with which the first frame comes out as the image model makes it."""
    diagnose: Callable[[nn.Module, Mapping[str, Tensor]], str] | None = None
    """A sentence on why a file does not fit a model, or ""."""
    compare: Callable[[nn.Module, Mapping[str, Any]], list[str]] | None = None
    """How the config beside the weights (empty if there is none) differs from a model, one line each. Raises `WeightsError`
    for what the model can't do."""
    facts: Callable[[Mapping[str, Tensor], Mapping[str, Any]], ModelFacts] | None = None
    """Of tensors as they were published, and the config beside them (empty if there is none)."""
    to_original: Callable[[nn.Module], Exported] | None = None
    to_diffusers: Callable[[nn.Module], Exported] | None = None
