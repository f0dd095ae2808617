"""What the configs of runs share. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from attrs import field, frozen
from attrs.validators import gt

from opensora.core.config.structure import ComponentConfig

__all__ = ["CompositionSpec", "RunSpec"]


def _hashed_words() -> ComponentConfig:
    return ComponentConfig(type="hashed-words")


def _identity() -> ComponentConfig:
    return ComponentConfig(type="identity")


@frozen(kw_only=True, slots=False)  # without slots, so that specs can be put together of several
class RunSpec:
    """What a run is about, where it runs, and where results go."""

    kinds: ClassVar[Mapping[str, str]]
    """Keys that hold a component, and its kind."""

    model: ComponentConfig
    """The network that is trained or used: a denoiser, which besides its own options has from_pretrained (file, run folder
    or hub id) and partial (accept missing keys), or in the pipelines for autoencoders an autoencoder."""
    accelerator: ComponentConfig | None = None
    """None: one process, or ddp under torchrun."""
    attention: str = "sdpa"
    """The attention kernel, by name."""
    hooks: list[ComponentConfig] = field(factory=list)
    """Further hooks; one of a default's name replaces it."""
    without_hooks: list[str] = field(factory=list)
    """Names of hooks to leave out."""

    device: str | None = None
    """None: the first GPU, or else the CPU."""
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Of matrix products; weights that are trained stay fp32. auto: bf16 on GPUs that have it, else fp32."""
    seed: int = 1024
    """Of all that is random."""
    batch_size: int = field(default=1, validator=gt(0))
    """Samples at once, in each process."""

    name: str | None = None
    """Of the run folder, after its number; None: the model's type."""
    outputs: str = "outputs"
    """Parent of run folders."""


@frozen(kw_only=True, slots=False)
class CompositionSpec(RunSpec):
    """Which components are composed around a denoiser."""

    kinds: ClassVar[Mapping[str, str]] = {
        "model": "models",
        "vae": "vaes",
        "text_encoder": "text_encoders",
        "scheduler": "schedulers",
        "dataset": "datasets",
        "accelerator": "accelerators",
    }

    scheduler: ComponentConfig
    """The training objective and sampler."""
    vae: ComponentConfig = field(factory=_identity)
    """The video autoencoder; the default works on pixels."""
    text_encoder: ComponentConfig = field(factory=_hashed_words)
    """The default needs no download and is meant for demos and tests. Besides its own options: device and dtype (None: those
    of the run), and shard (in training, spread its weights over all processes)."""
