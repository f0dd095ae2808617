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

from attrs import field, frozen

from opensora.core.errors import ConfigError

__all__ = ["Calibration", "Foresight", "Outputs", "Plan"]

REMEMBERED = 3
"""How many evaluated outputs an output is foreseen from."""
WARM_UP = 2
"""Calls at the start that are evaluated in any case: the first, and one that shows how well this video can be foreseen."""
_UNSEEN = 0.1
"""For how long, as a share of all calls, nothing may be evaluated."""
_AROUND = 0.05
"""How far away, as a share of all calls, errors are looked for."""
_UNCERTAIN = 1e-4
"""The square of how well an output is taken to be known, relatively: least squares would else trust in differences of outputs
that are not what they would be had all been evaluated."""
_ROUNDING = 1e-6
"""Relative errors below this are nothing but rounding."""
_THRESHOLDS = 80
"""How many are tried, from a hundredth of the budget up."""

_Table = tuple[tuple[float, ...], ...]
_Calls = tuple[int, tuple[int, ...]]
"""One that is foreseen, and those that it is foreseen from."""


@frozen
class Foresight:
    """How an output is made of earlier ones."""

    weights: tuple[float, ...]
    error: float
    """Length of what such weights miss in videos that they were not fitted to; the final latents' length is 1."""
    worst: float
    """The same, but the largest of this call and those around it. Where outputs change fast, they do so a little earlier in
    one video than in another."""


@frozen(kw_only=True)
class Outputs:
    """The outputs of a few videos, as far as foreseeing needs to know them."""

    products: tuple[_Table, ...]
    """[V, K, K], inner products, as shares of the squared length of the final latents."""
    _known: dict[_Calls, Foresight] = field(factory=dict, init=False, eq=False, repr=False)
    _fits: dict[_Calls, tuple[tuple[float, ...], float]] = field(factory=dict, init=False, eq=False, repr=False)

    def __attrs_post_init__(self) -> None:
        lengths = {len(each) for table in self.products for each in (table, *table)}
        if len(self.products) < 2 or len(lengths) != 1:
            raise ConfigError("products must be square tables of one size, two or more.")

    def __len__(self) -> int:
        """K."""
        return len(self.products[0])

    @cached_property
    def _others(self) -> list[_Table]:
        """[V], the mean of the products of all videos but one."""
        return [_mean([*self.products[:video], *self.products[video + 1 :]]) for video in range(len(self.products))]

    @cached_property
    def _mean(self) -> _Table:
        return _mean(self.products)

    def foresee(self, call: int, past: Sequence[int]) -> Foresight:
        """How the output of ``call`` is made of those of the calls ``past``, rising, at most `REMEMBERED`."""
        key = (call, tuple(past))
        if key not in self._known:
            weights, error = self._fit_best(call, key[1])
            self._known[key] = Foresight(weights, error, self._worst_around(call, past))
        return self._known[key]

    def _worst_around(self, call: int, past: Sequence[int]) -> float:
        """The error of foreseeing this output or, from as far back, one a little earlier or later."""
        around = math.ceil(_AROUND * len(self))
        shifts = range(max(-around, -past[0]), min(around, len(self) - 1 - call) + 1)
        return max(self._fit_best(call + shift, tuple(each + shift for each in past))[1] for shift in shifts)

    def _fit_best(self, call: int, past: tuple[int, ...]) -> tuple[tuple[float, ...], float]:
        """Weights, and their error; of all numbers of outputs to look back to, with the least error on unknown videos."""
        if (call, past) not in self._fits:
            tries = [(self._error(call, past[-count:]), count) for count in range(1, len(past) + 1)]
            error, count = min(tries)
            weights = _fit(self._mean, call, past[-count:])
            self._fits[call, past] = (*[0.0] * (len(past) - count), *weights), error
        return self._fits[call, past]

    def _error(self, call: int, past: tuple[int, ...]) -> float:
        """How much weights that are fitted to the other videos miss, the mean over all videos."""
        missed = 0.0
        for products, others in zip(self.products, self._others, strict=True):
            parts = [
                (1.0, call),
                *((-weight, each) for weight, each in zip(_fit(others, call, past), past, strict=True)),
            ]
            missed += sum(a * b * products[i][j] for a, i in parts for b, j in parts)
        floor = _ROUNDING**2 * self._mean[call][call]
        return math.sqrt(max(missed / len(self.products), floor))


