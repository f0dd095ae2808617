"""Resizing and cropping, against the reference vectors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from opensora.core import ShapeError
from opensora.core.transforms import (
    center_image,
    center_video,
    resize_crop_geometry,
    resize_crop_image,
    resize_crop_video,
    transform_image,
    transform_video,
)

GOLDENS = Path(__file__).with_name("goldens")
VECTORS = load_file(GOLDENS / "transforms.safetensors")
FACTS = json.loads((GOLDENS / "transforms.json").read_text())

VIDEO_TOLERANCE = 1e-5
IMAGE_TOLERANCE = 2 / 255 * 2  # rounding differs between releases of Pillow


def frames_of(case: int) -> torch.Tensor:
    """The case's input as uint8 [T, H, W, 3]."""
    return VECTORS[f"{case}.video_in"].permute(0, 2, 3, 1).contiguous()


def image_of(case: int) -> Image.Image:
    return Image.fromarray(frames_of(case)[0].numpy())


@pytest.mark.parametrize("case", range(len(FACTS["cases"])))
def test_reference_resize_crop(case):
    height, width = FACTS["cases"][case]["target"]
    video = resize_crop_video(frames_of(case), height, width)
    expected = VECTORS[f"{case}.video_resize_crop"].transpose(0, 1)
    torch.testing.assert_close(video, expected, atol=VIDEO_TOLERANCE, rtol=0)
    image = resize_crop_image(image_of(case), height, width)
    torch.testing.assert_close(image[:, 0], VECTORS[f"{case}.image_resize_crop"], atol=IMAGE_TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("case", "size"),
    sorted((int(name.split(".")[0]), int(name.rpartition("_")[2])) for name in VECTORS if "video_center" in name),
)
def test_reference_center(case, size):
    expected = VECTORS[f"{case}.video_center_{size}"].transpose(0, 1)
    torch.testing.assert_close(center_video(frames_of(case), size), expected, atol=VIDEO_TOLERANCE, rtol=0)
    image = center_image(image_of(case), size)
    torch.testing.assert_close(image[:, 0], VECTORS[f"{case}.image_center_{size}"], atol=IMAGE_TOLERANCE, rtol=0)


def test_reference_geometry():
    for row in FACTS["geometry"]:
        for kind in ("video", "image"):
            geometry = resize_crop_geometry(*row["input"], *row["target"], is_image=kind == "image")
            found = [geometry.height, geometry.width, geometry.top, geometry.left]
            assert found == row[f"{kind}_resized_and_offset"], (row["input"], row["target"], kind)


@pytest.mark.parametrize("target", [256, 512])
def test_center_keeps_its_size_where_the_reference_fails(target):
    sides = [case["short_side"] for case in FACTS["video_center_fails_for"] if case["target"] == target]
    assert len(sides) > 100
    for side in [*sides[::12], sides[-1]]:
        frames = torch.arange(side, dtype=torch.float).mul(255 / side).to(torch.uint8)
        video = center_video(frames[None, :, None, None].expand(1, -1, side + 2, 3), target)
        assert video.shape == (3, 1, target, target)
        assert video[0, 0, :, 0].diff().ge(0).all()
        assert video.max() > 0.97


@pytest.mark.parametrize("name", ["center", "resize_crop"])
@pytest.mark.parametrize("source", [(16, 16), (9, 50), (50, 9), (7, 5), (64, 33)], ids=str)
def test_results_have_the_wanted_size_and_range(name, source):
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (3, *source, 3), generator=generator, dtype=torch.uint8)
    video = transform_video(name, frames, 16, 16)
    image = transform_image(name, Image.fromarray(frames[0].numpy()), 16, 16)
    assert video.shape == (3, 3, 16, 16)
    assert image.shape == (3, 1, 16, 16)
    for result in (video, image):
        assert result.dtype == torch.float32
        assert result.is_contiguous()
        assert result.min() >= -1
        assert result.max() <= 1


@pytest.mark.parametrize("name", ["center", "resize_crop"])
def test_frames_of_the_wanted_size_pass_unchanged(name):
    frames = torch.arange(0, 240, dtype=torch.uint8).reshape(5, 4, 4, 3)
    expected = frames.permute(3, 0, 1, 2).float() / 127.5 - 1
    assert torch.equal(transform_video(name, frames, 4, 4), expected)
    image = Image.fromarray(frames[0].numpy())
    assert torch.equal(transform_image(name, image, 4, 4)[:, 0], expected[:, 0])


def test_images_and_videos_agree_about_up_and_left():
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:8, 16:24, 0] = 255
    video = resize_crop_video(torch.from_numpy(picture)[None], 16, 32)
    image = resize_crop_image(Image.fromarray(picture), 16, 32)
    assert (video - image).abs().mean() < 0.02


def test_center_of_a_rectangle_is_refused():
    with pytest.raises(ShapeError, match=r'"center" makes squares, not 16 x 20. Use "resize_crop"'):
        transform_video("center", torch.zeros(1, 30, 30, 3, dtype=torch.uint8), 16, 20)
    with pytest.raises(ShapeError):
        transform_image("center", Image.new("RGB", (30, 30)), 16, 20)
