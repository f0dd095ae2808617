"""What every scheduler must do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from attrs import define, field, frozen
from torch import Tensor

from opensora.core.components import build
from opensora.core.conditioning import Conditioning
from opensora.core.protocols import Scheduler
from opensora.core.randomness import Draws, SampleDraws, SampleKey
from opensora.core.testing._report import Report

__all__ = ["ToyDenoiser", "check_scheduler"]


@define
class CountedDraws:
    """Draws, and how many were taken."""

    draws: Draws
    taken: list[str] = field(factory=list)
    """Their names."""

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """See `Draws.normal`."""
        self.taken.append(name)
        return self.draws.normal(name, shape)

    def uniform(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """See `Draws.uniform`."""
        self.taken.append(name)
        return self.draws.uniform(name, shape)

    def integers(self, name: str, high: int, shape: Sequence[int] = ()) -> Tensor:
        """See `Draws.integers`."""
        self.taken.append(name)
        return self.draws.integers(name, high, shape)


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
    given_within: float = 0.0,
    **options: Any,
) -> Report:
    """Loss per sample, gradients, frame masks; sampling: states, determinism, batch independence, going on, given frames.

    Args:
        name: As in ``type=``.
        on_pass: Called with each check's title as it passes.
        trains: Whether it has a loss.
        samples: Whether it samples.
        num_sampling_steps: Steps to try.
        given_within: How far frames that are given may change in sampling. 0: they are kept bit for bit.
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
        check_guidance(report, scheduler, denoiser, latents, conditioning)
        check_sampling(report, scheduler, denoiser, latents, conditioning, draws)
        check_going_on(report, scheduler, denoiser, latents, conditioning, draws)
        check_given_frames(report, scheduler, denoiser, latents, conditioning, draws, given_within)
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
def check_guidance(
    report: Report, scheduler: Scheduler, denoiser: ToyDenoiser, latents: Tensor, conditioning: Conditioning
) -> None:
    """Guidance keeps shapes, and where it has a scale, 1 turns it off."""
    timestep = torch.full((3,), 500.0)
    alone = denoiser(latents, timestep, conditioning)
    guided = scheduler.guide(denoiser)
    with report.checking("guidance predicts in the shape of the denoiser"):
        prediction = guided(latents, timestep, conditioning)
        assert prediction.shape == alone.shape, f"got {list(prediction.shape)}, expected {list(alone.shape)}"
    with report.checking("guidance at scale 1 is the denoiser itself"):
        if hasattr(guided, "scale"):
            guided.scale = 1.0
            assert torch.equal(guided(latents, timestep, conditioning), alone)


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
    with report.checking("adds_noise says whether sampling draws random numbers"):
        counted = CountedDraws(draws)
        list(scheduler.sample(denoiser, noise.clone(), conditioning, draws=counted))
        announced = getattr(scheduler, "adds_noise", False)
        assert announced == bool(counted.taken), f"adds_noise is {announced}, and it drew {counted.taken or 'nothing'}"


@torch.no_grad()
def check_going_on(
    report: Report,
    scheduler: Scheduler,
    denoiser: ToyDenoiser,
    noise: Tensor,
    conditioning: Conditioning,
    draws: SampleDraws,
) -> None:
    """Behind any state the rest is as in the unbroken run, with frames that are given or join later too."""
    frame_mask = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.5, 1.0]])
    for mask in (None, frame_mask):
        with_frames = "" if mask is None else ", with given frames"
        with report.checking(f"sampling goes on from any state, bit for bit{with_frames}"):
            states = list(scheduler.sample(denoiser, noise.clone(), conditioning, draws=draws, frame_mask=mask))
            for state in states:
                rest = list(scheduler.sample(denoiser, noise, conditioning, draws=draws, frame_mask=mask, after=state))
                expected = states[state.step + 1 :]
                assert [each.step for each in rest] == [each.step for each in expected], f"after step {state.step}"
                same = all(torch.equal(a.latents, b.latents) for a, b in zip(rest, expected, strict=True))
                assert same, f"other latents after step {state.step}"


@torch.no_grad()
def check_given_frames(
    report: Report,
    scheduler: Scheduler,
    denoiser: ToyDenoiser,
    noise: Tensor,
    conditioning: Conditioning,
    draws: SampleDraws,
    within: float,
) -> None:
    """A frame of mask 0 comes back, the others are generated."""
    frame_mask = torch.tensor([[0.0, 1.0]] * 3)
    with report.checking("frames that are given are kept"):
        *_, last = scheduler.sample(denoiser, noise.clone(), conditioning, draws=draws, frame_mask=frame_mask)
        change = (last.latents - noise)[:, :, 0].abs().max().item()
        assert change <= within, f"they change by up to {change:g}, and may by {within:g}"
        assert not torch.equal(last.latents[:, :, 1], noise[:, :, 1]), "the others are kept too"
