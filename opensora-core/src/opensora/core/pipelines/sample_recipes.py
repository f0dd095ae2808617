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
from attrs import frozen

from opensora.core.checkpoints import find_checkpoint, list_checkpoints
from opensora.core.composing import resolved_values
from opensora.core.errors import ConfigError, DataError
from opensora.core.pipelines.sample_spec import SampleSpec
from opensora.core.recipes import RECIPE_VERSION, read_recipe
from opensora.core.references import digest_of
from opensora.core.requests import GivenFrames, Request

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
        values["model"] = {**values["model"], "from_pretrained": _located(spec.model.options.get("from_pretrained"))}
        return cls(
            config=values,
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
        texts = request.companions or tuple(each.text for each in requests)
        if len(texts) > 1:
            recipe["batch"] = {"row": request.row if request.companions else row, "texts": list(texts)}
        return {**recipe, "config": config, "made_with": dict(self.made_with)}


def _own_values(request: Request) -> dict[str, Any]:
    """The request's part of the config that makes it alone."""
    given = {name: _located(value) for name, value in attrs.asdict(request.given).items() if value is not None}
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


def _located(value: Any) -> Any:
    """Paths that are there, as absolute ones, so that a recipe works from any folder; of a run, the very checkpoint."""
    if isinstance(value, tuple):
        return tuple(map(_located, value))
    if not isinstance(value, str) or ";" in value:
        return ";".join(map(_located, value.split(";"))) if isinstance(value, str) else value
    path = Path(value).expanduser()
    if not value or not path.exists():
        return value
    if path.is_dir() and list_checkpoints(path):
        path = find_checkpoint(path)
    return str(path.resolve())


def _digests(request: Request) -> dict[str, str]:
    sources, _ = request.given.resolve(length=1)
    paths = {source: Path(source).expanduser() for source in sources}
    return {_located(source): digest_of(path) for source, path in paths.items() if path.exists()}


def config_of_recipe(path: Path) -> dict[str, Any]:
    """The config that makes the sample of a file again.

    Raises:
        DataError: The file has no recipe that can be read; see `read_recipe`.
    """
    recipe = read_recipe(path)
    if not isinstance(recipe.get("config"), dict):
        raise DataError(f"{path} has a recipe that no sampling run has written: it has no config.")
    return {**recipe["config"], "repeat": str(path.resolve())}


def made_again(request: Request, spec: SampleSpec, repeatable: Repeatable) -> Request:
    """The request with what the recipe of ``spec.repeat`` says beside its config; warns of what may change its last digits.

    Raises:
        ConfigError: A reference is no longer what it was.
        DataError: The recipe can't be read.
    """
    assert spec.repeat is not None
    recipe = read_recipe(Path(spec.repeat))
    for source, digest in recipe.get("references", {}).items():
        if _digests(request).get(source, digest) != digest:
            raise ConfigError(f"{source} is not the file that {spec.repeat} was made from: its content has changed.")
    before, now = recipe.get("made_with", {}), dict(repeatable.made_with)
    if changed := [f"{key} {before[key]} -> {now.get(key)}" for key in before if before[key] != now.get(key)]:
        log.warning("Made with something else than before, so last digits may differ: %s", ", ".join(changed))
    batch = recipe.get("batch", {"texts": (), "row": 0})
    is_same_text = recipe.get("text") == request.text
    path = request.path.with_name(Path(spec.repeat).stem + request.path.suffix)
    return attrs.evolve(
        request,
        prompt=recipe["prompt"] if is_same_text else request.prompt,
        companions=tuple(batch["texts"]) if is_same_text else (),
        row=batch["row"],
        path=path,
    )
