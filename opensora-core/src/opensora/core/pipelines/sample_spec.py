"""What a sampling config may say. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from attrs import field, frozen
from attrs.validators import and_, ge, gt, le, optional

from opensora.core.errors import ConfigError
from opensora.core.pipelines.composition_spec import CompositionSpec
from opensora.core.sizes import image_size, parse_num_frames

__all__ = ["SampleSpec"]


@frozen(kw_only=True)
class SampleSpec(CompositionSpec):
    """Sample videos or images from prompts or labels."""

    pipeline: Literal["sample"] = "sample"

    # ---- what
    prompt: str | list[str] | None = None
    """One or more prompts; for class labels their numbers."""
    prompt_path: str | None = None
    """Text file with a prompt a line, or an installed one such as prompts/t2v_samples.txt; used if there is no prompt."""
    start_index: int | None = None
    """First prompt to sample (of a file: as a Python slice); file names count on from it."""
    end_index: int | None = None
    """Prompt before which to stop."""
    num_sample: int = field(default=1, validator=gt(0))
    """Videos a prompt, each with a seed of its own."""
    num_frames: int | str = 1
    """Frames, or a name such as 2s or 4s; 1 is an image."""
    image_size: tuple[int, int] | None = None
    """Height and width in pixels; goes before resolution and aspect_ratio."""
    resolution: str | None = None
    """240p, 512, ...; with aspect_ratio."""
    aspect_ratio: str | None = None
    """height:width; 9:16 is landscape."""
    fps: float = field(default=24, validator=gt(0))
    """Frames a second that the model is told; images are told 120."""
    frame_interval: int = field(default=1, validator=gt(0))
    """The model was trained on every n-th frame: files play n times slower, unless save_fps is given."""
    save_fps: float | None = field(default=None, validator=optional(gt(0)))
    """Frames a second of the files; None: fps / frame_interval."""
    aes: float | None = None
    """Adds "aesthetic score: 6.5." to each prompt."""
    flow: float | None = None
    """Adds "motion score: 4.0."."""
    camera_motion: str | None = None
    """Adds "camera motion: pan right."."""
    multi_resolution: Literal["STDiT2", "OpenSora", "PixArtMS"] | bool | None = None
    """Accepted from older configs; each model is always told the size, and takes what it knows."""

    # ---- frames to start from, and rounds: read for the sake of older configs, and refused when run (see `unbuilt`)
    loop: int = field(default=1, validator=gt(0))
    """Rounds, each going on from the last. More than one is not built yet."""
    condition_frame_length: int = field(default=5, validator=gt(0))
    """Latent frames that a round takes from the last."""
    condition_frame_edit: float = field(default=0.0, validator=and_(ge(0), le(1)))
    """How far those frames may change: 0 keeps them."""
    align: int | None = field(default=None, validator=optional(gt(0)))
    """Latent frames to whose multiples references are aligned."""
    reference_path: str | list[str] | None = None
    """Images or videos to start from, one item a prompt. Not built yet."""
    mask_strategy: str | list[str] | None = None
    """Where the references go, one item a prompt. Not built yet."""

    # ---- memory
    release_text_encoder: bool = True
    """Free the text encoder's memory once all prompts are encoded, before the denoiser needs the GPU. The encoder stays
    where their embeddings don't fit text_cache_gib."""
    text_cache_gib: float = field(default=4.0, validator=ge(0))
    """Memory on the CPU, in each process, for embeddings, so that a prompt is encoded once. 0: batch by batch instead."""

    # ---- where
    save_dir: str | None = None
    """This very folder instead of samples/ of a numbered run folder."""
    sample_name: str | None = None
    """First part of file names; None: sample."""
    prompt_as_path: bool = False
    """Name files after their prompts, and leave out those that are there already."""
    skip_existing: bool = False
    """Leave out videos that are there already: goes on with a run that was ended."""
    crf: int = field(default=18, validator=ge(0))
    """H.264's quality: 0 is lossless, 18 looks so, 28 is small."""
    verbose: int = field(default=1, validator=ge(0))
    """0: no progress, 1: progress over videos, 2: over steps too."""

    def __attrs_post_init__(self) -> None:
        if self.image_size is None and (self.resolution is None or self.aspect_ratio is None):
            raise ConfigError("The size is not set: give image_size = (height, width), or resolution and aspect_ratio.")
        if any(side < 1 for side in self.size):
            raise ConfigError(f"image_size is {self.image_size}; both sides must be at least 1.")

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, height and width in pixels.

        Raises:
            ConfigError: A name is unknown.
        """
        if self.image_size is not None:
            return parse_num_frames(self.num_frames), *self.image_size
        return parse_num_frames(self.num_frames), *image_size(str(self.resolution), str(self.aspect_ratio))

    def unbuilt(self, prompts: Sequence[str]) -> list[str]:
        """What this config asks for that can be read but not run yet."""
        references = self.reference_path or self.mask_strategy
        in_prompts = any('{"reference_path"' in each or '{"mask_strategy"' in each for each in prompts)
        wanted = {f"loop = {self.loop}": self.loop > 1, "references": references or in_prompts}
        return [name for name, is_wanted in wanted.items() if is_wanted]

    @property
    def file_fps(self) -> float:
        """Frames a second of the files."""
        return self.save_fps or self.fps / self.frame_interval
