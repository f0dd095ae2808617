"""Caption cleaning against recorded results, exactly."""

from __future__ import annotations

from opensora.models.text_encoders.cleaning import clean_caption, prepare_prompt


def wrong(rows, once, twice, off):
    """The rows whose results differ, with what came out."""
    found = [(row, clean_caption(row["text"]), prepare_prompt(row["text"]), prepare_prompt(row["text"], clean=False))
             for row in rows]  # fmt: skip
    return [(row["text"], *results) for row, *results in found if results != [row[once], row[twice], row[off]]]


def test_recorded_captions(golden_json):
    rows = golden_json("text_preprocessing")
    assert len(rows) > 50
    assert wrong(rows, "clean_once", "processed", "plain") == []


def test_recorded_prompts(golden_json):
    rows = golden_json("text_cleaning")["rows"]
    assert len(rows) == 50
    assert wrong(rows, "once", "cleaned", "off") == []


def test_prompt_that_looks_like_a_file_raises_no_warning():
    assert prepare_prompt("clips/wave") == "clips wave"
