"""Prompts: where they come from, what is added to them, and what their files are called."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from attrs import frozen

from opensora.core.errors import DataError

__all__ = ["Request", "add_scores", "file_stem", "plan_requests", "read_prompts"]


@frozen(kw_only=True)
class Request:
    """One video to make."""

    prompt: str
    """As the user wrote it."""
    text: str
    """What the text encoder gets."""
    seed: int
    path: Path


def read_prompts(path: Path) -> list[str]:
    """Prompts of a text file, one a line, blanks stripped; an empty line is an empty prompt, a last line break is none.

    Raises:
        DataError: The file is missing, no UTF-8 text, or empty.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"Prompt file {path} can't be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"Prompt file {path} is no UTF-8 text (byte {error.start}).") from error
    prompts = [line.strip() for line in text.removesuffix("\n").split("\n")]  # splitlines would split at U+2028 too
    if not any(prompts):
        raise DataError(f"Prompt file {path} is empty. Write one prompt a line.")
    return prompts


def add_scores(text: str, *, aes: float | None, flow: float | None, camera_motion: str | None) -> str:
    """Append the scores that Open-Sora's captions carry, each unless the text has its marker already."""
    scores = {
        "aesthetic score:": None if aes is None else f"{aes:.1f}",
        "motion score:": None if flow is None else f"{flow:.1f}",
        "camera motion:": camera_motion,
    }
    for marker, value in scores.items():
        if value is not None and marker not in text:
            text = f"{text} {marker} {value}."
    return text


def plan_requests(
    prompts: Sequence[str],
    folder: Path,
    *,
    extension: str,
    seed: int,
    first_index: int = 0,
    num_sample: int = 1,
    sample_name: str | None = None,
    prompt_as_path: bool = False,
    aes: float | None = None,
    flow: float | None = None,
    camera_motion: str | None = None,
) -> list[Request]:
    """One request for each prompt and repeat. Seeds count up from ``seed`` through all that a whole run makes.

    Raises:
        DataError: Two prompts would get one file name.
    """
    requests: list[Request] = []
    for index, prompt in enumerate(prompts):
        stem = file_stem(prompt if prompt_as_path else first_index + index, sample_name)
        for repeat in range(num_sample):
            name = f"{stem}-{repeat}" if num_sample > 1 else stem
            requests.append(
                Request(
                    prompt=prompt,
                    text=add_scores(prompt, aes=aes, flow=flow, camera_motion=camera_motion),
                    seed=seed + (first_index + index) * num_sample + repeat,
                    path=folder / f"{name}{extension}",
                )
            )
    paths = [request.path for request in requests]
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise DataError(
            f"Two prompts would both be written to {twice}. Leave out prompt_as_path; repeats are num_sample."
        )
    return requests


def file_stem(prompt_or_index: str | int, sample_name: str | None) -> str:
    """``sample_0007``; or the prompt itself. Made safe: no separators, no hidden names, at most 150 bytes."""
    if isinstance(prompt_or_index, int):
        name = f"{'sample' if sample_name is None else sample_name}_{prompt_or_index:04d}"
    else:
        name = f"{sample_name or ''}{prompt_or_index}"
    safe = re.sub(r'[/\\\x00-\x1f<>:"|?*]+', "_", name).strip(" .") or "empty"
    encoded = safe.encode()
    if len(encoded) > 150:  # file systems allow 255 bytes, with our endings and a temporary name's
        digest = hashlib.sha256(encoded).hexdigest()[:8]
        safe = f"{encoded[:140].decode(errors='ignore')}-{digest}"
    return safe
