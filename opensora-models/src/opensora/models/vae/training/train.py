"""The pipeline ``train-vae``: a video autoencoder learns from clips, alone or against a discriminator.

It is `opensora.core.pipelines.train.Training` with another network: checkpoints, resuming, processes and hooks are the same.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import cast

import torch

from opensora.core.accelerator import Accelerator
from opensora.core.blocks import checkpoint_activations
from opensora.core.components import build, construct, load, structure_spec
from opensora.core.composing import on_meta
from opensora.core.config.structure import ComponentConfig
from opensora.core.errors import ConfigError
from opensora.core.hooking import build_hooks
from opensora.core.loading import UnreadableFiles
from opensora.core.optimization import build_optimizer
from opensora.core.orders import SampleOrder, Slicing
from opensora.core.pipelines.train import Training, clip_size, count_steps, makes_batches, new_listing
from opensora.core.protocols import Dataset, Size
from opensora.core.stopping import StopRequest
from opensora.models.vae.discriminators import Discriminator
from opensora.models.vae.losses import DiscriminatorLoss, DiscriminatorLossType, GeneratorLoss, GeneratorLossType
from opensora.models.vae.lpips import LPIPS, load_lpips
from opensora.models.vae.training.learner import VAELearner
from opensora.models.vae.training.run import Adversary, Contest, TrainVAERun
from opensora.models.vae.training.specs import TrainVAESpec
from opensora.models.vae.video_vae import VideoAutoencoderPipeline

__all__ = ["TrainVAE", "build_adversary", "build_dataset", "build_discriminator", "build_learner", "build_lpips"]

log = logging.getLogger(__name__)


class TrainVAE(Training):
    """Train a video autoencoder."""

    Spec = TrainVAESpec
    spec: TrainVAESpec

    def build_run(
        self, folder: Path, accelerator: Accelerator, stop: StopRequest, *, load_pretrained: bool
    ) -> TrainVAERun:
        """See `Training.build_run`."""
        spec = self.spec
        hooks = build_hooks(spec.default_hooks(), spec.hooks, without=spec.without_hooks)
        dataset = build_dataset(spec)
        slicing = Slicing(
            batch_size=spec.batch_size,
            accumulation=spec.accumulation_steps,
            world_size=accelerator.data_world_size,
            rank=accelerator.data_rank,
        )
        order = SampleOrder.of(dataset, spec.seed)
        max_steps = count_steps(spec, order, slicing)
        size = clip_size(dataset, spec.seed)
        torch.manual_seed(spec.seed)  # initial weights
        learner = build_learner(spec, load_pretrained=load_pretrained, lpips=build_lpips(spec))
        learner.vae.latent_size(size)  # refuses what is too small
        if spec.grad_checkpoint:
            log.info("Activation checkpointing of %d blocks", checkpoint_activations(learner.vae, spec.grad_checkpoint))
        adversary = build_adversary(spec, accelerator, size, load_pretrained=load_pretrained)
        learn = accelerator.prepare(learner)
        parameters = [parameter for parameter in learner.parameters() if parameter.requires_grad]
        log.info(
            "%s: %s parameters to train of %s; %s samples, %d a step, %d steps; %s on %d x %s, seed %d",
            spec.model.type,
            f"{sum(parameter.numel() for parameter in parameters):,}",
            f"{sum(parameter.numel() for parameter in learner.vae.parameters()):,}",
            f"{len(dataset):,}",
            slicing.samples_per_step,
            max_steps,
            str(accelerator.dtype).removeprefix("torch."),
            accelerator.world_size,
            accelerator.device.type,
            spec.seed,
        )
        return TrainVAERun(
            spec=spec,
            folder=folder,
            accelerator=accelerator,
            module=learner.vae,
            learner=learner,
            learn=learn,
            last_layer=learner.vae.temporal_last_layer,
            adversary=adversary,
            parameters=parameters,
            optimizer=accelerator.prepare_optimizer(build_optimizer(parameters, spec)),
            dataset=dataset,
            order=order,
            slicing=slicing,
            clip_size=size,
            unreadable=UnreadableFiles(new_listing(folder, accelerator), len(dataset), spec.max_unreadable),
            max_steps=max_steps,
            hooks=hooks,
            stop=stop,
        )

    def dry_run(self) -> str:
        """See `Training.dry_run`."""
        from opensora.models.vae.training.dry_run import describe_training

        return describe_training(self.spec)


def build_dataset(spec: TrainVAESpec) -> Dataset:
    """The dataset.

    Raises:
        ConfigError: Its clips differ in size.
    """
    dataset: Dataset = build("datasets", spec.dataset, needs_text=False)
    if makes_batches(dataset):
        raise ConfigError(
            f"{spec.dataset.type} has clips of many sizes; autoencoders are trained on one: VideoTextDataset."
        )
    return dataset


def build_learner(
    spec: TrainVAESpec, *, load_pretrained: bool = True, lpips: LPIPS | None = None, meta: bool = False
) -> VAELearner:
    """The autoencoder with its losses.

    Args:
        load_pretrained: Whether to take ``model.from_pretrained``; a checkpoint would replace those weights at once.
        meta: Build on the meta device: shapes without memory; nothing is loaded.

    Raises:
        ConfigError: The model is no autoencoder that can be trained here.
        WeightsError: Its weights can't be had.
    """
    config = spec.model
    if not load_pretrained:
        config = ComponentConfig(config.type, {**config.options, "from_pretrained": None})
    with on_meta(meta):
        vae = construct(load("vaes", config.type), structure_spec("vaes", config, path=("model",)), meta=meta)
        if not isinstance(vae, VideoAutoencoderPipeline):
            raise ConfigError(
                f'model "{config.type}" can\'t be trained here. Use VideoAutoencoderPipeline, which joins an image '
                "autoencoder (vae_2d) and a temporal one (vae_temporal), or OpenSoraVAE_V1_2."
            )
        return VAELearner(vae, spec, lpips)


def build_lpips(spec: TrainVAESpec) -> LPIPS | None:
    """LPIPS, if a loss uses it.

    Raises:
        WeightsError: Its weights can't be had.
    """
    if not spec.needs_lpips:
        return None
    try:
        return load_lpips(None if spec.perceptual_weights == "download" else spec.perceptual_weights)
    except Exception as error:
        error.add_note("perceptual_loss_weight = 0 trains without LPIPS.")
        raise


def build_discriminator(spec: TrainVAESpec, size: Size, *, meta: bool = False) -> Discriminator | None:
    """The discriminator, if there is one, with new weights.

    Raises:
        ShapeError: It can't judge videos of this (T, H, W).
    """
    if spec.discriminator is None:
        return None
    with on_meta(meta):
        discriminator = cast("Discriminator", build("discriminators", spec.discriminator))
    discriminator.check_size(size)
    return discriminator


def build_adversary(
    spec: TrainVAESpec, accelerator: Accelerator, size: Size, *, load_pretrained: bool
) -> Adversary | None:
    """The discriminator with its weights, losses and optimizer, on the device."""
    discriminator = build_discriminator(spec, size)
    if discriminator is None:
        return None
    if load_pretrained and (report := discriminator.load_pretrained()):
        log.info("Discriminator: %s", report)
    parameters = list(discriminator.train().parameters())
    log.info("Discriminator: %s parameters", f"{sum(parameter.numel() for parameter in parameters):,}")
    contest = accelerator.prepare(Contest(discriminator))
    return Adversary(
        discriminator=discriminator,
        judge=accelerator.predictor(discriminator.judge),
        contest=contest,
        optimizer=accelerator.prepare_optimizer(build_optimizer(parameters, spec)),
        loss=DiscriminatorLoss(
            discriminator_factor=spec.discriminator_factor,
            discriminator_start=spec.discriminator_start,
            discriminator_loss_type=cast("DiscriminatorLossType", spec.discriminator_loss_type),
            lecam_loss_weight=spec.lecam_loss_weight,
            gradient_penalty_loss_weight=spec.gradient_penalty_loss_weight,
        ),
        generator_loss=GeneratorLoss(
            discriminator_factor=spec.discriminator_factor,
            discriminator_start=spec.discriminator_start,
            generator_factor=spec.generator_factor,
            generator_loss_type=cast("GeneratorLossType", spec.generator_loss_type),
        ),
    )
