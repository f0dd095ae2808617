"""Sampling from Python: the same pipelines, configs and results as those of ``opensora-run``.

    from opensora.core.sampling import load

    pipeline = load("stdit3/sample", model=dict(from_pretrained="outputs/000-STDiT3-XL-2"))
    video = pipeline("a wave", num_frames=16)
    video.save("wave.mp4")

Shapes: B batch, T H W frames and size in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import attrs
import torch
from attrs import define, frozen
from torch import Tensor

from opensora.core.accelerator import Single, SingleSpec
from opensora.core.composing import check_components
from opensora.core.config._merge import merge
from opensora.core.config.evaluate import evaluate
from opensora.core.config.legacy import modernize
from opensora.core.config.names import resolve
from opensora.core.config.structure import structure
from opensora.core.denoising import Denoising
from opensora.core.hooking import build_hooks
from opensora.core.pipelines.sample import build_sampler
from opensora.core.pipelines.sample_recipes import Repeatable
from opensora.core.pipelines.sample_requests import check_lists, plan_requests, read_plans
from opensora.core.pipelines.sample_spec import SampleSpec
from opensora.core.prompt_files import PromptEntry, PromptSettings
from opensora.core.requests import Request, iter_batches
from opensora.core.results import ResultWriter
from opensora.core.video import to_uint8
from opensora.core.video_sampler import VideoSampler

__all__ = ["SamplingPipeline", "Video", "load"]


@frozen(kw_only=True, eq=False)
class Video:
    """A sampled video or image."""

    frames: Tensor
    """[T, H, W, 3] uint8."""
    fps: float
    """Frames a second."""
    request: Request
    """What it was made of: text, seed, size."""
    recipe: Mapping[str, Any]
    """What makes it again."""

    def save(self, path: str | Path, *, crf: int = 18) -> None:
        """Write the file that the name's ending says (.mp4, .gif, .png; without: a folder of png files), and its recipe.

        Raises:
            MachineError: It can't be written.
        """
        with ResultWriter(Path(path), fps=self.fps, crf=crf, recipe=self.recipe) as writer:
            writer.append(self.frames)


@define(kw_only=True, eq=False)
class SamplingPipeline:
    """A model with all that surrounds it, ready to sample. Made by `load`."""

    spec: SampleSpec
    sampler: VideoSampler
    repeatable: Repeatable

    @overload
    def __call__(self, prompt: str, **settings: Any) -> Video: ...
    @overload
    def __call__(self, prompt: Sequence[str], **settings: Any) -> list[Video]: ...
    def __call__(self, prompt: str | Sequence[str], **settings: Any) -> Video | list[Video]:
        """The video of a prompt, or those of several, in batches of the config's ``batch_size``.

        Args:
            prompt: Text, or several.
            settings: Those of `PromptSettings`, such as ``num_frames``, ``seed``, ``image``, ``negative_prompt``, ``loop``;
                the others are as in the config.

        Raises:
            ConfigError, DataError, ShapeError: A setting is unknown or wrong, or the model can't do it.
        """
        requests = self._requests([prompt] if isinstance(prompt, str) else prompt, settings)
        videos = {
            video.request: video
            for batch in iter_batches(requests, self.spec.batch_size)
            for video in self._sample(batch)
        }
        made = [videos[request] for request in requests]
        return made[0] if isinstance(prompt, str) else made

    def start(self, prompt: str | Sequence[str], **settings: Any) -> Denoising:
        """Denoising to be iterated: to watch it, to stop it, to fork it, to change its guidance. Arguments as in a call.

        Of several prompts, which share their size, one batch. Of several rounds the first.
        """
        requests = self._requests([prompt] if isinstance(prompt, str) else prompt, settings)
        (batch,) = iter_batches(requests, len(requests))
        return self.sampler.start(batch)

    def decode(self, latents: Tensor, *, num_frames: int | None = None) -> list[Tensor]:
        """Latents [B, C, t, h, w] to frames: for each video [T, H, W, 3] uint8.

        Args:
            latents: Such as ``denoising.latents`` or a state's ``denoised``.
            num_frames: T; None: as the config says.
        """
        with torch.inference_mode():
            video = self.sampler.parts.vae.decode(latents, num_frames=num_frames or self.spec.size[0])
        return [to_uint8(row.float().cpu()) for row in video]

    def _requests(self, prompts: Sequence[str], settings: Mapping[str, Any]) -> list[Request]:
        own = structure(PromptSettings, settings)
        entries = {
            index: PromptEntry(text=text, settings=own, location=f"prompt {index + 1}")
            for index, text in enumerate(prompts)
        }
        spec = attrs.evolve(self.spec, prompt=list(prompts), start_index=None, end_index=None, num_sample=1)
        check_lists(spec, len(prompts))
        return list(plan_requests(read_plans(entries, spec), spec, Path()))

    def _sample(self, batch: Sequence[Request]) -> list[Video]:
        pieces: list[list[Tensor]] = [[] for _ in batch]
        for piece in self.sampler.iter_pieces(batch):
            for own, frames in zip(pieces, piece.frames, strict=True):
                own.append(frames)
        return [
            Video(
                frames=torch.cat(pieces[row]),
                fps=request.file_fps,
                request=request,
                recipe=self.repeatable.recipe(batch, row),
            )
            for row, request in enumerate(batch)
        ]


def load(config: str | Path, *, trust: bool = False, **changes: Any) -> SamplingPipeline:
    """Build the sampling pipeline of a config: weights read, everything on its device.

    Args:
        config: A config file, the name of an installed one, or a run folder's ``config.py``.
        trust: Execute the config as Python.
        changes: Keys to set; a dict changes those keys of a component that it names.

    Raises:
        ConfigError, ComponentError, WeightsError, MachineError: As ``opensora-run`` would say.
    """
    evaluated = modernize(evaluate(resolve(str(config)), trust=trust))
    locations: dict[tuple[str, ...], str] = {}
    values = merge(evaluated.values, changes, (), evaluated.locations, {}, locations)
    spec = structure(SampleSpec, {"prompt": "", **values}, locations=locations)
    check_components(spec, locations)
    accelerator = Single(SingleSpec(), device=spec.device, dtype=spec.dtype)
    hooks = build_hooks([], spec.hooks)
    return SamplingPipeline(
        spec=spec,
        sampler=build_sampler(spec, accelerator, hooks, prompts=[], keeps_encoder=True),
        repeatable=Repeatable.of(spec, accelerator.device),
    )
