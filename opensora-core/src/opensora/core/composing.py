"""Building the parts that training and sampling share, in the order in which each learns what it needs from the others."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import attrs
import torch
from attrs import frozen
from torch import nn

from opensora.core.accelerator import Accelerator, choose_device, choose_dtype
from opensora.core.adapters import load_adapter
from opensora.core.blocks import checkpoint_activations
from opensora.core.components import available, build, construct, find, load, structure_spec
from opensora.core.config.structure import ComponentConfig, structure, unstructure
from opensora.core.errors import ConfigError, MachineError
from opensora.core.hooking import Hooks
from opensora.core.pipelines.composition_spec import CompositionSpec, RunSpec
from opensora.core.protocols import Denoiser, Scheduler, Size, TextEncoder, VideoAutoencoder
from opensora.core.weights import load_weights

__all__ = [
    "Parts",
    "TextPlacement",
    "build_accelerator",
    "build_parts",
    "checkpoint_activations",
    "check_components",
    "choose_text_placement",
    "is_installed",
    "on_meta",
    "place",
    "resolved_values",
    "wrap",
]

log = logging.getLogger(__name__)


@frozen(kw_only=True)
class Parts:
    """The networks and the scheduler of a run, on the CPU."""

    denoiser: nn.Module
    vae: VideoAutoencoder
    text_encoder: TextEncoder
    scheduler: Scheduler
    latent_size: Size | None


def check_components(spec: RunSpec, locations: Mapping[Any, str]) -> None:
    """Import every component that a pipeline's spec names, and check its options, before anything heavy happens.

    Raises:
        ComponentError, ConfigError: See `structure_spec`.
    """
    for key, kind in spec.kinds.items():
        config = getattr(spec, key, None)
        if config is None or (key == "accelerator" and not is_installed(config)):
            continue  # a dry run of a cluster's config needs no cluster's software; a run builds the accelerator first
        own, _ = split_options(kind, config, locations)
        structure_spec(kind, own, locations=locations, path=(key,))
    find("attention", spec.attention)
    for index, config in enumerate(spec.hooks):
        structure_spec("hooks", config, locations=locations, path=("hooks", str(index)))


def is_installed(accelerator: ComponentConfig) -> bool:
    """Whether an accelerator of that name is there."""
    return any(one.name == accelerator.type.rpartition(":")[2] for one in available("accelerators"))


def resolved_values(spec: RunSpec) -> dict[str, Any]:
    """The config that repeats a run whatever becomes of defaults: every option of every component is in it.

    What names this very run (its folder, what it was resumed from) is left out.
    """
    values: dict[str, Any] = unstructure(spec)
    for key, kind in spec.kinds.items():
        config = getattr(spec, key, None)
        if config is not None:
            own, of_core = split_options(kind, config)
            values[key] = {"type": config.type, **of_core, **unstructure(structure_spec(kind, own))}
    values["hooks"] = [{"type": each.type, **unstructure(structure_spec("hooks", each))} for each in spec.hooks]
    this_run = ("run_folder", "resume", "load", "start_from_scratch", "allow_changes", "save_dir", "skip_existing")
    return {key: value for key, value in values.items() if key not in this_run}


def build_accelerator(spec: RunSpec) -> Accelerator:
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
    spec: CompositionSpec,
    *,
    size_of: Callable[[], Size | None],
    meta: bool = False,
    load_pretrained: bool = True,
    vae: VideoAutoencoder | None = None,
    text_encoder: TextEncoder | None = None,
) -> Parts:
    """Build text encoder, VAE, scheduler and denoiser.

    Args:
        spec: Names the components.
        size_of: Returns the (T, H, W) of the videos in pixels, or None if they differ. Called once the VAE exists.
        meta: Build on the meta device: shapes without memory; nothing is loaded.
        load_pretrained: Whether the denoiser takes the weights of ``model.from_pretrained``.
        vae: To be used instead of the configured one.
        text_encoder: The same.
    """
    state = torch.get_rng_state()  # each part starts from it: its weights don't depend on which others are built
    with on_meta(meta):
        if text_encoder is None:
            text_encoder = build("text_encoders", split_options("text_encoders", spec.text_encoder)[0], meta=meta)
        torch.set_rng_state(state)
        vae = build("vaes", spec.vae, meta=meta) if vae is None else vae
    torch.set_rng_state(state)
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
        load_weights(denoiser, weights["from_pretrained"], partial=weights["partial"], grow=weights["grow"])
    if weights["adapter"] and load_pretrained and not meta:
        load_adapter(denoiser, Path(weights["adapter"]))
    for part in (vae, text_encoder):
        if isinstance(part, nn.Module):
            part.requires_grad_(False).eval()
    if (prompt := getattr(denoiser, "null_prompt", None)) is not None and not meta:
        denoiser.take_null_text(text_encoder.encode([prompt]))
    return Parts(denoiser=denoiser, vae=vae, text_encoder=text_encoder, scheduler=scheduler, latent_size=latent_size)


@frozen(kw_only=True)
class TextPlacement:
    """Where a text encoder computes: options of ``text_encoder`` that core takes from it, whichever it is."""

    device: str | None = None
    """As torch names it: "cpu" leaves the GPU's memory to the denoiser. None: that of the run."""
    dtype: Literal["fp32", "fp16", "bf16"] | None = None
    """None: that of the run; on another kind of device, what suits it."""
    shard: bool = False
    """In training with several processes: spread its weights over them all. Each puts a block together while it computes."""


