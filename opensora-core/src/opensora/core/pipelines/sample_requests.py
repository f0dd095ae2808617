"""From a sampling config and its prompts to requests: every prompt with its own settings, text, seed and file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import attrs
from attrs import frozen

from opensora.core.config.names import find_text
from opensora.core.errors import ConfigError
from opensora.core.frame_conditions import override_conditions
from opensora.core.pipelines.sample_spec import SampleSpec
from opensora.core.prompt_files import PromptEntry, PromptSettings, read_prompt_file
from opensora.core.prompt_syntax import Rounds, check_rounds, parse_rounds, print_rounds, split_suffix
from opensora.core.prompts import add_scores
from opensora.core.recipes import read_recipe
from opensora.core.requests import EndlessRequests, GivenFrames, Request, check_paths, file_stem

if TYPE_CHECKING:
    from opensora.core.protocols import Prompter

__all__ = ["ENDLESS", "Plan", "check_lists", "choose_entries", "plan_requests", "read_plans", "refine_plans"]

ENDLESS = 1_000_000
"""Where prompt_generator ends, if nobody ends it before."""
T = TypeVar("T")
_GIVEN = tuple(attrs.fields_dict(GivenFrames))
_FILE_ENDING = re.compile(r"\.(?=[a-zA-Z]\w{2,3}$)")  # a folder that is called as a file would be taken for one


def choose_entries(spec: SampleSpec) -> dict[int, PromptEntry]:
    """The prompts of the config, or of its prompt file, by their numbers; cut to ``start_index`` and ``end_index``.

    Raises:
        ConfigError: There is none.
        DataError: The prompt file can't be used.
    """
    if spec.prompt is not None:
        prompts = [spec.prompt] if isinstance(spec.prompt, str) else list(spec.prompt)
        entries = [_plain_entry(text, index) for index, text in enumerate(prompts)]
        source = "prompt"
    elif spec.prompt_path is not None:
        entries = read_prompt_file(find_text(spec.prompt_path) or Path(spec.prompt_path))
        source = spec.prompt_path
    elif spec.prompt_generator is not None:
        check_lists(spec, 1)
        return {max(spec.start_index or 0, 0): _plain_entry(spec.prompt_generator, 0)}
    else:
        raise ConfigError('There is no prompt. Give --prompt "a wave" or --prompt-path prompts.txt.')
    chosen = dict(list(enumerate(entries))[spec.start_index : spec.end_index])
    if not chosen:
        raise ConfigError(
            f"No prompt is left: {source} has {len(entries)}, start_index is {spec.start_index}, end_index {spec.end_index}."
        )
    check_lists(spec, len(entries))
    return chosen


def check_lists(spec: SampleSpec, count: int) -> None:
    """Check that keys which may have an item for each of ``count`` prompts do.

    Raises:
        ConfigError: One has fewer or more.
    """
    for key in ("reference_path", "mask_strategy"):
        value = getattr(spec, key)
        if isinstance(value, list) and len(value) != count:
            raise ConfigError(f"{key} has {len(value)} items for {count} prompts. Give one item a prompt.")


def _plain_entry(text: str, index: int) -> PromptEntry:
    return PromptEntry(text=text, settings=PromptSettings(), location=f"prompt {index + 1}")


@frozen(kw_only=True)
class Plan:
    """One prompt, read: its text without JSON, and what it asks for besides."""

    entry: PromptEntry
    number: int
    """Of the prompt among all, from 0: in its name and its seed."""
    rounds: Rounds
    prompt: str
    """As it was written, without JSON."""
    given: GivenFrames


def read_plans(entries: Mapping[int, PromptEntry], spec: SampleSpec) -> list[Plan]:
    """Read what is written inside prompts. ``entries`` by their numbers, see `choose_entries`.

    Raises:
        ConfigError: JSON, rounds, or frames to start from are wrong; with the place.
    """
    return [_read_plan(entry, spec, number) for number, entry in entries.items()]


def _read_plan(entry: PromptEntry, spec: SampleSpec, number: int) -> Plan:
    with _located(entry):
        prompt, inside = (entry.text, {}) if _is_repeated(entry.text, spec) else split_suffix(entry.text)
        rounds = parse_rounds(prompt)
        loop = _chosen(entry.settings.loop, spec.loop)
        check_rounds(rounds, loop)
        given = _given_frames(entry.settings, spec, inside, 0 if _is_endless(spec) else number)
        given.resolve(length=1, loop=loop)  # mistakes come up before anything is loaded
    return Plan(entry=entry, number=number, rounds=rounds, prompt=prompt.strip(), given=given)


def _given_frames(settings: PromptSettings, spec: SampleSpec, inside: Mapping[str, str], item: int) -> GivenFrames:
    """What a prompt starts from: as its JSON says, or else its own settings, or else the config (of lists, one item)."""
    values = {name: getattr(spec, name) for name in _GIVEN}
    values = {name: value[item] if isinstance(value, list) else value for name, value in values.items()}
    for own in ({name: getattr(settings, name) for name in _GIVEN}, inside):
        values = override_conditions(values, own)
    return GivenFrames(**{name: value or None for name, value in values.items()})


def _is_repeated(text: str, spec: SampleSpec) -> bool:
    """Whether a text is that of the sample which is made again, without JSON; braces in it are a prompter's."""
    return spec.repeat is not None and read_recipe(Path(spec.repeat)).get("text") == text


