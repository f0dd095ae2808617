"""The loop of the sampling pipeline: batch after batch, each video written as its frames come, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import attrs
from attrs import define, frozen

from opensora.core.accelerator import Accelerator
from opensora.core.denoising import Denoising
from opensora.core.hooking import Hooks
from opensora.core.pipelines.sample_recipes import Repeatable
from opensora.core.pipelines.sample_spec import SampleSpec
from opensora.core.protocols import SampleState
from opensora.core.requests import Request, Target, iter_batches
from opensora.core.results import ResultWriter
from opensora.core.run_folder import append_jsonl
from opensora.core.seams import Seam
from opensora.core.video_sampler import Piece, VideoSampler

__all__ = ["SEAMS", "SampleRun", "SavedSample", "sample"]

SEAMS = "seams.jsonl"
"""In the run folder: how well the rounds of each long video meet."""


@frozen(kw_only=True)
class SavedSample:
    """One finished file."""

    request: Target
    seams: Sequence[Seam] = ()
    """Where rounds meet."""


@define(kw_only=True, eq=False)
class SampleRun:
    """Everything that a sampling run consists of. Hooks get it."""

    spec: SampleSpec
    folder: Path
    """Of config, log and summary."""
    accelerator: Accelerator
    sampler: VideoSampler
    requests: Sequence[Request]
    """All videos of the run, in order, those of other processes included."""
    hooks: Hooks
    repeatable: Repeatable
    """What recipes say of the run."""
    there: Collection[Path] = ()
    """Files that were there when the run began, and are left out; the same in all processes."""
    num_saved: int = 0
    num_skipped: int = 0
    """Of all processes' requests, known to the main one."""

    def iter_batches(self) -> Iterator[list[Request]]:
        """This process's batches; what is there already is left out if the config says so."""
        mine = islice(self._wanted(), self.accelerator.sampling_rank, None, self.accelerator.sampling_world_size)
        return iter_batches(mine, self.spec.batch_size)

    def start(self, requests: Sequence[Request]) -> Denoising:
        """Begin to denoise videos, without files, for a hook that wants to know more."""
        return self.sampler.start(requests)

    def _wanted(self) -> Iterator[Request]:
        """What all processes together are to make."""
        for request in self.requests:
            if request.path in self.there:
                self.num_skipped += self.accelerator.is_main
            else:
                yield request


def sample(run: SampleRun) -> None:
    """Make and write every video of ``run``, batch by batch."""
    for requests in run.iter_batches():
        run.hooks.sample_batch(run=run, requests=requests)
        sample_batch(run, requests)


def sample_batch(run: SampleRun, requests: Sequence[Request]) -> None:
    """Make one batch; its files appear together, each whole. Of the processes that share it, one writes them."""
    clock = run.sampler.clock
    own = requests if run.accelerator.writes_samples else ()

    def watch(state: SampleState) -> None:
        run.hooks.sample_step(run=run, state=state)

    with ExitStack() as stack:
        writers: list[ResultWriter] | None = None
        for piece in iter_own_pieces(run.sampler, requests, watch):
            with clock.phase("write"):
                if writers is None:
                    writers = [stack.enter_context(open_writer(run, requests, row)) for row in range(len(own))]
                run.hooks.sample_frames(run=run, requests=requests, piece=piece)
                for writer, frames in zip(writers, piece.frames[: len(own)], strict=True):
                    writer.append(frames, is_new_round=piece.is_first and piece.round > 0)
        with clock.phase("write"):
            stack.close()
    assert writers is not None  # every video has a frame
    for request, writer in zip(own, writers, strict=True):
        run.num_saved += 1
        if writer.seams:
            seams = [attrs.asdict(seam) for seam in writer.seams]
            append_jsonl(run.folder / SEAMS, {"file": request.path.name, "seams": seams})
        run.hooks.sample_saved(run=run, sample=SavedSample(request=request, seams=writer.seams))


def iter_own_pieces(
    sampler: VideoSampler, requests: Sequence[Request], watch: Callable[[SampleState], None]
) -> Iterator[Piece]:
    """The batch's videos. One that is made again is made among as many, with the texts that it had beside it."""
    if not (companions := requests[0].companions):
        yield from sampler.iter_pieces(requests, watch=watch)
        return
    (request,), row = requests, slice(requests[0].row, requests[0].row + 1)

    def watch_own(state: SampleState) -> None:
        memory = tuple(past[row] for past in state.memory)
        watch(attrs.evolve(state, latents=state.latents[row], denoised=state.denoised[row], memory=memory))

    batch = [attrs.evolve(request, text=each.text, negative_prompt=each.negative_prompt) for each in companions]
    for piece in sampler.iter_pieces(batch, watch=watch_own):
        yield attrs.evolve(piece, frames=piece.frames[row])


def open_writer(run: SampleRun, requests: Sequence[Request], row: int) -> ResultWriter:
    """Where a request's frames go, with its recipe."""
    return ResultWriter(
        requests[row].path,
        fps=requests[row].file_fps,
        crf=run.spec.crf,
        recipe=run.repeatable.recipe(requests, row),
        watermark=run.spec.watermark,
    )
