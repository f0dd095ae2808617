"""A batch in progress: which of its videos' outputs are evaluated at a call, and which are foreseen.

Shapes: B batch, C latent channels, T H W latent frames and size.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from weakref import ref

import torch
from attrs import define, field, frozen
from torch import Tensor

from opensora.accel._calibrating import changed_rows, weighted_sum
from opensora.accel._calibration import REMEMBERED, Calibration
from opensora.accel._common import total
from opensora.core.accelerator import Accelerator
from opensora.core.conditioning import Conditioning
from opensora.core.protocols import Denoiser, SampleState

__all__ = ["Batch", "Counts", "Spent", "Video"]

log = logging.getLogger(__name__)


@define(eq=False)
class Counts:
    """What was computed and what was spared, in this process. An evaluation is of one video, with guidance."""

    calibrating: int = 0
    computed: int = 0
    reused: int = 0
    videos: int = 0
    """Begun; forks don't count."""
    finished: int = 0
    errors: float = 0.0
    """Sum of the expected errors of those that are finished."""
    largest_error: float = 0.0
    off_course: int = 0
    """Videos whose calls were not those that were calibrated."""

    def finish(self, videos: Sequence[Video]) -> None:
        """Count videos that came to their end."""
        self.finished += len(videos)
        self.errors += sum(video.error for video in videos)
        self.largest_error = max(self.largest_error, *(video.error for video in videos))

    def report(self, accelerator: Accelerator) -> dict[str, object]:
        """Of all processes; to be asked in all of them."""
        sums = total(accelerator, self.computed, self.reused, self.calibrating, self.videos, self.finished, self.errors)
        computed, reused, calibrating, videos, finished, errors = sums
        return {
            "evaluations_computed": round(computed),
            "evaluations_reused": round(reused),
            "evaluations_of_calibration": round(calibrating),
            "videos": round(videos),
            "evaluations_per_video": round(computed / max(videos, 1), 2),
            "expected_error": round(errors / max(finished, 1), 5),
            "largest_expected_error": accelerator.highest(round(self.largest_error * 1e5)) / 1e5,
        }


@frozen(eq=False)
class _Guess:
    """What an output is foreseen to be."""

    call: int
    output: Tensor
    """[C or 2C, T, H, W]."""
    missed: float
    """The error that was calibrated, a share of the length of the final latents."""
    cost: float
    """The expected error of the final latents, if it is taken."""


@define(eq=False)
class Video:
    """One video of a batch. Nothing here depends on the others."""

    calibration: Calibration | None
    """None: everything is evaluated."""
    squares: float = 0.0
    """Of the expected errors of all outputs that were foreseen, before the last evaluation."""
    open_squares: float = 0.0
    """Of those since, about which nothing more is known yet."""
    strain: float | None = None
    """How much larger than calibrated the error of the last foresight was. None: not seen yet."""
    past: list[tuple[int, Tensor]] = field(factory=list)
    """The last evaluated calls and their outputs."""

    @property
    def error(self) -> float:
        """The expected relative error of the final latents."""
        return math.sqrt(self.squares + self.open_squares)

    def restart(self) -> None:
        """Use nothing earlier: what the denoiser is asked has changed."""
        self.squares, self.open_squares = self.squares + self.open_squares, 0.0
        self.past.clear()
        self.strain = None

    def guess(self, call: int) -> _Guess | None:
        """Foresee an output; None if there is nothing to go by."""
        if self.calibration is None or not self.past:
            return None
        calls = [number for number, _ in self.past]
        foresight = self.calibration.outputs.foresee(call, calls)
        output = weighted_sum(foresight.weights, [output for _, output in self.past])
        return _Guess(call, output, foresight.error, self.calibration.cost(call, calls) * self.trust)

    @property
    def trust(self) -> float:
        """By how much calibrated errors are multiplied."""
        return max(1.0, self.strain or 1.0)

    def takes(self, guess: _Guess | None, budget: float) -> bool:
        """Whether a guess is good enough to do without the evaluation; if so, its error is booked."""
        if guess is None or self.calibration is None or self.strain is None:
            return False
        if not self.calibration.may_reuse(guess.call, [call for call, _ in self.past]):
            return False
        if not guess.cost <= self.calibration.threshold:  # which no cost is that is not a number
            return False
        if not self.squares + self.open_squares + guess.cost**2 <= budget**2:
            return False
        self.open_squares += guess.cost**2
        return True

    def learn(self, call: int, output: Tensor, guess: _Guess | None, missed: float) -> None:
        """Take in an evaluated output.

        Args:
            guess: What it was foreseen to be.
            missed: The length of the difference.
        """
        if self.calibration is None:
            return
        if guess is not None:
            strain = missed / self.calibration.length / guess.missed if guess.missed else 1.0
            worse = max(1.0, strain / self.trust)  # than was thought when the outputs since the last one were foreseen
            self.squares, self.open_squares = self.squares + self.open_squares * worse**2, 0.0
            self.strain = strain
        self.past = [*self.past, (call, output.clone())][-REMEMBERED:]


