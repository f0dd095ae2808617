"""In place of encoders, where a dataset has latents and embeddings instead of pixels and captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from opensora.core.conditioning import Conditioning
from opensora.core.errors import ConfigError, DataError
from opensora.core.loading import Batch, stand_in
from opensora.core.pipelines.train_spec import TrainSpec
from opensora.core.protocols import ClipFeatures, Size, TextEncoder, VideoAutoencoder
from opensora.core.randomness import Draws

__all__ = ["ReadyLatents", "ReadyText", "ready_encoders", "ready_stand_in"]


class ReadyLatents:
    """In place of an autoencoder, for a dataset that has latents."""

    def __init__(self, dataset: Any) -> None:
        """``dataset`` has ``latent_channels`` and, if its files are there, ``latent_size(size)``."""
        self.latent_channels: int = dataset.latent_channels
        self._size_of = getattr(dataset, "latent_size", None)

    def latent_size(self, size: Size) -> Size:
        """(T', H', W') of clips of (T, H, W), as the dataset has them."""
        if self._size_of is None:
            raise DataError("The sizes of the latents are not known before their files are there.")
        latent: Size = self._size_of(size)
        return latent

    def encode(self, video: Tensor, *, draws: Draws | None = None) -> Tensor:
        """There is nothing to encode with.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError("The dataset has latents, and the config names no vae to make or show others with. Set vae.")

    def decode(self, latents: Tensor, *, num_frames: int) -> Tensor:
        """See `encode`."""
        return self.encode(latents)


class ReadyText:
    """In place of a text encoder, for a dataset that has embeddings."""

    def __init__(self, dataset: Any) -> None:
        """``dataset`` has ``text_width`` and ``text_length``."""
        self.width: int | None = dataset.text_width
        self.max_length: int = dataset.text_length

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """There is nothing to encode with.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            "The dataset has embeddings, and the config names no text_encoder to read prompts with. Set it."
        )


def ready_encoders(spec: TrainSpec, dataset: Any) -> dict[str, Any]:
    """What stands in for the encoders, by the names of `build_parts`, where the dataset has features instead of pixels.

    An encoder that the config names itself, for previews, is built all the same.

    Args:
        spec: Of the run.
        dataset: Or its options.

    Raises:
        ConfigError: The config asks for what can't be had without them.
    """
    if not hasattr(dataset, "latent_channels"):
        return {}
    if spec.features:
        raise ConfigError(f"{spec.dataset.type} has latents and embeddings already. Leave features out.")
    named = {"vae": spec.vae.type != "identity", "text_encoder": spec.text_encoder.type != "hashed-words"}
    ready = {"vae": ReadyLatents(dataset), "text_encoder": ReadyText(dataset)}
    if spec.preview_every and not all(named.values()):
        raise ConfigError(
            "Previews need an autoencoder and a text encoder: set vae and text_encoder, or preview_every = 0."
        )
    return {name: part for name, part in ready.items() if not named[name]}


def ready_stand_in(size: Size, vae: VideoAutoencoder, text_encoder: TextEncoder) -> Batch:
    """As `stand_in`, with latents and embeddings of zeros, so that no encoder is needed for it."""
    width, length = text_encoder.width, text_encoder.max_length
    if width is None:
        text = Conditioning(labels=torch.zeros(1, dtype=torch.int64))
    else:
        mask = torch.arange(length)[None] < 1
        text = Conditioning(text_embedding=torch.zeros(1, length, width), text_mask=mask)
    latents = torch.zeros(1, vae.latent_channels, *vae.latent_size(size))
    batch = stand_in(size)
    return attrs.evolve(
        batch, video=torch.empty(0), features=[ClipFeatures(size=size)], moments={"latents": latents}, text=text
    )
