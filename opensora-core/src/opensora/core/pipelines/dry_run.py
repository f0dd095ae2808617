"""``--dry-run``: compose everything on the meta device, and say what would happen, how large it is and what it would cost."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from opensora.core.components import build, load, structure_spec
from opensora.core.composing import Parts, build_parts, is_installed, on_meta, split_options
from opensora.core.conditioning import Conditioning
from opensora.core.config.structure import ComponentConfig
from opensora.core.errors import DataError
from opensora.core.mask_strategy import print_mask_strategy
from opensora.core.orders import BatchOrder, Slicing
from opensora.core.pipelines.plan import describe_costs, planned_buckets, rehearse, shares_of
from opensora.core.pipelines.sample_spec import SampleSpec
from opensora.core.pipelines.step_cost import StepRehearsal, build_on_meta
from opensora.core.pipelines.train_spec import TrainSpec
from opensora.core.protocols import Dataset, Size
from opensora.core.ready_features import ready_encoders
from opensora.core.reference_latents import Overlap
from opensora.core.requests import EndlessRequests, Request

if TYPE_CHECKING:
    from opensora.core.pipelines.extract import ExtractSpec

__all__ = [
    "declared_size",
    "describe_extraction",
    "describe_losses",
    "describe_memory",
    "describe_sampling",
    "describe_training",
    "measure",
    "meta_inputs",
]

log = logging.getLogger(__name__)
_GIB = 2**30


def describe_training(spec: TrainSpec, world_size: int = 1) -> str:
    """Models, sizes, steps, and the memory and compute of each of ``world_size`` processes."""
    from opensora.core.pipelines.train import build_dataset, clip_size

    dataset: Dataset | None = None
    try:
        dataset = build_dataset(spec)
        data_line = f"{len(dataset):,} samples"
    except DataError as error:
        data_line = f"not readable yet: {error}"
    lines = [f"data         {spec.dataset.type}: {data_line}"]
    batches = _bucket_sizes(spec)
    largest = max(batches, key=lambda one: math.prod(one[0]) * one[1]) if batches else None
    size = largest[0] if largest else clip_size(dataset, spec.seed) if dataset else declared_size(spec.dataset)
    ready = ready_encoders(spec, dataset or structure_spec("datasets", spec.dataset))
    if size is None and not ready:
        return "\n".join([*lines, "The size of the clips is not known, so nothing more can be said."])
    parts = build_on_meta(spec, None if batches else size, **ready)
    if size is None:
        lines.append(f"model        {spec.model.type}: {_count(parts.denoiser)} parameters")
        return "\n".join([*lines, "The size of the latents is not known, so nothing more can be said."])
    lines += _describe_buckets(parts, batches) + _describe_parts(spec, parts, size)
    if dataset:
        lines.append(_describe_steps(spec, dataset, world_size))
    if spec.compile:
        lines.append("compile      not counted: compiled blocks save somewhat less, for as many operations")
    buckets = planned_buckets(spec, parts, size)
    if dataset is None and len(buckets) > 1:  # which of them will have clips is not known yet
        lines.append(
            f"buckets      the largest is rehearsed until the data can be read; all {len(buckets)}: opensora plan"
        )
        buckets = [max(buckets, key=lambda one: math.prod(parts.vae.latent_size(one.size)) * one.batch_size)]
    with StepRehearsal(spec, parts, shares_of(spec, world_size)) as rehearsal:
        costs = rehearse(rehearsal, buckets)
    return "\n".join([*lines, *describe_costs(costs, world_size)])


def describe_extraction(spec: ExtractSpec) -> str:
    """What features would be made of, and where they would be kept."""
    from opensora.core.pipelines.train import build_dataset

    try:
        dataset = build_dataset(spec)
        data_line = f"{len(dataset):,} samples, {spec.epochs_of_clips} epochs of clips"
    except DataError as error:
        data_line = f"not readable yet: {error}"
    with on_meta(True):
        vae = build("vaes", spec.vae, meta=True)
        text_encoder = build("text_encoders", split_options("text_encoders", spec.text_encoder)[0], meta=True)
    assert spec.features is not None  # checked by the pipeline
    text = (
        f"{text_encoder.max_length} tokens of {text_encoder.width}" if text_encoder.width else "class labels, not kept"
    )
    lines = [
        f"data         {spec.dataset.type}: {data_line}",
        f"vae          {spec.vae.type}: {_count(vae)} parameters",
        f"text         {spec.text_encoder.type}: {_count(text_encoder)} parameters, {text}",
        f"features     {spec.features.folder}",
    ]
    if size := declared_size(spec.dataset):
        lines.append(f"latents      {' x '.join(map(str, (vae.latent_channels, *vae.latent_size(size))))} of each clip")
    return "\n".join(lines)


def describe_losses(spec: TrainSpec, num_timesteps: int) -> str:
    """What would be measured at so many timesteps, and what a call of the denoiser costs."""
    from opensora.core.pipelines.train import build_dataset

    try:
        data_line = f"{len(build_dataset(spec)):,} samples"
    except DataError as error:
        data_line = f"not readable yet: {error}"
    lines = [f"data         {spec.dataset.type}: {data_line}"]
    batches = _bucket_sizes(spec)
    largest = max(batches, key=lambda one: math.prod(one[0]) * one[1]) if batches else None
    size = largest[0] if largest else declared_size(spec.dataset)
    if size is None:
        return "\n".join([*lines, "The size of the clips is not known, so nothing more can be said."])
    parts = build_parts(spec, size_of=lambda: None if batches else size, meta=True)
    parts.denoiser.eval()
    batch_size = largest[1] if largest else spec.batch_size
    flops, _ = _measure(parts, batch_size, size, train=False)
    each = 2 if spec.dtype in ("bf16", "fp16") else 4
    weights = each * sum(parameter.numel() for parameter in parts.denoiser.parameters())
    return "\n".join(
        [
            *lines,
            *_describe_buckets(parts, batches),
            *_describe_parts(spec, parts, size),
            f"timesteps    {num_timesteps}, each a call of the denoiser for each batch",
            f"memory       weights {weights / _GIB:.2f} GiB, without VAE, text encoder and activations",
            f"compute      {flops / 1e12:.3f} TFLOP a call for the largest batch",
        ]
    )


def describe_memory(parameters: int, trained: int, *, averaged: int, activations: int, without: str) -> str:
    """The line about the memory of training.

    Args:
        parameters: How many there are.
        trained: How many of them are trained.
        averaged: Of how many of them an average is kept.
        activations: Bytes.
        without: What is not counted.
    """
    memory = {
        "weights": 4 * parameters,
        "gradients": 4 * trained,
        "AdamW": 8 * trained,
        "EMA": 4 * averaged,
        "activations": activations,
    }
    listed = ", ".join(f"{name} {amount / _GIB:.2f}" for name, amount in memory.items())
    return f"memory       about {sum(memory.values()) / _GIB:.2f} GiB a process ({listed}), without {without}"


def _bucket_sizes(spec: TrainSpec) -> list[tuple[Size, int]]:
    """(T, H, W) and batch size of each bucket in use; empty where clips have one size."""
    sizes_of = getattr(load("datasets", spec.dataset.type), "bucket_sizes", None)
    sizes: list[tuple[Size, int]] = sizes_of(spec.bucket_config) if sizes_of and spec.bucket_config else []
    return sizes


def _describe_buckets(parts: Parts, batches: Sequence[tuple[Size, int]]) -> list[str]:
    """The buckets' extremes."""
    if not batches:
        return []
    latents = [math.prod(parts.vae.latent_size(size)) * count for size, count in batches]
    (small, few), (large, many) = (batches[latents.index(pick(latents))] for pick in (min, max))
    extremes = [" x ".join(map(str, (count, *size))) for size, count in ((small, few), (large, many))]
    spread = f"{max(latents) / min(latents):.1f} times as many latents"
    return [f"buckets      {len(batches)}: from {' to '.join(extremes)} (batch x frames x height x width), {spread}"]


