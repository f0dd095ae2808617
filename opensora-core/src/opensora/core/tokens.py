"""How many tokens a denoiser sees of a clip: what a batch costs, told by the config alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

from opensora.core.components import build, structure_spec
from opensora.core.composing import on_meta, split_model_options
from opensora.core.pipelines.composition_spec import CompositionSpec
from opensora.core.protocols import Size, VideoAutoencoder

__all__ = ["count_tokens"]


def count_tokens(spec: CompositionSpec) -> Callable[[Size], int]:
    """What counts the latent tokens of a clip of (T, H, W) pixels.

    They are the latents of the configured autoencoder, in patches of the model's ``patch_size`` where its options have one
    (a number for all axes, or one for each of T, H, W), rounded up. Sizes that the autoencoder can't do raise its ShapeError.
    """
    with on_meta(True):
        vae: VideoAutoencoder = build("vaes", spec.vae, meta=True)
    patch = getattr(structure_spec("models", split_model_options(spec.model)[0]), "patch_size", 1)
    patches = (patch,) * 3 if isinstance(patch, int) else tuple(patch)

    @cache
    def tokens(size: Size) -> int:
        return math.prod(-(-each // own) for each, own in zip(vae.latent_size(size), patches, strict=True))

    return tokens
