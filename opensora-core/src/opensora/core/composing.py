"""Building the parts that training and sampling share, in the order in which each learns what it needs from the others."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from attrs import frozen
from torch import nn

from opensora.core.accelerator import Accelerator
from opensora.core.components import build, construct, find, load, structure_spec
from opensora.core.config.structure import ComponentConfig, unstructure
from opensora.core.errors import ConfigError, MachineError
from opensora.core.hooking import Hooks
from opensora.core.pipelines.composition_spec import CompositionSpec
from opensora.core.protocols import Denoiser, Scheduler, Size, TextEncoder, VideoAutoencoder
from opensora.core.weights import load_weights

__all__ = [
    "Parts",
    "build_accelerator",
    "build_parts",
    "checkpoint_activations",
    "check_components",
    "on_meta",
    "resolved_values",
    "wrap",
]

log = logging.getLogger(__name__)

KIND_OF_KEY = {
    "model": "models",
    "vae": "vaes",
    "text_encoder": "text_encoders",
    "scheduler": "schedulers",
    "dataset": "datasets",
    "accelerator": "accelerators",
}
"""Config keys that hold a component, and its kind."""


@frozen(kw_only=True)
class Parts:
    """The networks and the scheduler of a run, on the CPU."""

    denoiser: nn.Module
    vae: VideoAutoencoder
    text_encoder: TextEncoder
    scheduler: Scheduler
    latent_size: Size | None

    @property
    def frozen_modules(self) -> list[nn.Module]:
        """The VAE and the text encoder, as far as they are modules."""
        return [part for part in (self.vae, self.text_encoder) if isinstance(part, nn.Module)]


def check_components(spec: CompositionSpec, locations: Mapping[Any, str]) -> None:
    """Import every component that a pipeline's spec names, and check its options, before anything heavy happens.

    Raises:
        ComponentError, ConfigError: See `structure_spec`.
    """
    for key, kind in KIND_OF_KEY.items():
        config = getattr(spec, key, None)
        if config is not None:
            own, _ = split_model_options(config) if key == "model" else (config, {})
            structure_spec(kind, own, locations=locations, path=(key,))
    find("attention", spec.attention)
    for index, config in enumerate(spec.hooks):
        structure_spec("hooks", config, locations=locations, path=("hooks", str(index)))


def resolved_values(spec: CompositionSpec) -> dict[str, Any]:
    """The config that repeats a run whatever becomes of defaults: every option of every component is in it.

    What names this very run (its folder, what it was resumed from) is left out.
    """
    values: dict[str, Any] = unstructure(spec)
    for key, kind in KIND_OF_KEY.items():
        config = getattr(spec, key, None)
        if config is not None:
            own, weights = split_model_options(config) if key == "model" else (config, {})
            values[key] = {"type": config.type, **weights, **unstructure(structure_spec(kind, own))}
    values["hooks"] = [{"type": each.type, **unstructure(structure_spec("hooks", each))} for each in spec.hooks]
    this_run = ("run_folder", "resume", "load", "start_from_scratch", "save_dir", "skip_existing")
    return {key: value for key, value in values.items() if key not in this_run}


def build_accelerator(spec: CompositionSpec) -> Accelerator:
    """The configured accelerator; by default ``ddp`` under torchrun, else ``single``."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    config = spec.accelerator or ComponentConfig(type="ddp" if world_size > 1 else "single", options={})
    accelerator: Accelerator = build("accelerators", config, device=spec.device, dtype=spec.dtype)
    if accelerator.world_size != world_size:
        raise MachineError(
            f'{world_size} processes were started, but accelerator "{config.type}" uses {accelerator.world_size}. '
            'Use accelerator = dict(type="ddp"), or leave it out.'
        )
    return accelerator


def build_parts(
    spec: CompositionSpec, *, size_of: Callable[[], Size | None], meta: bool = False, load_pretrained: bool = True
) -> Parts:
    """Build text encoder, VAE, scheduler and denoiser.

    Args:
        spec: Names the components.
        size_of: Returns the (T, H, W) of the videos in pixels, or None if they differ. Called once the VAE exists.
        meta: Build on the meta device: shapes without memory; nothing is loaded.
        load_pretrained: Whether the denoiser takes the weights of ``model.from_pretrained``.
    """
    with on_meta(meta):
        text_encoder = build("text_encoders", spec.text_encoder, meta=meta)
        vae = build("vaes", spec.vae, meta=meta)
    scheduler = build("schedulers", spec.scheduler)
    size = size_of()
    latent_size = vae.latent_size(size) if size else None
    model_config, weights = split_model_options(spec.model)
    denoiser_class = load("models", model_config.type)
    with on_meta(meta):
        denoiser = construct(
            denoiser_class,
            structure_spec("models", model_config),
            latent_channels=vae.latent_channels,
            latent_size=latent_size,
            text_width=text_encoder.width,
            text_length=text_encoder.max_length,
        )
    if weights["from_pretrained"] and load_pretrained and not meta:
        load_weights(denoiser, weights["from_pretrained"], partial=bool(weights["partial"]))
    for part in (vae, text_encoder):
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    return Parts(denoiser=denoiser, vae=vae, text_encoder=text_encoder, scheduler=scheduler, latent_size=latent_size)


def split_model_options(config: ComponentConfig) -> tuple[ComponentConfig, dict[str, Any]]:
    """The model's own options, and those that core acts on: ``from_pretrained`` and ``partial``.

    Raises:
        ConfigError: One of the latter has the wrong type.
    """
    options = dict(config.options)
    weights = {"from_pretrained": options.pop("from_pretrained", None), "partial": options.pop("partial", False)}
    if not isinstance(weights["from_pretrained"], str | None):
        raise ConfigError(
            f"model.from_pretrained is {weights['from_pretrained']!r}; it must be a path or hub id, or None."
        )
    if not isinstance(weights["partial"], bool):
        raise ConfigError(f"model.partial is {weights['partial']!r}; it must be True or False.")
    return ComponentConfig(type=config.type, options=options), weights


def on_meta(meta: bool) -> AbstractContextManager[object]:
    """Surrounds construction: on torch's meta device, tensors have shapes and no memory."""
    return torch.device("meta") if meta else nullcontext()


def wrap(denoiser: Denoiser, hooks: Hooks, spec: Any) -> Denoiser:
    """The denoiser inside the wrappers that hooks ask for; the first hook's is innermost."""
    for wrapper in hooks.denoiser_wrapper(spec=spec):
        denoiser = wrapper(denoiser)
    return denoiser


def checkpoint_activations(denoiser: nn.Module) -> int:
    """Keep only the inputs of each block for backward, and compute the rest again: less memory, about a third more time.

    A block is a member of any ``nn.ModuleList``. Parameters and their names stay as they are.

    Returns:
        How many blocks.
    """
    lists = [module for module in denoiser.modules() if isinstance(module, nn.ModuleList)]
    blocks = [block for each in lists for block in each]
    for block in blocks:
        block.forward = partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)
    return len(blocks)
