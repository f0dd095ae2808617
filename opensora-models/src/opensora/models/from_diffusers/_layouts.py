"""How each transformer class of diffusers is called: the layout of its latents, its text, timesteps and prediction.

What a class predicts, and which timesteps it is told, are not in its config but in the pipeline that samples from it.

Shapes: B batch, C channels, T H W latent frames and size, L text tokens, D text width, S video tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

import torch
from attrs import frozen
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from einops import rearrange, repeat
from torch import Tensor

from opensora.core.conditioning import Conditioning
from opensora.core.errors import ConfigError, ShapeError
from opensora.core.protocols import Size
from opensora.models._layers.conditions import required

Prediction = Literal["flow", "velocity", "v", "epsilon"]
POOLED = "pooled_text"
"""Name of the condition, in ``Conditioning.extra``, that holds one vector a caption [B, D']."""
_TEXT_KEYS = ("text_embed_dim", "text_dim", "caption_channels", "joint_attention_dim", "cross_attention_dim")


@frozen(kw_only=True)
class Inputs:
    """What a denoiser is told, in the dtype of its weights."""

    latents: Tensor
    """[B, C, T, H, W]."""
    timestep: Tensor
    """[B], as the class counts."""
    clean_timestep: float
    """The timestep of data."""
    text: Tensor | None
    """[B, L, D]."""
    text_mask: Tensor
    """[B, L] bool; [B, 0] without text."""
    conditioning: Conditioning
    guidance: float
    """Of models that are told how much they are guided."""


class Layout:
    """Classes that take latents [B, C, T, H, W] and text with a mask, and predict noise - data."""

    prediction: Prediction | None = "flow"
    timesteps: tuple[float, float] = (0.0, 1000.0)
    """Of data and of noise."""
    text_key: str | None = "text_embed_dim"
    """The argument of the class that is the text's width."""
    is_image = False
    """Whether the class knows single frames only: [B, C, H, W]."""

    def patch(self, config: Any) -> Size:
        """Latent frames, height and width of a token."""
        patch = config.get("patch_size") or 1
        return (config.get("patch_size_t") or 1, patch, patch) if isinstance(patch, int) else tuple(patch)

    def channels(self, config: Any, patch: Size) -> int | None:
        """Latent channels; None if the config doesn't say."""
        return config.get("in_channels")

    def problem(self, config: Any, size: Size) -> str | None:
        """What is wrong with a latent size of whole patches."""
        return None

    def fill_in(
        self, *, latent_channels: int, latent_size: Size | None, text_width: int | None, text_length: int | None
    ) -> dict[str, Any]:
        """Arguments that follow from autoencoder and text encoder."""
        filled: dict[str, Any] = {"in_channels": latent_channels, "out_channels": latent_channels}
        return filled | ({self.text_key: text_width} if self.text_key else {})

    def arguments(self, module: Any, inputs: Inputs) -> dict[str, Any]:
        """Keywords of the call."""
        return {
            "hidden_states": inputs.latents.squeeze(2) if self.is_image else inputs.latents,
            "timestep": inputs.timestep,
            "encoder_hidden_states": inputs.text,
            "encoder_attention_mask": inputs.text_mask,
        }

    def prepare(self, module: Any) -> None:
        """Change what the class can't do here, once it is built."""

    def idle(self, config: Any) -> str:
        """A regular expression of parameters that the class has and never uses; they are frozen."""
        return r"(?!)"

    def unpack(self, module: Any, output: Tensor, inputs: Inputs) -> Tensor:
        """What the class returned as [B, C or 2C, T, H, W]."""
        return output.unsqueeze(2) if self.is_image else output


class CogVideoX(Layout):
    """Frames before channels, no text mask; v of a schedule that keeps variance."""

    prediction = "v"

    def fill_in(self, **sizes: Any) -> dict[str, Any]:
        return super().fill_in(**sizes) | {"max_text_seq_length": sizes["text_length"]}

    def patch(self, config: Any) -> Size:
        return 1, config["patch_size"], config["patch_size"]  # frames are padded

    def problem(self, config: Any, size: Size) -> str | None:
        trained = (config["sample_height"], config["sample_width"])
        if config.get("use_learned_positional_embeddings") and size[1:] != trained:
            return f"its positions are learned for {trained[0]}x{trained[1]} alone"
        return None

    def arguments(self, module: Any, inputs: Inputs) -> dict[str, Any]:
        latents = rearrange(inputs.latents, "b c t h w -> b t c h w")
        if surplus := -latents.shape[1] % (
            module.config.patch_size_t or 1
        ):  # 1.5 was trained with a repeated first frame
            latents = torch.cat([latents[:, :1].expand(-1, surplus, -1, -1, -1), latents], dim=1)
        return {
            "hidden_states": latents,
            "timestep": inputs.timestep,
            "encoder_hidden_states": inputs.text,
            "image_rotary_emb": self.rotary(module.config, latents),
        }

    def rotary(self, config: Any, latents: Tensor) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines, [S, head] each; None for models with added positions."""
        if not config.use_rotary_positional_embeddings:
            return None
        grid = (latents.shape[3] // config.patch_size, latents.shape[4] // config.patch_size)
        trained = (config.sample_height // config.patch_size, config.sample_width // config.patch_size)
        is_sliced = config.patch_size_t is not None  # CogVideoX 1.5
        tables: Any = get_3d_rotary_pos_embed(
            embed_dim=config.attention_head_dim,
            crops_coords=None if is_sliced else crop_region(grid, trained),
            grid_size=grid,
            temporal_size=latents.shape[1] // (config.patch_size_t or 1),
            grid_type="slice" if is_sliced else "linspace",
            max_size=trained if is_sliced else None,
            device=latents.device,
        )
        cosines, sines = tables
        return cosines, sines

    def unpack(self, module: Any, output: Tensor, inputs: Inputs) -> Tensor:
        return rearrange(output[:, -inputs.latents.shape[2] :], "b t c h w -> b c t h w")


class Wan(Layout):
    """Text beyond the prompt's end is zero instead of masked; given frames have a timestep of their own."""

    text_key = "text_dim"

    def arguments(self, module: Any, inputs: Inputs) -> dict[str, Any]:
        assert inputs.text is not None  # the class has a text width
        return {
            "hidden_states": inputs.latents,
            "timestep": _token_timesteps(inputs, self.patch(module.config)),
            "encoder_hidden_states": inputs.text * inputs.text_mask[:, :, None].to(inputs.text.dtype),
        }


class LTX(Layout):
    """A row of tokens, positions in seconds and pixels; given frames have a timestep of their own."""

    text_key = "caption_channels"

    def channels(self, config: Any, patch: Size) -> int | None:
        return int(config["in_channels"]) // torch.Size(patch).numel()

    def arguments(self, module: Any, inputs: Inputs) -> dict[str, Any]:
        patch = self.patch(module.config)
        pattern = "b c (t pt) (h ph) (w pw) -> b (t h w) (c pt ph pw)"
        return {
            "hidden_states": rearrange(inputs.latents, pattern, pt=patch[0], ph=patch[1], pw=patch[2]),
            "timestep": _token_timesteps(inputs, patch),
            "encoder_hidden_states": inputs.text,
            "encoder_attention_mask": inputs.text_mask,
            "video_coords": self.positions(inputs, patch),
        }

    def positions(self, inputs: Inputs, patch: Size) -> Tensor:
        """Seconds, rows and columns in pixels of each token, [B, 3, S]."""
        told, size, device = inputs.conditioning, inputs.latents.shape[2:], inputs.latents.device
        batch = len(inputs.latents)
        frames = _or_default(told.num_frames, 8.0 * (size[0] - 1) + 1, batch, device)
        spacing = [  # of latents, [B] each
            (frames - 1) / max(size[0] - 1, 1) / _or_default(told.fps, 25.0, batch, device),
            _or_default(told.height, 32.0 * size[1], batch, device) / size[1],
            _or_default(told.width, 32.0 * size[2], batch, device) / size[2],
        ]
        steps = [torch.arange(0, length, each, device=device) for length, each in zip(size, patch, strict=True)]
        grid = torch.stack(torch.meshgrid(*steps, indexing="ij")).flatten(1)  # [3, S]
        return grid * torch.stack(spacing, dim=1)[:, :, None]

    def unpack(self, module: Any, output: Tensor, inputs: Inputs) -> Tensor:
        patch = self.patch(module.config)
        frames, height, width = (length // each for length, each in zip(inputs.latents.shape[2:], patch, strict=True))
        pattern = "b (t h w) (c pt ph pw) -> b c (t pt) (h ph) (w pw)"
        return rearrange(output, pattern, t=frames, h=height, w=width, pt=patch[0], ph=patch[1], pw=patch[2])


class Mochi(Layout):
    """Time runs the other way: 0 is noise, and what it predicts points at the data."""

    prediction = "velocity"
    timesteps = (1000.0, 0.0)

    def prepare(self, module: Any) -> None:
        if hasattr(module.rope, "_create_rope"):  # of the class: warns on a CPU, fails on the meta device
            module.rope._create_rope = _mochi_rotary

    def idle(self, config: Any) -> str:
        return rf"transformer_blocks\.{config.num_layers - 1}\.attn1\.(norm_added_q|add_q_proj)\."  # text ends there


class HunyuanVideo(Layout):
    """Takes a pooled text vector besides, and, where it is distilled, how much it is guided."""

    def arguments(self, module: Any, inputs: Inputs) -> dict[str, Any]:
        config = module.config
        guidance = torch.full_like(inputs.timestep, 1000 * inputs.guidance) if config.guidance_embeds else None
        pooled = self.pooled(inputs, config.pooled_projection_dim)
        return super().arguments(module, inputs) | {"pooled_projections": pooled, "guidance": guidance}

    def pooled(self, inputs: Inputs, width: int) -> Tensor:
        """The condition ``extra["pooled_text"]`` [B, D']; without it the mean of the text, if that is as wide.

        Raises:
            ShapeError: There is neither.
        """
        assert inputs.text is not None  # the class has a text width
        if (given := inputs.conditioning.extra.get(POOLED)) is not None:
            return given.to(inputs.text.dtype)
        if inputs.text.shape[2] != width:
            raise ShapeError(
                f"This model takes a pooled text vector of width {width} (pooled_projection_dim). No text encoder gave one "
                f'as Conditioning.extra["{POOLED}"], and the text, {inputs.text.shape[2]} wide, can\'t stand in for it.'
            )
        weights = inputs.text_mask[:, :, None].to(inputs.text.dtype)
        return (inputs.text * weights).sum(1) / weights.sum(1).clamp(min=1)

    def fill_in(self, **sizes: Any) -> dict[str, Any]:
        return super().fill_in(**sizes) | {"pooled_projection_dim": sizes["text_width"]}


class Captioned(Layout):
    """SanaVideo and others that call the text's width caption_channels."""

    text_key = "caption_channels"


class Latte(Captioned):
    """Noise, as DDPM's; clips of one length."""

    prediction = "epsilon"

    def problem(self, config: Any, size: Size) -> str | None:
        if size[0] not in (1, config["video_length"]):
            return f"it has positions for {config['video_length']} latent frames (video_length) and for single ones"
        return None

    def fill_in(self, **sizes: Any) -> dict[str, Any]:
        size = sizes["latent_size"]
        return super().fill_in(**sizes) | ({"video_length": size[0]} if size else {})

    def arguments(self, module: Any, inputs: Inputs) -> dict[str, Any]:
        bias = (~inputs.text_mask).to(inputs.latents.dtype) * -10000.0  # [B, L]
        per_frame = repeat(bias, "b l -> (b t) 1 l", t=inputs.latents.shape[2])
        return super().arguments(module, inputs) | {"encoder_attention_mask": per_frame}


class SanaImage(Captioned):
    """Single frames; its timesteps have a scale of their own."""

    is_image = True

    def arguments(self, module: Any, inputs: Inputs) -> dict[str, Any]:
        return super().arguments(module, inputs) | {"timestep": inputs.timestep * module.config.timestep_scale}


class PixArt(Captioned):
    """Single frames, noise as DDPM's; large models are told their size."""

    prediction = "epsilon"
    is_image = True

    def arguments(self, module: Any, inputs: Inputs) -> dict[str, Any]:
        told: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if module.use_additional_conditions:
            sides = [required(inputs.conditioning, name, "PixArt") for name in ("height", "width", "aspect_ratio")]
            told = {"resolution": torch.stack(sides[:2], 1), "aspect_ratio": sides[2][:, None]}
        return super().arguments(module, inputs) | {"added_cond_kwargs": told}


class DiT(Layout):
    """Single square frames of a class, noise as DDPM's."""

    prediction = "epsilon"
    is_image = True
    text_key = None

    def problem(self, config: Any, size: Size) -> str | None:
        return "it does squares alone" if size[1] != size[2] else None

    def arguments(self, module: Any, inputs: Inputs) -> dict[str, Any]:
        labels = required(inputs.conditioning, "labels", "DiTTransformer2DModel")
        if (dropped := inputs.conditioning.dropped) is not None:
            labels = torch.where(dropped, module.config.num_embeds_ada_norm, labels)  # one past the last class
        return {"hidden_states": inputs.latents.squeeze(2), "timestep": inputs.timestep, "class_labels": labels}


class Unlisted(Layout):
    """A class that is not in the table: called by the names of its arguments, with the prediction that the user states."""

    prediction = None
    harmless = (
        *("return_dict", "attention_kwargs", "joint_attention_kwargs", "cross_attention_kwargs", "attention_mask"),
        *("timestep_cond", "controlnet_block_samples", "encoder_hidden_states_image", "image_embeds"),
    )
    """Optional arguments that text to video does without."""

    def __init__(self, cls: Any) -> None:
        """Look at the arguments of ``cls``.

        Raises:
            ConfigError: It wants something that isn't latents, timestep and text.
        """
        parameters = dict(list(inspect.signature(cls.forward).parameters.items())[1:])
        self.taken = {"hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask"} & set(parameters)
        strange = [
            name
            for name, each in parameters.items()
            if name not in self.taken and (name not in self.harmless or each.default is each.empty)
        ]
        if strange or not self.taken >= {"hidden_states", "timestep", "encoder_hidden_states"}:
            raise ConfigError(
                f"{cls.__name__} can't be driven: its forward takes {', '.join(parameters)}, more than latents, timestep "
                f"and text{' (' + ', '.join(strange) + ')' if strange else ''}. Classes that can: {', '.join(LAYOUTS)}."
            )
        self.is_image = "2D" in cls.__name__
        arguments = inspect.signature(cls.__init__).parameters
        self.text_key = next((name for name in _TEXT_KEYS if name in arguments), None)

    def arguments(self, module: Any, inputs: Inputs) -> dict[str, Any]:
        return {name: value for name, value in super().arguments(module, inputs).items() if name in self.taken}


LAYOUTS: Mapping[str, Layout] = {
    "CogVideoXTransformer3DModel": CogVideoX(),
    "WanTransformer3DModel": Wan(),
    "LTXVideoTransformer3DModel": LTX(),
    "MochiTransformer3DModel": Mochi(),
    "HunyuanVideoTransformer3DModel": HunyuanVideo(),
    "SanaVideoTransformer3DModel": Captioned(),
    "LatteTransformer3DModel": Latte(),
    "PixArtTransformer2DModel": PixArt(),
    "SanaTransformer2DModel": SanaImage(),
    "DiTTransformer2DModel": DiT(),
}


def layout_of(cls: Any) -> Layout:
    """How ``cls`` is called.

    Raises:
        ConfigError: It takes more than latents, timestep and text.
    """
    return LAYOUTS.get(cls.__name__) or Unlisted(cls)


def crop_region(grid: tuple[int, int], trained: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Upper left and lower right corner of a grid of tokens, as large as it fits into the middle of the trained one."""
    scale = min(trained[0] / grid[0], trained[1] / grid[1])
    height, width = round(grid[0] * scale), round(grid[1] * scale)
    top, left = round((trained[0] - height) / 2), round((trained[1] - width) / 2)
    return (top, left), (top + height, left + width)


def _mochi_rotary(frequencies: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [S, heads, F] of frequencies [3, heads, F] at positions [S, 3], under autocast in float32 too."""
    angles = (positions.float()[:, :, None, None] * frequencies.float()).sum(1)
    return angles.cos(), angles.sin()


def _token_timesteps(inputs: Inputs, patch: Size) -> Tensor:
    """[B], or [B, S] where some frames are given: those are told that they are clean."""
    mask = inputs.conditioning.frame_mask
    if mask is None:
        return inputs.timestep
    noised = rearrange(mask, "b (t pt) -> b t pt", pt=patch[0]).any(2)  # [B, token frames]
    tokens = (inputs.latents.shape[3] // patch[1]) * (inputs.latents.shape[4] // patch[2])
    timesteps = torch.where(noised, inputs.timestep[:, None], inputs.clean_timestep)
    return timesteps.repeat_interleave(tokens, dim=1)


def _or_default(value: Tensor | None, default: float, batch: int, device: torch.device) -> Tensor:
    return torch.full((batch,), default, device=device) if value is None else value.float()
