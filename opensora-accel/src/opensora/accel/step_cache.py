"""``step-cache``: at steps where the denoiser's output follows from those before, it is foreseen instead of evaluated.

    hooks = [dict(type="step-cache", tolerance=0.05)]

The cache first samples a video in full, from two noises, and then in part (see `opensora.accel._calibrating`). From that it
knows how each output follows from earlier ones, how wrong that is, and what an error there does to the result. Then, for each
video and each call: the expected error of foreseeing is the calibrated one, times how much worse than calibrated this video's
last foresight was, which is seen whenever an output is evaluated. An output is foreseen if this is small enough, if all that
the video has been given so far stays within the budget, which is the tolerance over a factor of safety, and if it is not long
since the last evaluation. Each video is decided about by itself, so that its result doesn't depend on its batch.

Shapes: B batch, C latent channels, T H W latent frames and size.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import attrs
from attrs import field, frozen
from attrs.validators import and_, gt, lt
from torch import Tensor, nn

from opensora.accel._batches import Batch, Counts, Spent, Video
from opensora.accel._calibrating import Course, calibrate, one_video
from opensora.accel._calibration import REMEMBERED, WARM_UP, Calibration
from opensora.accel._calibration_file import CalibrationFile, Kind, Model, describe_scheduler
from opensora.accel._common import check_run, check_scheduler
from opensora.core.conditioning import Conditioning
from opensora.core.hookspecs import hook
from opensora.core.protocols import Denoiser, SampleState
from opensora.core.requests import EndlessRequests, Request

if TYPE_CHECKING:
    from opensora.core.denoising import Denoising
    from opensora.core.pipelines.sample_loop import SampleRun
    from opensora.core.pipelines.sample_spec import SampleSpec

__all__ = ["StepCache", "StepCacheSpec"]

log = logging.getLogger(__name__)

SAFETY = 2.5
"""How many times smaller than the tolerance the expected error is kept. What the same error in an output does to the result
differs from video to video, for one in twenty by more than a factor of 2, and calibrated is on two."""


def _absolute(path: str | None) -> str | None:
    """So that a recipe means the same file from any folder."""
    return None if path is None else str(Path(path).expanduser().absolute())


@frozen(kw_only=True)
class StepCacheSpec:
    """Options of `StepCache`."""

    tolerance: float = field(default=0.05, validator=and_(gt(0), lt(1)))
    """Largest distance of a video's latents from those of full sampling, as a share of their length. 0.05 is a difference
    that the eye hardly sees; 0.02 spares less, 0.1 more. At least 95 of 100 videos keep it."""
    calibration: str | None = field(default=None, converter=_absolute)
    """File (.json) that the calibration is read from, and written to where it lacks this kind of video. None: each run
    calibrates anew, which costs the evaluations of about 4 videos."""


class StepCache:
    """Spares evaluations of the denoiser while the result stays within a tolerance of full sampling."""

    Spec = StepCacheSpec

    def __init__(self, spec: StepCacheSpec) -> None:
        """Read the calibration file, if one is named and there.

        Raises:
            ConfigError: It can't be read.
        """
        self.spec = spec
        self.file = None if spec.calibration is None else CalibrationFile.open(Path(spec.calibration))
        self.counts = Counts()
        self._budget = spec.tolerance / SAFETY
        self._beside = ""
        self._evaluate: Denoiser | None = None
        self._calibrations: dict[Kind, Calibration] = {}
        self._calibrates_anything = True
        self._batches: WeakKeyDictionary[Denoising, Batch] = WeakKeyDictionary()
        self._current: Batch | None = None
        self._unknown: set[Kind] = set()
        self._model: Model | None = None
        self._writes = True
        self._spent = Spent()

    # ---- hooks

    @hook
    def denoiser_built(self, denoiser: nn.Module, spec: SampleSpec) -> None:
        """Know the model.

        Raises:
            ConfigError: The calibration file is of another; or a cache can't serve, see `check_run`.
        """
        check_run("step-cache", spec, others=("pyramid-broadcast",))
        self._model = Model.of(denoiser, called=spec.model.type)
        if self.file is not None:
            self.file.check(self._model)

    @hook
    def denoiser_wrapper(self, spec: SampleSpec) -> Callable[[Denoiser], Denoiser]:
        """Stand between scheduler and denoiser."""
        others = [f"{each.type} {each.options}" for each in spec.hooks if each.type.rpartition(":")[2] != "step-cache"]
        self._beside = ", ".join([spec.dtype, *sorted(others)])

        def wrap(denoiser: Denoiser) -> Denoiser:
            self._evaluate = denoiser
            return self._answer

        return wrap

    @hook
    def sample_start(self, run: SampleRun) -> None:
        """Calibrate on the first request of each kind, so that no result depends on how requests are dealt out."""
        leaves_out = run.spec.skip_existing or run.spec.prompt_as_path
        if leaves_out and all(request.path.exists() for request in run.requests):
            return
        if run.spec.repeat is not None and self.file is None:
            log.warning(
                "step-cache: calibrated anew, on what is made again: it can differ a little. To get the same file, give runs "
                "a calibration file."
            )
        self._writes = run.accelerator.is_main
        requests = run.requests[:1] if isinstance(run.requests, EndlessRequests) else run.requests
        firsts: dict[object, Request] = {}
        for request in requests:
            firsts.setdefault(_likeness(request), request)
        for request in firsts.values():
            denoising = run.start([request])
            with run.sampler.clock.phase("calibrate"):
                self._calibration_for(denoising, 0)
        self._calibrates_anything = False

    @hook
    def denoising_step(self, denoising: Denoising) -> None:
        """Know whose the next calls are."""
        if isinstance(denoising.denoiser, Course):
            return  # of a calibration
        check_scheduler("step-cache", denoising.scheduler)
        batch = self._batches.get(denoising)
        if batch is None:
            batch = self._batches[denoising] = self._begin(denoising)
        elif batch.guidance_scale != denoising.guidance_scale:
            batch.change_guidance(denoising.guidance_scale, self._calibrations_for(denoising))
        if denoising.state is not None:
            self._spent.note(denoising.state, batch.errors)
        batch.go_on(0 if denoising.state is None else denoising.state.step + 1)
        self._current = batch

    @hook
    def sample_end(self, run: SampleRun) -> None:
        """Let go of everything."""
        self._current = None

    @hook
    def sample_report(self, run: SampleRun) -> Mapping[str, object]:
        """Evaluations made and spared in all processes, and the expected errors."""
        return {"step_cache": {"tolerance": self.spec.tolerance, **self.counts.report(run.accelerator)}}

    # ---- calls

    def _answer(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """What the scheduler calls in place of the denoiser."""
        assert self._evaluate is not None  # denoiser_wrapper has set it
        if self._current is None or len(self._current.videos) != len(latents):
            return self._evaluate(latents, timestep, conditioning)  # a call from outside of any denoising
        return self._current.answer(self._evaluate, latents, timestep, conditioning)

    def _begin(self, denoising: Denoising) -> Batch:
        """A batch that is new here: one that starts, or a fork, which has the errors of what it comes from."""
        errors = [0.0] * len(denoising.noise)
        if denoising.state is None:
            self.counts.videos += len(errors)
        else:
            errors = self._errors_at(denoising.state) or errors
        videos = [
            Video(calibration, squares=error**2)
            for calibration, error in zip(self._calibrations_for(denoising), errors, strict=True)
        ]
        return Batch(videos, guidance_scale=denoising.guidance_scale, budget=self._budget, counts=self.counts)

    def _errors_at(self, state: SampleState) -> list[float] | None:
        others = (batch.errors for denoising, batch in self._batches.items() if denoising.state is state)
        return next(others, None) or self._spent.find(state)

    # ---- calibrations

    def _calibrations_for(self, denoising: Denoising) -> list[Calibration | None]:
        return [self._calibration_for(denoising, row) for row in range(len(denoising.noise))]

    def _calibration_for(self, denoising: Denoising, row: int) -> Calibration | None:
        """That of a video's kind: known, from the file, or measured now; None if there is none and now is not the time."""
        kind = self._kind(denoising, row)
        if kind not in self._calibrations:
            found = None if self.file is None else self.file.find(kind)
            if found is None and self._calibrates_anything and denoising.state is None:
                found = self._calibrate(kind, one_video(denoising, row))
            if found is None:
                self._say_unknown(kind)
                return None
            self._calibrations[kind] = found
        return self._calibrations[kind]

    def _kind(self, denoising: Denoising, row: int) -> Kind:
        mask = denoising.frame_mask
        return Kind(
            scheduler=describe_scheduler(denoising.scheduler),
            latents=tuple(denoising.noise.shape[1:]),
            guidance_scale=denoising.guidance_scale,
            frames=None if mask is None else tuple(mask[row].tolist()),
            tolerance=self.spec.tolerance,
            beside=self._beside,
        )

    def _calibrate(self, kind: Kind, denoising: Denoising) -> Calibration:
        assert self._evaluate is not None
        calibration = calibrate(denoising, self._evaluate, budget=self._budget)
        self.counts.calibrating += calibration.evaluations
        plan = calibration.plan(self._budget)
        count = len(calibration.timesteps)
        log.info(
            "step-cache: calibrated for videos of latents %s with %d evaluations; expects to foresee %d of %d outputs",
            " x ".join(map(str, kind.latents)),
            calibration.evaluations,
            len(plan.reused),
            count,
        )
        if not plan.reused:
            log.warning("step-cache: %s", _why_nothing(calibration, self.spec.tolerance))
        if self.file is not None and self._writes and self._model is not None:
            self.file.add(self._model, kind, calibration)
        return calibration

    def _say_unknown(self, kind: Kind) -> None:
        if kind not in self._unknown:
            self._unknown.add(kind)
            log.warning(
                "step-cache: there is no calibration for latents %s, guidance scale %g, %s: sampled in full",
                " x ".join(map(str, kind.latents)),
                kind.guidance_scale,
                "all frames generated" if kind.frames is None else f"frame mask {list(kind.frames)}",
            )


def _likeness(request: Request) -> object:
    """The same for requests that are surely of one kind."""
    given = attrs.asdict(request.given)
    strategy = [given.pop(name) for name in ("strength", "mask_strategy")]
    return (request.kind, *strategy, *(value is None for value in given.values()))


def _why_nothing(calibration: Calibration, tolerance: float) -> str:
    """Why all outputs are evaluated, and what would change that."""
    count = len(calibration.timesteps)
    costs = [calibration.cost(call, range(max(0, call - REMEMBERED), call)) for call in range(WARM_UP, count)]
    if not costs:
        return f"a video takes {count} evaluations only, and the first {WARM_UP} are always made. Nothing is reused."
    least = SAFETY * min(costs)
    if not math.isfinite(least):
        return "the denoiser returned numbers that are not finite. Nothing is reused."
    return f"no output can be foreseen within the tolerance of {tolerance:g}; it would have to be {least:.2g} at least."