def choose_text_placement(config: ComponentConfig, accelerator: Accelerator) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the text encoder; to be asked before anything is built.

    Raises:
        ConfigError: An option has the wrong type.
        MachineError: The device is missing, or can't compute in that dtype.
    """
    _, options = split_options("text_encoders", config)
    device = choose_device(options["device"]) if options["device"] else accelerator.device
    if options["dtype"] is None and device.type == accelerator.device.type:
        return device, accelerator.dtype
    return device, choose_dtype(options["dtype"] or "auto", device, key="text_encoder.dtype")


def split_options(
    kind: str, config: ComponentConfig, locations: Mapping[Any, str] | None = None
) -> tuple[ComponentConfig, dict[str, Any]]:
    """The component's own options, and those that core acts on.

    Raises:
        ConfigError: One of the latter has the wrong type.
    """
    if kind == "models":
        return split_model_options(config)
    if kind != "text_encoders":
        return config, {}
    own, of_core = dict(config.options), {}
    for name in attrs.fields_dict(TextPlacement):
        if name in own:
            of_core[name] = own.pop(name)
    placement = structure(TextPlacement, of_core, locations=locations, path=("text_encoder",))
    return ComponentConfig(type=config.type, options=own), attrs.asdict(placement)


def split_model_options(config: ComponentConfig) -> tuple[ComponentConfig, dict[str, Any]]:
    """The model's own options, and those that core acts on: ``from_pretrained``, ``adapter``, ``partial`` and ``grow``.

    Raises:
        ConfigError: One of the latter has the wrong type.
    """
    options = dict(config.options)
    weights = {name: options.pop(name, None) for name in ("from_pretrained", "adapter")}
    weights |= {name: options.pop(name, False) for name in ("partial", "grow")}
    if not isinstance(weights["from_pretrained"], str | None):
        raise ConfigError(
            f"model.from_pretrained is {weights['from_pretrained']!r}; it must be a path or hub id, or None."
        )
    if not isinstance(weights["adapter"], str | None):
        raise ConfigError(f"model.adapter is {weights['adapter']!r}; it must be a run folder or checkpoint, or None.")
    if weights["adapter"] and not weights["from_pretrained"]:
        raise ConfigError(
            "model.adapter needs model.from_pretrained, the weights that it was trained on. "
            "Or give its run folder to from_pretrained: it knows them."
        )
    for name in ("partial", "grow"):
        if not isinstance(weights[name], bool):
            raise ConfigError(f"model.{name} is {weights[name]!r}; it must be True or False.")
    if "from_pretrained" in config.options and "from_pretrained" in attrs.fields_dict(load("models", config.type).Spec):
        options["from_pretrained"] = weights["from_pretrained"]  # it says what to build, too
    return ComponentConfig(type=config.type, options=options), weights


def place(
    part: object, accelerator: Accelerator, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> None:
    """Move a part that isn't trained, if it is a module, to a device in a dtype; None is the accelerator's."""
    if isinstance(part, nn.Module):
        accelerator.place(part, device=device, dtype=dtype)


def on_meta(meta: bool) -> AbstractContextManager[object]:
    """Surrounds construction: on torch's meta device, tensors have shapes and no memory."""
    return torch.device("meta") if meta else nullcontext()


def wrap(denoiser: Denoiser, hooks: Hooks, spec: Any) -> Denoiser:
    """The denoiser inside the wrappers that hooks ask for; the first hook's is innermost."""
    for wrapper in hooks.denoiser_wrapper(spec=spec):
        denoiser = wrapper(denoiser)
    return denoiser
