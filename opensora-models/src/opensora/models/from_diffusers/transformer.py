"""Any transformer of diffusers that takes latents, timestep and text, as a denoiser.

    model = dict(type="diffusers", from_pretrained="Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    model = dict(type="diffusers", class_name="CogVideoXTransformer3DModel", config=dict(num_layers=8))

The class keeps its own attention, layers and names of weights. What it predicts is turned into what this project's schedulers
expect: the velocity data - noise of ``rflow``, or the noise of ``iddpm``. Shapes: B batch, C latent channels, T H W latent
frames and size, L text tokens, D text width.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import attrs
import torch
from attrs import field, frozen
from attrs.validators import and_, ge, in_, le, optional
from torch import Tensor, nn

from opensora.core.conditioning import Conditioning
from opensora.core.errors import ConfigError, ShapeError, WeightsError
from opensora.core.interop import Exported, Interop, ModelFacts
from opensora.core.protocols import Size
from opensora.models._layers.conditions import required
from opensora.models.from_diffusers._layouts import POOLED, Inputs, Layout, Prediction, layout_of
from opensora.models.from_diffusers._schedules import COGVIDEOX_2B, noise_angles, scales, timestep_at
from opensora.models.from_diffusers._sources import build_class, describe, diffusers_class

__all__ = ["DiffusersTransformer", "DiffusersTransformerSpec"]

log = logging.getLogger(__name__)
_SUBFOLDER = "transformer"


@frozen(kw_only=True)
class DiffusersTransformerSpec:
    """Options of `DiffusersTransformer`."""

    from_pretrained: str | None = None
    """Folder or hub id, of a whole pipeline or of its transformer ("org/name/transformer_2"), or a run of this project. It
    says which class and of which size, and has the weights. None: random weights."""
    class_name: str | None = None
    """The diffusers class, such as "WanTransformer3DModel". None: from_pretrained says."""
    config: dict[str, Any] = field(factory=dict)
    """Arguments of the class, in place of those of from_pretrained or of the class's defaults. Latent channels and text width
    follow from autoencoder and text encoder."""
    prediction: Prediction | None = field(default=None, validator=optional(in_(("flow", "velocity", "v", "epsilon"))))
    """What the class predicts: "flow" is noise - data, "velocity" data - noise, "v" that of a diffusion model, all three for
    the scheduler rflow; "epsilon" is noise, for iddpm. None: as the class's own pipeline has it."""
    timesteps: tuple[float, float] | None = None
    """What the class is told at data and at noise. None: as the class's own pipeline has it, mostly (0, 1000)."""
    noise_schedule: dict[str, Any] | None = None
    """For prediction "v", scheduler_config.json's values. None: those beside from_pretrained, else CogVideoX-2b's."""
    negative_prompt: str = ""
    """What a dropped caption is replaced by: guidance leads away from it."""
    embedded_guidance: float = field(default=6.0, validator=ge(0))
    """Guidance scale that distilled models (HunyuanVideo) are told; the scheduler's cfg_scale is then 1."""
    class_dropout_prob: float = field(default=0.1, validator=and_(ge(0), le(1)))
    """Share of training samples whose caption or class is dropped, for classifier-free guidance."""


