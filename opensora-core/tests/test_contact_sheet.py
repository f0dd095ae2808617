"""The contact sheet: every row and frame is on it, at a size that can be read."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from opensora.core import MachineError, ShapeError
from opensora.core import contact_sheet as contact_sheet_module
from opensora.core.contact_sheet import draw_contact_sheet, write_contact_sheet
from opensora.core.hooks.contact_sheet import ContactSheet, ContactSheetSpec
from opensora.core.requests import Target
from opensora.core.video import open_sink, read_image

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


def test_rows_are_as_high_as_their_frames():
    tall, flat = striped(2, 300, 60), striped(2, 60, 300)
    one = draw_contact_sheet([("tall", tall)])
    both = draw_contact_sheet([("tall", tall), ("flat", flat), ("small", striped(2))])
    assert one.height < both.height < one.height + 2 * 80
    frames = np.isin(np.asarray(both), COLOURS[:2]).all(axis=-1)[:, 240:]
    blank = np.flatnonzero(~frames.any(axis=1))
    between = blank[(blank > np.flatnonzero(frames.any(axis=1))[0]) & (blank < np.flatnonzero(frames.any(axis=1))[-1])]
    assert len(between) <= 2 * 5  # no room is left but the gaps


def test_columns_of_uneven_rows_are_about_equally_high():
    rows = [("tall", striped(3, 300, 60)), *[("flat", striped(3, 60, 80))] * 30]
    pixels = np.asarray(draw_contact_sheet(rows))
    assert areas(pixels)[0] == 300 * 60 + 30 * 60 * 80
    assert 0.8 < pixels.shape[1] / pixels.shape[0] < 2.2
    is_ink = (pixels != 255).any(axis=-1)
    starts = np.flatnonzero(is_ink.any(axis=0))
    blocks = np.split(starts, np.flatnonzero(np.diff(starts) > 30) + 1)  # columns of the sheet, captions apart
    ends = [np.flatnonzero(is_ink[:, block].any(axis=1))[-1] for block in blocks]
    assert min(ends) > 0.7 * max(ends)


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


# The hook


def finished_run(folder: Path, names: Sequence[str], *, is_main: bool = True) -> Any:
    """As much of a sampling run as the hook looks at."""
    targets = [Target(prompt=f"prompt of {name}", path=folder / name) for name in names]
    return SimpleNamespace(accelerator=SimpleNamespace(is_main=is_main), requests=targets, folder=folder)


def write_results(folder: Path) -> list[str]:
    """One result of each kind, of several lengths and sizes."""
    results = {"a.mp4": striped(20, 32, 48), "b.gif": striped(3), "c.png": striped(1, 40, 24), "d": striped(8, 24, 24)}
    for name, frames in results.items():
        with open_sink(folder / name, fps=8, crf=1) as sink:
            sink.append(frames)
    return [*results, "not made.mp4"]


def test_the_sheet_of_a_run_shows_every_kind_of_result(tmp_path):
    ContactSheet(ContactSheetSpec()).sample_end(finished_run(tmp_path, write_results(tmp_path)))
    sheet = read_image(tmp_path / "contact-sheet.png")
    shown = areas(sheet)
    assert (
        shown[0] >= 64 * 64 + 64 * 107 + 72 * 72
    )  # of the gif, the png and the folder; an mp4's colours are a little off
    expected = draw_contact_sheet(
        [
            ("prompt of b.gif", striped(3)),
            ("prompt of c.png", striped(1, 40, 24)),
            ("prompt of d", striped(8, 24, 24)),
        ]
    )
    assert sheet.height > expected.height


def test_long_results_are_thinned_and_many_are_left_out(tmp_path):
    hook = ContactSheet(ContactSheetSpec(max_rows=1, max_frames=3))
    names = write_results(tmp_path)
    assert len(hook.frames(tmp_path / "a.mp4")) == 3
    assert len(hook.frames(tmp_path / "c.png")) == 1
    hook.sample_end(finished_run(tmp_path, names))
    assert read_image(tmp_path / "contact-sheet.png").height < 120


def test_a_damaged_result_is_told_and_the_others_are_shown(tmp_path, caplog):
    names = write_results(tmp_path)
    (tmp_path / "a.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:900])
    with caplog.at_level("WARNING"):
        ContactSheet(ContactSheetSpec()).sample_end(finished_run(tmp_path, names))
    assert "Not on the contact sheet: " in caplog.text
    assert "a.mp4" in caplog.text
    assert areas(read_image(tmp_path / "contact-sheet.png"))[0] > 0


def test_there_is_no_sheet_of_nothing_and_one_process_draws_it(tmp_path):
    hook = ContactSheet(ContactSheetSpec())
    hook.sample_end(finished_run(tmp_path, ["not made.mp4"]))
    hook.sample_end(finished_run(tmp_path, write_results(tmp_path), is_main=False))
    assert not (tmp_path / "contact-sheet.png").exists()
