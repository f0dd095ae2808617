"""Models in the layout of diffusers: which class computes the same, with which config, and what there is none for.

A denoiser can be handed over where diffusers' class computes the same numbers. That it does is tested for each of them; what
it can't do (videos in a PixArt, captions in a DiT, normalised queries and keys, ...) is an error here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

from torch import Tensor, nn

from opensora.core.errors import WeightsError
from opensora.core.interop import Exported
from opensora.models import _diffusers_keys as keys
from opensora.models._key_maps import NULL_CAPTION, PATCH_WEIGHT

TABLES = ("pos_embed", "pos_embed_spatial", "pos_embed_temporal")
DIT, PIXART, LATTE_T2V = "DiTTransformer2DModel", "PixArtTransformer2DModel", "LatteTransformer3DModel"
_FIXED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "dropout": 0.0,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
}
"""What the models here always do. DiT's folders say 1e-5, which DiT itself never had."""
_NORM = {DIT: "ada_norm_zero", PIXART: "ada_norm_single", LATTE_T2V: "ada_norm_single"}
_DEFAULTS = {
    DIT: {"attention_bias": True, "activation_fn": "gelu-approximate", "norm_elementwise_affine": False},
    PIXART: {"attention_bias": True, "activation_fn": "gelu-approximate", "norm_elementwise_affine": False},
    LATTE_T2V: {"attention_bias": False, "activation_fn": "geglu", "norm_elementwise_affine": True},
}
"""Those of the classes, for configs that leave a key out."""
_OTHER_FREQUENCIES = (
    "diffusers spaces the frequencies of the timestep a little differently from DiT's own code, so its samples differ "
    "somewhat. A DiT with model.frequency_shift = 1 gives the same numbers in both."
)
_NULL_CAPTION_APART = (
    "diffusers' pipelines embed an empty prompt where this project takes the null caption that the model was trained "
    "with; that is kept in opensora_extra.safetensors."
)
_OTHER_MODELS = {"t5": "a T5 text encoder", "umt5": "a T5 text encoder", "clip": "CLIP", "clip_text_model": "CLIP"}
"""By the model_type of transformers."""


def export_dit(model: Any) -> Exported:
    """`DiT` of class labels as a DiTTransformer2DModel.

    Raises:
        WeightsError: diffusers has nothing that computes the same.
    """
    spec = model.spec
    _refuse(
        DIT,
        {
            'condition "text"; it takes class labels only': spec.num_classes is None,
            "no null class (class_dropout_prob 0)": spec.class_dropout_prob == 0,
            **_video_reasons(model),
        },
    )
    state = {key: value for key, value in model.state_dict().items() if key not in TABLES}
    config = _config(DIT, model) | {"num_embeds_ada_norm": spec.num_classes, "sample_size": model.latent_size[-1]}
    notes = (_OTHER_FREQUENCIES,) if spec.frequency_shift == 0 else ()
    options = {"_opensora": {"frequency_shift": spec.frequency_shift}}
    return Exported(tensors=keys.to_diffusers(_flat(state), keys.DIT), config=config | options, notes=notes)


def export_pixart(model: Any) -> Exported:
    """`PixArt`, `PixArtMS` or `PixArtSigma` as a PixArtTransformer2DModel.

    Raises:
        WeightsError: diffusers has nothing that computes the same.
    """
    spec = model.spec
    compression = getattr(spec, "kv_compress_config", None)
    _refuse(
        PIXART,
        {
            "normalised queries and keys (qk_norm)": getattr(spec, "qk_norm", False),
            "compressed keys and values": compression is not None and compression.sampling is not None,
            **_video_reasons(model),
        },
    )
    config = _config(PIXART, model) | {
        "caption_channels": model.y_embedder.y_embedding.shape[1],
        "cross_attention_dim": spec.hidden_size,
        "interpolation_scale": spec.space_scale,
        "sample_size": model.base_size * spec.patch_size[1],
        "use_additional_conditions": hasattr(model, "csize_embedder"),
    }
    return _with_null_caption(model, keys.PIXART, config)


