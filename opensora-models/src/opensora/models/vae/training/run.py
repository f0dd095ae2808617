"""How an autoencoder is trained: by the loop that trains denoisers, and beside it a discriminator with its own optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import attrs
import torch
from attrs import define, field
from torch import Tensor, nn

from opensora.core.checkpoints import Checkpoint
from opensora.core.errors import CheckpointError
from opensora.core.loading import Batch, stand_in
from opensora.core.optimization import restore_optimizer
from opensora.core.pipelines.loop import Counters, LoopRun
from opensora.models.vae.discriminators import Discriminator
from opensora.models.vae.losses import DiscriminatorLoss, GeneratorLoss, LeCamEMA
from opensora.models.vae.training.learner import Learned, VAELearner, choose_length
from opensora.models.vae.training.specs import TrainVAESpec

__all__ = ["Adversary", "Contest", "Rebuilt", "TrainVAERun"]


class Rebuilt(NamedTuple):
    """What the discriminator learns from after the autoencoder's step."""

    video: Tensor
    x_rec: Tensor
    """Detached."""
    weight: float
    """Share of the micro-batch that could be read."""


class Contest(nn.Module):
    """The discriminator on real videos and on reconstructions, as one network."""

    def __init__(self, discriminator: Discriminator) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of either."""
        return self.discriminator.judge(real).float(), self.discriminator.judge(fake).float()


@define(kw_only=True, eq=False)
class Adversary:
    """The discriminator's side of a run."""

    discriminator: Discriminator
    judge: Callable[[Tensor], Tensor]
    """Logits under mixed precision, for the autoencoder's loss."""
    contest: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """Logits of real and rebuilt, with the exchange of gradients, for its own."""
    optimizer: torch.optim.Optimizer
    loss: DiscriminatorLoss
    generator_loss: GeneratorLoss
    lecam: LeCamEMA = field(factory=LeCamEMA)

    def generator_term(self, learned: Learned, last_layer: Tensor, *, step: int) -> Tensor:
        """The autoencoder's adversarial loss, a scalar. The discriminator gets no gradients of it."""
        assert learned.x_rec is not None  # there is a discriminator
        self.discriminator.requires_grad_(False)
        try:
            logits = self.judge(learned.x_rec).float()
            return self.generator_loss(logits, learned.nll.mean(), last_layer, step=step)
        finally:
            self.discriminator.requires_grad_(True)

    def learn(self, run: TrainVAERun, rebuilt: list[Rebuilt], *, lr: float, step: int) -> float:
        """Make the discriminator's step.

        Returns:
            The norm of its gradients; NaN if the step was left out.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        logits = []
        for index, one in enumerate(rebuilt):
            with run.accelerator.micro_step(last=index == len(rebuilt) - 1):
                real = one.video.detach().requires_grad_(bool(self.loss.gradient_penalty_loss_weight))
                real_logits, fake_logits = self.contest(real, one.x_rec)
                terms = self.loss(real_logits, fake_logits, step=step, ema=self.lecam, real=real)
                loss = torch.stack(terms).sum() * one.weight
                run.accelerator.backward(loss / len(rebuilt))
            run.note("disc_loss", loss)
            if self.loss.lecam_loss_weight:
                weight = torch.tensor(one.weight, device=real.device)
                means = torch.stack([real_logits.mean(), fake_logits.mean(), weight.new_ones(())])
                logits.append((means * weight).detach())
        if logits:
            real_sum, fake_sum, weight_sum = run.accelerator.mean(torch.stack(logits).sum(0)).tolist()
            if weight_sum and math.isfinite(real_sum + fake_sum):
                self.lecam.update(real_sum / weight_sum, fake_sum / weight_sum)
        parameters = list(self.discriminator.parameters())
        return run.accelerator.update(self.optimizer, parameters, grad_clip=run.spec.grad_clip)


@define(kw_only=True, eq=False)
class TrainVAERun(LoopRun):
    """A run that trains an autoencoder."""

    spec: TrainVAESpec
    learner: VAELearner
    learn: Callable[..., Learned]
    """The learner with mixed precision and the exchange of gradients."""
    last_layer: nn.Parameter
    adversary: Adversary | None
    rebuilt: list[Rebuilt] = field(factory=list)
    """Of this step's micro-batches, for the discriminator."""

    def loss(self, batch: Batch) -> Tensor:
        """See `LoopRun.loss`."""
        used, read = (batch, len(batch)) if len(batch) else (stand_in(self.clip_size), 0)
        device, step = self.accelerator.device, self.counters.step
        length = choose_length(self.spec, used.video.shape[2], step=step)
        video = used.video[:, :, :length].to(device, non_blocking=True)
        learned = self.learn(video, used.draws(device))
        share = read / self.slicing.batch_size
        for name, term in learned.terms.items():
            self.note(name, term.mean() * share)
        loss = learned.loss.mean()
        if self.adversary and self.adversary.loss.is_active(step):
            assert learned.x_rec is not None  # there is a discriminator
            self.rebuilt.append(Rebuilt(video, learned.x_rec.detach(), share))
            if step >= self.spec.discriminator_start:
                adversarial = self.adversary.generator_term(learned, self.last_layer, step=step)
                self.note("adversarial_loss", adversarial * share)
                loss = loss + adversarial
        return loss * share

    def step_optimizer(self, lr: float) -> float:
        """The autoencoder's step, then the discriminator's on the same reconstructions; NaN if either was left out."""
        norm = LoopRun.step_optimizer(self, lr)
        rebuilt, self.rebuilt = self.rebuilt, []
        if self.adversary and rebuilt:
            own_norm = self.adversary.learn(self, rebuilt, lr=lr, step=self.counters.step)
            norm = math.nan if math.isnan(own_norm) else norm
        return norm

    def checkpoint(self) -> Checkpoint:
        """See `LoopRun.checkpoint`."""
        own = LoopRun.checkpoint(self)
        tensors, optimizer = dict(own.tensors), dict(own.optimizer)
        optimizer["logvar"] = self.learner.losses.logvar.detach().cpu()
        if self.adversary:
            tensors["discriminator"] = self.adversary.discriminator.state_dict()
            optimizer["discriminator"] = self.adversary.optimizer.state_dict()
            optimizer["lecam"] = {"real": self.adversary.lecam.real, "fake": self.adversary.lecam.fake}
        return attrs.evolve(own, tensors=tensors, optimizer=optimizer)

    def restore(self, checkpoint: Checkpoint) -> Counters:
        """See `LoopRun.restore`.

        Raises:
            CheckpointError: There is a discriminator in this config and none in the checkpoint, or the reverse.
        """
        if ("discriminator" in checkpoint.tensors) != (self.adversary is not None):
            has, lacks = ("This config", "the checkpoint") if self.adversary else ("The checkpoint", "this config")
            raise CheckpointError(
                f"{has} has a discriminator, {lacks} has none. To go on with the same weights as a new run, "
                "give the run folder to model.from_pretrained instead of load."
            )
        counters = LoopRun.restore(self, checkpoint)
        with torch.no_grad():
            self.learner.losses.logvar.copy_(checkpoint.optimizer["logvar"])
        if self.adversary:
            self.adversary.discriminator.load_state_dict(checkpoint.tensors["discriminator"])
            restore_optimizer(self.adversary.optimizer, checkpoint.optimizer["discriminator"])
            lecam: dict[str, Any] = checkpoint.optimizer["lecam"]
            self.adversary.lecam.real, self.adversary.lecam.fake = lecam["real"], lecam["fake"]
        return counters
