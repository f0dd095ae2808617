"""Names of video sizes and lengths: ``240p`` and ``9:16``, ``2s``. Tables in sizes.json, as Open-Sora publishes them."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any

from opensora.core.errors import ConfigError, did_you_mean

__all__ = ["ASPECT_RATIOS", "RESOLUTIONS", "image_size", "nearest_aspect_key", "nominal_pixels", "parse_num_frames"]


@cache
def _tables() -> dict[str, Any]:
    tables: dict[str, Any] = json.loads(
        resources.files("opensora.core").joinpath("sizes.json").read_text(encoding="utf-8")
    )
    return tables


RESOLUTIONS: dict[str, dict[str, tuple[int, int]]] = {
    name: {key: (height, width) for key, (height, width) in table["sizes"].items()}
    for name, table in _tables()["resolutions"].items()
}
"""Resolution -> {aspect key: (height, width)}; a key is height / width, as text."""

ASPECT_RATIOS: dict[str, str] = _tables()["aspect_names"]
"""``height:width`` -> aspect key. 9:16 is landscape: 9 high, 16 wide."""


def image_size(resolution: str, aspect_ratio: str) -> tuple[int, int]:
    """(height, width) in pixels of a named resolution and aspect ratio.

    The square-bin resolutions (256, 512, ...) spell their keys with other digits than the names do; there the bin nearest to
    the ratio is taken, if it is within 0.01.

    Raises:
        ConfigError: An unknown name, or a ratio that this resolution lacks.
    """
    sizes = _sizes(resolution)
    if aspect_ratio not in ASPECT_RATIOS:
        raise ConfigError(
            f'aspect_ratio "{aspect_ratio}" is not known (height:width).{did_you_mean(aspect_ratio, ASPECT_RATIOS)} '
            f"Known: {', '.join(ASPECT_RATIOS)}."
        )
    key = ASPECT_RATIOS[aspect_ratio]
    if key in sizes:
        return sizes[key]
    nearest = min(sizes, key=lambda each: abs(float(each) - float(key)))
    if abs(float(nearest) - float(key)) > 0.011:
        raise ConfigError(
            f'resolution "{resolution}" has no aspect ratio {aspect_ratio} ({key}); nearest: {nearest}, {sizes[nearest]}. '
            "Give image_size instead."
        )
    return sizes[nearest]


def nearest_aspect_key(resolution: str, height: int, width: int) -> str:
    """The aspect key of a resolution whose ratio is nearest to height / width; the first on ties.

    Raises:
        ConfigError: An unknown resolution.
    """
    return min(_sizes(resolution), key=lambda key: abs(float(key) - height / width))


def nominal_pixels(resolution: str) -> int:
    """How many pixels a resolution stands for, whatever the aspect ratio.

    Raises:
        ConfigError: An unknown resolution.
    """
    _sizes(resolution)
    pixels: int = _tables()["resolutions"][resolution]["num_pixels"]
    return pixels


def _sizes(resolution: str) -> dict[str, tuple[int, int]]:
    if resolution not in RESOLUTIONS:
        raise ConfigError(
            f'resolution "{resolution}" is not known.{did_you_mean(resolution, RESOLUTIONS)} Known: {", ".join(RESOLUTIONS)}.'
        )
    return RESOLUTIONS[resolution]


def parse_num_frames(value: int | str) -> int:
    """Frames of a number, or of a name such as ``2s`` (51, three chunks of the 1.2 autoencoder) or ``4x``.

    Raises:
        ConfigError: Neither, or fewer than one frame.
    """
    names: dict[str, int] = _tables()["num_frames"]
    if isinstance(value, str) and value in names:
        return names[value]
    try:
        frames = int(value)
    except (ValueError, TypeError):
        raise ConfigError(f'num_frames "{value}" is neither a number nor one of {", ".join(names)}.') from None
    if frames < 1:
        raise ConfigError(f"num_frames is {frames}; at least 1 is needed.")
    return frames
