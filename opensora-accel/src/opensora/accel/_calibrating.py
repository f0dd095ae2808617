"""Measuring a `Calibration` on two videos: sampling them in full, then in part with some outputs foreseen, not evaluated.

1. In full, writing down all outputs: their inner products, and where each step led.
2. Without the network: what a step makes of an error in one output.
3. Trials that foresee one output, early in one video and later in the other: how the network's answers make the error grow
   or shrink from each step to the end. The worst of them counts.
4. Trials of the whole plan, with each: how far its error is from the expected one. The worst counts again.

Shapes: C latent channels, T H W latent frames and size, K calls of the denoiser, S steps.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence

import attrs
import torch
from attrs import define, field, frozen
from torch import Tensor

from opensora.accel._calibration import REMEMBERED, Calibration, Outputs
from opensora.core.conditioning import Conditioning
from opensora.core.denoising import Denoising
from opensora.core.errors import ConfigError
from opensora.core.protocols import Denoiser, SampleState
from opensora.core.randomness import SampleDraws, seed_for

__all__ = ["Course", "calibrate", "changed_rows", "one_video", "weighted_sum"]

_TRIALS = (0.1, 0.33)
"""Where a single output is foreseen, in the first video and in the other: shares of all calls."""
_LEAST_AMPLIFICATION = 0.5
"""A trial that ends better than this was lucky."""
_ROUNDING = 1e-6
"""Relative errors below this are nothing but rounding."""


@define(kw_only=True, eq=False)
class Course:
    """A denoiser for one trajectory of one video that evaluates some calls, foresees the others, and writes all down."""

    evaluate: Denoiser
    reused: Collection[int] = ()
    calibration: Calibration | None = None
    """Foresees; needed if anything is reused."""
    outputs: list[Tensor] = field(factory=list)
    """[C or 2C, T, H, W], by call. Those that are there at the start stand for calls that were made."""
    timesteps: list[float] = field(factory=list)
    restarts: list[int] = field(factory=list)
    past: list[int] = field(factory=list)
    """Calls that were evaluated since the last restart."""
    evaluations: int = 0
    _told: Conditioning | None = None

    def __call__(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """As `Denoiser.__call__`, of one video."""
        call = len(self.outputs)
        if self._told is not None and changed_rows(self._told, conditioning):
            self.restarts.append(call)
            self.past.clear()
        self._told = conditioning
        if call in self.reused and self.calibration is not None:
            output = self._foresee(self.calibration, call)
        else:
            output = self.evaluate(latents, timestep, conditioning)[0]
            self.past.append(call)
            self.evaluations += 1
        self.outputs.append(output)
        self.timesteps.append(timestep.max().item())
        return output[None]

    def _foresee(self, calibration: Calibration, call: int) -> Tensor:
        past = self.past[-REMEMBERED:]
        weights = calibration.outputs.foresee(call, past).weights
        return weighted_sum(weights, [self.outputs[each] for each in past])


@frozen(kw_only=True, eq=False)
class _Record:
    """A video that was sampled in full."""

    denoising: Denoising
    """Of it, not begun."""
    course: Course
    states: list[SampleState]
    calls: tuple[int, ...]
    """[S]"""

    @property
    def final(self) -> Tensor:
        """[1, C, T, H, W]."""
        return self.states[-1].latents

    @property
    def length(self) -> float:
        """Of the final latents."""
        return max(_length(self.final), 1e-12)

    def products(self) -> tuple[tuple[float, ...], ...]:
        """[K, K], inner products of the outputs, as shares of that of the final latents."""
        channels = self.final.shape[1]
        flat = [output[:channels].flatten().cpu().double() for output in self.course.outputs]
        outputs = torch.stack(flat) / self.length
        return tuple(map(tuple, (outputs @ outputs.T).tolist()))

    def step_of(self, call: int) -> int:
        """The step that a call belongs to."""
        return next(step for step in range(len(self.calls)) if call < sum(self.calls[: step + 1]))

    def before(self, step: int) -> SampleState | None:
        """The state that a step begins with; None: with noise."""
        return self.states[step - 1] if step else None

    def past(self, call: int) -> list[int]:
        """The calls before one, from the last restart on."""
        return list(range(max((each for each in self.course.restarts if each <= call), default=0), call))


def one_video(denoising: Denoising, row: int) -> Denoising:
    """The same denoising from its start, of one of its videos."""
    mask = denoising.frame_mask
    return attrs.evolve(
        denoising,
        noise=denoising.noise[row : row + 1],
        conditioning=denoising.conditioning[row : row + 1],
        frame_mask=None if mask is None else mask[row : row + 1],
        keys=list(denoising.keys)[row : row + 1],
        state=None,
    )


@torch.inference_mode()
def calibrate(denoising: Denoising, evaluate: Denoiser, *, budget: float) -> Calibration:
    """Measure all that decides for videos like this one.

    Args:
        denoising: Of one video, not begun. The other that is needed differs in its noise.
        evaluate: What answers a call when it is not foreseen.
        budget: The relative error that is to be kept.

    Raises:
        ConfigError: The two are asked at different timesteps.
    """
    records = [_sample_in_full(each, evaluate) for each in (denoising, _with_other_noise(denoising))]
    calibration = _describe(records)
    count, growths = sum(record.course.evaluations for record in records), []
    for call, record in zip(_trial_calls(calibration), records, strict=False):
        states, evaluations = _try(record, calibration, evaluate, [call])
        growths.append(_growth(record, states))
        count += evaluations
    calibration = _with_growth(records[0], calibration, growths)
    seen = [_LEAST_AMPLIFICATION]
    for record in records:
        plan = calibration.plan(budget)
        if not plan.reused:
            break
        states, evaluations = _try(record, calibration, evaluate, plan.reused)
        ratio = _distance(states[-1], record.states[-1]) / record.length / max(plan.error, _ROUNDING)
        seen.append(calibration.amplification * max(ratio, _ROUNDING) if math.isfinite(ratio) else math.inf)
        calibration = attrs.evolve(calibration, amplification=seen[-1])
        count += evaluations
    calibration = attrs.evolve(calibration, amplification=max(seen), evaluations=count)
    plan = calibration.plan(budget)
    return attrs.evolve(calibration, threshold=plan.threshold if plan.reused else 0.0)


def _with_other_noise(denoising: Denoising) -> Denoising:
    """The same video from other noise; frames that are given stay."""
    (key,) = denoising.keys
    other = SampleDraws([attrs.evolve(key, seed=seed_for("step-cache", key.seed))], denoising.noise.device)
    noise = other.normal("latents", denoising.noise.shape[1:])
    if denoising.frame_mask is not None:
        noise = torch.where((denoising.frame_mask == 1)[:, None, :, None, None], noise, denoising.noise)
    return attrs.evolve(denoising, noise=noise)


def _sample_in_full(denoising: Denoising, evaluate: Denoiser) -> _Record:
    course = Course(evaluate=evaluate)
    states: list[SampleState] = []
    calls: list[int] = []
    for state in attrs.evolve(denoising, denoiser=course):
        states.append(state)
        calls.append(len(course.outputs) - sum(calls))
    return _Record(denoising=denoising, course=course, states=states, calls=tuple(calls))


def _describe(records: Sequence[_Record]) -> Calibration:
    """What can be told without trials; sensitivities are left at 0."""
    first, second = (record.course for record in records)
    if (first.timesteps, first.restarts) != (second.timesteps, second.restarts):
        raise ConfigError(
            "step-cache: the scheduler asks the denoiser at other timesteps from video to video, so what is known of one "
            "says nothing of others. Use another scheduler, or leave step-cache out."
        )
    return Calibration(
        timesteps=tuple(first.timesteps),
        calls=records[0].calls,
        restarts=tuple(first.restarts),
        length=sum(record.length for record in records) / len(records),
        outputs=Outputs(products=tuple(record.products() for record in records)),
        sensitivities=(0.0,) * len(first.outputs),
    )


def _trial_calls(calibration: Calibration) -> list[int]:
    """The calls that are foreseen alone: the first that have something before them, from their share of the way on."""
    count = len(calibration.timesteps)
    free = [call for call in range(1, count) if call not in calibration.restarts]
    found = [next((call for call in free if call >= share * count), None) for share in _TRIALS]
    return sorted({call for call in found if call is not None})


def _try(
    record: _Record, calibration: Calibration, evaluate: Denoiser, reused: Sequence[int]
) -> tuple[list[SampleState], int]:
    """Sample again with some calls foreseen, from the step of the first of them: states, and evaluations that it took."""
    step = record.step_of(min(reused))
    first = calibration.first_call(step)
    course = Course(
        evaluate=evaluate,
        reused=frozenset(reused),
        calibration=calibration,
        outputs=record.course.outputs[:first],
        past=record.past(first),
    )
    states = list(attrs.evolve(record.denoising, denoiser=course, state=record.before(step)))
    return states, course.evaluations


def _growth(record: _Record, states: Sequence[SampleState]) -> list[float]:
    """By how much a trial's distance from the full trajectory grows from each step to the end, [S]; 1 before its start."""
    distances = [_distance(state, record.states[state.step]) for state in states]
    grown = [distances[-1] / distance if distance else 1.0 for distance in distances]
    before = len(record.states) - len(states)
    return [grown[0]] * before + grown


