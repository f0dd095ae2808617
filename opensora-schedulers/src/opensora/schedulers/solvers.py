"""Solvers: how sampling gets from one noise level to the next.

Latents at a level are alpha * clean + sigma * noise. What the denoiser predicts, noise or velocity, says which clean latents
it takes them for. That changes on the way, so that they follow a differential equation, whose solution from level s to t is

    x_t = sigma_t / sigma_s x_s + alpha_t * integral of exp(l - lambda_t) clean(l) over l = lambda_s .. lambda_t

with lambda = log(alpha / sigma), which grows towards the data. Solvers differ in their guess at the course of clean(l) within
a step, mostly a polynomial through the last few predictions. So a step is a weighted sum, and a solver a function that makes
the weights of all steps from the levels; all have one signature. They don't know what is predicted, and the levels may be
those of a flow or of a diffusion process.

Source of the equation: Lu et al., DPM-Solver++, https://arxiv.org/abs/2211.01095, proposition 4.1.

Shapes: S steps between S + 1 levels; B samples, or 1 if all have the same levels; K predictions. Tensors are float64 on the
CPU, as weights are differences of numbers that lie close together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from types import MappingProxyType
from typing import Protocol

import torch
from attrs import frozen
from torch import Tensor

__all__ = [
    "Levels",
    "NOISY_SOLVERS",
    "PlacedWeights",
    "SOLVERS",
    "Solver",
    "StepWeights",
    "dpm_solver",
    "dpm_solver_sde",
    "euler",
    "euler_ancestral",
    "heun",
    "unipc",
]

_FEW_STEPS = 10
"""With fewer steps than these the last ones are of a lower order: they are long, and extrapolation goes wrong."""
_INFINITY = 1e5
"""Stands for the lambda of levels without signal or without noise: the weights have long come to their limits there."""


@frozen(kw_only=True, eq=False)
class Levels:
    """The noise levels of a sampling run, from noise to data."""

    timesteps: Tensor
    """[S + 1, B], what the denoiser is told; falling."""
    alphas: Tensor
    """[S + 1, B], share of signal; may begin with 0."""
    sigmas: Tensor
    """[S + 1, B], share of noise; may end with 0."""

    @property
    def num_steps(self) -> int:
        """S."""
        return len(self.sigmas) - 1

    def on(self, device: torch.device) -> Levels:
        """On a device, to compute with latents: timesteps as they are, the shares [S + 1, B, 1, 1, 1, 1], all in float32."""
        timesteps = self.timesteps.to(device, torch.float32)
        return Levels(
            timesteps=timesteps, alphas=_by_latents(self.alphas, device), sigmas=_by_latents(self.sigmas, device)
        )

    @cached_property
    def strides(self) -> Tensor:
        """h, by how much lambda grows in each step, [S, B]."""
        return (self.alphas.log() - self.sigmas.log()).clamp(-_INFINITY, _INFINITY).diff(dim=0)

    @cached_property
    def ratios(self) -> Tensor:
        """Of each stride to the one before, [S, B]; 0 at the first.

        After a level without signal, which is infinitely far away in lambda, they are those of the share of noise: what was
        predicted there would else be worth nothing, and the second step as blind as the first.
        """
        shares = self.sigmas / (self.alphas + self.sigmas)
        before, now, after = shares[:-2], shares[1:-1], shares[2:]
        ratios = torch.where(self.alphas[:-2] > 0, self.strides[1:] / self.strides[:-1], (now - after) / (before - now))
        return torch.cat([torch.zeros_like(self.sigmas[:1]), ratios])

    def orders(self, highest: int) -> Tensor:
        """The order of each step, [S, 1] int64: as many predictions as there are, and fewer at the end of few steps.

        A step that leads to no noise at all is of order 1: lambda goes on for ever there, and a slope would with it.
        """
        step = torch.arange(self.num_steps)
        left = self.num_steps - step if self.num_steps < _FEW_STEPS else step + 1
        orders = torch.minimum(step + 1, left).clamp(max=highest)
        ends_clean = (self.sigmas[1:] == 0).any(dim=1)
        return torch.where(ends_clean, 1, orders)[:, None]


@frozen(eq=False)
class StepWeights:
    """What the latents after each step are a sum of, each with its weight."""

    latents: Tensor
    """[S, B]: the latents before the step."""
    predictions: Tensor
    """[S, K, B]: the clean latents as foreseen before the step, and before the K - 1 steps ahead of it, newest first."""
    noise: Tensor | None = None
    """[S, B]: fresh noise. None: there is none."""
    again: StepWeights | None = None
    """The sum once more, with one prediction more, the newest: that for the latents which the first sum has led to. Where it
    has no weight, the denoiser is not asked. None: at no step."""

    def on(self, device: torch.device) -> PlacedWeights:
        """On a device, to compute with latents."""
        return PlacedWeights(
            latents=_by_latents(self.latents, device),
            predictions=_by_latents(self.predictions, device),
            noise=None if self.noise is None else _by_latents(self.noise, device),
            is_noisy=[] if self.noise is None else (self.noise != 0).any(dim=1).tolist(),
            again=None if self.again is None else self.again.on(device),
            is_twice=[] if self.again is None else (self.again.predictions[:, 0] != 0).any(dim=1).tolist(),
        )


@frozen(kw_only=True, eq=False)
class PlacedWeights:
    """`StepWeights` in float32 where the latents are, [S, ..., B, 1, 1, 1, 1], and on the host what decides about steps."""

    latents: Tensor
    predictions: Tensor
    noise: Tensor | None
    is_noisy: Sequence[bool]
    """[S]"""
    again: PlacedWeights | None
    is_twice: Sequence[bool]
    """[S]"""

    @property
    def num_remembered(self) -> int:
        """How many predictions the next step wants to know of."""
        return self.predictions.shape[1] - 1

    def sum(self, step: int, latents: Tensor, predictions: Sequence[Tensor]) -> Tensor:
        """The sum of a step, without noise. Where there are too few predictions, the oldest stands for those before it."""
        total = self.latents[step] * latents
        for index, weight in enumerate(self.predictions[step]):
            total = total + weight * predictions[min(index, len(predictions) - 1)]
        return total


class Solver(Protocol):
    """A way of solving the equation."""

    def __call__(self, levels: Levels, *, eta: float) -> StepWeights:
        """The weights of all steps.

        Args:
            levels: Where to stop by.
            eta: Of solvers that add noise: how much, from 0 (none) to 1 (as much as the reverse diffusion process).
        """
        ...


def euler(levels: Levels, *, eta: float = 0.0) -> StepWeights:
    """What is foreseen stays the same within a step. One evaluation a step, order 1.

    For a flow the steps are Euler's, for a diffusion process DDIM's without noise: Song et al.,
    https://arxiv.org/abs/2010.02502, eq. 12.
    """
    carry, gain = _carry_and_gain(levels)
    return StepWeights(carry, gain[:, None])


def euler_ancestral(levels: Levels, *, eta: float = 1.0) -> StepWeights:
    """Euler's steps to less noise than the level has, and fresh noise for the rest. Order 1.

    Source: DDIM, https://arxiv.org/abs/2010.02502, eq. 12 and 16, where eta = 1 is DDPM with its smaller variance; for
    sigma alone, Karras et al., https://arxiv.org/abs/2206.00364, and k-diffusion's ``euler_ancestral``.
    """
    sigmas = levels.sigmas
    noise = eta * sigmas[1:] * (1 - _decay(levels).square()).sqrt()
    carry = (sigmas[1:].square() - noise.square()).clamp(min=0).sqrt() / sigmas[:-1]
    return StepWeights(carry, (levels.alphas[1:] - levels.alphas[:-1] * carry)[:, None], noise)


def heun(levels: Levels, *, eta: float = 0.0) -> StepWeights:
    """Euler's step, and again with the mean of the velocities before and after it. Two evaluations a step, order 2.

    Scaled by 1 / (alpha + sigma) any process is a flow, of the velocity clean - noise over u = sigma / (alpha + sigma). A
    step to no noise stays Euler's.

    Source: Karras et al., https://arxiv.org/abs/2206.00364, algorithm 1, there over sigma / alpha.
    """
    carry, gain = _carry_and_gain(levels)
    scales = levels.alphas + levels.sigmas
    u = levels.sigmas / scales
    there = torch.where(u[1:] > 0, (u[:-1] - u[1:]) / u[1:], 0)
    is_twice = u[1:] > 0
    latents = torch.where(is_twice, (1 - there) / 2 * carry + scales[1:] / scales[:-1] / 2, carry)
    here = torch.where(is_twice, (1 - there) / 2 * gain, gain)
    again = StepWeights(latents, torch.stack([scales[1:] * there / 2, here], dim=1))
    return StepWeights(carry, gain[:, None], again=again)


def dpm_solver(levels: Levels, *, order: int, eta: float = 0.0) -> StepWeights:
    """DPM-Solver++ in its multistep form: a polynomial in lambda through the last predictions. One evaluation a step.

    Of order 2 in the midpoint form ("2M"), of order 3 exact ("3M").

    Source: Lu et al., https://arxiv.org/abs/2211.01095, section 4 and algorithm 2.
    """
    carry, gain = _carry_and_gain(levels)
    orders = levels.orders(order)
    if order == 1:
        return StepWeights(carry, gain[:, None])
    line = _line(gain, levels.ratios.where(orders > 1, 0))
    if order == 2:
        return StepWeights(carry, line)
    h = levels.strides
    parabola = _zeros(gain, 3)
    parabola[2:] = _parabola(gain[2:], levels.alphas[3:] * h[2:], h[2:], -h[1:-1], -h[1:-1] - h[:-2])
    # A point without signal is too far away for a parabola to go by.
    has_signal = torch.cat([levels.alphas[:1], levels.alphas[:1], levels.alphas[:-3]])[: len(gain)] > 0
    is_third = ((orders > 2) & has_signal)[:, None]
    return StepWeights(carry, torch.where(is_third, parabola, torch.cat([line, _zeros(gain, 1)], dim=1)))


def dpm_solver_sde(levels: Levels, *, eta: float = 1.0) -> StepWeights:
    """DPM-Solver++ 2M for the reverse diffusion process with its noise. One evaluation a step.

    Source: Lu et al., https://arxiv.org/abs/2211.01095, appendix D; eta from k-diffusion's ``dpmpp_2m_sde``.
    """
    alphas, sigmas = levels.alphas, levels.sigmas
    decay = _decay(levels) ** eta
    carry = sigmas[1:] / sigmas[:-1] * decay
    gain = alphas[1:] - alphas[:-1] * carry
    noise = sigmas[1:] * (1 - decay.square()).sqrt()
    return StepWeights(carry, _line(gain, levels.ratios.where(levels.orders(2) > 1, 0)), noise)


def unipc(levels: Levels, *, eta: float = 0.0) -> StepWeights:
    """UniPC of order 2: DPM-Solver++ 2M predicts, and the next prediction corrects it. One evaluation a step.

    Each step begins with the correction of the one before, so both make one sum. The result itself is not corrected, as that
    would take another evaluation.

    Source: Zhao et al., https://arxiv.org/abs/2302.04867, algorithms 1 and 2, with B(h) = exp(h) - 1.
    """
    carry, gain = _carry_and_gain(levels)
    orders, h = levels.orders(2), levels.strides
    line = _line(gain, levels.ratios.where(orders > 1, 0))
    correction = _zeros(gain, 3)  # of the latents before the step, by the predictions there and before
    halves = torch.stack([gain / 2, -gain / 2, torch.zeros_like(gain)], dim=1)[:-1]
    correction[1:] = halves
    if levels.num_steps > 2:
        curved = _parabola(gain[1:-1], levels.alphas[2:-1] * h[1:-1], h[1:-1], -h[:-2], h[1:-1])  # now, before, next
        curved = torch.stack([curved[:, 2], curved[:, 0] - line[1:-1, 0], curved[:, 1] - line[1:-1, 1]], dim=1)
        correction[2:] = torch.where(orders[1:-1, None] > 1, curved, halves[1:])
    predicted = torch.cat([line, _zeros(gain, 1)], dim=1)
    return StepWeights(carry, predicted + carry[:, None] * correction)


SOLVERS: Mapping[str, Solver] = MappingProxyType(
    {
        "euler": euler,
        "euler-ancestral": euler_ancestral,
        "heun": heun,
        "dpm++2m": partial(dpm_solver, order=2),
        "dpm++3m": partial(dpm_solver, order=3),
        "dpm++2m-sde": dpm_solver_sde,
        "unipc": unipc,
    }
)
"""By the name that configs use."""
NOISY_SOLVERS = frozenset({"euler-ancestral", "dpm++2m-sde"})
"""Those that add noise, if eta is not 0."""


def _carry_and_gain(levels: Levels) -> tuple[Tensor, Tensor]:
    """sigma_t / sigma_s, and alpha_t (1 - exp(-h)): the weights of a step that foresees the same all along, [S, B] each."""
    carry = levels.sigmas[1:] / levels.sigmas[:-1]
    return carry, levels.alphas[1:] - levels.alphas[:-1] * carry


def _decay(levels: Levels) -> Tensor:
    """exp(-h), [S, B]."""
    return levels.alphas[:-1] / levels.alphas[1:] * levels.sigmas[1:] / levels.sigmas[:-1]


def _line(gain: Tensor, ratios: Tensor) -> Tensor:
    """Weights of the last two predictions, of a line through them at the middle of the step, [S, 2, B]."""
    return torch.stack([gain * (1 + ratios / 2), -gain * ratios / 2], dim=1)


def _parabola(constant: Tensor, first: Tensor, h: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Weights of predictions at 0, a and b, counted in lambda from where the step begins, [S, 3, B].

    The integral of a parabola through them, of which ``constant`` and ``first`` are parts: alpha_t (1 - exp(-h)), alpha_t h.
    """
    linear = first - constant  # alpha_t times the integral of u exp(u - h) over u = 0 .. h
    square = first * h - 2 * linear  # of u^2 exp(u - h)
    return torch.stack(
        [
            (square - (a + b) * linear + a * b * constant) / (a * b),
            (square - b * linear) / (a * (a - b)),
            (square - a * linear) / (b * (b - a)),
        ],
        dim=1,
    )


def _by_latents(table: Tensor, device: torch.device) -> Tensor:
    """[..., B] to float32 [..., B, 1, 1, 1, 1]."""
    return table[..., None, None, None, None].to(device, torch.float32)


def _zeros(like: Tensor, count: int) -> Tensor:
    return like.new_zeros(like.shape[0], count, like.shape[1])
