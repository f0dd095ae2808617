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
from opensora.core.components import build
from opensora.core.composing import check_components
from opensora.core.config._merge import merge
from opensora.core.config.evaluate import evaluate
from opensora.core.config.legacy import modernize
from opensora.core.config.names import resolve
from opensora.core.config.structure import structure
from opensora.core.denoising import Denoising
from opensora.core.errors import ConfigError, ShapeError
from opensora.core.hooking import build_hooks
from opensora.core.pipelines.sample import build_sampler, settle_prompter
from opensora.core.pipelines.sample_recipes import Repeatable
from opensora.core.pipelines.sample_requests import check_lists, plan_requests, read_plans, refine_plans
from opensora.core.pipelines.sample_spec import SampleSpec
from opensora.core.prompt_files import PromptEntry, PromptSettings
from opensora.core.protocols import Prompter
from opensora.core.requests import Request, iter_batches
from opensora.core.results import ResultWriter
from opensora.core.video import to_uint8
from opensora.core.video_sampler import VideoSampler
from opensora.core.video_writing import format_of

__all__ = ["SamplingPipeline", "Video", "load"]


@frozen(kw_only=True, eq=False, repr=False)
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

    def __repr__(self) -> str:
        frames, height, width, _ = self.frames.shape
        return f"<Video {frames} x {height} x {width} at {self.fps:g} fps: {self.request.text!r}, seed {self.request.seed}>"

    def save(self, path: str | Path, *, crf: int | None = None) -> None:
        """Write the file that the name's ending says (.mp4, .gif, .png; without: a folder of png files), and its recipe.

        Args:
            path: Missing folders are made.
            crf: H.264's quality; None: as in the config.

        Raises:
            ConfigError: The ending is of another kind of file.
            MachineError: It can't be written.
        """
        config, kind = self.recipe["config"], format_of(path)
        crf = config["crf"] if crf is None else crf
        of_file = {"crf": crf, "format": "auto" if kind == "png" else kind}
        recipe = {**self.recipe, "config": {**config, **of_file}}  # makes this very file again
        with ResultWriter(Path(path), fps=self.fps, crf=crf, recipe=recipe) as writer:
            writer.append(self.frames)


@define(kw_only=True, eq=False)
class SamplingPipeline:
    """A model with all that surrounds it, ready to sample. Made by `load`."""

    spec: SampleSpec
    sampler: VideoSampler
    repeatable: Repeatable
    prompter: Prompter | None = None
    """Rewrites prompts first."""

    @overload
    def __call__(self, prompt: str, **settings: Any) -> Video: ...
    @overload
    def __call__(self, prompt: Sequence[str], **settings: Any) -> list[Video]: ...
    def __call__(self, prompt: str | Sequence[str], **settings: Any) -> Video | list[Video]:
        """The video of a prompt, or those of several, in batches of the config's ``batch_size``.

        Args:
            prompt: Text, or several.
            settings: Those of `PromptSettings`, such as ``num_frames``, ``seed``, ``image``, ``negative_prompt``, ``loop``;
                the others are as in the config. Of several prompts, each has the seed after that of the one before.

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

        Raises:
            ConfigError, DataError, ShapeError: As in a call; or there is no prompt.
        """
        requests = self._requests([prompt] if isinstance(prompt, str) else prompt, settings)
        if not requests:
            raise ConfigError("There is no prompt to start with.")
        (batch,) = iter_batches(requests, len(requests))
        return self.sampler.start(batch)

    def decode(self, latents: Tensor, *, num_frames: int | None = None) -> list[Tensor]:
        """Latents [B, C, t, h, w] to frames: for each video [T, H, W, 3] uint8.

        Args:
            latents: Such as ``denoising.latents`` or a state's ``denoised``.
            num_frames: T; None: as the config says.

        Raises:
            ShapeError: So many frames don't have so many latent ones.
        """
        vae, (frames, height, width) = self.sampler.parts.vae, self.spec.size
        frames = num_frames or frames
        if (needed := vae.latent_size((frames, height, width))[0]) != latents.shape[2]:
            raise ShapeError(
                f"{frames} frames have {needed} latent frames, but there are {latents.shape[2]}. Give the num_frames that "
                "these latents were started with."
            )
        with torch.inference_mode():
            video = vae.decode(latents, num_frames=frames)
        return [to_uint8(row.float().cpu()) for row in video]

    def _requests(self, prompts: Sequence[str], settings: Mapping[str, Any]) -> list[Request]:
        own = structure(PromptSettings, settings)
        seed = self.spec.seed if own.seed is None else own.seed  # of the first prompt: they count up from it
        own = attrs.evolve(own, seed=None)
        entries = {
            index: PromptEntry(text=text, settings=own, location=f"prompt {index + 1}")
            for index, text in enumerate(prompts)
        }
        spec = attrs.evolve(self.spec, prompt=list(prompts), seed=seed, start_index=None, end_index=None, num_sample=1)
        check_lists(spec, len(prompts))
        plans = read_plans(entries, spec)
        if self.prompter is not None:
            plans = refine_plans(plans, self.prompter)
        return list(plan_requests(plans, spec, Path()))

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
    spec = settle_prompter(structure(SampleSpec, {"prompt": "", **values}, locations=locations))
    check_components(spec, locations)
    accelerator = Single(SingleSpec(), device=spec.device, dtype=spec.dtype)
    hooks = build_hooks([], spec.hooks)
    return SamplingPipeline(
        spec=spec,
        sampler=build_sampler(spec, accelerator, hooks, prompts=[], keeps_encoder=True),
        repeatable=Repeatable.of(spec, accelerator.device),
        prompter=build("prompters", spec.prompter) if spec.prompter else None,
    )