def _describe_steps(spec: TrainSpec, dataset: Dataset, world_size: int) -> str:
    from opensora.core.pipelines.train import count_steps, order_of

    order = order_of(spec, dataset)
    shares = max(
        1, round(world_size * shares_of(spec, world_size).activations)
    )  # processes may work on the same samples
    slicing = Slicing(batch_size=spec.batch_size, accumulation=spec.accumulation_steps, world_size=shares)
    steps = count_steps(spec, order, slicing)
    if isinstance(order, BatchOrder):
        batches = order.of_epoch(0)
        used = f"{sum(map(len, batches)):,} of the {len(dataset):,} samples"
        return f"steps        {steps:,}; the first epoch has {len(batches):,} batches of {used}"
    per_step = slicing.samples_per_step
    each = spec.batch_size * spec.accumulation_steps
    return f"steps        {steps:,} of {each} samples a process ({steps * per_step / len(dataset):.1f} epochs)"


def describe_sampling(spec: SampleSpec, requests: Sequence[Request]) -> str:
    """Models, sizes, and an estimate of memory and compute for one process."""
    parts = build_parts(spec, size_of=lambda: spec.size, meta=True)
    parts.denoiser.eval()
    first = requests[0]
    flops, _ = _measure(parts, spec.batch_size, first.size, train=False)
    bytes_each = 2 if spec.dtype in ("bf16", "fp16") else 4
    weights = bytes_each * sum(each.numel() for each in parts.denoiser.parameters())
    kind = ("image" if first.size[0] == 1 else "video") + ("s" if len(requests) > 1 else "")
    return "\n".join(
        [
            f"samples      {len(requests):,} {kind} of {_count_prompts(requests)}",
            *_describe_parts(spec, parts, first.size),
            *_describe_rounds(spec, parts, first),
            f"memory       weights {weights / _GIB:.2f} GiB, without VAE, text encoder and activations",
            f"compute      {flops / 1e12:.3f} TFLOP a denoiser call of {spec.batch_size}, guidance not counted",
        ]
    )


