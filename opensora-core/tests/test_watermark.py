"""Watermarks: in the lower right corner, a tenth as high as the frames, whatever their size."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from opensora.core import DataError, ShapeError
from opensora.core.watermark import Watermark, draw_mark, watermarked_path


def gray(num_frames: int = 3, height: int = 240, width: int = 426, level: int = 100) -> torch.Tensor:
    return torch.full((num_frames, height, width, 3), level, dtype=torch.uint8)


def changed(frames: torch.Tensor, marked: torch.Tensor) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of what differs."""
    rows, columns = (marked[0] != frames[0]).any(-1).nonzero(as_tuple=True)
    return int(rows.min()), int(rows.max()) + 1, int(columns.min()), int(columns.max()) + 1


@pytest.mark.parametrize(("height", "width"), [(240, 426), (720, 1280), (512, 512), (426, 240)])
def test_the_mark_is_a_tenth_as_high_in_the_lower_right_corner(height, width):
    frames = gray(height=height, width=width)
    marked = Watermark.load().put_on(frames)
    top, bottom, left, right = changed(frames, marked)
    assert bottom - top == pytest.approx(height / 10, abs=1.5)
    assert 0 < height - bottom < height / 20
    assert 0 < width - right < height / 20
    assert left > width / 8
    assert torch.equal(frames, gray(height=height, width=width))  # a copy is marked


def test_the_built_in_mark_is_letters_on_a_rounded_plate():
    mark = np.asarray(draw_mark())
    assert mark[0, 0, 3] == 0  # the corner is round
    plate, letters = mark[mark.shape[0] // 2, 20], mark[..., 0] > 200
    assert 0 < plate[3] < 255
    assert 0.05 < letters.mean() < 0.5
    columns = np.flatnonzero(letters.any(axis=0))
    assert columns[0] == pytest.approx(mark.shape[1] - columns[-1], abs=30)  # in the middle


def test_edges_are_smooth():
    marked = Watermark.load().put_on(gray(1, 720, 1280))[0, ..., 0]
    assert len(marked.unique()) > 30


def test_pieces_are_marked_as_the_whole():
    frames = torch.randint(0, 256, (7, 64, 96, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mark = Watermark.load(True)
    assert torch.equal(torch.cat([mark.put_on(piece) for piece in frames.split([1, 4, 2])]), mark.put_on(frames))
    assert torch.equal(Watermark.load().put_on(frames), mark.put_on(frames))


@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 80), (80, 8), (1, 1), (1, 300), (300, 1), (15, 17)])
def test_small_and_odd_frames_are_marked_too(height, width):
    frames = gray(height=height, width=width)
    marked = Watermark.load().put_on(frames)
    assert marked.shape == frames.shape
    assert not torch.equal(marked, frames)


def test_a_picture_of_the_users_is_put_on_with_its_transparency(tmp_path):
    logo = np.zeros((20, 60, 4), np.uint8)
    logo[:, 30:] = (250, 0, 0, 255)
    Image.fromarray(logo).save(tmp_path / "logo.png")
    frames = gray(height=200, width=300)
    marked = Watermark.load(str(tmp_path / "logo.png")).put_on(frames)
    top, bottom, left, right = changed(frames, marked)
    assert (bottom - top, right - left) == (20, pytest.approx(30, abs=3))  # the other half is transparent
    assert marked[0, bottom - 5, right - 5].tolist() == [250, 0, 0]
    assert marked.shape == frames.shape


def test_a_picture_without_transparency_covers(tmp_path):
    Image.new("RGB", (60, 20), (0, 0, 250)).save(tmp_path / "logo.jpg", quality=95)
    marked = Watermark.load(tmp_path / "logo.jpg").put_on(gray(height=200, width=300))
    assert marked[0, 185, 285].tolist() == pytest.approx([0, 0, 250], abs=6)


def test_a_logo_that_is_too_wide_is_made_to_fit(tmp_path):
    Image.new("RGB", (900, 10), (0, 0, 250)).save(tmp_path / "logo.png")
    frames = gray(height=100, width=120)
    _, _, left, right = changed(frames, Watermark.load(tmp_path / "logo.png").put_on(frames))
    assert 0 < left < right < 120


def test_a_logo_that_can_not_be_read_is_named(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    for name, says in (("gone.png", "is missing"), ("text.png", "is not an image")):
        with pytest.raises(DataError, match=f"{name} {says}"):
            Watermark.load(tmp_path / name)


@pytest.mark.parametrize(
    "frames", [torch.zeros(2, 8, 8, 3), torch.zeros(8, 8, 3, dtype=torch.uint8)], ids=["float", "one"]
)
def test_other_tensors_are_refused(frames):
    with pytest.raises(ShapeError, match=r"uint8 \[T, H, W, 3\]; got"):
        Watermark.load().put_on(frames)


@pytest.mark.parametrize(
    ("name", "marked"),
    [
        ("a/b.mp4", "a/b_watermark.mp4"),
        ("b.GIF", "b_watermark.GIF"),
        ("b.c.png", "b.c_watermark.png"),
        ("frames", "frames_watermark"),
        ("at 3.5 metres", "at 3.5 metres_watermark"),
    ],
)
def test_marked_files_lie_beside_the_others(name, marked):
    assert watermarked_path(name) == Path(marked)
