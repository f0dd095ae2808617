"""The contact sheet: every row and frame is on it, at a size that can be read."""

import numpy as np
import pytest
import torch

from opensora.core import MachineError, ShapeError
from opensora.core import contact_sheet as contact_sheet_module
from opensora.core.contact_sheet import draw_contact_sheet, write_contact_sheet
from opensora.core.video import read_image

COLOURS = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200), (200, 0, 200), (90, 90, 0), (0, 90, 90)]


def striped(num_frames: int = 8, height: int = 16, width: int = 16) -> torch.Tensor:
    """A video whose frame i has the i-th colour."""
    frames = torch.tensor([COLOURS[index % len(COLOURS)] for index in range(num_frames)], dtype=torch.uint8)
    return frames[:, None, None].expand(-1, height, width, 3).contiguous()


def areas(sheet) -> list[int]:
    """Pixels of each colour."""
    pixels = np.asarray(sheet).reshape(-1, 3)
    return [int((pixels == colour).all(axis=1).sum()) for colour in COLOURS]


def test_every_frame_of_every_row_is_shown_enlarged_without_smoothing():
    sheet = draw_contact_sheet([("a prompt", striped())] * 80, title="eighty prompts")
    assert areas(sheet) == [80 * 64 * 64] * 8


def test_eighty_rows_make_a_sheet_of_ordinary_proportions():
    sheet = draw_contact_sheet([("a handwritten seven moving left", striped())] * 80)
    assert 0.8 < sheet.width / sheet.height < 2.2
    assert sheet.width < 4000


def test_frames_go_from_left_to_right_and_rows_from_top_to_bottom():
    first, second = striped(2), striped(2).flip(0)
    pixels = np.asarray(draw_contact_sheet([("first", first), ("second", second)]))
    red = np.argwhere((pixels == COLOURS[0]).all(axis=-1))
    (top, left), (bottom, right) = red[0], red[-1]
    assert top < bottom
    assert left < right


def test_captions_are_drawn_and_differ():
    one, other = (np.asarray(draw_contact_sheet([(caption, striped())])) for caption in ("a seven", "a nine"))
    assert one.shape == other.shape
    assert not np.array_equal(one, other)
    assert (one < 100).all(axis=-1).sum() > 50  # dark ink


def test_long_captions_stay_in_their_column():
    captions = ["very " * 100, "x" * 500]
    pixels = np.asarray(draw_contact_sheet([(caption, striped()) for caption in captions]))
    assert areas(pixels) == [2 * 64 * 64] * 8  # no letter on a frame
    assert pixels.shape[0] < 300


def test_long_large_videos_are_thinned_and_reduced():
    sheet = draw_contact_sheet([("large", striped(51, 240, 426))], max_frames=6)
    assert sheet.width < 1200
    assert sheet.height < 130
    shown = [index for index, area in enumerate(areas(sheet)) if area]
    assert shown == [0, 2, 4, 6]  # frames 0, 10, 20, 30, 40, 50 of eight colours in turn


def test_rows_of_different_lengths_and_sizes_share_a_sheet():
    sheet = draw_contact_sheet([("image", striped(1, 8, 8)), ("wide", striped(3, 16, 40))])
    assert areas(sheet)[0] == 64 * 64 + 64 * 160


def test_what_does_not_fit_is_counted():
    with_note = draw_contact_sheet([("a", striped(1, 4, 4))] * 450, frame_size=4)
    assert areas(with_note)[0] == 400 * 16


def test_the_same_rows_give_the_same_file(tmp_path):
    for name in ("a.png", "b.png"):
        write_contact_sheet(tmp_path / name, [("a wave", striped())], title="Grüße")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert read_image(tmp_path / "a.png").size == draw_contact_sheet([("a wave", striped())], title="x").size


def test_wrong_rows_are_refused(tmp_path):
    with pytest.raises(ShapeError, match="at least one row"):
        draw_contact_sheet([])
    with pytest.raises(ShapeError, match=r"uint8 \[T, H, W, 3\]; got float32 \[2, 4, 4, 3\] \('a wave'\)"):
        draw_contact_sheet([("a wave", np.zeros((2, 4, 4, 3), np.float32))])
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MachineError, match="can't be written"):
        write_contact_sheet(tmp_path / "file" / "sheet.png", [("a", striped())])


def test_everything_public_is_listed():
    public = {
        name
        for name, value in vars(contact_sheet_module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == contact_sheet_module.__name__
    }
    assert public == set(contact_sheet_module.__all__)