def _with_growth(record: _Record, calibration: Calibration, growths: Sequence[Sequence[float]]) -> Calibration:
    """With the sensitivities: what the step of a call makes of an error in it, and what becomes of that until the end."""
    worst = [max(column) for column in zip(*growths, strict=True)] if growths else [1.0] * len(calibration.calls)
    calls = range(len(calibration.timesteps))
    sensitivities = [_effect(record, calibration, call) * worst[record.step_of(call)] for call in calls]
    return attrs.evolve(calibration, sensitivities=tuple(sensitivities))


def _effect(record: _Record, calibration: Calibration, call: int) -> float:
    """How far an error in one output moves the latents after its step, relative to the error's length."""
    past = record.past(call)[-REMEMBERED:]
    if not past:
        return 0.0
    outputs, step = record.course.outputs, record.step_of(call)
    foreseen = weighted_sum(calibration.outputs.foresee(call, past).weights, [outputs[each] for each in past])
    first = calibration.first_call(step)
    answers = [*outputs[first:call], foreseen, *outputs[call + 1 : first + calibration.calls[step]]]
    denoising = record.denoising
    moved = next(
        iter(
            denoising.scheduler.sample(
                _Answers(iter(answers)),
                denoising.noise,
                denoising.conditioning,
                draws=denoising.draws,
                frame_mask=denoising.frame_mask,
                after=record.before(step),
            )
        )
    )
    error = _length((foreseen - outputs[call])[: record.final.shape[1]])
    return _distance(moved, record.states[step]) / error if error else 0.0


