"""From frames or an image to a clip of the wanted size in [-1, 1].

Frames are uint8 [T, H, W, 3], images Pillow's RGB; all results are float32 [3, T, height, width], T = 1 for images.
Videos are resized without antialiasing and images with it, as the published models were trained.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from attrs import frozen
from PIL import Image
from torch import Tensor

from opensora.core.errors import ShapeError

__all__ = [
    "Geometry",
    "TransformName",
    "center_image",
    "center_video",
    "resize_crop_geometry",
    "resize_crop_image",
    "resize_crop_video",
    "transform_image",
    "transform_video",
]

TransformName = Literal["center", "resize_crop"]


def transform_video(name: TransformName, frames: Tensor, height: int, width: int) -> Tensor:
    """`center_video` or `resize_crop_video`.

    Raises:
        ShapeError: ``center`` with a height other than the width.
    """
    if name == "resize_crop":
        return resize_crop_video(frames, height, width)
    return center_video(frames, _side(height, width))


def transform_image(name: TransformName, image: Image.Image, height: int, width: int) -> Tensor:
    """`center_image` or `resize_crop_image`.

    Raises:
        ShapeError: ``center`` with a height other than the width.
    """
    if name == "resize_crop":
        return resize_crop_image(image, height, width)
    return center_image(image, _side(height, width))


def center_video(frames: Tensor, size: int) -> Tensor:
    """Scale the shorter side to ``size``, bilinearly, and cut out the central square."""
    height, width = frames.shape[1:3]
    short = min(height, width)
    factor = size / short
    while math.floor(short * factor) < size:  # rounding of the quotient would lose a row: 161 * (256 / 161) < 256
        factor = math.nextafter(factor, math.inf)
    resized = _resized(frames, scale_factor=factor)
    top, left = round((resized.shape[-2] - size) / 2), round((resized.shape[-1] - size) / 2)
    return resized[..., top : top + size, left : left + size].contiguous()


def center_image(image: Image.Image, size: int) -> Tensor:
    """Halve while the shorter side is at least twice ``size``, scale it to ``size``, cut out the central square.

    Source: the image cropping of guided-diffusion and DiT, https://arxiv.org/abs/2212.09748.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    factor = size / min(image.size)
    image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)
    return _cropped(image, (image.height - size) // 2, (image.width - size) // 2, size, size)


def resize_crop_video(frames: Tensor, height: int, width: int) -> Tensor:
    """Scale to the smallest size that covers ``height`` x ``width``, bilinearly, and cut the excess off both sides."""
    geometry = resize_crop_geometry(frames.shape[1], frames.shape[2], height, width)
    resized = _resized(frames, size=(geometry.height, geometry.width))
    return resized[..., geometry.top : geometry.top + height, geometry.left : geometry.left + width].contiguous()


def resize_crop_image(image: Image.Image, height: int, width: int) -> Tensor:
    """As `resize_crop_video`, bicubically with antialiasing."""
    geometry = resize_crop_geometry(image.height, image.width, height, width, is_image=True)
    image = image.resize((geometry.width, geometry.height), Image.Resampling.BICUBIC)
    return _cropped(image, geometry.top, geometry.left, height, width)


@frozen
class Geometry:
    """Size after scaling, and where the crop begins in it."""

    height: int
    width: int
    top: int
    left: int


def resize_crop_geometry(
    height: int, width: int, target_height: int, target_width: int, *, is_image: bool = False
) -> Geometry:
    """How videos and, with ``is_image``, images are scaled and cropped: their half pixels round differently."""
    by_height, by_width = target_height / height, target_width / width
    if by_height > by_width:
        scaled_height, scaled_width = target_height, round(width * by_height)
    else:
        scaled_height, scaled_width = round(height * by_width), target_width
    top, left = (scaled_height - target_height) / 2, (scaled_width - target_width) / 2
    if is_image:
        return Geometry(scaled_height, scaled_width, round(top), round(left))
    return Geometry(scaled_height, scaled_width, int(top), int(left))


def _resized(frames: Tensor, *, size: tuple[int, int] | None = None, scale_factor: float | None = None) -> Tensor:
    """Scaled bilinearly and normalized, [3, T, h, w]."""
    if scale_factor == 1 or size == tuple(frames.shape[1:3]):
        return _normalized(frames.permute(3, 0, 1, 2).float())
    scaled = [  # frame by frame: a large clip as floats, before it is reduced, would be the peak of memory
        F.interpolate(
            frame.permute(2, 0, 1)[None].float(),
            size=size,
            scale_factor=scale_factor,
            mode="bilinear",
            align_corners=False,
            recompute_scale_factor=False if scale_factor else None,
        )[0]
        for frame in frames
    ]
    return _normalized(torch.stack(scaled, dim=1))


def _cropped(image: Image.Image, top: int, left: int, height: int, width: int) -> Tensor:
    pixels = torch.from_numpy(np.array(image.crop((left, top, left + width, top + height)), dtype=np.float32))
    return _normalized(pixels.permute(2, 0, 1)[:, None]).contiguous()


def _normalized(pixels: Tensor) -> Tensor:
    """[0, 255] to [-1, 1]."""
    return pixels / 127.5 - 1


def _side(height: int, width: int) -> int:
    if height != width:
        raise ShapeError(f'transform "center" makes squares, not {height} x {width}. Use "resize_crop".')
    return height