def _mean(tables: Sequence[_Table]) -> _Table:
    return tuple(
        tuple(sum(column) / len(tables) for column in zip(*rows, strict=True)) for rows in zip(*tables, strict=True)
    )


def _fit(products: _Table, call: int, past: tuple[int, ...]) -> list[float]:
    """The weights of least squares. There are so few that plain numbers are quicker than tensors."""
    rows = [[*(products[i][j] for j in past), products[i][call]] for i in past]
    for index, row in enumerate(rows):
        row[index] += _UNCERTAIN * row[index] + 1e-300
    for index, row in enumerate(rows):  # the matrix is positive definite: no row needs to be exchanged
        for lower in rows[index + 1 :]:
            factor = lower[index] / row[index]
            lower[index:] = [below - factor * above for below, above in zip(lower[index:], row[index:], strict=True)]
    weights: list[float] = []
    for index in range(len(past) - 1, -1, -1):
        known = sum(a * b for a, b in zip(rows[index][index + 1 : -1], weights, strict=True))
        weights.insert(0, (rows[index][-1] - known) / rows[index][index])
    return weights


@frozen
class Plan:
    """Which calls of a calibrated trajectory would be foreseen."""

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
    outputs: Outputs
    sensitivities: tuple[float, ...]
    """[K], by how much the final latents change for an error in an output, both relative to the final latents."""
    amplification: float = 1.0
    """How much larger the error of a trial was than expected."""
    threshold: float = 0.0
    """See `Plan`. 0: nothing is reused."""
    evaluations: int = 0
    """That calibrating took."""

    def __attrs_post_init__(self) -> None:
        sizes = (len(self.timesteps), len(self.outputs), len(self.sensitivities), sum(self.calls))
        if len(set(sizes)) != 1:
            raise ConfigError(f"timesteps, outputs, sensitivities and calls must be of one size, not {sizes}.")

    def first_call(self, step: int) -> int:
        """The number of a step's first call."""
        return sum(self.calls[:step])

    def is_at(self, call: int, timestep: float) -> bool:
        """Whether a call of that number was at that timestep."""
        known = self.timesteps[call] if call < len(self.timesteps) else math.nan
        return math.isclose(timestep, known, rel_tol=1e-4, abs_tol=1e-2)

    def may_reuse(self, call: int, past: Sequence[int]) -> bool:
        """Whether enough was evaluated, and not too long ago: nothing else shows how well a video can be foreseen."""
        return len(past) >= WARM_UP and call - past[-1] <= math.ceil(_UNSEEN * len(self.timesteps))

    def cost(self, call: int, past: Sequence[int]) -> float:
        """The relative error of the final latents that foreseeing this one output is expected to add."""
        return self.amplification * self.sensitivities[call] * self.outputs.foresee(call, past).worst

    def plan(self, budget: float) -> Plan:
        """The threshold that spares most calls of a calibrated trajectory, and of several such the least error.

        Args:
            budget: The error to be kept.
        """
        shares = [10 ** (-2 * index / (_THRESHOLDS - 1)) for index in range(_THRESHOLDS)]
        plans = [self._plan(share * budget, budget) for share in shares]
        return max(plans, key=lambda plan: (len(plan.reused), -plan.error))

    def _plan(self, threshold: float, budget: float) -> Plan:
        past: list[int] = []
        reused: list[int] = []
        squares = 0.0
        for call in range(len(self.timesteps)):
            if call in self.restarts:
                past = []
            cost = self.cost(call, past[-REMEMBERED:]) if self.may_reuse(call, past) else math.inf
            if cost <= threshold and squares + cost**2 <= budget**2:
                reused.append(call)
                squares += cost**2
            else:
                past.append(call)
        return Plan(tuple(reused), math.sqrt(squares), threshold)
