"""Recipes: stored in every kind of result and beside it, the same bytes for equal recipes, and read back from either."""

import json
import os
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from opensora.core import DataError, MachineError
from opensora.core.recipes import RECIPE_VERSION, read_recipe, recipe_path, recipe_text, write_recipe
from opensora.core.video import open_sink

NAMES = ["wave.mp4", "wave.gif", "wave.png", "wave", "at 3.5 metres"]
RECIPE = {
    "version": 1,
    "prompt": "Grüße 波 {x} \"'\\\n",
    "seed": 2**40,
    "scale": 7.5,
    "config": {"b": [1, None], "a": {}},
}


def write_result(path: Path, comment: str | None) -> Path:
    """A result of one frame, with a comment if given."""
    with open_sink(path, fps=8, metadata={} if comment is None else {"comment": comment}) as sink:
        sink.append(torch.zeros(1, 16, 16, 3, dtype=torch.uint8))
    return path


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_comes_back_from_the_result_itself(tmp_path, name):
    assert read_recipe(write_result(tmp_path / name, recipe_text(RECIPE))) == RECIPE


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_comes_back_from_beside_the_result(tmp_path, name):
    path = write_result(tmp_path / name, None)
    beside = write_recipe(path, RECIPE)
    assert beside == recipe_path(path)
    assert read_recipe(path) == RECIPE
    assert read_recipe(str(beside)) == RECIPE


@pytest.mark.parametrize("name", NAMES)
def test_large_recipes_fit(tmp_path, name):
    recipe = {"version": 1, "prompt": "a wave é 波 " * 10_000}
    assert len(recipe_text(recipe)) > 100_000
    assert read_recipe(write_result(tmp_path / name, recipe_text(recipe))) == recipe


def test_the_recipe_in_the_file_wins(tmp_path):
    path = write_result(tmp_path / "wave.mp4", recipe_text(RECIPE))
    write_recipe(path, {**RECIPE, "seed": 1})
    assert read_recipe(path) == RECIPE


@pytest.mark.parametrize("comment", [None, "made by hand", '{"version": 1, "prom', '{"title": "x"}'])
@pytest.mark.parametrize("name", ["wave.mp4", "wave.gif", "wave.png"])
def test_what_the_file_lacks_is_read_from_beside_it(tmp_path, name, comment):
    path = write_result(tmp_path / name, comment)
    write_recipe(path, RECIPE)
    assert read_recipe(path) == RECIPE


def test_a_damaged_or_lost_file_still_has_its_recipe(tmp_path):
    path = write_result(tmp_path / "wave.mp4", recipe_text(RECIPE))
    write_recipe(path, RECIPE)
    path.write_bytes(path.read_bytes()[:200])
    assert read_recipe(path) == RECIPE
    path.unlink()
    assert read_recipe(path) == RECIPE


@pytest.mark.parametrize(
    ("name", "beside"),
    [
        ("a/b.mp4", "a/b.json"),
        ("b.c.GIF", "b.c.json"),
        ("b.png", "b.json"),
        ("frames", "frames.json"),
        ("at 3.5 metres", "at 3.5 metres.json"),
    ],
)
def test_recipes_lie_beside_results(name, beside):
    assert recipe_path(name) == Path(beside)


def test_equal_recipes_have_equal_bytes(tmp_path):
    other = dict(reversed(RECIPE.items()))
    assert recipe_text(other) == recipe_text(RECIPE)
    assert recipe_text(json.loads(recipe_text(RECIPE))) == recipe_text(RECIPE)
    one, two = write_recipe(tmp_path / "1.mp4", RECIPE), write_recipe(tmp_path / "2.mp4", other)
    assert one.read_bytes() == two.read_bytes()


def test_people_can_read_what_lies_beside(tmp_path):
    text = write_recipe(tmp_path / "new" / "a.mp4", {"version": 1, "prompt": "Grüße 波"}).read_text(encoding="utf-8")
    assert text.splitlines() == ["{", ' "prompt": "Grüße 波",', ' "version": 1', "}"]