@contextmanager
def _located(entry: PromptEntry) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise ConfigError(str(error), location=entry.location) from error


def refine_plans(plans: Sequence[Plan], prompter: Prompter) -> list[Plan]:
    """The plans with every text as ``prompter`` rewrites it, all in one call."""
    refined = prompter.refine([text for plan in plans for text in plan.rounds.texts])
    texts = (text.replace("|", ",") for text in refined)  # "|" would part rounds
    return [attrs.evolve(plan, rounds=plan.rounds.map(lambda _: next(texts))) for plan in plans]


def plan_requests(plans: Sequence[Plan], spec: SampleSpec, folder: Path) -> Sequence[Request]:
    """A request for each prompt and repeat. Seeds count up from ``seed`` through all that a whole run makes.

    Args:
        plans: From `read_plans`.
        spec: What holds for all prompts that don't say otherwise.
        folder: Where the files go.

    Raises:
        ConfigError: A size is unknown, or an endless prompt ends before it starts.
        DataError: Two prompts would get one file name.
    """
    requests = [request for plan in plans for request in _requests_of(plan, spec, folder)]
    if not _is_endless(spec):
        check_paths(requests)
        return requests
    first, first_index = requests[0], plans[0].number
    count = ENDLESS if spec.end_index is None else spec.end_index - first_index
    if count < 1:
        raise ConfigError(f"No prompt is left: start_index is {spec.start_index}, end_index {spec.end_index}.")
    return EndlessRequests(
        first,
        stem="sample" if spec.sample_name is None else spec.sample_name,
        extension=_extension(spec, first),
        first_index=first_index,
        count=count,
    )


def _requests_of(plan: Plan, spec: SampleSpec, folder: Path) -> Iterator[Request]:
    settings, number = plan.entry.settings, plan.number
    with _located(plan.entry):
        size = spec.size_of(settings.num_frames, settings.image_size, settings.resolution, settings.aspect_ratio)
    fps = _chosen(settings.fps, spec.fps)
    repeats = 1 if _is_endless(spec) else spec.num_sample
    rounds = plan.rounds.map(lambda text: _with_scores(text, spec))
    request = Request(
        prompt=plan.prompt,
        text=print_rounds(rounds),
        negative_prompt=_chosen(settings.negative_prompt, spec.negative_prompt),
        seed=0,
        path=folder,
        size=size,
        fps=fps,
        file_fps=spec.save_fps or fps / spec.frame_interval,
        frame_fps=fps / spec.frame_interval,
        loop=_chosen(settings.loop, spec.loop),
        given=plan.given,
        cfg_scale=settings.cfg_scale,
        num_sampling_steps=settings.num_sampling_steps,
    )
    extension = _extension(spec, request)
    stem = settings.name and file_stem(settings.name, "")
    stem = stem or file_stem(plan.prompt if spec.prompt_as_path else number, spec.sample_name)
    if not extension:
        stem = _FILE_ENDING.sub("_", stem)
    for repeat in range(repeats):
        name = f"{stem}-{repeat}" if repeats > 1 else stem
        seed = spec.seed + number * repeats if settings.seed is None else settings.seed
        yield attrs.evolve(request, seed=seed + repeat, path=folder / f"{name}{extension}")


def _extension(spec: SampleSpec, request: Request) -> str:
    if spec.format == "auto":
        return ".png" if request.size[0] == request.loop == 1 else ".mp4"
    return "" if spec.format == "frames" else f".{spec.format}"


def _with_scores(text: str, spec: SampleSpec) -> str:
    return add_scores(text, aes=spec.aes, flow=spec.flow, camera_motion=spec.camera_motion)


def _chosen(own: T | None, default: T) -> T:
    return default if own is None else own


def _is_endless(spec: SampleSpec) -> bool:
    return spec.prompt is None and spec.prompt_path is None
