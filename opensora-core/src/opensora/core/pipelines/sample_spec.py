"""What a sampling config may say. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from attrs import field, frozen
from attrs.validators import and_, ge, gt, le, optional

from opensora.core.config.structure import ComponentConfig
from opensora.core.errors import ConfigError
from opensora.core.pipelines.composition_spec import CompositionSpec
from opensora.core.sizes import image_size as find_image_size
from opensora.core.sizes import parse_num_frames

__all__ = ["SampleSpec"]

Size = tuple[int, int, int]


@frozen(kw_only=True)
class SampleSpec(CompositionSpec):
    """Sample videos or images from prompts or labels."""

    kinds: ClassVar[Mapping[str, str]] = {**CompositionSpec.kinds, "prompter": "prompters"}

    pipeline: Literal["sample"] = "sample"

    # ---- what
    prompt: str | list[str] | None = None
    """One or more prompts; for class labels their numbers. |0|a|2|b changes the text at round 2; JSON at the end may name
    references."""
    prompt_path: str | None = None
    """Prompts a line (.txt), or with settings of their own (.csv, .jsonl); or an installed list such as
    prompts/t2v_samples.txt. Used if there is no prompt."""
    prompt_generator: str | None = None
    """Sample this prompt without end, if there is no other; end_index sets an end."""
    negative_prompt: str | None = None
    """What guidance leads away from, in place of the model's learned null."""
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
    prompter: ComponentConfig | None = None
    """Rewrites the prompts before they are used, such as dict(type="openai") or dict(type="templates")."""
    llm_refine: bool = False
    """Open-Sora's name for prompter = dict(type="openai")."""

    # ---- frames to start from, and rounds
    image: str | None = None
    """Image or video whose first frame the video begins with."""
    last_image: str | None = None
    """Image that the video ends with."""
    extend: str | None = None
    """Video to go on from."""
    connect: tuple[str, str] | None = None
    """Two images or videos to lead from one to the other."""
    edit: str | None = None
    """Video to change as far as ``strength`` says."""
    strength: float | None = field(default=None, validator=optional(and_(gt(0), le(1))))
    """How far ``edit`` goes: 0.2 retouches, 1 keeps nothing. None: 0.5."""
    reference_path: str | list[str] | None = None
    """Images or videos that mask_strategy uses, separated by ";"; a list has one item a prompt."""
    mask_strategy: str | list[str] | None = None
    """Where references go: loop,reference,reference start,target start,length,edit ratio; a list has one item a prompt."""
    loop: int = field(default=1, validator=gt(0))
    """Rounds, each going on from the last: long videos."""
    condition_frame_length: int | None = field(default=None, validator=optional(gt(0)))
    """Latent frames that a round takes from the last, extend and connect from their videos. None: a quarter, at most 5."""
    condition_frame_edit: float = field(default=0.0, validator=and_(ge(0), le(1)))
    """How far the frames of the last round may change: 0 keeps them."""
    align: int | None = field(default=None, validator=optional(gt(0)))
    """Latent frames to whose multiples references are moved. None: what the autoencoder decodes together, if it does so."""

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
    format: Literal["auto", "mp4", "gif", "frames"] = "auto"
    """Of the files. auto: mp4, and png where there is one frame; frames: a folder of png files."""
    watermark: bool | str = False
    """Put a mark on a copy of each file: True for opensora's, or the path of a png."""
    preview: int | None = field(default=None, validator=optional(gt(0)))
    """Write a cheap preview of each video every so many denoising steps."""
    compile: bool = False
    """Compile each block by torch.compile: slower to start, by seconds to minutes for new sizes, and faster after."""
    crf: int = field(default=18, validator=and_(ge(0), le(51)))
    """H.264's quality: 0 is lossless, 18 looks so, 28 is small, 51 the worst."""
    verbose: int = field(default=1, validator=ge(0))
    """0: no progress, 1: progress over videos, 2: over steps too."""

    repeat: str | None = None
    """A sample that is made again: set by --from."""

    def __attrs_post_init__(self) -> None:
        self.size_of(None, None, None, None)
        if self.llm_refine and self.prompter is not None:
            raise ConfigError(
                'llm_refine stands for prompter = dict(type="openai"), but there is a prompter too. Keep one.'
            )

    @property
    def size(self) -> Size:
        """Frames, height and width in pixels, of prompts that don't have their own.

        Raises:
            ConfigError: A name is unknown.
        """
        return self.size_of(None, None, None, None)

    def size_of(
        self,
        num_frames: int | str | None,
        image_size: tuple[int, int] | None,
        resolution: str | None,
        aspect_ratio: str | None,
    ) -> Size:
        """Frames, height and width of a prompt with these settings; None is this spec's. A size goes before names.

        Raises:
            ConfigError: A name is unknown, or the size isn't set.
        """
        frames = parse_num_frames(self.num_frames if num_frames is None else num_frames)
        if image_size is None and resolution is None and aspect_ratio is None:
            image_size, resolution, aspect_ratio = self.image_size, self.resolution, self.aspect_ratio
        if image_size is not None:
            if min(image_size) < 1:
                raise ConfigError(f"image_size is {image_size}; both sides must be at least 1.")
            return frames, *image_size
        resolution, aspect_ratio = resolution or self.resolution, aspect_ratio or self.aspect_ratio
        if resolution is None or aspect_ratio is None:
            given = f'resolution "{resolution}" alone' if resolution else f'aspect_ratio "{aspect_ratio}" alone'
            what = f"{given} is no size" if resolution or aspect_ratio else "The size is not set"
            raise ConfigError(f"{what}: give image_size = (height, width), or resolution and aspect_ratio.")
        return frames, *find_image_size(resolution, aspect_ratio)

    @property
    def leaves_out_existing(self) -> bool:
        """Whether files that are there already are not made again."""
        return self.skip_existing or self.prompt_as_path
