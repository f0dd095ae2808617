"""Recipes: what makes one sample again, to the last bit, kept in its file and beside it.

A recipe holds a whole sampling config for this one sample, wherever its settings came from, and what else is needed for the
same bits: the texts that were in its batch, and on what it was computed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import attrs
import torch
from attrs import field, frozen

from opensora.core.checkpoints import find_checkpoint, list_checkpoints
from opensora.core.composing import resolved_values
from opensora.core.config.structure import structure
from opensora.core.errors import ConfigError, DataError
from opensora.core.pipelines.sample_spec import SampleSpec
from opensora.core.prompt_syntax import split_references
from opensora.core.recipes import RECIPE_VERSION, read_recipe, recipe_path
from opensora.core.references import digest_of
from opensora.core.requests import Companion, GivenFrames, Request

__all__ = ["Repeatable", "config_of_recipe", "made_again"]

log = logging.getLogger(__name__)

_OF_A_RUN = (
    *("prompt_path", "prompt_generator", "prompter", "llm_refine", "start_index", "end_index", "num_sample", "name"),
    *(
        "resolution",
        "aspect_ratio",
        "aes",
        "flow",
        "camera_motion",
        "multi_resolution",
        "sample_name",
        "prompt_as_path",
    ),
    *("outputs", "verbose", "batch_size", "repeat", "accelerator", "release_text_encoder", "text_cache_gib", "preview"),
    *("without_hooks", "pipeline", "device", "mask_strategy", "reference_path"),
)
"""Keys of a config that say how many samples are made, or what they are called, and not what one is."""
_PATHS = ("from_pretrained", "watermark")
"""Keys, here and in components, whose values may be paths."""


@frozen(kw_only=True)
class Repeatable:
    """What the recipes of a run share."""

    config: Mapping[str, Any]
    made_with: Mapping[str, Any]
    """Versions, device and number of threads, on which last digits depend."""

    @classmethod
    def of(cls, spec: SampleSpec, device: torch.device) -> Repeatable:
        """What ``spec`` says of every sample."""
        values = {key: value for key, value in resolved_values(spec).items() if key not in _OF_A_RUN}
        values = {
            key: value
            for key, value in values.items()
            if value is not None and key not in attrs.fields_dict(GivenFrames)
        }
        return cls(
            config=_with_paths_located(values),
            made_with={
                "opensora-core": metadata.version("opensora-core"),
                "torch": torch.__version__,
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
                "threads": torch.get_num_threads(),
            },
        )

    def recipe(self, requests: Sequence[Request], row: int) -> dict[str, Any]:
        """The recipe of one request of a batch."""
        request = requests[row]
        config = {**self.config, **_own_values(request)}
        config["scheduler"] = _scheduler_of(config["scheduler"], request)
        num_frames, height, width = request.size
        recipe: dict[str, Any] = {
            "version": RECIPE_VERSION,
            "prompt": request.prompt,
            "text": request.text,
            "seed": request.seed,
            "num_frames": num_frames,
            "height": height,
            "width": width,
            "fps": request.fps,
            "model": config["model"]["type"],
            "from_pretrained": config["model"]["from_pretrained"],
            "scheduler": config["scheduler"],
        }
        if references := _digests(request):
            recipe["references"] = references
        batch = request.companions or tuple(Companion(each.text, each.negative_prompt) for each in requests)
        if len(batch) > 1:
            of_batch = {"row": request.row if request.companions else row, "texts": [each.text for each in batch]}
            if request.negative_prompt is not None:
                of_batch["negative_prompts"] = [each.negative_prompt for each in batch]
            recipe["batch"] = of_batch
        return {**recipe, "config": config, "made_with": dict(self.made_with)}


def _own_values(request: Request) -> dict[str, Any]:
    """The request's part of the config that makes it alone."""
    given = {name: _located(name, value) for name, value in attrs.asdict(request.given).items() if value is not None}
    return {
        "prompt": [request.text],
        "seed": request.seed,
        "num_frames": request.size[0],
        "image_size": request.size[1:],
        "fps": request.fps,
        "save_fps": request.file_fps,
        "loop": request.loop,
        **({} if request.negative_prompt is None else {"negative_prompt": request.negative_prompt}),
        **given,
    }


def _scheduler_of(scheduler: Mapping[str, Any], request: Request) -> dict[str, Any]:
    own = {"cfg_scale": request.cfg_scale, "num_sampling_steps": request.num_sampling_steps}
    return {**scheduler, **{key: value for key, value in own.items() if value is not None}}


def _located(name: str, value: Any) -> Any:
    """The value of a field of `GivenFrames`, with paths that hold from any folder."""
    match name, value:
        case "mask_strategy" | "strength", _:
            return value
        case "reference_path", str():
            return ";".join(map(_absolute, split_references(value)))
        case "connect", (first, second):
            return [_absolute(first), _absolute(second)]
    return _absolute(value)