def test_the_text_for_files_is_one_line_of_ascii():
    assert recipe_text(RECIPE).isascii()
    assert "\n" not in recipe_text(RECIPE)


def test_half_a_character_is_kept(tmp_path):
    recipe = {"version": 1, "prompt": os.fsdecode(b"caf\xe9")}  # as an argument in another encoding arrives
    assert read_recipe(write_recipe(tmp_path / "a.mp4", recipe)) == recipe
    assert read_recipe(write_result(tmp_path / "b.mp4", recipe_text(recipe))) == recipe


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), values, max_size=4))
def test_any_json_comes_back(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("any")
    recipe = {**content, "version": 1}
    assert read_recipe(write_recipe(folder / "a.mp4", recipe)) == recipe
    assert read_recipe(write_result(folder / "b.gif", recipe_text(recipe))) == recipe


# Bad recipes


@pytest.mark.parametrize("value", [float("nan"), float("inf"), Path("a"), {1, 2}, np.float32(1)])
def test_what_is_no_json_is_refused(tmp_path, value):
    for attempt in (
        lambda: recipe_text({"version": 1, "x": value}),
        lambda: write_recipe(tmp_path / "a", {"x": value}),
    ):
        with pytest.raises((TypeError, ValueError)):
            attempt()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_result_without_a_recipe_says_where_it_was_sought(tmp_path, name):
    path = write_result(tmp_path / name, None)
    with pytest.raises(
        DataError, match=f"{name} has no recipe, neither in it nor beside it in {recipe_path(name).name}"
    ):
        read_recipe(path)


def test_pictures_and_videos_of_others_have_none(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", comment="Grüße".encode())
    with av.open(str(tmp_path / "a.webm"), "w") as container:
        container.metadata["comment"] = "a holiday"
        stream = container.add_stream("libvpx", rate=8)
        stream.height = stream.width = 16
        stream.pix_fmt = "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    for name in ("a.jpg", "a.webm"):
        with pytest.raises(DataError, match=f"{name} has no recipe"):
            read_recipe(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"version": 1, "prom', "The recipe in .* is cut short or damaged: "),
        ('{"title": "x"}', 'holds no recipe: that is a JSON object with a whole number "version"'),
        ('{"version": "1"}', "holds no recipe"),
        ('{"version": true}', "holds no recipe"),
        (
            f'{{"version": {RECIPE_VERSION + 1}}}',
            f"is of version {RECIPE_VERSION + 1}, .* reads up to {RECIPE_VERSION}",
        ),
        ('{"a":' * 100_000, "holds no recipe: it is nested too deeply"),
    ],
    ids=["cut", "no version", "text", "boolean", "newer", "deep"],
)
def test_what_is_no_recipe_is_told_from_one_that_is_damaged(tmp_path, content, says):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=says) as caught:
        read_recipe(tmp_path / "a.json")
    assert str(tmp_path / "a.json") in str(caught.value)
    path = write_result(tmp_path / "b.mp4", content)
    with pytest.raises(DataError, match=says):
        read_recipe(path)


@pytest.mark.parametrize("content", ["[1]", "3", "null", "", "version"])
def test_other_json_is_no_recipe(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=r"a\.json"):
        read_recipe(tmp_path / "a.json")


def test_what_is_missing_or_unreadable_is_named(tmp_path):
    (tmp_path / "cut.mp4").write_bytes(b"\0\0\0\x20ftypisom")
    (tmp_path / "bytes.json").write_bytes(b'{"version": \xff}')
    (tmp_path / "folder").mkdir()
    for name, says in (
        ("gone.mp4", "is missing; a result of sampling, or its recipe"),
        ("gone.json", "is missing"),
        ("cut.mp4", "truncated or damaged file"),
        ("bytes.json", "can't be read"),
        ("folder", "has no recipe"),
    ):
        with pytest.raises(DataError, match=f"{name} .*{says}"):
            read_recipe(tmp_path / name)


def test_a_place_that_can_not_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MachineError, match="Can't write to"):
        write_recipe(tmp_path / "file" / "a.mp4", RECIPE)