class DiffusersTransformer(nn.Module):
    """Calls the wrapped class, ``self.module``, as its own pipeline would.

    Conditions it reads: text_embedding, text_mask, dropped; what the class knows of labels, sizes, fps, frame_mask and
    ``extra["pooled_text"]``.
    """

    Spec: ClassVar[type] = DiffusersTransformerSpec
    interop: ClassVar[Interop]
    null_text: Tensor
    null_mask: Tensor
    null_pooled: Tensor

    def __init__(
        self,
        spec: DiffusersTransformerSpec,
        *,
        latent_channels: int,
        latent_size: Size | None = None,
        text_width: int | None = None,
        text_length: int | None = None,
    ) -> None:
        """Build the class with initial weights; core reads those of ``spec.from_pretrained``.

        Raises:
            ConfigError: The class is unknown, can't be driven, can't be built, or does not fit the text encoder.
            ShapeError: It does not fit the autoencoder, or can't do ``latent_size``.
            WeightsError: ``spec.from_pretrained`` has no config.json, or can't be reached.
        """
        super().__init__()
        self.spec = spec
        part = describe(attrs.asdict(spec), usual_subfolder=_SUBFOLDER, key="model")
        cls = diffusers_class(part.class_name, part="Transformer", key="model")
        self.layout: Layout = layout_of(cls)
        self.prediction = _prediction(spec, self.layout, cls.__name__)
        self.latent_channels = latent_channels
        self.condition_dropout = spec.class_dropout_prob
        filled = self.layout.fill_in(
            latent_channels=latent_channels, latent_size=latent_size, text_width=text_width, text_length=text_length
        )
        _check_text(self.layout, cls.__name__, text_width)
        config = dict(part.config) if part.is_complete else {**filled, **part.config}
        self.module: Any = build_class(cls, config, own=spec.config, key="model")
        self.layout.prepare(self.module)
        self._check_fit(text_width, text_length)
        if latent_size is not None:
            self._check_size(latent_size)
        _silence_dropout(self.module)
        idle = re.compile(self.layout.idle(self.module.config))
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(not idle.match(name))
        self.null_prompt = spec.negative_prompt if self.layout.text_key else None
        self.register_buffer("null_text", torch.zeros(1, text_width or 0), persistent=False)
        self.register_buffer("null_mask", torch.ones(1, dtype=torch.bool), persistent=False)
        self.register_buffer("null_pooled", torch.zeros(1), persistent=False)
        # No buffer: half precision would blur it.
        self.angles = noise_angles(_schedule(part.noise_schedule)) if self.prediction == "v" else None

    def forward(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """See `opensora.core.protocols.Denoiser`: [B, C, T, H, W] and [B] -> [B, C or 2C, T, H, W] float32.

        Raises:
            ShapeError: A size that this class can't do, or a condition that it needs is missing.
        """
        self._check_size(latents.shape[2:])
        u = timestep.float() / 1000
        told_latents, told_timestep = self._as_trained(latents.float(), u, conditioning.frame_mask)
        text, text_mask = self._text(conditioning)
        inputs = Inputs(
            latents=told_latents.to(self.module.dtype),
            timestep=told_timestep,
            clean_timestep=self._timesteps[0],
            text=text,
            text_mask=text_mask,
            conditioning=self._pooled(conditioning),
            guidance=self.spec.embedded_guidance,
        )
        arguments = self.layout.arguments(self.module, inputs)
        with _all_tokens_count() if latents.is_meta else nullcontext():
            output = self.module(**arguments, return_dict=False)[0]
        prediction = self.layout.unpack(self.module, output, inputs).float()
        own, variance = prediction[:, : latents.shape[1]], prediction[:, latents.shape[1] :]
        own = self._for_scheduler(own, told_latents, u)
        return torch.cat([own, variance], dim=1) if variance.shape[1] else own

    def take_null_text(self, conditioning: Conditioning) -> None:
        """Keep what the text encoder made of ``null_prompt``, to put it where a caption is dropped.

        Args:
            conditioning: Of one prompt.
        """
        text = required(conditioning, "text_embedding", "A dropped caption")
        mask = conditioning.text_mask
        self.null_text = text[0].detach().to(self.null_text.device, torch.float32, copy=True)  # [L, D]
        full = torch.ones(text.shape[1], dtype=torch.bool)
        self.null_mask = (full if mask is None else mask[0].clone()).to(self.null_text.device)  # [L]
        if (pooled := conditioning.extra.get(POOLED)) is not None:
            self.null_pooled = pooled[0].detach().to(self.null_text.device, torch.float32, copy=True)

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Diffusers' keys, as a folder of its own or another run holds them, to this wrapper's."""
        return {key if key.startswith("module.") else f"module.{key}": value for key, value in state.items()}

    @property
    def _timesteps(self) -> tuple[float, float]:
        return self.spec.timesteps or self.layout.timesteps

    def _as_trained(self, latents: Tensor, u: Tensor, frame_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Latents and timestep [B] as the class knows them; ``u`` [B] in [0, 1] is the share of noise."""
        if self.angles is None:
            clean, noise = self._timesteps
            return latents, clean + u * (noise - clean)
        length = _per_sample(scales(u)[0])
        if frame_mask is not None:  # given frames are data, whose length is right
            length = torch.where(frame_mask[:, None, :, None, None], length, 1.0)
        if self.angles.device != u.device:
            self.angles = self.angles.to(u.device)
        return latents / length, timestep_at(torch.atan2(u, 1 - u), self.angles)

    def _for_scheduler(self, prediction: Tensor, latents: Tensor, u: Tensor) -> Tensor:
        """What the class predicted of ``latents`` as velocity data - noise, or noise as it is."""
        if self.prediction == "flow":
            return -prediction
        if self.prediction != "v":
            return prediction
        _, a, s = map(_per_sample, scales(u))
        return (a - s) * latents - (a + s) * prediction  # data = a x - s v, noise = s x + a v

    def _text(self, conditioning: Conditioning) -> tuple[Tensor | None, Tensor]:
        """[B, L, D] in the weights' dtype and [B, L], the null text in place of dropped captions."""
        if self.layout.text_key is None:
            return None, torch.ones(len(conditioning), 0, dtype=torch.bool)
        text = required(conditioning, "text_embedding", type(self.module).__name__)
        mask = conditioning.text_mask
        mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device) if mask is None else mask
        if (dropped := conditioning.dropped) is not None:
            text = torch.where(dropped[:, None, None], self.null_text.to(text.dtype), text)
            mask = torch.where(dropped[:, None], self.null_mask, mask)
        return text.to(self.module.dtype), mask

    def _pooled(self, conditioning: Conditioning) -> Conditioning:
        """The null's pooled text, zero if the text encoder gave none, in place of dropped ones."""
        pooled, dropped = conditioning.extra.get(POOLED), conditioning.dropped
        if pooled is None or dropped is None:
            return conditioning
        pooled = torch.where(dropped[:, None], self.null_pooled.to(pooled.dtype), pooled)
        return conditioning.replace(extra={**conditioning.extra, POOLED: pooled})

    def _check_fit(self, text_width: int | None, text_length: int | None) -> None:
        config, name = self.module.config, type(self.module).__name__
        channels = self.layout.channels(config, self.layout.patch(config))
        if channels not in (None, self.latent_channels):
            raise ShapeError(
                f"{name} takes {channels} latent channels, but the autoencoder makes {self.latent_channels}. "
                "Use the autoencoder that it was trained with, such as the vae of the same pipeline."
            )
        if self.layout.text_key and config[self.layout.text_key] not in (None, text_width):
            raise ConfigError(
                f"{name} reads text of width {config[self.layout.text_key]} ({self.layout.text_key}), but the text encoder "
                f"gives {text_width}. Use the text encoder that it was trained with."
            )
        longest = config.get("max_text_seq_length")
        if longest is not None and text_length not in (None, longest):
            raise ConfigError(
                f"{name} reads {longest} text tokens, not {text_length}: set model_max_length = {longest}."
            )

    def _check_size(self, size: Any) -> None:
        config, size = self.module.config, tuple(size)
        patch = self.layout.patch(config)
        nearest = tuple(max(1, round(length / each)) * each for length, each in zip(size, patch, strict=True))
        if self.layout.is_image:
            nearest = (1, *nearest[1:])
        problem = self.layout.problem(config, nearest)
        if size != nearest or problem:
            rule = problem or (
                "it makes single images" if self.layout.is_image and size[0] > 1 else f"its patch is {_format(patch)}"
            )
            hint = "" if problem else f" Nearest: {_format(nearest)}."
            raise ShapeError(
                f"{type(self.module).__name__} can't do latents of {_format(size)} (frames x height x width): {rule}.{hint}"
            )