@define(eq=False)
class Batch:
    """The videos that are denoised together."""

    videos: list[Video]
    guidance_scale: float
    budget: float
    counts: Counts
    _call: int = 0
    _told: Conditioning | None = None
    _part: tuple[tuple[int, ...], Conditioning] | None = None

    @property
    def errors(self) -> list[float]:
        """[B], expected so far."""
        return [video.error for video in self.videos]

    def go_on(self, step: int) -> None:
        """Be at the start of a step."""
        calibration = next((video.calibration for video in self.videos if video.calibration is not None), None)
        self._call = 0 if calibration is None else calibration.first_call(step)

    def change_guidance(self, scale: float, calibrations: Sequence[Calibration | None]) -> None:
        """Go on under another guidance scale."""
        self.guidance_scale = scale
        for video, calibration in zip(self.videos, calibrations, strict=True):
            video.restart()
            video.calibration = calibration

    def answer(self, evaluate: Denoiser, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """As `Denoiser.__call__`."""
        call, self._call = self._call, self._call + 1
        if all(video.calibration is None for video in self.videos):
            self.counts.computed += len(latents)
            return evaluate(latents, timestep, conditioning)
        self._notice(conditioning)
        self._check_course(call, timestep)
        guesses = [video.guess(call) for video in self.videos]
        rows = [
            row
            for row, (video, guess) in enumerate(zip(self.videos, guesses, strict=True))
            if not video.takes(guess, self.budget)
        ]
        self.counts.computed += len(rows)
        self.counts.reused += len(self.videos) - len(rows)
        outputs = {row: guess.output for row, guess in enumerate(guesses) if guess is not None}
        if rows:
            evaluated = self._evaluate(evaluate, rows, latents, timestep, conditioning)
            self._learn(call, rows, evaluated, guesses, channels=latents.shape[1])
            outputs |= dict(zip(rows, evaluated, strict=True))
        answer = evaluated if len(rows) == len(latents) else torch.stack([outputs[row] for row in range(len(latents))])
        self._finish(call)
        return answer

    def _notice(self, conditioning: Conditioning) -> None:
        """See which videos are told something else than at the call before."""
        if self._told is not conditioning:
            for row in changed_rows(self._told, conditioning) if self._told is not None else ():
                self.videos[row].restart()
            self._told, self._part = conditioning, None

    def _check_course(self, call: int, timestep: Tensor) -> None:
        """Foresee nothing for videos whose calls are not those that were calibrated."""
        for video, now in zip(self.videos, timestep.tolist(), strict=True):
            if video.calibration is None or video.calibration.is_at(call, now):
                continue
            video.calibration = None
            if not self.counts.off_course:
                log.warning(
                    "step-cache: call %d of the denoiser is at timestep %g, unlike when it was calibrated: sampled in full",
                    call + 1,
                    now,
                )
            self.counts.off_course += 1

    def _evaluate(
        self, evaluate: Denoiser, rows: list[int], latents: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> Tensor:
        if len(rows) == len(latents):
            return evaluate(latents, timestep, conditioning)
        if self._part is None or self._part[0] != tuple(rows):
            self._part = tuple(rows), conditioning[rows]
        return evaluate(latents[rows], timestep[rows], self._part[1])

    def _learn(
        self, call: int, rows: Sequence[int], evaluated: Tensor, guesses: Sequence[_Guess | None], *, channels: int
    ) -> None:
        foreseen = [
            output if (guess := guesses[row]) is None else guess.output
            for row, output in zip(rows, evaluated, strict=True)
        ]
        missed = (evaluated - torch.stack(foreseen))[:, :channels].float().flatten(1).norm(dim=1)
        for row, output, length in zip(rows, evaluated, missed.tolist(), strict=True):
            self.videos[row].learn(call, output, guesses[row], length)

    def _finish(self, call: int) -> None:
        """At the last call, count the videos, and keep nothing of them."""
        calibration = next((video.calibration for video in self.videos if video.calibration is not None), None)
        if calibration is not None and call == len(calibration.timesteps) - 1:
            self.counts.finish(self.videos)
            self._told = self._part = None
            for video in self.videos:
                video.past.clear()


@define(eq=False)
class Spent:
    """The expected errors that states had, for forks that go on from them."""

    _known: dict[int, tuple[ref[SampleState], list[float]]] = field(factory=dict)

    def note(self, state: SampleState, errors: Sequence[float]) -> None:
        """Remember until the state is gone."""
        self._known = {key: pair for key, pair in self._known.items() if pair[0]() is not None}
        self._known[id(state)] = ref(state), list(errors)

    def find(self, state: SampleState) -> list[float] | None:
        """[B]; None for a state that is not known."""
        reference, errors = self._known.get(id(state), (None, None))
        return errors if reference is not None and reference() is state else None
