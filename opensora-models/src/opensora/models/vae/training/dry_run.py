"""``--dry-run`` of the pipelines for autoencoders: sizes, and for training an estimate of memory and compute."""

from __future__ import annotations

from typing import Any

from torch import nn

from opensora.core.blocks import checkpoint_activations
from opensora.core.components import build, construct, load, structure_spec
from opensora.core.composing import on_meta
from opensora.core.errors import DataError
from opensora.core.orders import SampleOrder, Slicing
from opensora.core.pipelines.dry_run import declared_size, describe_memory, measure
from opensora.core.pipelines.train import clip_size, count_steps
from opensora.core.protocols import Dataset, Size
from opensora.core.randomness import SampleDraws, SampleKey
from opensora.models.vae.lpips import LPIPS
from opensora.models.vae.training.specs import SampleVAESpec, TrainVAESpec
from opensora.models.vae.training.train import build_discriminator, build_learner

__all__ = ["describe_reconstruction", "describe_training"]


def describe_training(spec: TrainVAESpec) -> str:
    """Models, sizes, losses, steps, and an estimate of memory and compute for one process."""
    dataset, size, lines = _describe_data(spec)
    if size is None:
        return "\n".join([*lines, "The size of the clips is not known, so nothing more can be said."])
    with on_meta(True):
        lpips = LPIPS() if spec.needs_lpips else None
    learner = build_learner(spec, lpips=lpips, meta=True)
    discriminator = build_discriminator(spec, size, meta=True)
    lines += _describe_model(spec, learner.vae, size)
    trained = sum(each.numel() for each in learner.parameters() if each.requires_grad)
    lines.append(f"trained      {trained:,} parameters; losses: {', '.join(_losses(spec))}")
    if discriminator:
        assert spec.discriminator is not None
        lines.append(f"adversary    {spec.discriminator.type}: {_count(discriminator)} parameters")
    if dataset:
        slicing = Slicing(batch_size=spec.batch_size, accumulation=spec.accumulation_steps)
        steps = count_steps(spec, SampleOrder.of(dataset, spec.seed), slicing)
        epochs = steps * slicing.samples_per_step / len(dataset)
        lines.append(f"steps        {steps:,} of {slicing.samples_per_step} samples a process ({epochs:.1f} epochs)")
    if spec.grad_checkpoint:
        checkpoint_activations(learner.vae, spec.grad_checkpoint)
    with on_meta(True):
        video = learner.losses.logvar.new_empty((spec.batch_size, 3, *size))
    draws = SampleDraws([SampleKey(spec.seed, index) for index in range(spec.batch_size)], "meta")
    flops, activations = measure(lambda: learner(video, draws).loss, learner, train=True)
    adversary = sum(each.numel() for each in discriminator.parameters()) if discriminator else 0
    lines.append(
        describe_memory(
            sum(each.numel() for each in learner.vae.parameters()) + adversary,
            trained + adversary,
            averaged=trained if spec.ema_decay else 0,
            activations=activations,
            without="LPIPS's weights and the discriminator's activations",
        )
    )
    lines.append(f"compute      {flops / 1e12:.3f} TFLOP a micro-batch of {spec.batch_size}, forward and backward")
    return "\n".join(lines)


def describe_reconstruction(spec: SampleVAESpec) -> str:
    """What would be encoded and decoded, and by what."""
    dataset, size, lines = _describe_data(spec)
    with on_meta(True):
        vae = construct(load("vaes", spec.model.type), structure_spec("vaes", spec.model), meta=True)
    if dataset:
        count = min(len(dataset), spec.num_samples or len(dataset))
        lines.append(f"samples      {count:,}, {spec.batch_size} at a time in each process")
    return "\n".join([*lines, *_describe_model(spec, vae, size)])


def _describe_data(spec: TrainVAESpec | SampleVAESpec) -> tuple[Dataset | None, Size | None, list[str]]:
    """The dataset, the size of its clips as far as it is known, and a line about both."""
    try:
        dataset: Dataset = build("datasets", spec.dataset, needs_text=False)
    except DataError as error:
        return None, declared_size(spec.dataset), [f"data         {spec.dataset.type}: not readable yet: {error}"]
    return dataset, clip_size(dataset, spec.seed), [f"data         {spec.dataset.type}: {len(dataset):,} samples"]


def _describe_model(spec: TrainVAESpec | SampleVAESpec, vae: Any, size: Size | None) -> list[str]:
    source = spec.model.options.get("from_pretrained") or "weights of its parts"
    lines = [f"model        {spec.model.type}: {_count(vae)} parameters, {source}"]
    for name, part in (
        ("spatial", getattr(vae, "spatial_vae", None)),
        ("temporal", getattr(vae, "temporal_vae", None)),
    ):
        if isinstance(part, nn.Module):
            lines.append(f"  {name:10} {_count(part)} parameters")
    if size:
        latent = (vae.latent_channels, *vae.latent_size(size))
        sizes = f"{' x '.join(map(str, size))} (frames x height x width) -> latents {' x '.join(map(str, latent))}"
        lines.append(f"video        {sizes}")
    return lines


def _losses(spec: TrainVAESpec) -> list[str]:
    used = {
        "pixels": spec.use_real_rec_loss,
        f"LPIPS x {spec.perceptual_loss_weight:g}" if spec.perceptual_loss_weight else "": spec.needs_lpips,
        f"KL x {spec.kl_loss_weight:g}" if spec.kl_loss_weight else "": spec.use_real_rec_loss and spec.kl_loss_weight,
        "latents": spec.use_z_rec_loss,
        "identity of images": spec.use_image_identity_loss,
        "adversarial": spec.discriminator is not None,
    }
    return [name for name, is_used in used.items() if is_used]


def _count(module: nn.Module) -> str:
    return f"{sum(each.numel() for each in module.parameters()):,}"