def _count_prompts(requests: Sequence[Request]) -> str:
    if isinstance(requests, EndlessRequests):
        return "one prompt"
    count = len({request.prompt for request in requests})
    return f"{count:,} prompt{'s' if count > 1 else ''}"


def _describe_rounds(spec: SampleSpec, parts: Parts, first: Request) -> list[str]:
    """What a video starts from, and of how many rounds it is."""
    lines = []
    overlap = Overlap.of(spec)
    if first.given:
        sources, edits = first.given.resolve(overlap.latent_frames(parts.vae, first.size), loop=first.loop)
        lines.append(f"starts from  {'; '.join(sources)}: mask strategy {print_mask_strategy(edits)}")
    if first.loop > 1:
        shared = overlap.frames(parts.vae, first.size)
        total = first.loop * first.size[0] - (first.loop - 1) * shared
        lines.append(f"rounds       {first.loop}, each with {shared} frames of the one before: {total:,} frames")
    return lines


def declared_size(dataset: ComponentConfig) -> Size | None:
    """(T, H, W) as the dataset's options say, where its file isn't there yet."""
    options = structure_spec("datasets", dataset)
    num_frames, image_size = getattr(options, "num_frames", 1), getattr(options, "image_size", None)
    return (num_frames, *image_size) if num_frames and image_size else None


def _describe_parts(spec: TrainSpec | SampleSpec, parts: Parts, size: Size) -> list[str]:
    latent = (parts.vae.latent_channels, *parts.vae.latent_size(size))
    width = parts.text_encoder.width
    text = f"{parts.text_encoder.max_length} tokens of {width}" if width else "class labels"
    source = spec.model.options.get("from_pretrained") or "random weights"
    accelerator = spec.accelerator
    lines = [] if accelerator is None else [f"accelerator  {accelerator.type}"]
    if accelerator is not None and not is_installed(accelerator):
        lines = [f"accelerator  {accelerator.type}: not installed, so this can be composed here but not run"]
    return [
        f"model        {spec.model.type}: {_count(parts.denoiser)} parameters, {source}",
        f"vae          {spec.vae.type}: {_count(parts.vae)} parameters",
        f"text         {spec.text_encoder.type}: {_count(parts.text_encoder)} parameters, {text}",
        f"scheduler    {spec.scheduler.type}",
        f"video        {' x '.join(map(str, size))} (frames x height x width) -> latents {' x '.join(map(str, latent))}",
        *lines,
    ]


def _count(part: Any) -> str:
    return f"{sum(each.numel() for each in part.parameters()):,}" if isinstance(part, nn.Module) else "no"


def _measure(parts: Parts, batch_size: int, size: Size, *, train: bool) -> tuple[int, int]:
    latents, timestep, conditioning = meta_inputs(parts, batch_size, size)
    return measure(lambda: parts.denoiser(latents, timestep, conditioning), parts.denoiser, train=train)


def measure(call: Callable[[], Tensor], module: nn.Module, *, train: bool) -> tuple[int, int]:
    """FLOPs of a call (with backward, if training), and bytes saved for backward, both counted on the meta device.

    Args:
        call: Uses ``module``, whose parameters are not counted as saved.
    """
    from torch.utils.flop_counter import FlopCounterMode

    saved: dict[Any, int] = {}
    owned = {id(each) for each in module.parameters()}

    def note(tensor: Tensor) -> Tensor:
        base = tensor._base if tensor._base is not None else tensor
        if id(base) not in owned:
            saved[id(tensor)] = tensor.numel() * tensor.element_size()
            kept.append(tensor)  # keeps ids unique
        return tensor

    kept: list[Tensor] = []
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(note, lambda each: each):
        with torch.set_grad_enabled(train):
            prediction = call()
        if train:
            torch.autograd.backward(prediction.sum())
    return counter.get_total_flops(), sum(saved.values())


def meta_inputs(parts: Parts, batch: int, size: Size) -> tuple[Tensor, Tensor, Conditioning]:
    """What the denoiser would be called with, on the meta device.

    Raises:
        ShapeError: The autoencoder can't do this size.
    """
    encoder = parts.text_encoder

    def each(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(batch, *shape, dtype=dtype, device="meta")

    has_text = encoder.width is not None
    conditioning = Conditioning(
        text_embedding=each(encoder.max_length, encoder.width or 0) if has_text else None,
        text_mask=each(encoder.max_length, dtype=torch.bool) if has_text else None,
        labels=None if has_text else each(dtype=torch.int64),
        fps=each(),
        height=each(),
        width=each(),
        num_frames=each(),
        aspect_ratio=each(),
    )
    return each(parts.vae.latent_channels, *parts.vae.latent_size(size)), each(), conditioning
