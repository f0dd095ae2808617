"""The sampler of videos: requests to noise to latents to frames, round by round. What the command and `load` are made of.

Each video depends on its own request alone, not on its neighbours in a batch. However many rounds there are, no more than one
round's latents and frames are held.

Shapes: B batch, C latent channels, T H W frames and size in pixels, t h w in latents.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import attrs
import torch
from attrs import define, field, frozen
from torch import Tensor

from opensora.core.accelerator import Accelerator
from opensora.core.attention import Kernel, sdpa
from opensora.core.components import build
from opensora.core.composing import Parts
from opensora.core.conditioning import Conditioning
from opensora.core.config.structure import ComponentConfig
from opensora.core.denoising import Denoising
from opensora.core.errors import ConfigError
from opensora.core.given_frames import apply_edits
from opensora.core.hooking import Hooks
from opensora.core.mask_strategy import carry_over, edits_of_round
from opensora.core.profiling import marked
from opensora.core.prompt_syntax import parse_rounds
from opensora.core.protocols import IMAGE_FPS, Denoiser, SampleState, Scheduler
from opensora.core.randomness import SampleDraws, SampleKey
from opensora.core.reference_latents import Overlap, ReferenceLatents
from opensora.core.requests import Request
from opensora.core.video import to_uint8

__all__ = ["Clock", "Piece", "VideoSampler", "build_conditioning", "build_scheduler"]

log = logging.getLogger(__name__)


@define(eq=False)
class Clock:
    """Where the time goes."""

    device: torch.device
    seconds: dict[str, float] = field(factory=dict)
    """By phase."""
    _inner: list[float] = field(factory=list, init=False)
    """Of each phase under way, the time of phases within it."""

    @contextmanager
    def phase(self, name: str, *, waits: bool = True) -> Iterator[None]:
        """Add the time of the block, but for that of phases within it, to ``seconds[name]``.

        Args:
            name: Of the phase.
            waits: Whether to wait for the device at the end; not at each denoising step.
        """
        begin = time.perf_counter()
        self._inner.append(0.0)
        try:
            with marked(name):
                yield
        finally:
            if waits and self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            taken = time.perf_counter() - begin
            self.seconds[name] = self.seconds.get(name, 0.0) + taken - self._inner.pop()
            if self._inner:
                self._inner[-1] += taken


@frozen(kw_only=True, eq=False)
class Piece:
    """The next frames of a batch's videos."""

    frames: list[Tensor]
    """[T', H, W, 3] uint8, one for each request."""
    round: int
    is_first: bool
    """Whether a round begins with these: behind a seam, if it isn't the first."""


