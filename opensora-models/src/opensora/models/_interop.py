"""What each denoiser can say about weights of other projects: published names, sizes that a file tells, layouts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import partial
from importlib import resources
from typing import Any

from torch import Tensor

from opensora.core.interop import Exported, Interop, ModelFacts
from opensora.models import _diffusers_layout as diffusers
from opensora.models._diffusers_keys import from_diffusers
from opensora.models._key_maps import PATCH_WEIGHT
from opensora.models._recognition import ModelShape, diagnose

PUBLISHED: Mapping[str, str] = json.loads(
    resources.files("opensora.models").joinpath("published_weights.json").read_text(encoding="utf-8")
)
"""Published files by name: see `opensora.core.interop.Interop`."""
_NORMS = r"\.(q|k)_norm\."


def facts(
    published: Mapping[str, Tensor], config: Mapping[str, Any], *, default_text_length: int, sigma: str = "pred_sigma"
) -> ModelFacts:
    """What a file of any layout tells about its model. ``sigma``: what the option for variance values is called."""
    state = from_diffusers(dict(published))
    shape = ModelShape.of(state)
    options: dict[str, Any] = {"patch_size": shape.patch, "hidden_size": shape.width, "depth": shape.depth}
    options |= {"mlp_ratio": shape.mlp_ratio, sigma: shape.outputs == 2} | diffusers.config_options(config)
    size = _latent_size(state, config, shape)
    if shape.classes is not None:
        options["condition"] = f"label_{shape.classes}"
    if size[0] == 1:
        options["no_temporal_pos_emb"] = True
    if shape.has_norms:
        options["qk_norm"] = True
    if "rope.freqs" in state:
        options["num_heads"] = (shape.width or 0) // (2 * len(state["rope.freqs"]))
    is_text = shape.text_width is not None
    return ModelFacts(
        options={key: value for key, value in options.items() if value is not None},
        latent_channels=shape.channels or 0,
        latent_size=size,
        text_width=shape.text_width,
        text_length=(shape.text_length or default_text_length) if is_text else None,
    )


def _latent_size(state: Mapping[str, Tensor], config: Mapping[str, Any], shape: ModelShape) -> tuple[int, int, int]:
    """From the config, else from position tables of square latents; else that of 256x256 pixels."""
    patch = shape.patch or (1, 1, 1)
    spatial = next((state[key] for key in ("pos_embed", "pos_embed_spatial") if key in state), None)
    temporal = next((state[key] for key in ("pos_embed_temporal", "temp_embed") if key in state), None)
    side = config.get("sample_size") or (32 if spatial is None else math.isqrt(spatial.shape[1]) * patch[1])
    frames = config.get("video_length") or (1 if temporal is None else temporal.shape[1] * patch[0])
    return frames, side, side


# ---- the original layouts


def original_dit(model: Any) -> Exported:
    """That of DiT's own code, for images by class; of Open-Sora's otherwise, whose keys are the ones here."""
    state = model.state_dict()
    if model.spec.num_classes is None or model.latent_size[0] != 1 or model.spec.patch_size[0] != 1:
        return Exported(tensors=state)
    return Exported(tensors=_image_keys(state, "pos_embed_spatial"))


def original_latte(model: Any) -> Exported:
    """That of Latte's own code for class labels, Open-Sora's otherwise."""
    state = model.state_dict()
    if model.spec.num_classes is None or model.spec.patch_size[0] != 1:
        return Exported(tensors=state)
    tables = {"temp_embed": state["pos_embed_temporal"]}
    return Exported(tensors=_image_keys(state, "pos_embed_spatial") | tables, wrapper="ema")


def original_pixart(model: Any) -> Exported:
    """That of PixArt's own code for images, Open-Sora's for videos."""
    state = model.state_dict()
    if model.latent_size[0] != 1 or model.spec.patch_size[0] != 1:
        return Exported(tensors=state)
    return Exported(tensors=_image_keys(state, "pos_embed"), wrapper="state_dict")


def original_opensora(model: Any) -> Exported:
    """Open-Sora's, whose keys are the ones here."""
    return Exported(tensors=model.state_dict())


def _image_keys(state: Mapping[str, Tensor], table: str) -> dict[str, Tensor]:
    """Patch weights of an image model, and one position table called ``pos_embed``."""
    left = {key: value for key, value in state.items() if key not in diffusers.TABLES}
    return {"pos_embed": state[table], **left, PATCH_WEIGHT: state[PATCH_WEIGHT].squeeze(2)}


# ---- the models


def _interop(*types: str, classes: tuple[str, ...] = (), **entries: Any) -> Interop:
    return Interop(
        published=PUBLISHED,
        diagnose=partial(diagnose, types=types),
        compare=partial(diffusers.compare, classes=classes),
        **{"to_original": original_opensora, **entries},
    )


_PIXARTS = ("PixArt-XL/2", "PixArt-Sigma-XL/2")
_class_facts = partial(facts, default_text_length=1, sigma="learn_sigma")
DIT = _interop(
    "DiT-XL/2",
    classes=(diffusers.DIT,),
    facts=_class_facts,
    to_original=original_dit,
    to_diffusers=diffusers.export_dit,
)
LATTE = _interop("DiT-XL/2", "Latte-XL/2", facts=_class_facts, to_original=original_latte)
PIXART = _interop(
    *_PIXARTS,
    classes=(diffusers.PIXART,),
    facts=partial(facts, default_text_length=120),
    to_original=original_pixart,
    to_diffusers=diffusers.export_pixart,
)
PIXART_MS = _interop(
    "PixArtMS-XL/2",
    classes=(diffusers.PIXART,),
    facts=partial(facts, default_text_length=120),
    to_original=original_pixart,
    to_diffusers=diffusers.export_pixart,
)
PIXART_SIGMA = _interop(
    *_PIXARTS,
    classes=(diffusers.PIXART,),
    facts=partial(facts, default_text_length=300),
    to_original=original_pixart,
    to_diffusers=diffusers.export_pixart,
)
LATTE_T2V = _interop(
    "LatteT2V-XL/2",
    classes=(diffusers.LATTE_T2V,),
    facts=partial(facts, default_text_length=120),
    to_diffusers=diffusers.export_latte_t2v,
)
STDIT = _interop(
    "STDiT-XL/2",
    *_PIXARTS,
    classes=(diffusers.PIXART,),
    new_parts=r"\.attn_temp\.",
    facts=partial(facts, default_text_length=120),
)
# Its size embedders are new too and not zero, so its first frame is the image model's but for their say.
STDIT2 = _interop(
    "STDiT2-XL/2",
    *_PIXARTS,
    classes=(diffusers.PIXART,),
    new_parts=rf"\.attn_temp\.|_temporal$|^(t_block_temp|csize_embedder|ar_embedder|fl_embedder|fps_embedder|rope)\.|{_NORMS}",
    facts=partial(facts, default_text_length=200),
)
STDIT3 = _interop(
    "STDiT3-XL/2",
    *_PIXARTS,
    classes=(diffusers.PIXART,),
    new_parts=rf"^(temporal_blocks|fps_embedder|rope)\.|{_NORMS}",
    facts=partial(facts, default_text_length=300),
)
