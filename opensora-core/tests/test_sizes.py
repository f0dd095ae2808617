"""Names of sizes and lengths mean what Open-Sora's tables say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from opensora.core import ConfigError
from opensora.core.sizes import ASPECT_RATIOS, RESOLUTIONS, image_size, nearest_aspect_key, parse_num_frames

SQUARE_BINS = ("256", "512", "1024", "2048", "2880")


def test_tables_are_complete_and_in_order(golden: Callable[[str], Any]) -> None:
    published = golden("aspect")["resolutions"]
    assert {name: list(sizes.items()) for name, sizes in RESOLUTIONS.items()} == {
        name: [(key, tuple(size)) for key, size in table["sizes"].items()] for name, table in published.items()
    }


def test_every_named_size_is_as_published(golden: Callable[[str], Any]) -> None:
    for row in golden("image_size"):
        resolution, aspect_ratio = row["resolution"], row["aspect_ratio"]
        if "ok" in row:
            assert image_size(resolution, aspect_ratio) == tuple(row["ok"])
        elif resolution in SQUARE_BINS and aspect_ratio in ASPECT_RATIOS:  # fails upstream for the spelling of its key
            ratio = float(ASPECT_RATIOS[aspect_ratio])
            if min(abs(float(key) - ratio) for key in RESOLUTIONS[resolution]) < 0.0101:
                height, width = image_size(resolution, aspect_ratio)
                assert height / width == pytest.approx(ratio, abs=0.03)
            else:
                with pytest.raises(ConfigError, match=f'"{resolution}" has no aspect ratio {aspect_ratio}'):
                    image_size(resolution, aspect_ratio)
        else:
            with pytest.raises(ConfigError):
                image_size(resolution, aspect_ratio)


@pytest.mark.parametrize("resolution", SQUARE_BINS)
def test_square_bins_have_a_square(resolution: str) -> None:
    side = int(resolution)
    assert image_size(resolution, "1:1") == (side, side)


def test_9_16_is_landscape() -> None:
    height, width = image_size("240p", "9:16")
    assert height < width


@pytest.mark.parametrize(
    ("resolution", "aspect_ratio", "message"),
    [
        ("240", "9:16", 'resolution "240" is not known. Did you mean "240p"?'),
        ("240p", "16:90", 'aspect_ratio "16:90" is not known (height:width). Did you mean "16:9"?'),
        ("256", "3:8", 'resolution "256" has no aspect ratio 3:8 (0.38); nearest: 0.4, (160, 400)'),
    ],
    ids=["resolution", "aspect ratio", "combination"],
)
def test_unknown_names_come_with_the_nearest(resolution: str, aspect_ratio: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        image_size(resolution, aspect_ratio)
    assert message in str(caught.value)


def test_nearest_aspect_key_is_as_published(golden: Callable[[str], Any]) -> None:
    for row in golden("closest_ratio"):
        assert nearest_aspect_key(row["resolution"], row["height"], row["width"]) == row["key"], row


def test_nearest_aspect_key_of_an_unknown_resolution_is_an_error() -> None:
    with pytest.raises(ConfigError, match='Did you mean "720p"'):
        nearest_aspect_key("720", 3, 4)


def test_lengths_are_as_published(golden: Callable[[str], Any]) -> None:
    for row in golden("num_frames"):
        if "ok" in row:
            assert parse_num_frames(row["value"]) == row["ok"]
        else:
            with pytest.raises(ConfigError, match="num_frames"):
                parse_num_frames(row["value"])


@pytest.mark.parametrize("value", [0, -1, "0"])
def test_a_video_has_at_least_one_frame(value: int | str) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        parse_num_frames(value)
