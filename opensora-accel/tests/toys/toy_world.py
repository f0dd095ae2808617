"""A small world in place of networks: a denoiser whose answers are known, and a scheduler that follows it.

The data are mixtures of normals. The best denoiser of a mixture is a formula; near the middle between two means it decides
for one of them, as networks do, so that small errors can grow.

Shapes: B batch, C latent channels, T H W latent frames and size, D all of them, K means.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import attrs
import torch
from attrs import define, field, frozen
from torch import Tensor, nn

from opensora.core.accelerator import Single, SingleSpec
from opensora.core.conditioning import Conditioning
from opensora.core.config.structure import ComponentConfig
from opensora.core.denoising import Denoising
from opensora.core.hooking import Hooks, build_hooks
from opensora.core.pipelines.sample_spec import SampleSpec
from opensora.core.protocols import Denoiser, SampleState
from opensora.core.randomness import Draws, SampleDraws, SampleKey

SIZE = (2, 3, 2, 2)


@frozen(kw_only=True)
class FlowSpec:
    num_sampling_steps: int = 30
    is_twice: bool = False
    eta: float = 0.0


class Flow:
    """Euler's steps, or Heun's, which ask twice; with noise on the way if eta is not 0."""

    Spec = FlowSpec
    num_timesteps = 1000

    def __init__(self, spec: FlowSpec) -> None:
        self.spec = spec
        self.adds_noise = spec.eta > 0

    def guide(self, denoiser: Denoiser) -> Guided:
        return Guided(denoiser)

    def sample(
        self,
        denoiser: Denoiser,
        noise: Tensor,
        conditioning: Conditioning,
        *,
        draws: Draws,
        frame_mask: Tensor | None = None,
        after: SampleState | None = None,
    ) -> Iterator[SampleState]:
        steps = self.spec.num_sampling_steps
        times = [1 - step / steps for step in range(steps + 1)]
        told, latents = conditioning, noise if after is None else after.latents
        for step, (u, v) in enumerate(pairwise(times)):
            moves = torch.ones(len(noise), noise.shape[2]) if frame_mask is None else (frame_mask >= u - 1e-6).float()
            if frame_mask is not None and (told is conditioning or not torch.equal(told.frame_mask, moves.bool())):
                told = conditioning.replace(frame_mask=moves.bool())
            if after is not None and step <= after.step:
                continue

            def ask(x: Tensor, time: float, told: Conditioning = told) -> Tensor:
                return denoiser(x, torch.full((len(x),), 1000 * time), told)[:, : x.shape[1]]

            velocity = ask(latents, u)
            if self.spec.is_twice and v > 0:
                velocity = (velocity + ask(latents + (u - v) * velocity, v)) / 2
            latents = latents + (u - v) * velocity * moves[:, None, :, None, None]
            yield SampleState(step=step, num_steps=steps, timestep=1000 * u, latents=latents, denoised=latents)


@define
class Guided:
    """Guidance, which needs one call of the mixture here: a larger scale pulls harder."""

    denoiser: Denoiser
    scale: float = 1.0

    def __call__(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        return self.scale * self.denoiser(latents, timestep, conditioning)


class Mixture(nn.Module):
    """The velocity of the best denoiser; the text says how far apart the means are. A second half of channels is no use."""

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        means = torch.randn(6, *SIZE, generator=torch.Generator().manual_seed(seed))
        self.means = nn.Parameter(means)
        self.calls: list[tuple[int, float]] = []
        """Rows and timestep of each."""

    def forward(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        self.calls.append((len(latents), timestep.max().item()))
        assert conditioning.text_embedding is not None
        apart = conditioning.text_embedding.mean((1, 2))[:, None, None]
        u = (timestep / 1000)[:, None, None]
        x, means = latents.flatten(1)[:, None], self.means.flatten(1)[None] * apart  # [B, 1, D], [B, K, D]
        variance = (0.3 * (1 - u)) ** 2 + u**2
        odds = (-(x - (1 - u) * means).square().sum(-1, keepdim=True) / (2 * variance)).softmax(1)
        clean = means + 0.09 * (1 - u) / variance * (x - (1 - u) * means)
        velocity = ((odds * clean).sum(1) - x[:, 0]) / u[:, 0].clamp(min=1e-3)
        velocity = velocity.view_as(latents)
        return torch.cat([velocity, latents.tanh()], dim=1)


def told(apart: Sequence[float]) -> Conditioning:
    """Conditions of as many videos."""
    return Conditioning(text_embedding=torch.tensor(apart)[:, None, None].expand(-1, 2, 3).clone())


@define(eq=False)
class World:
    """A pipeline in small."""

    spec: SampleSpec
    hooks: Hooks
    network: nn.Module
    guided: Guided
    denoiser: Denoiser
    scheduler: Flow

    @classmethod
    def build(cls, *hooks: dict[str, Any], network: nn.Module | None = None, **scheduler: Any) -> World:
        """As the pipelines compose it."""
        chosen = [ComponentConfig(each["type"], {k: v for k, v in each.items() if k != "type"}) for each in hooks]
        spec = SampleSpec(
            model=ComponentConfig("toy"),
            scheduler=ComponentConfig("toy-flow", scheduler),
            image_size=(16, 16),
            hooks=chosen,
        )
        network = Mixture() if network is None else network
        relay = build_hooks([], chosen)
        relay.denoiser_built(denoiser=network, spec=spec)
        flow = Flow(FlowSpec(**scheduler))
        guided = flow.guide(network.eval())
        denoiser: Denoiser = guided
        for wrapper in relay.denoiser_wrapper(spec=spec):
            denoiser = wrapper(denoiser)
        return cls(spec, relay, network, guided, denoiser, flow)

    def start(
        self,
        seeds: Sequence[int],
        apart: Sequence[float] | None = None,
        *,
        frame_mask: Tensor | None = None,
        conditioning: Conditioning | None = None,
        **changes: Any,
    ) -> Denoising:
        keys = [SampleKey(seed, 0) for seed in seeds]
        denoising = Denoising(
            scheduler=self.scheduler,
            guided=self.guided,
            denoiser=self.denoiser,
            noise=SampleDraws(keys).normal("latents", SIZE),
            conditioning=conditioning or told(apart or [1.0] * len(keys)),
            frame_mask=frame_mask,
            keys=keys,
            hooks=self.hooks,
        )
        return attrs.evolve(denoising, **changes)

    def plugin(self, name: str) -> Any:
        """The hook object."""
        return next(each.plugin for each in self.hooks.denoising_step.get_hookimpls() if each.plugin_name == name)


@frozen(kw_only=True)
class Clock:
    phases: list[str] = field(factory=list)

    def phase(self, name: str) -> Any:
        from contextlib import nullcontext

        self.phases.append(name)
        return nullcontext()


@frozen(kw_only=True)
class Sampler:
    clock: Clock = field(factory=Clock)


@define(kw_only=True)
class Run:
    """What a hook of the sampling command sees of it."""

    world: World
    requests: Sequence[Any]
    starts: Any
    """(requests) -> Denoising."""
    started: list[Any] = field(factory=list)
    sampler: Sampler = field(factory=Sampler)
    accelerator: Single = field(factory=lambda: Single(SingleSpec(), device="cpu"))

    @property
    def spec(self) -> SampleSpec:
        return self.world.spec

    def start(self, requests: Sequence[Any]) -> Denoising:
        self.started.extend(requests)
        return self.starts(requests)