@frozen(eq=False)
class _Answers:
    """A denoiser that says what it was told to say."""

    outputs: Iterator[Tensor]

    def __call__(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        return next(self.outputs)[None]


def weighted_sum(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one shape, each with its weight."""
    total = weights[0] * tensors[0]
    for weight, tensor in zip(weights[1:], tensors[1:], strict=True):
        total = total + weight * tensor
    return total


def changed_rows(before: Conditioning, now: Conditioning) -> set[int]:
    """The samples that are told something else than before, such as that other frames are given."""
    if before is now:
        return set()
    old, new = tensors_of(before), tensors_of(now)
    if old.keys() != new.keys() or any(old[name].shape != new[name].shape for name in new):
        return set(range(len(now)))
    differing = [name for name in new if old[name] is not new[name]]
    rows = [
        (old[name] != new[name]).reshape(len(now), -1).any(dim=1).nonzero().flatten().tolist() for name in differing
    ]
    return {row for each in rows for row in each}


def tensors_of(conditioning: Conditioning) -> dict[str, Tensor]:
    """All that a batch is told, by name."""
    fields = {each.name: getattr(conditioning, each.name) for each in attrs.fields(Conditioning)}
    extra = {f"extra.{name}": tensor for name, tensor in fields.pop("extra").items()}
    return {name: tensor for name, tensor in {**fields, **extra}.items() if tensor is not None}


def _distance(one: SampleState, other: SampleState) -> float:
    return _length(one.latents - other.latents)


def _length(tensor: Tensor) -> float:
    return float(tensor.float().norm())