def _with_paths_located(value: Any) -> Any:
    """Options of components, in which weights and the watermark are found from any folder."""
    if isinstance(value, list | tuple):
        return [_with_paths_located(part) for part in value]
    if not isinstance(value, Mapping):
        return value
    return {
        key: _absolute(part) if key in _PATHS and isinstance(part, str) else _with_paths_located(part)
        for key, part in value.items()
    }


def _absolute(value: str) -> str:
    """A path that is there, as an absolute one; of a run, its very checkpoint. Addresses and hub ids stay."""
    path = Path(value).expanduser()
    if not value or not path.exists():
        return value
    if path.is_dir() and list_checkpoints(path):
        path = find_checkpoint(path)
    return str(path.resolve())


def _digests(request: Request) -> dict[str, str]:
    sources, _ = request.given.resolve(length=1)
    paths = {source: Path(source).expanduser() for source in sources}
    return {_absolute(source): digest_of(path) for source, path in paths.items() if path.exists()}


def config_of_recipe(path: Path) -> dict[str, Any]:
    """The config that makes the sample of a file again.

    Raises:
        DataError: There is no file, or it has no recipe that can be read; see `read_recipe`.
    """
    if not path.name:
        raise DataError(f'"{path}" is no result of sampling. Give a file, or a folder of frames.')
    recipe = read_recipe(path)
    if not isinstance(recipe.get("config"), dict):
        raise DataError(f"{path} has a recipe that no sampling run has written: it has no config.")
    return {**recipe["config"], "repeat": str(path.resolve())}


@frozen(kw_only=True)
class _Batch:
    row: int
    texts: list[str]
    negative_prompts: list[str | None] | None = None

    def __attrs_post_init__(self) -> None:
        if not 0 <= self.row < len(self.texts) or len(self.negative_prompts or self.texts) != len(self.texts):
            raise ConfigError(
                f"row {self.row} of {len(self.texts)} texts is none, or their negative prompts are more or fewer."
            )

    def companions(self, negative_prompt: str | None) -> tuple[Companion, ...]:
        """All of them, for one whose negative prompt this is: if it is another now, all have it."""
        negatives = self.negative_prompts or [None] * len(self.texts)
        if negatives[self.row] != negative_prompt:
            negatives = [negative_prompt] * len(self.texts)
        return tuple(map(Companion, self.texts, negatives))


@frozen(kw_only=True)
class _Known:
    """What a recipe says beside its config."""

    prompt: str
    text: str
    references: dict[str, str] = field(factory=dict)
    batch: _Batch | None = None
    made_with: dict[str, Any] = field(factory=dict)

    @classmethod
    def read(cls, path: Path) -> _Known:
        """Of the recipe of a file.

        Raises:
            DataError: It can't be read, or no sampling run has written it.
        """
        recipe = read_recipe(path)
        try:
            return structure(cls, {name: recipe[name] for name in attrs.fields_dict(cls) if name in recipe})
        except ConfigError as error:
            raise DataError(f"{path} has a recipe that no sampling run has written: {error}") from error

    def applied(self, request: Request) -> Request:
        """The request as it was first, if it has the same text."""
        if request.text != self.text:
            return request
        if self.batch is None:
            return attrs.evolve(request, prompt=self.prompt)
        companions = self.batch.companions(request.negative_prompt)
        return attrs.evolve(request, prompt=self.prompt, companions=companions, row=self.batch.row)


def made_again(requests: Sequence[Request], spec: SampleSpec, repeatable: Repeatable) -> list[Request]:
    """Requests with what the recipe of ``spec.repeat`` says beside its config; warns of what may change last digits.

    One that is alone is called as it was, unless the run says otherwise.

    Raises:
        ConfigError: A reference is no longer what it was.
        DataError: The recipe can't be read.
    """
    path = Path(str(spec.repeat))
    known = _Known.read(path)
    for source, digest in (pair for request in requests for pair in _digests(request).items()):
        if known.references.get(source, digest) != digest:
            raise ConfigError(f"{source} is not the file that {path} was made from: its content has changed.")
    before, now = known.made_with, dict(repeatable.made_with)
    if changed := [f"{key} {before[key]} -> {now.get(key)}" for key in before if before[key] != now.get(key)]:
        log.warning("Made with something else than before, so last digits may differ: %s", ", ".join(changed))
    again = [known.applied(request) for request in requests]
    if len(again) == 1 and spec.sample_name is None and not spec.prompt_as_path:
        name = (path if path.suffix == ".json" else recipe_path(path)).stem
        again = [attrs.evolve(again[0], path=again[0].path.with_name(name + again[0].path.suffix))]
    return again
