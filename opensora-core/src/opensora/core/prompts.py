"""Prompts: how they are read from a text file, and what is added to them."""

from __future__ import annotations

from pathlib import Path

from opensora.core.errors import DataError

__all__ = ["add_scores", "read_prompts"]


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
