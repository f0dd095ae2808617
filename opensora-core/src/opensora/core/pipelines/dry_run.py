"""``--dry-run``: compose everything on the meta device, and say what would happen, how large it is and what it would cost."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from opensora.core.components import build, structure_spec
from opensora.core.composing import Parts, build_parts, checkpoint_activations
from opensora.core.conditioning import Conditioning
from opensora.core.errors import DataError
from opensora.core.pipelines.sample_spec import SampleSpec
from opensora.core.pipelines.train_spec import TrainSpec
from opensora.core.protocols import Dataset, Size

__all__ = ["describe_sampling", "describe_training"]

log = logging.getLogger(__name__)
_GIB = 2**30


def describe_training(spec: TrainSpec) -> str:
    """Models, sizes, steps, and an estimate of memory and compute for one process."""
    from opensora.core.pipelines.train import clip_size, count_steps

    dataset: Dataset | None = None
    try:
        dataset = build("datasets", spec.dataset)
        data_line = f"{len(dataset):,} samples"
    except DataError as error:
        data_line = f"not readable yet: {error}"
    size = clip_size(dataset, spec.seed) if dataset else _declared_size(spec)
    lines = [f"data         {spec.dataset.type}: {data_line}"]
    if size is None:
        return "\n".join([*lines, "The size of the clips is not known, so nothing more can be said."])
    parts = build_parts(spec, size_of=lambda: size, meta=True)
    lines += _describe_parts(spec, parts, size)
    if dataset:
        per_step = spec.batch_size * spec.accumulation_steps
        steps = count_steps(spec, len(dataset), per_step)
        lines.append(
            f"steps        {steps:,} of {per_step} samples a process ({steps * per_step / len(dataset):.1f} epochs)"
        )
    parts.denoiser.train()
    if spec.grad_checkpoint:
        checkpoint_activations(parts.denoiser)
    flops, activations = _measure(parts, spec.batch_size, train=True)
    trained = sum(each.numel() for each in parts.denoiser.parameters() if each.requires_grad)
    memory = {
        "weights": 4 * sum(each.numel() for each in parts.denoiser.parameters()),
        "gradients": 4 * trained,
        "AdamW": 8 * trained,
        "EMA": 4 * trained if spec.ema_decay else 0,
        "activations": activations,
    }
    listed = ", ".join(f"{name} {amount / _GIB:.2f}" for name, amount in memory.items())
    lines.append(
        f"memory       about {sum(memory.values()) / _GIB:.2f} GiB a process ({listed}), without VAE and text encoder"
    )
    lines.append(f"compute      {flops / 1e12:.3f} TFLOP a micro-batch of {spec.batch_size}, forward and backward")
    return "\n".join(lines)


def describe_sampling(spec: SampleSpec, *, num_prompts: int) -> str:
    """Models, sizes, and an estimate of memory and compute for one process."""
    parts = build_parts(spec, size_of=lambda: spec.size, meta=True)
    parts.denoiser.eval()
    flops, _ = _measure(parts, spec.batch_size, train=False)
    bytes_each = 2 if spec.dtype in ("bf16", "fp16") else 4
    weights = bytes_each * sum(each.numel() for each in parts.denoiser.parameters())
    kind = "images" if spec.size[0] == 1 else "videos"
    return "\n".join(
        [
            f"samples      {num_prompts * spec.num_sample} {kind} of {num_prompts} prompts",
            *_describe_parts(spec, parts, spec.size),
            f"memory       weights {weights / _GIB:.2f} GiB, without VAE, text encoder and activations",
            f"compute      {flops / 1e12:.3f} TFLOP a denoiser call of {spec.batch_size}, guidance not counted",
        ]
    )


def _declared_size(spec: TrainSpec) -> Size | None:
    """(T, H, W) as the dataset's options say, where its file isn't there yet."""
    options = structure_spec("datasets", spec.dataset)
    num_frames, image_size = getattr(options, "num_frames", 1), getattr(options, "image_size", None)
    return (num_frames, *image_size) if num_frames and image_size else None


def _describe_parts(spec: TrainSpec | SampleSpec, parts: Parts, size: Size) -> list[str]:
    latent = (parts.vae.latent_channels, *(parts.latent_size or ()))
    width = parts.text_encoder.width
    text = f"{parts.text_encoder.max_length} tokens of {width}" if width else "class labels"
    source = spec.model.options.get("from_pretrained") or "random weights"
    return [
        f"model        {spec.model.type}: {_count(parts.denoiser)} parameters, {source}",
        f"vae          {spec.vae.type}: {_count(parts.vae)} parameters",
        f"text         {spec.text_encoder.type}: {_count(parts.text_encoder)} parameters, {text}",
        f"scheduler    {spec.scheduler.type}",
        f"video        {' x '.join(map(str, size))} (frames x height x width) -> latents {' x '.join(map(str, latent))}",
    ]


def _count(part: Any) -> str:
    return f"{sum(each.numel() for each in part.parameters()):,}" if isinstance(part, nn.Module) else "no"


def _measure(parts: Parts, batch_size: int, *, train: bool) -> tuple[int, int]:
    """FLOPs of a call (with backward, if training), and bytes saved for backward, both counted on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    saved: dict[Any, int] = {}
    owned = {id(each) for each in parts.denoiser.parameters()}

    def note(tensor: Tensor) -> Tensor:
        base = tensor._base if tensor._base is not None else tensor
        if id(base) not in owned:
            saved[id(tensor)] = tensor.numel() * tensor.element_size()
            kept.append(tensor)  # keeps ids unique
        return tensor

    kept: list[Tensor] = []
    latents, timestep, conditioning = _meta_inputs(parts, batch_size)
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(note, lambda each: each):
        with torch.set_grad_enabled(train):
            prediction = parts.denoiser(latents, timestep, conditioning)
        if train:
            prediction.sum().backward()
    return counter.get_total_flops(), sum(saved.values())


def _meta_inputs(parts: Parts, batch: int) -> tuple[Tensor, Tensor, Conditioning]:
    assert parts.latent_size is not None  # both callers know the size
    encoder = parts.text_encoder

    def each(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(batch, *shape, dtype=dtype, device="meta")

    has_text = encoder.width is not None
    conditioning = Conditioning(
        text_embedding=each(encoder.max_length, encoder.width or 0) if has_text else None,
        text_mask=each(encoder.max_length, dtype=torch.bool) if has_text else None,
        labels=None if has_text else each(dtype=torch.int64),
        fps=each(),
        height=torch.full((batch,), 512.0),
        width=torch.full((batch,), 512.0),
        num_frames=each(),
        aspect_ratio=each(),
    )
    return each(parts.vae.latent_channels, *parts.latent_size), each(), conditioning
