"""Image autoencoders in the layouts of diffusers and of Open-Sora, which calls diffusers' network ``module``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from opensora.core.interop import Exported, Interop, ModelFacts

_PREFIX = "module."


def own_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """``module.`` before each key, be it there already or not, and present names."""
    return {_PREFIX + present_name(key.removeprefix(_PREFIX)): value for key, value in state.items()}


def present_name(key: str) -> str:
    """Linear layers of attention were called otherwise before diffusers 0.15."""
    block, is_attention, rest = key.partition(".attentions.0.")
    layer, dot, kind = rest.rpartition(".")
    present = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    return f"{block}{is_attention}{present.get(layer, layer)}{dot}{kind}" if is_attention else key


def _facts(published: Mapping[str, Tensor], config: Mapping[str, Any]) -> ModelFacts:
    """Without a config, the network is taken to be Stable Diffusion's."""
    channels = config.get("latent_channels", 4)
    return ModelFacts(options={"from_pretrained": "stabilityai/sd-vae-ft-ema"}, latent_channels=channels)


def _to_diffusers(vae: Any) -> Exported:
    config = {key: value for key, value in vae.module.config.items() if not key.startswith("_")}
    named = {"_class_name": type(vae.module).__name__, "_diffusers_version": vae.module.config["_diffusers_version"]}
    return Exported(tensors=vae.module.state_dict(), config=named | config)


def _to_original(vae: Any) -> Exported:
    return Exported(tensors=vae.state_dict())


IMAGE_VAE = Interop(facts=_facts, to_original=_to_original, to_diffusers=_to_diffusers)
