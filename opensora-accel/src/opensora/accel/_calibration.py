"""What a few trajectories, sampled in full, tell about others of their kind: which outputs follow from earlier ones, and how
much an error in one of them changes the result.

An output is foreseen as a weighted sum of the last few that were evaluated. The weights are those of least squares on the
calibrated trajectories, for which the inner products of each one's outputs suffice. So nothing is assumed of how outputs
change with the timestep, and there are no numbers to be found for each model. How wrong that is, and how many outputs to
look back to, is told by foreseeing each trajectory with the weights of the others.

The errors of several outputs are added as if they were at right angles: what least squares leave over is at right angles to
what it was given. Whatever that neglects is in the amplification, which is measured.

Shapes: V calibrated videos, K calls of the denoiser for each, S steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from attrs import field, frozen
from torch import Tensor

from opensora.core.errors import ConfigError

__all__ = ["Calibration", "Foresight", "Plan"]

REMEMBERED = 3
"""How many evaluated outputs an output is foreseen from."""
WARM_UP = 2
"""Calls at the start that are evaluated in any case: the first, and one that shows how well this video can be foreseen."""
_UNCERTAIN = 1e-4
"""The square of how well an output is taken to be known, relatively: least squares would else trust in differences of outputs
that are not what they would be had all been evaluated."""
_UNSEEN = 0.1
"""For how long, as a share of all calls, nothing may be evaluated."""
_AROUND = 0.05
"""How far away, as a share of all calls, errors are looked for."""
_ROUNDING = 1e-6
_THRESHOLDS = 80
"""How many are tried, from a hundredth of the budget up."""


_Calls = tuple[int, tuple[int, ...]]
"""One that is foreseen, and those that it is foreseen from."""


@frozen
class Foresight:
    """How an output is made of earlier ones."""

    weights: tuple[float, ...]
    error: float
    """Length of what such weights miss in videos that they were not fitted to, as a share of the length of the final latents."""
    worst: float
    """The same, but of this call and those around it the largest. Where outputs change fast, they do so a little earlier in one
    video than in another."""


@frozen
class Plan:
    """Which calls of the calibrated trajectory would be foreseen."""

    reused: tuple[int, ...]
    error: float
    """Of the final latents, as expected: relative."""
    threshold: float
    """The largest error that one call may add."""


@frozen(kw_only=True)
class Calibration:
    """All that decides, for videos of one kind, about evaluating or foreseeing an output."""

    timesteps: tuple[float, ...]
    """[K], what the denoiser was told."""
    calls: tuple[int, ...]
    """[S], calls in each step."""
    restarts: tuple[int, ...]
    """Calls that were told other conditions than the one before, from which nothing earlier is used."""
    length: float
    """Of the final latents, their mean."""
    products: tuple[tuple[tuple[float, ...], ...], ...]
    """[V, K, K], inner products of the outputs, as shares of the final latents'."""
    sensitivities: tuple[float, ...]
    """[K], by how much the final latents change for an error in an output, both relative to the final latents."""
    amplification: float = 1.0
    """How much larger the error of a trial was than expected."""
    threshold: float = 0.0
    """See `Plan`. 0: nothing is reused."""
    evaluations: int = 0
    """That calibrating took."""
    _known: dict[_Calls, Foresight] = field(factory=dict, init=False, eq=False, repr=False)
    _fits: dict[_Calls, tuple[tuple[float, ...], float]] = field(factory=dict, init=False, eq=False, repr=False)

    def __attrs_post_init__(self) -> None:
        count = len(self.timesteps)
        tables = [each for table in self.products for each in (table, *table)]
        lengths = {len(self.sensitivities), sum(self.calls), *map(len, tables)}
        if lengths - {count}:
            raise ConfigError(f"A calibration of {count} calls has tables of other sizes: {sorted(lengths - {count})}.")

    @cached_property
    def _products(self) -> Tensor:
        return torch.tensor(self.products, dtype=torch.float64)

    def first_call(self, step: int) -> int:
        """The number of a step's first call."""
        return sum(self.calls[:step])

    def is_at(self, call: int, timestep: float) -> bool:
        """Whether a call of that number was at that timestep."""
        known = self.timesteps[call] if call < len(self.timesteps) else math.nan
        return math.isclose(timestep, known, rel_tol=1e-4, abs_tol=1e-2)

    def may_reuse(self, call: int, last: int) -> bool:
        """Whether it is not too long since the last evaluation, which alone shows how well a video can be foreseen."""
        return call - last <= math.ceil(_UNSEEN * len(self.timesteps))

    def foresee(self, call: int, past: Sequence[int]) -> Foresight:
        """How the output of ``call`` is made of those of the calls ``past``, rising, at most `REMEMBERED`."""
        key = (call, tuple(past))
        if key not in self._known:
            weights, error = self._fit_best(call, list(past))
            self._known[key] = Foresight(weights, error, self._worst_around(call, past))
        return self._known[key]

    def cost(self, call: int, past: Sequence[int]) -> float:
        """The relative error of the final latents that foreseeing this one output is expected to add."""
        return self.amplification * self.sensitivities[call] * self.foresee(call, past).worst

    def plan(self, budget: float) -> Plan:
        """The threshold that spares most calls of a calibrated trajectory, and of several such the least error.

        Args:
            budget: The error to be kept.
        """
        shares = torch.logspace(-2, 0, _THRESHOLDS, dtype=torch.float64).tolist()
        plans = [self._plan(share * budget, budget) for share in shares]
        return max(plans, key=lambda plan: (len(plan.reused), -plan.error))

    def _plan(self, threshold: float, budget: float) -> Plan:
        past: list[int] = []
        reused: list[int] = []
        squares = 0.0
        for call in range(len(self.timesteps)):
            if call in self.restarts:
                past = []
            may = len(past) >= WARM_UP and self.may_reuse(call, past[-1])
            cost = self.cost(call, past[-REMEMBERED:]) if may else math.inf
            if cost <= threshold and squares + cost**2 <= budget**2:
                reused.append(call)
                squares += cost**2
            else:
                past.append(call)
        return Plan(tuple(reused), math.sqrt(squares), threshold)

    def _worst_around(self, call: int, past: Sequence[int]) -> float:
        """The error of foreseeing this output or, from as far back, one a little earlier or later."""
        around = math.ceil(_AROUND * len(self.timesteps))
        shifts = [shift for shift in range(-around, around + 1) if past[0] + shift >= 0]
        shifts = [shift for shift in shifts if call + shift < len(self.timesteps)]
        return max(self._fit_best(call + shift, [each + shift for each in past])[1] for shift in shifts)

    def _fit_best(self, call: int, past: list[int]) -> tuple[tuple[float, ...], float]:
        """Weights, and their error; of all numbers of outputs to look back to, with the least error on unknown videos."""
        key = (call, tuple(past))
        if key not in self._fits:
            count = len(self.products)
            tries = []
            for looked_at in range(1, len(past) + 1):
                used = past[-looked_at:]
                missed = 0.0
                for video in range(count):
                    weights = self._fit(call, used, [other for other in range(count) if other != video] or [video])
                    missed += self._missed(weights, call, used, video) / count
                floor = _ROUNDING**2 * float(self._products[:, call, call].mean())
                tries.append((math.sqrt(max(missed, floor)), used))
            error, used = min(tries)
            unused = (0.0,) * (len(past) - len(used))
            self._fits[key] = (*unused, *self._fit(call, used, range(count)).tolist()), error
        return self._fits[key]

    def _fit(self, call: int, past: Sequence[int], videos: Sequence[int]) -> Tensor:
        """The weights that foresee ``videos`` best."""
        products = self._products[list(videos)].mean(0)
        known = products[past][:, past]
        uncertain = torch.diag(_UNCERTAIN * known.diagonal() + 1e-300)
        weights: Tensor = torch.linalg.solve(known + uncertain, products[past, call])
        return weights

    def _missed(self, weights: Tensor, call: int, past: Sequence[int], video: int) -> float:
        """The square of the length of what weights miss."""
        products = self._products[video]
        crossed = weights @ products[past, call]
        missed = products[call, call] - 2 * crossed + weights @ products[past][:, past] @ weights
        return float(missed.clamp(min=0.0))
