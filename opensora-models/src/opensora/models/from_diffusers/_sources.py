"""Where the parts of a diffusers pipeline lie, and what their config files say.

A source is a folder or hub repository, of one part with its ``config.json`` or of a whole pipeline with a subfolder a part;
or a run of this project that trained a wrapped class, whose ``config.py`` says which.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from attrs import field, frozen
from diffusers import DDIMScheduler, ModelMixin, Transformer2DModel

from opensora.core.checkpoints import list_checkpoints
from opensora.core.config.evaluate import evaluate
from opensora.core.errors import ConfigError, WeightsError, did_you_mean
from opensora.models._pretrained import reading

_SCHEDULES = "scheduler"
"""Subfolder of a pipeline with the noise schedule that its transformer was trained with."""


@frozen(kw_only=True)
class Part:
    """One part of a pipeline, as far as it is known."""

    class_name: str | None = None
    """Its diffusers class."""
    config: Mapping[str, Any] = field(factory=dict)
    """Arguments of the class."""
    is_complete: bool = False
    """Whether ``config`` is a ``config.json``, in which nothing is left to be filled in."""
    noise_schedule: Mapping[str, Any] | None = None
    """``scheduler_config.json`` beside it."""

    def changed(
        self, *, class_name: str | None, config: Mapping[str, Any], noise_schedule: Mapping[str, Any] | None
    ) -> Part:
        """This part with a user's own options in place of what it says.

        Raises:
            ConfigError: The user names another class.
        """
        if class_name and self.class_name and class_name != self.class_name:
            raise ConfigError(f'class_name is "{class_name}", but from_pretrained holds a {self.class_name}. Drop one.')
        return Part(
            class_name=class_name or self.class_name,
            config={**self.config, **config},
            is_complete=self.is_complete,
            noise_schedule=noise_schedule or self.noise_schedule,
        )


def describe(options: Mapping[str, Any], *, usual_subfolder: str, key: str, subfolder: str | None = None) -> Part:
    """The part that a component's options mean.

    Args:
        options: ``from_pretrained``, ``class_name``, ``config`` and ``noise_schedule``, each as in a spec.
        usual_subfolder: Where pipelines keep such a part.
        subfolder: Where this one does, if that is known.
        key: Of the component in a config, for messages: "model".

    Raises:
        WeightsError: ``from_pretrained`` can't be read, or names no class.
        ConfigError: Options and ``from_pretrained`` contradict each other, or a run did not train a wrapped class.
    """
    source = options.get("from_pretrained")
    published = _published(source, subfolder, usual_subfolder, key) if source else Part()
    return published.changed(
        class_name=options.get("class_name"),
        config=options.get("config") or {},
        noise_schedule=options.get("noise_schedule"),
    )


def diffusers_class(name: str | None, *, part: str, key: str) -> Any:
    """The class of the installed diffusers.

    Args:
        part: A word that names of such classes hold: "Transformer".

    Raises:
        ConfigError: None is named, or there is no such model class.
    """
    if name is None:
        raise ConfigError(
            f"{key} names no class: set {key}.from_pretrained to a diffusers folder or hub id, or {key}.class_name."
        )
    found = getattr(diffusers, name, None)
    if inspect.isclass(found) and issubclass(found, ModelMixin) and part in name:
        return found
    names = [each for each in dir(diffusers) if part in each and not each.endswith(("Mixin", "Output"))]
    hint = did_you_mean(name, names) or " A newer one may: pip install -U diffusers"
    raise ConfigError(f'{key}.class_name: diffusers {diffusers.__version__} has no {part} class "{name}".{hint}')


def build_class(cls: Any, config: Mapping[str, Any], *, own: Mapping[str, Any], key: str) -> Any:
    """``cls(**config)`` with initial weights. Arguments that the class doesn't have are left out.

    Args:
        own: Those of ``config`` that the user wrote; others are from a file, maybe of another version of diffusers.

    Raises:
        ConfigError: One of ``own`` is unknown, or the class can't be built from ``config``.
    """
    known = arguments_of(cls)
    if unknown := next((name for name in own if name not in known), None):
        hint = did_you_mean(unknown, known) or f" It has: {', '.join(known)}."
        raise ConfigError(f"{key}.config.{unknown} is no argument of {cls.__name__}.{hint}")
    try:
        return cls.from_config({name: value for name, value in config.items() if name in known})
    except (TypeError, ValueError, ArithmeticError, NotImplementedError, RuntimeError, LookupError) as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise ConfigError(
            f"{cls.__name__} can't be built from {key}.config ({type(error).__name__}: {cause})."
        ) from error


def arguments_of(cls: Any) -> list[str]:
    """Names of the arguments that ``cls`` is built from."""
    return [name for name in inspect.signature(cls.__init__).parameters if name != "self"]


def read_part(
    source: str, subfolder: str | None, *, usual_subfolder: str, key: str
) -> tuple[dict[str, Any], str | None]:
    """``config.json`` of a part in a folder or hub repository, and the subfolder that it is in.

    Args:
        subfolder: None looks at the top and then into ``usual_subfolder``.

    Raises:
        WeightsError: There is none that names a class, or the hub can't be reached.
    """
    places = [subfolder] if subfolder else [None, usual_subfolder]
    folder = Path(source).expanduser()
    if folder.is_dir():
        place = next((each for each in places if (folder / (each or "") / "config.json").exists()), places[0])
        return _read_json(folder / (place or "") / "config.json", key), place
    repository, inside, revision = split_hub_id(source)
    places = [inside] if inside else places
    with reading("model", repository, key=f"{key}.from_pretrained"):
        for place in places:
            try:
                config = Transformer2DModel.load_config(  # as of any model class
                    repository, subfolder=place, revision=revision
                )
            except OSError:
                if place == places[-1]:
                    raise
                continue
            if "_class_name" in config:
                return config, place
        raise OSError(f"its config.json names no diffusers class; is {places[-1]} the right subfolder?")


def split_hub_id(source: str) -> tuple[str, str | None, str | None]:
    """``org/name@revision/folder`` as repository, folder and revision; what is clearly a path stays as it is."""
    if source.startswith((".", "/", "~")):
        return source, None, None
    owner, _, rest = source.partition("/")
    name, _, inside = rest.partition("/")
    name, _, revision = name.partition("@")
    return (f"{owner}/{name}", inside or None, revision or None) if name else (source, None, None)


def _published(source: str, subfolder: str | None, usual_subfolder: str, key: str) -> Part:
    path = Path(source).expanduser()
    if home := _home_of_run(path):
        return _part_of_run(home, usual_subfolder, key)
    if path.is_file():  # tensors alone
        return Part()
    config, place = read_part(source, subfolder, usual_subfolder=usual_subfolder, key=key)
    kept = {name: value for name, value in config.items() if not name.startswith("_")}
    schedule = _schedule_beside(path / (place or ""), key) if path.is_dir() else _hub_schedule(source)
    return Part(class_name=config["_class_name"], config=kept, is_complete=True, noise_schedule=schedule)


def _read_json(file: Path, key: str) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(values, dict) and isinstance(values.get("_class_name"), str):
            return values
        reason = "it names no diffusers class (_class_name)"
    except FileNotFoundError:
        reason = "it is missing"
    except (OSError, ValueError) as error:
        reason = f"it can't be read ({error})"
    raise WeightsError(
        f"{file}: {reason}. Set {key}.from_pretrained to a folder as diffusers' save_pretrained writes it, or to a hub id."
    )


def _schedule_beside(folder: Path, key: str) -> dict[str, Any] | None:
    file = folder.parent / _SCHEDULES / "scheduler_config.json"
    return _read_json(file, key) if file.exists() else None


def _hub_schedule(source: str) -> dict[str, Any] | None:
    repository, _, revision = split_hub_id(source)
    try:
        schedule: dict[str, Any] = DDIMScheduler.load_config(repository, subfolder=_SCHEDULES, revision=revision)
    except OSError:  # a repository of a transformer alone
        return None
    return schedule


def _home_of_run(path: Path) -> Path | None:
    """The run folder that a run folder, its ``checkpoints``, a checkpoint or a file of one belongs to."""
    if not path.exists():
        return None
    is_of_run = list_checkpoints(path) if path.is_dir() else []
    if not is_of_run and not any((folder / "manifest.json").exists() for folder in (path, path.parent)):
        return None
    homes = (folder for folder in (path, *path.absolute().parents[:3]) if (folder / "config.py").is_file())
    return next(homes, None)


def _part_of_run(home: Path, usual_subfolder: str, key: str) -> Part:
    options = evaluate(home / "config.py").values.get(key)
    trained = options.get("type") if isinstance(options, Mapping) else None
    if not isinstance(options, Mapping) or str(trained).rpartition(":")[2] != "diffusers":
        raise ConfigError(
            f'{home} trained a {key} of type "{trained}", not "diffusers". Use that type with its weights.'
        )
    return describe(options, usual_subfolder=usual_subfolder, key=key)
