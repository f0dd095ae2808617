"""What packages must agree on: the few methods that each kind of component has, and what flows between them.

Shapes: B batch, C channels, T H W frames and size, L text tokens, D text width. Video is RGB in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from attrs import frozen
from torch import Tensor

from opensora.core.conditioning import Conditioning
from opensora.core.randomness import Draws, SampleKey

__all__ = [
    "IMAGE_FPS",
    "Clip",
    "ClipFeatures",
    "ClipRecipe",
    "Dataset",
    "Denoiser",
    "Prompter",
    "SampleState",
    "Scheduler",
    "Size",
    "SourceFacts",
    "TextEncoder",
    "VideoAutoencoder",
    "batch_conditioning",
]

Size = tuple[int, int, int]
"""Frames, height, width."""

IMAGE_FPS = 120.0
"""The frame rate that denoisers are told for images: one that videos hardly have."""


class Denoiser(Protocol):
    """The trained network: an ``nn.Module``, built as ``Class(spec, *, latent_channels, ...)``.

    A constructor takes those of the keywords that it needs: ``latent_channels`` of the autoencoder, ``latent_size`` (T, H, W)
    of a video of the configured size, ``text_width`` (D; None for class labels) and ``text_length`` (L) of the text encoder.
    Optional attributes: ``condition_dropout`` (float), the share of training samples whose text or label is dropped for
    classifier-free guidance; ``adapt_state_dict(state) -> state``, which turns a published checkpoint into this class's keys;
    ``null_prompt`` (str) with ``take_null_text(conditioning)``, for models without a learned null: it is given what the text
    encoder makes of that prompt; ``sequence_plan`` (`SequencePlan`), without which its tokens can't be spread over processes.
    A ``Spec`` with a field ``from_pretrained`` is told the source of the weights as well.
    """

    def __call__(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Predict noise or velocity.

        Args:
            latents: [B, C, T, H, W].
            timestep: [B], in [0, 1000], integer or not.

        Returns:
            [B, C, T, H, W], or [B, 2C, T, H, W] with variance values in the second half. Float32.

        Raises:
            ShapeError: A size that this model can't do.
        """
        ...


class VideoAutoencoder(Protocol):
    """Pixels to latents and back: an ``nn.Module`` built as ``Class(spec)``, frozen and in eval mode.

    Takes and gives float32, whatever dtype it was cast to. In a run in fp16, submodules with a true attribute
    ``overflows_in_fp16`` stay float32. Optional: ``iter_decode(latents, *, num_frames)``, which yields what ``decode`` gives
    in pieces of time; ``latent_chunk`` (int or None), the latent frames that are decoded together, apart from all others.

    Optional, for latents that are computed once and drawn anew at each showing: ``moments(video) -> dict[str, Tensor]``, what
    the encoder says of each video, each tensor [B, ...]; and ``latents_of(moments, draws) -> Tensor``, which draws latents
    from that as ``encode`` does, without weights: it is called where the module was built on the meta device. Options
    that are named in an attribute ``memory_options`` change latents by rounding alone: kept ones serve with any of them.
    """

    latent_channels: int

    def encode(self, video: Tensor, *, draws: Draws | None = None) -> Tensor:
        """[B, 3, T, H, W] in [-1, 1] to latents [B, C, T', H', W']. ``draws`` samples the posterior; None takes its mean."""
        ...

    def decode(self, latents: Tensor, *, num_frames: int) -> Tensor:
        """Latents to video [B, 3, num_frames, H, W], about in [-1, 1]."""
        ...

    def latent_size(self, size: Size) -> Size:
        """(T', H', W') of a video of (T, H, W).

        Raises:
            ShapeError: A size that can't be encoded; the message names the nearest that can.
        """
        ...


class TextEncoder(Protocol):
    """Prompts to the text part of a `Conditioning`: an ``nn.Module`` built as ``Class(spec)``, frozen and in eval mode.

    What it makes of a prompt must not depend on the others of a batch: it may be remembered. ``overflows_in_fp16`` is as for
    a `VideoAutoencoder`. ``fingerprint() -> str``, optional, stands for what besides options and weights decides what it
    makes of a prompt, such as its tokens: remembered embeddings of another one aren't used. ``memory_options`` is as there.
    Options ``device``, ``dtype`` and ``shard`` are core's, for every text encoder: a ``Spec`` has none so named.
    Optional, for those with a limit: ``cut_off(prompt) -> str``, the end of a prompt that lies beyond it and is not read, in
    its own spelling (T5's is cleaned), "" if all is read; and ``max_tokens`` (int), the limit if not ``max_length``.
    Functions of these names in `opensora.core.text_cuts` know what to answer for encoders without.
    """

    width: int | None
    """D; None for class labels."""
    max_length: int
    """L."""

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """``text_embedding`` [B, L, D] and ``text_mask`` [B, L], or ``labels`` [B]."""
        ...


class Prompter(Protocol):
    """Rewrites prompts before a text encoder reads them, such as short ones into longer; built as ``Class(spec)``."""

    def refine(self, texts: Sequence[str]) -> list[str]:
        """One prompt for each text, in their order, each of one line. A text that is empty asks for a new, random prompt.

        Raises:
            MachineError: What it needs is not there, or doesn't answer.
            DataError: It made nothing of a text that could be a prompt.
        """
        ...