def export_latte_t2v(model: Any) -> Exported:
    """`LatteT2V` as a LatteTransformer3DModel.

    Raises:
        WeightsError: diffusers has nothing that computes the same.
    """
    spec = model.spec
    frames, side, _ = model.latent_size
    _refuse(
        LATTE_T2V,
        {
            f"space_scale {spec.space_scale} at {side} latents; it takes {max(side // 64, 1)}": spec.space_scale
            != max(side // 64, 1),
            f"mlp_ratio {spec.mlp_ratio}; it takes 4": spec.mlp_ratio != 4,
            f"patch_size {spec.patch_size}; it takes patches of one frame": spec.patch_size[0] != 1,
        },
    )
    config = _config(LATTE_T2V, model) | {
        "caption_channels": model.y_embedder.y_embedding.shape[1],
        "cross_attention_dim": spec.hidden_size,
        "sample_size": side,
        "video_length": frames,
    }
    return _with_null_caption(model, keys.LATTE_T2V, config)


def compare(model: nn.Module, config: Mapping[str, Any], *, classes: Iterable[str]) -> list[str]:
    """What in a folder's config disagrees with ``model``, as far as its tensors don't tell.

    Raises:
        WeightsError: It is of another class, or asks for what no model here does.
    """
    if other := _OTHER_MODELS.get(config.get("model_type", "")):
        raise WeightsError(f"The folder holds {other}, not a denoiser. Give that of {type(model).__name__}'s weights.")
    name = config.get("_class_name")
    if name is None:
        return []
    if name not in classes:
        takes = f"takes {' or '.join(classes)}" if classes else "has no counterpart in diffusers"
        advice = ' Use model type "diffusers" to run it as it is.' if "Transformer" in name else ""
        raise WeightsError(f"The folder holds diffusers' {name}, and {type(model).__name__} {takes}.{advice}")
    given = {"norm_type": _NORM[name], "attention_type": "default", **_DEFAULTS[name], **config}
    wanted = {key: _FIXED[key] for key in _DEFAULTS[name]} | {"norm_type": _NORM[name], "attention_type": "default"}
    if unlike := [f"{key} = {given[key]!r}" for key, value in wanted.items() if given[key] != value]:
        raise WeightsError(f'This {name} has {", ".join(unlike)}, which no model here does. Use type "diffusers".')
    spec: Any = model.spec
    said = config_options(config)
    if "num_heads" in said and said["num_heads"] != spec.num_heads:
        raise WeightsError(
            f"The folder's model has {said['num_heads']} heads: set model.num_heads, now {spec.num_heads}."
        )
    return [
        f"{key} is {value} there and {getattr(spec, key)} here"
        for key, value in said.items()
        if hasattr(spec, key) and getattr(spec, key) != value
    ]


def config_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a model here, as far as a diffusers config tells them and tensors don't."""
    name = config.get("_class_name")
    if name not in _NORM:
        return {}
    options: dict[str, Any] = {}
    if (heads := config.get("num_attention_heads")) is not None:
        options["num_heads"] = heads
    if name == DIT:
        options["frequency_shift"] = config.get("_opensora", {}).get("frequency_shift", 1)
    else:
        scale = config.get("interpolation_scale") if name == PIXART else None
        options["space_scale"] = float(
            max(config.get("sample_size", 128 if name == PIXART else 64) // 64, 1) if scale is None else scale
        )
    return options


def _with_null_caption(model: Any, table: keys.KeyTable, config: Mapping[str, Any]) -> Exported:
    state = {key: value for key, value in model.state_dict().items() if key not in (*TABLES, NULL_CAPTION)}
    return Exported(
        tensors=keys.to_diffusers(_flat(state), table),
        config=config,
        extra={NULL_CAPTION: model.y_embedder.y_embedding},
        notes=(_NULL_CAPTION_APART,),
    )


def _config(name: str, model: Any) -> dict[str, Any]:
    """What the classes have in common."""
    spec = model.spec
    channels = model.x_embedder.proj.weight.shape[1]
    outputs = model.final_layer.linear.out_features // (spec.patch_size[1] * spec.patch_size[2])
    return {
        "_class_name": name,
        "_diffusers_version": metadata.version("diffusers"),
        **_FIXED,
        "num_attention_heads": spec.num_heads,
        "attention_head_dim": spec.hidden_size // spec.num_heads,
        "num_layers": spec.depth,
        "in_channels": channels,
        "out_channels": outputs,
        "patch_size": spec.patch_size[1],
        "norm_type": _NORM[name],
        "num_embeds_ada_norm": 1000,
    }


def _video_reasons(model: Any) -> dict[str, bool]:
    """Why an image class of diffusers may not do."""
    spec = model.spec
    frames = model.latent_size[0]
    return {
        f"{frames} latent frames; it makes images": frames != 1,
        f"patch_size {spec.patch_size}; it takes square patches of one frame": spec.patch_size[0] != 1
        or spec.patch_size[1] != spec.patch_size[2],
        "a position of the frame, even for images (set no_temporal_pos_emb = True)": not spec.no_temporal_pos_emb,
        f"mlp_ratio {spec.mlp_ratio}; it takes 4": spec.mlp_ratio != 4,
    }


def _refuse(name: str, reasons: Mapping[str, bool]) -> None:
    if given := [reason for reason, holds in reasons.items() if holds]:
        raise WeightsError(f"diffusers' {name} can't stand for this model, which has {'; '.join(given)}.")


def _flat(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With the patch weights of an image model."""
    return {key: value.squeeze(2) if key == PATCH_WEIGHT else value for key, value in state.items()}