def _prediction(spec: DiffusersTransformerSpec, layout: Layout, name: str) -> Prediction:
    prediction = spec.prediction or layout.prediction
    if prediction is None:
        raise ConfigError(
            f"What {name} predicts is not known here. Set model.prediction to what its pipeline's scheduler expects: "
            '"flow" (noise - data), "velocity" (data - noise), "v" or "epsilon"; and model.timesteps where it is not '
            "told 0 at data and 1000 at noise."
        )
    return prediction


def _check_text(layout: Layout, name: str, text_width: int | None) -> None:
    if layout.text_key and text_width is None:
        raise ConfigError(f"{name} reads text, but the text encoder gives class labels. Use a text encoder such as t5.")
    if layout.text_key is None and text_width is not None:
        raise ConfigError(f'{name} reads class labels, but the text encoder gives text. Use text encoder "classes".')


def _schedule(found: Any) -> Any:
    if found is None:
        log.info("model.noise_schedule is not given: using that of CogVideoX-2b")
    return found or COGVIDEOX_2B


def _silence_dropout(module: nn.Module) -> None:
    """Labels are dropped outside, by the sample's own draws, and not by the class's label embedding."""
    for each in module.modules():
        if hasattr(each, "dropout_prob"):
            setattr(each, "dropout_prob", 0.0)  # noqa: B010  # torch types attributes of modules as tensors


def _all_tokens_count() -> AbstractContextManager[Any]:
    """For dry runs of classes that pick the tokens of a mask, whose values the meta device doesn't have."""
    from torch.fx.experimental import _config

    config: Any = _config  # torch adds its methods when it is imported
    if not hasattr(config, "meta_nonzero_assume_all_nonzero"):  # torch 2.5: those classes say that they can't
        return nullcontext()
    patch: AbstractContextManager[Any] = config.patch(meta_nonzero_assume_all_nonzero=True)
    return patch


def _per_sample(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1, 1)


def _format(size: Any) -> str:
    return "x".join(map(str, size))


def _to_diffusers(denoiser: nn.Module) -> Exported:
    module: Any = denoiser.module
    return Exported(tensors=module.state_dict(), config=json.loads(module.to_json_string()))


def _facts(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> ModelFacts:
    """Of a folder that diffusers wrote."""
    if "_class_name" not in config:
        raise WeightsError(
            "Tensors alone don't say which class of diffusers they are of: there is no config.json beside them. A run's "
            "model is written for diffusers by denoiser.module.save_pretrained(folder)."
        )
    kept = {name: value for name, value in config.items() if not name.startswith("_")}
    layout: Any = layout_of(diffusers_class(config["_class_name"], part="Transformer", key="model"))
    channels = layout.channels(kept, layout.patch(kept))
    return ModelFacts(
        options={"class_name": config["_class_name"], "config": kept},
        latent_channels=channels or 0,
        text_width=kept.get(layout.text_key) if layout.text_key else None,
        text_length=kept.get("max_text_seq_length"),
    )


DiffusersTransformer.interop = Interop(facts=_facts, to_diffusers=_to_diffusers)
