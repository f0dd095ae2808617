"""Sampling: prompts to noise to latents to files. Each video depends on its own seed, not on its neighbours in the batch."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from attrs import define, field, frozen
from torch import Tensor

from opensora.core.accelerator import Accelerator
from opensora.core.composing import Parts
from opensora.core.conditioning import Conditioning
from opensora.core.hooking import Hooks
from opensora.core.pipelines.sample_spec import SampleSpec
from opensora.core.prompts import Request
from opensora.core.protocols import IMAGE_FPS, Denoiser, SampleState, Size
from opensora.core.randomness import SampleDraws, SampleKey
from opensora.core.run_folder import write_atomically
from opensora.core.video import to_uint8, write_image, write_video

__all__ = ["SampleRun", "SavedSample", "decode", "iter_denoising", "sample"]

log = logging.getLogger(__name__)


@frozen(kw_only=True)
class SavedSample:
    """One finished file."""

    request: Request
    frames: Tensor
    """[T, H, W, 3] uint8."""


@define(kw_only=True, eq=False)
class SampleRun:
    """Everything that a sampling run consists of. Hooks get it."""

    spec: SampleSpec
    folder: Path
    """Of config, log and summary."""
    accelerator: Accelerator
    parts: Parts
    predict: Denoiser
    requests: Sequence[Request]
    """All videos of the run, in order, those of other processes included."""
    hooks: Hooks
    seconds: dict[str, float] = field(factory=dict)
    """Time by phase, in this process."""
    num_saved: int = 0
    num_skipped: int = 0

    def iter_batches(self) -> Iterator[list[Request]]:
        """This process's batches; what is there already is left out if the config says so."""
        mine = list(self.requests)[self.accelerator.rank :: self.accelerator.world_size]
        if self.spec.skip_existing or self.spec.prompt_as_path:
            wanted = [request for request in mine if not request.path.exists()]
            self.num_skipped, mine = len(mine) - len(wanted), wanted
        for start in range(0, len(mine), self.spec.batch_size):
            yield mine[start : start + self.spec.batch_size]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to ``seconds[name]``."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            if self.accelerator.device.type == "cuda":
                torch.cuda.synchronize(self.accelerator.device)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin


@torch.inference_mode()
def sample(run: SampleRun) -> None:
    """Make and write every video of ``run``, batch by batch."""
    for requests in run.iter_batches():
        latents = None
        with run.phase("denoise"):
            for state in iter_denoising(
                run.parts,
                run.predict,
                run.accelerator,
                [request.text for request in requests],
                [request.seed for request in requests],
                size=run.spec.size,
                fps=run.spec.fps,
            ):
                latents = state.latents
                run.hooks.sample_step(run=run, state=state)
        assert latents is not None  # a scheduler makes at least one step
        with run.phase("decode"):
            videos = decode(run.parts, latents, num_frames=run.spec.size[0])
        with run.phase("write"):
            for request, frames in zip(requests, videos, strict=True):
                write_sample(run, request, frames)
                run.num_saved += 1
                run.hooks.sample_saved(run=run, sample=SavedSample(request=request, frames=frames))


def iter_denoising(
    parts: Parts,
    predict: Denoiser,
    accelerator: Accelerator,
    texts: Sequence[str],
    seeds: Sequence[int],
    *,
    size: Size,
    fps: float,
) -> Iterator[SampleState]:
    """Denoise a batch of videos of ``size`` (T, H, W) in pixels; the last state holds the latents."""
    conditioning = build_conditioning(parts, texts, size=size, fps=fps).to(accelerator.device)
    draws = SampleDraws([SampleKey(seed, 0) for seed in seeds], accelerator.device)
    noise = draws.normal("latents", (parts.vae.latent_channels, *parts.vae.latent_size(size)))
    return parts.scheduler.sample(predict, noise, conditioning, draws=draws)


def build_conditioning(parts: Parts, texts: Sequence[str], *, size: Size, fps: float) -> Conditioning:
    """Text, size and rate of a batch."""
    num_frames, height, width = (float(side) for side in size)

    def each(value: float) -> Tensor:
        return torch.full((len(texts),), value)

    text = parts.text_encoder.encode(texts)
    return text.to("cpu").replace(
        fps=each(IMAGE_FPS if size[0] == 1 else fps),
        height=each(height),
        width=each(width),
        num_frames=each(num_frames),
        aspect_ratio=each(height / width),
    )


def decode(parts: Parts, latents: Tensor, *, num_frames: int) -> list[Tensor]:
    """Latents to frames: for each video [T, H, W, 3] uint8 on the CPU."""
    video = parts.vae.decode(latents, num_frames=num_frames)
    return [to_uint8(each.float().cpu()) for each in video]


def write_sample(run: SampleRun, request: Request, frames: Tensor) -> None:
    """Write the video (or, of one frame, the image) and beside it its recipe as json."""
    num_frames, height, width = run.spec.size
    recipe = {
        "prompt": request.prompt,
        "text": request.text,
        "seed": request.seed,
        "num_frames": num_frames,
        "height": height,
        "width": width,
        "fps": run.spec.fps,
        "model": run.spec.model.type,
        "from_pretrained": run.spec.model.options.get("from_pretrained"),
        "scheduler": {"type": run.spec.scheduler.type, **run.spec.scheduler.options},
    }
    write_atomically(request.path.with_suffix(".json"), json.dumps(recipe, indent=1))
    if num_frames == 1:
        write_image(request.path, frames[0])
    else:
        write_video(request.path, frames, run.spec.file_fps, crf=run.spec.crf, metadata={"comment": json.dumps(recipe)})
