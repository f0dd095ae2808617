"""What a sampling run is to make: a request for each file, settled as far as it can be before anything is loaded."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from pathlib import Path
from typing import overload

import attrs
from attrs import field, frozen

from opensora.core.errors import DataError
from opensora.core.frame_conditions import given_frames_of
from opensora.core.mask_strategy import FrameEdit
from opensora.core.recipes import recipe_path

__all__ = [
    "Companion",
    "EndlessRequests",
    "GivenFrames",
    "Request",
    "Target",
    "check_paths",
    "file_stem",
    "iter_batches",
]

Size = tuple[int, int, int]


@frozen(kw_only=True)
class Target:
    """One file of a run, and what it is called in pictures and logs."""

    prompt: str
    """As the user wrote it, without JSON."""
    path: Path


@frozen(kw_only=True)
class GivenFrames:
    """Which frames a video starts from, as the user said it: by the readable names or by a mask strategy."""

    image: str | None = None
    last_image: str | None = None
    extend: str | None = None
    connect: tuple[str, str] | None = None
    edit: str | None = None
    strength: float | None = None
    reference_path: str | None = None
    mask_strategy: str | None = None

    def __bool__(self) -> bool:
        """Whether there are any."""
        return any(value is not None for value in attrs.astuple(self, recurse=False))

    def resolve(self, length: int, *, loop: int | None = None) -> tuple[list[str], list[FrameEdit]]:
        """Where the references are, and where their frames go.

        Args:
            length: Latent frames that ``extend`` and ``connect`` take from a video.
            loop: How many rounds there are, to check a strategy by; None: it isn't checked.

        Raises:
            ConfigError: Names contradict each other, or the strategy can't be read or names a missing reference.
        """
        return given_frames_of(length=length, loop=loop, **attrs.asdict(self))


@frozen
class Companion:
    """What a batch told its denoiser of one of its videos."""

    text: str
    negative_prompt: str | None = None


@frozen(kw_only=True)
class Request(Target):
    """One video or image to make."""

    text: str
    """What the text encoder gets: refined, with scores; still a programme where the text changes from round to round."""
    negative_prompt: str | None = None
    """None: guidance leads away from the model's null."""
    seed: int
    size: Size
    """Frames, height, width of a round."""
    fps: float
    """That the model is told."""
    file_fps: float
    """Of the file."""
    frame_fps: float
    """At which the video's own frames follow one another, in the world that it shows."""
    loop: int = 1
    given: GivenFrames = field(factory=GivenFrames)
    cfg_scale: float | None = None
    """None: the scheduler's."""
    num_sampling_steps: int | None = None
    """None: the scheduler's."""
    companions: tuple[Companion, ...] = ()
    """The whole batch in which this was made first, and is made again to get the same to the last bit."""
    row: int = 0
    """Which of them is its own."""

    @property
    def kind(self) -> tuple[object, ...]:
        """What all of a batch share."""
        has_negative, has_frames = self.negative_prompt is not None, bool(self.given)
        return (self.size, self.loop, has_negative, has_frames, self.cfg_scale, self.num_sampling_steps)


def iter_batches(requests: Iterable[Request], batch_size: int) -> Iterator[list[Request]]:
    """Batches of one kind each, in order of their first request; what is left of a kind comes last.

    A request with companions is a batch by itself.
    """
    begun: dict[tuple[object, ...], list[Request]] = {}
    for request in requests:
        if request.companions:
            yield [request]
            continue
        batch = begun.setdefault(request.kind, [])
        batch.append(request)
        if len(batch) == batch_size:
            yield begun.pop(request.kind)
    yield from begun.values()


class EndlessRequests(Sequence[Request]):
    """One prompt again and again, each time with the next seed and number. Nothing is held but the first."""

    def __init__(self, first: Request, *, stem: str, extension: str, first_index: int, count: int) -> None:
        """Files are called ``stem_NNNN`` and ``extension``, from ``first_index`` on; ``count`` is where even this ends."""
        self.first, self.stem, self.extension = first, stem, extension
        self.first_index, self._indices = first_index, range(count)

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Request: ...
    @overload
    def __getitem__(self, index: slice) -> EndlessRequests: ...
    def __getitem__(self, index: int | slice) -> Request | EndlessRequests:
        if isinstance(index, slice):
            part = copy(self)
            part._indices = self._indices[index]
            return part
        number = self._indices[index]
        path = self.first.path.with_name(file_stem(self.first_index + number, self.stem) + self.extension)
        return attrs.evolve(self.first, seed=self.first.seed + number, path=path)


def check_paths(requests: Iterable[Target]) -> None:
    """Check that no two requests write to one file: ``a.mp4`` and ``a.png`` would share their recipe.

    Raises:
        DataError: Two do.
    """
    seen: set[Path] = set()
    for request in requests:
        if (recipe := recipe_path(request.path)) in seen:
            raise DataError(
                f"Two prompts would both be written to {request.path}. Leave out prompt_as_path and equal names; repeats "
                "are num_sample."
            )
        seen.add(recipe)


def file_stem(prompt_or_index: str | int, sample_name: str | None) -> str:
    """``sample_0007``; or the prompt itself. Made safe: no separators, no hidden names, UTF-8 of at most 150 bytes."""
    if isinstance(prompt_or_index, int):
        name = f"{'sample' if sample_name is None else sample_name}_{prompt_or_index:04d}"
    else:
        name = f"{sample_name or ''}{prompt_or_index}"
    safe = re.sub(r'[/\\\x00-\x1f\ud800-\udfff<>:"|?*]+', "_", name).strip(" .") or "empty"
    encoded = safe.encode()
    if len(encoded) > 150:  # file systems allow 255 bytes, with our endings and a temporary name's
        digest = hashlib.sha256(encoded).hexdigest()[:8]
        safe = f"{encoded[:140].decode(errors='ignore')}-{digest}"
    return safe