@define(kw_only=True, eq=False)
class VideoSampler:
    """Makes videos of requests with parts that are placed and ready."""

    parts: Parts
    accelerator: Accelerator
    hooks: Hooks
    guided: Denoiser
    """The denoiser under the scheduler's guidance."""
    denoiser: Denoiser
    """That, inside the wrappers of hooks."""
    kernel: Kernel = sdpa
    """What computes attention."""
    overlap: Overlap = field(factory=Overlap)
    scheduler_config: ComponentConfig | None = None
    """Builds schedulers with other numbers of steps."""
    clock: Clock = field(init=False)
    _schedulers: dict[int | None, Scheduler] = field(init=False)
    _sizes_told: set[tuple[int, ...]] = field(factory=set, init=False)

    def __attrs_post_init__(self) -> None:
        self.clock = Clock(self.accelerator.device)
        self._schedulers = {None: self.parts.scheduler}

    def start(self, requests: Sequence[Request]) -> Denoising:
        """Denoising of a batch's first round, to be iterated. ``requests`` are of one kind (see `iter_batches`)."""
        return self._start(requests, self._load_references(requests), round_=0, tail=None)

    def iter_pieces(
        self, requests: Sequence[Request], *, watch: Callable[[SampleState], None] | None = None
    ) -> Iterator[Piece]:
        """The videos of a batch, all rounds, piece by piece as they are decoded.

        Args:
            requests: Of one kind.
            watch: Called after each denoising step.

        Raises:
            ConfigError, DataError, ShapeError: Something that a request asks for can't be had.
        """
        first = requests[0]
        references = self._load_references(requests)
        shared = self.overlap.frames(self.parts.vae, first.size) if first.loop > 1 else 0
        tail: Tensor | None = None
        for round_ in range(first.loop):
            denoising = self._start(requests, references, round_=round_, tail=tail)
            with self.clock.phase("denoise"):
                for state in denoising:
                    if watch is not None:
                        with self.clock.phase("hooks", waits=False):
                            watch(state)
            tail, unseen, is_first = None, shared if round_ else 0, True
            for piece in self._iter_decode(denoising.latents, first.size[0]):
                self._tell_size(first.size[1:], tuple(piece.shape[3:]))
                if shared:
                    tail = piece if tail is None else torch.cat([tail, piece], dim=2)
                    tail = tail[:, :, -shared:].clone()
                fresh = piece[:, :, unseen:]
                unseen -= piece.shape[2] - fresh.shape[2]
                if fresh.shape[2]:
                    with self.clock.phase("decode"):
                        frames = [to_uint8(row.cpu()) for row in fresh]
                    yield Piece(frames=frames, round=round_, is_first=is_first)
                    is_first = False

    def _tell_size(self, asked: tuple[int, ...], given: tuple[int, ...]) -> None:
        """Say so, once for each size, where the autoencoder's blocks don't fill what was asked for."""
        if given != asked and asked not in self._sizes_told:
            self._sizes_told.add(asked)
            log.info("%d x %d (height x width) was asked for; the autoencoder gives %d x %d", *asked, *given)

    def scheduler_for(self, request: Request) -> Scheduler:
        """The run's scheduler, or one with the request's own number of steps.

        Raises:
            ConfigError: The number of steps can't be chosen, or is wrong.
        """
        steps = request.num_sampling_steps
        if steps not in self._schedulers:
            if self.scheduler_config is None:
                raise ConfigError("num_sampling_steps can't be chosen here.")
            self._schedulers[steps] = build_scheduler(self.scheduler_config, num_sampling_steps=steps)
        return self._schedulers[steps]

    def _load_references(self, requests: Sequence[Request]) -> list[ReferenceLatents]:
        with self.clock.phase("references"):
            return [
                ReferenceLatents.load(request, self.parts.vae, self.accelerator.device, self.overlap)
                for request in requests
            ]

    @torch.inference_mode()
    def _start(
        self, requests: Sequence[Request], references: Sequence[ReferenceLatents], *, round_: int, tail: Tensor | None
    ) -> Denoising:
        """Denoising of one round; ``tail`` [B, 3, T', H, W] are the last frames of the round before."""
        first, device = requests[0], self.accelerator.device
        with self.clock.phase("text"):
            conditioning = build_conditioning(self.parts, requests, round_=round_).to(device)
        keys = [SampleKey(request.seed, 0, round_) for request in requests]
        shape = (self.parts.vae.latent_channels, *self.parts.vae.latent_size(first.size))
        noise = SampleDraws(keys, device).normal("latents", shape)
        with self.clock.phase("references"):
            noise, mask = self._give_frames(noise, references, round_=round_, tail=tail)
        return Denoising(
            scheduler=self.scheduler_for(first),
            guided=self.guided,
            denoiser=self.denoiser,
            noise=noise,
            conditioning=conditioning,
            frame_mask=mask,
            keys=keys,
            hooks=self.hooks,
            kernel=self.kernel,
            guidance_scale=first.cfg_scale,
        )

    def _give_frames(
        self, noise: Tensor, references: Sequence[ReferenceLatents], *, round_: int, tail: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Noise with the latents of given frames in place, and the mask [B, t]; None if there are none."""
        rows, masks = [], []
        for index, (row, own) in enumerate(zip(noise, references, strict=True)):
            latents, edits = list(own.latents), edits_of_round(own.edits, round_)
            if tail is not None:
                before = self.parts.vae.encode(tail[index : index + 1])[0]
                taken = carry_over(
                    loop=round_, reference=len(latents), length=before.shape[1], edit_ratio=self.overlap.edit_ratio
                )
                latents, edits = [*latents, before], [*edits, taken]
            filled, mask = apply_edits(
                row, latents, edits, align=self.overlap.alignment(self.parts.vae), names=own.sources
            )
            rows.append(filled)
            masks.append(mask)
        mask = torch.stack(masks)
        return torch.stack(rows), None if bool((mask == 1).all()) else mask

    def _iter_decode(self, latents: Tensor, num_frames: int) -> Iterator[Tensor]:
        """Video [B, 3, T', H, W] in pieces, where the autoencoder can; each is timed."""
        vae = self.parts.vae
        if hasattr(vae, "iter_decode"):
            pieces = vae.iter_decode(latents, num_frames=num_frames)
        else:
            pieces = (vae.decode(whole, num_frames=num_frames) for whole in (latents,))
        while True:
            with self.clock.phase("decode"), torch.inference_mode():
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece.float()


def build_scheduler(config: ComponentConfig, *, num_sampling_steps: int | None) -> Scheduler:
    """A config's scheduler, with another number of steps unless that is None.

    Raises:
        ConfigError: It can't be chosen, or is wrong.
    """
    if num_sampling_steps is not None:
        config = attrs.evolve(config, options={**config.options, "num_sampling_steps": num_sampling_steps})
    scheduler: Scheduler = build("schedulers", config)
    return scheduler


def build_conditioning(parts: Parts, requests: Sequence[Request], *, round_: int = 0) -> Conditioning:
    """What a batch's denoiser is told in a round: texts, sizes and rates. On the CPU."""
    num_frames, height, width = requests[0].size

    def each(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32)

    def same(value: float) -> Tensor:
        return each([value] * len(requests))

    texts = [parse_rounds(request.text).at(round_) for request in requests]
    text = parts.text_encoder.encode(texts).to("cpu")
    negatives = [request.negative_prompt for request in requests if request.negative_prompt is not None]
    if negatives:
        if text.text_embedding is None:
            raise ConfigError("negative_prompt needs a text encoder of texts; this one gives class labels.")
        negative = parts.text_encoder.encode(negatives).to("cpu")
        text = text.replace(negative_embedding=negative.text_embedding, negative_mask=negative.text_mask)
    return text.replace(
        fps=each([IMAGE_FPS if num_frames == 1 else request.fps for request in requests]),
        height=same(height),
        width=same(width),
        num_frames=same(num_frames),
        latent_frames=same(parts.vae.latent_size(requests[0].size)[0]),
        aspect_ratio=same(height / width),
    )