@frozen(kw_only=True)
class SampleState:
    """Where a sampler stands after a step."""

    step: int
    """Counts from 0."""
    num_steps: int
    timestep: float
    """In [0, num_timesteps]: where this step began."""
    latents: Tensor
    """[B, C, T, H, W] after the step."""
    denoised: Tensor
    """[B, C, T, H, W]: the clean latents as the denoiser foresees them at this step; for previews."""
    memory: tuple[Tensor, ...] = ()
    """What a multistep solver takes along to its next step, newest first; each [B, C, T, H, W]."""


class Scheduler(Protocol):
    """A training objective and a sampler; pure: randomness and the denoiser are arguments. Built as ``Class(spec)``.

    Optional attribute: ``adds_noise`` (bool, False if missing), whether sampling draws fresh noise at its steps, so that no
    step follows from the ones before. Its ``Spec`` has ``num_sampling_steps`` if the number of steps can be chosen.
    """

    num_timesteps: int

    def loss(
        self,
        denoiser: Denoiser,
        latents: Tensor,
        conditioning: Conditioning,
        *,
        draws: Draws,
        timestep: Tensor | None = None,
    ) -> Tensor:
        """Loss of each sample, [B].

        Frames that ``conditioning.frame_mask`` marks as given stay clean and don't count. ``timestep`` [B] fixes what is
        otherwise drawn.
        """
        ...

    def guide(self, denoiser: Denoiser) -> Denoiser:
        """The denoiser under the classifier-free guidance that the options ask for.

        What it returns may have an attribute ``scale``, the guidance scale, that can be changed between steps.
        """
        ...

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
        """Denoise step by step; the last state holds the result.

        Args:
            denoiser: As it is to be called at each step: guided (see `guide`), if that is wanted.
            noise: [B, C, T, H, W] standard normal; given frames hold their clean latents.
            frame_mask: [B, T] in [0, 1]: 1 is generated, 0 is kept as given, in between joins in from that share of the way.
            after: Go on behind this state, one that an earlier call yielded, instead of beginning with ``noise``. With the
                same arguments the states that follow are the same, bit for bit.
        """
        ...


@frozen(kw_only=True)
class SourceFacts:
    """What is known of a video or image file."""

    digest: str
    """Of its bytes."""
    num_frames: int = 1
    fps: float = IMAGE_FPS


@frozen(kw_only=True)
class ClipRecipe:
    """How a dataset would make a clip, known without decoding its file."""

    path: Path
    """The file."""
    frames: Sequence[int]
    """Which of its frames; (0,) of an image."""
    size: Size
    """(T, H, W) of the clip."""
    transform: Mapping[str, object]
    """What else decides its pixels: the name of the transform, and its options if it has some."""
    text: str
    fps: float
    """As `Clip` has it."""


@frozen(kw_only=True, eq=False)
class ClipFeatures:
    """What was computed of a clip before, or under which names it is to be kept once it is."""

    size: Size
    """(T, H, W) of the clip in pixels."""
    moments: Mapping[str, Tensor] | None = None
    """Of its latents, as a `VideoAutoencoder`'s ``moments`` has them, without batch axis. ``latents`` [C, T', H', W'] alone
    are the latents themselves. None: to be computed of the pixels."""
    latents_name: str = ""
    text: Conditioning | None = None
    """Of its caption, with a batch axis of 1. None: to be computed."""
    text_name: str = ""
    num_damaged: int = 0
    """Features that were there, but damaged."""


@frozen(kw_only=True, eq=False)
class Clip:
    """One training sample: a video or, with one frame, an image."""

    video: Tensor
    """[3, T, H, W] float32 in [-1, 1]; empty where ``features`` have the moments."""
    text: str
    """The caption; for class-labelled data the label's number."""
    fps: float
    """120 for images."""
    key: SampleKey
    path: str = ""
    """The file it came from, for messages."""
    features: ClipFeatures | None = None
    """What was computed of it before, if the run uses features."""

    @property
    def size(self) -> Size:
        """(T, H, W) in pixels."""
        if self.features is not None:
            return self.features.size
        return tuple(self.video.shape[1:])  # type: ignore[return-value]  # a 4-D shape


@runtime_checkable
class Dataset(Protocol):
    """Map-style dataset, built as ``Class(spec)``. Lives in loader workers, so it must pickle.

    Optional: ``size``, the (T, H, W) of every clip, known without reading one; ``order(seed, epoch)``, the indices of all
    samples in the order in which an epoch shows them, where some orders are read faster than others; and
    ``recipe(key, look) -> ClipRecipe``, how ``dataset[key]`` would be made, where ``look(path)`` gives the `SourceFacts` of a
    file: with it, files whose latents are computed already aren't decoded.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, key: SampleKey) -> Clip:
        """The clip of row ``key.index``; whatever is random about it (crops) is drawn from ``key``.

        Raises:
            DataError: The row's file can't be used. Skipped, counted and listed by the training pipeline.
        """
        ...


def batch_conditioning(clips: Sequence[Clip]) -> Conditioning:
    """Size and rate conditions of a batch of equally sized clips."""
    num_frames, height, width = clips[0].size
    batch = len(clips)
    return Conditioning(
        fps=torch.tensor([clip.fps for clip in clips], dtype=torch.float32),
        height=torch.full((batch,), float(height)),
        width=torch.full((batch,), float(width)),
        num_frames=torch.full((batch,), float(num_frames)),
        aspect_ratio=torch.full((batch,), height / width),
    )
