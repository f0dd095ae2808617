"""What every scheduler must do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from opensora.core.components import build
from opensora.core.conditioning import Conditioning
from opensora.core.protocols import Scheduler
from opensora.core.randomness import SampleDraws, SampleKey
from opensora.core.testing._report import Report

__all__ = ["ToyDenoiser", "check_scheduler"]


@frozen
class ToyDenoiser:
    """A smooth function in place of a network: [B, C, T, H, W] -> [B, 2C, T, H, W]. A dropped text pulls the other way."""

    weight: Tensor
    """A scalar; requires gradients, to see whether a loss reaches the denoiser."""

    def __call__(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """See `Denoiser`."""

        def column(values: Tensor) -> Tensor:
            return values.view(-1, 1, 1, 1, 1)

        assert conditioning.text_embedding is not None
        pull = conditioning.text_embedding.mean((1, 2))
        if conditioning.dropped is not None:
            pull = torch.where(conditioning.dropped, -pull, pull)
        level = column(timestep.float() / 1000)
        prediction = self.weight * ((0.2 + 0.7 * level) * latents + 0.3 * (1 - level) * column(pull))
        return torch.cat([prediction, 0.3 * latents.tanh()], dim=1)


def check_scheduler(
    name: str,
    *,
    on_pass: Callable[[str], None] | None = None,
    trains: bool = True,
    samples: bool = True,
    num_sampling_steps: int = 4,
    **options: Any,
) -> Report:
    """Loss per sample, gradients, frame masks; sampling: states, determinism, batch independence.

    Args:
        name: As in ``type=``.
        on_pass: Called with each check's title as it passes.
        trains: Whether it has a loss.
        samples: Whether it samples.
        num_sampling_steps: Steps to try.
        options: Further options of the component's ``Spec``.

    Raises:
        AssertionError: A check failed.
    """
    scheduler: Scheduler = build("schedulers", {"type": name, "num_sampling_steps": num_sampling_steps, **options})
    report = Report(name, on_pass=on_pass)
    denoiser = ToyDenoiser(torch.ones((), requires_grad=True))
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 4, 2, 5, 6, generator=generator)
    conditioning = Conditioning(
        text_embedding=torch.randn(3, 2, 8, generator=generator),
        height=torch.full((3,), 512.0),
        width=torch.full((3,), 512.0),
        num_frames=torch.full((3,), 17.0),
    )
    draws = SampleDraws([SampleKey(0, index) for index in range(3)])
    if trains:
        check_loss(report, scheduler, denoiser, latents, conditioning, draws)
    if samples:
        check_sampling(report, scheduler, denoiser, latents, conditioning, draws)
    return report


def check_loss(
    report: Report,
    scheduler: Scheduler,
    denoiser: ToyDenoiser,
    latents: Tensor,
    conditioning: Conditioning,
    draws: SampleDraws,
) -> None:
    """One finite loss a sample, that depends on this sample alone and reaches the denoiser."""
    with report.checking("loss is [B] and finite"):
        losses = scheduler.loss(denoiser, latents, conditioning, draws=draws)
        assert losses.shape == (3,), f"got {list(losses.shape)}"
        assert losses.isfinite().all()
    with report.checking("loss is the same for the same draws, whatever the batch"):
        alone = scheduler.loss(denoiser, latents[1:2], conditioning[1:2], draws=SampleDraws(draws.keys[1:2]))
        torch.testing.assert_close(alone, losses[1:2], rtol=1e-5, atol=1e-6)
    with report.checking("loss has a gradient"):
        (gradient,) = torch.autograd.grad(losses.sum(), denoiser.weight)
        assert gradient.isfinite()
        assert gradient != 0
    with report.checking("frames that are given don't count in the loss"):
        mask = torch.tensor([[False, True]] * 3)
        before = scheduler.loss(denoiser, latents, conditioning.replace(frame_mask=mask), draws=draws)
        changed = latents.clone()
        changed[:, :, 0] += 1
        after = scheduler.loss(denoiser, changed, conditioning.replace(frame_mask=mask), draws=draws)
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def check_sampling(
    report: Report,
    scheduler: Scheduler,
    denoiser: ToyDenoiser,
    noise: Tensor,
    conditioning: Conditioning,
    draws: SampleDraws,
) -> None:
    """States count up, the result is finite, repeatable, and independent of the batch."""
    with report.checking("sampling yields its state at each step"):
        states = list(scheduler.sample(denoiser, noise.clone(), conditioning, draws=draws))
        assert states, "not one state"
        assert [state.step for state in states] == list(range(states[0].num_steps))
        assert all(state.latents.shape == state.denoised.shape == noise.shape for state in states)
        times = [state.timestep for state in states]
        assert times == sorted(times, reverse=True), f"timesteps don't fall: {times}"
    with report.checking("sampling ends in finite latents"):
        assert states[-1].latents.isfinite().all()
    with report.checking("sampling again gives the same"):
        *_, again = scheduler.sample(denoiser, noise.clone(), conditioning, draws=draws)
        assert torch.equal(again.latents, states[-1].latents)
    with report.checking("sampling alone gives the same as in a batch"):
        *_, alone = scheduler.sample(denoiser, noise[2:].clone(), conditioning[2:], draws=SampleDraws(draws.keys[2:]))
        torch.testing.assert_close(alone.latents, states[-1].latents[2:], rtol=1e-5, atol=1e-5)
