"""From prompts and a config to requests: what each file is made of, and what it is called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opensora.core import Conditioning, ConfigError, DataError
from opensora.core.config.structure import structure
from opensora.core.pipelines.sample_requests import choose_entries, plan_requests, read_plans, refine_plans
from opensora.core.pipelines.sample_spec import SampleSpec
from opensora.core.requests import EndlessRequests, Request, file_stem, iter_batches
from opensora.core.video_sampler import build_conditioning

FOLDER = Path("out/dir")


def spec(**options: object) -> SampleSpec:
    needed = {
        "model": {"type": "any"},
        "scheduler": {"type": "any"},
        "image_size": (16, 32),
        "num_frames": 8,
        "seed": 42,
    }
    return structure(SampleSpec, {**needed, **options})


def plan(prompts: str | list[str] | None, folder: Path = FOLDER, **options: object) -> list[Request]:
    chosen = spec(prompt=prompts, **options)
    return list(plan_requests(read_plans(choose_entries(chosen), chosen), chosen, folder))


def test_files_are_named_as_published(golden: Callable[[str], Any]) -> None:
    checked = 0
    for row in golden("save_names"):
        if "error" in row or ("prompt" in row and row["prompt"] is None):
            continue  # neither index nor prompt
        by_prompt = row.get("prompt_as_path", False)
        index = 0 if by_prompt else row["sample_idx"]
        requests = plan(
            [*(["unused"] * index), row.get("prompt", "unused")],
            Path(row["save_dir"]),
            format="frames",
            start_index=index,
            num_sample=row.get("num_sample", 1),
            sample_name=row.get("sample_name"),
            prompt_as_path=by_prompt,
        )
        path = requests[row.get("k", 0)].path
        if "/" in row.get("prompt", ""):  # upstream writes to other folders
            assert path.parent == Path(row["save_dir"])
            assert path.name == row["prompt"].replace("/", "_")
        else:
            assert str(path) == row["ok"]
        checked += 1
    assert checked == 12


@pytest.mark.parametrize(
    "prompt",
    ["/etc/passwd", "../../up", "a\\b", ".hidden", "..", "", "  ", "a\x00b\nc", "a\udc80", "x" * 400, "波" * 200],
)
@pytest.mark.parametrize("sample_name", [None, "", "p-", "../p"])
def test_a_prompt_never_leaves_its_folder(prompt: str, sample_name: str | None, tmp_path: Path) -> None:
    (request,) = plan([prompt], tmp_path, prompt_as_path=True, sample_name=sample_name)
    assert request.path.parent == tmp_path
    request.path.write_bytes(b"")
    assert [path.name for path in tmp_path.iterdir()] == [request.path.name]
    assert not request.path.name.startswith(".")
    assert request.prompt == prompt.strip()


def test_a_sample_name_never_leaves_its_folder() -> None:
    assert plan(["a"], sample_name="../../a/b")[0].path.parent == FOLDER


@given(st.text(max_size=300).filter(lambda text: text.isprintable()))
def test_any_prompt_makes_a_file_name(prompt: str) -> None:
    stem = file_stem(prompt, None)
    assert stem
    assert len(stem.encode()) <= 150
    assert not {"/", "\\", "\x00", "\n"} & set(stem)
    assert file_stem(prompt, None) == stem


def test_long_prompts_with_a_common_start_get_names_of_their_own() -> None:
    paths = {request.path for request in plan(["a" * 200 + "b", "a" * 200 + "c"], prompt_as_path=True)}
    assert len(paths) == 2


def test_each_prompt_and_repeat_has_a_seed_of_its_own() -> None:
    requests = plan(["x"] * 5 + ["a", "b"], num_sample=3, start_index=5)
    assert [request.seed for request in requests] == [57, 58, 59, 60, 61, 62]
    assert [request.path.name for request in requests] == [
        *("sample_0005-0.mp4", "sample_0005-1.mp4", "sample_0005-2.mp4"),
        *("sample_0006-0.mp4", "sample_0006-1.mp4", "sample_0006-2.mp4"),
    ]


def test_a_part_of_the_prompts_makes_the_same_videos_as_the_whole() -> None:
    whole = plan(["a", "b", "c"], num_sample=2)
    assert plan(["a", "b", "c"], num_sample=2, start_index=2) == whole[4:]


def test_prompts_counted_from_the_last_keep_their_numbers(tmp_path: Path) -> None:
    given = {"reference_path": ["a.png", "b.png", "c.png"], "mask_strategy": "0"}
    assert plan(["a", "b", "c"], start_index=-2, **given) == plan(["a", "b", "c"], **given)[1:]
    path = tmp_path / "prompts.txt"
    path.write_text("a\nb\nc\n")
    (request,) = plan(None, prompt_path=str(path), start_index=-1)
    assert (request.prompt, request.seed, request.path.name) == ("c", 44, "sample_0002.mp4")


def test_scores_go_to_the_encoder_in_every_round_and_not_into_names() -> None:
    (request,) = plan(["a cat."], aes=6.5, prompt_as_path=True)
    assert request.text == "a cat. aesthetic score: 6.5."
    assert request.prompt == "a cat."
    assert request.path == FOLDER / "a cat.mp4"
    (request,) = plan(["|0|a seed|1|a flower"], flow=4.0, loop=2)
    assert request.text == "|0|a seed motion score: 4.0.|1|a flower motion score: 4.0."


def test_two_prompts_for_one_file_are_refused_before_anything_is_made() -> None:
    with pytest.raises(DataError, match=r"out/dir/a cat\.mp4"):
        plan(["a cat", "a dog", "a cat"], prompt_as_path=True)
    assert len(plan(["a cat", "a cat"])) == 2


def test_two_results_that_would_share_a_recipe_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "name": "x"}\n{"prompt": "b", "name": "x", "num_frames": 1}\n')
    with pytest.raises(DataError, match=r"out/dir/x\.png"):
        plan(None, prompt_path=str(path))


def test_json_in_a_prompt_says_what_it_starts_from() -> None:
    (request,) = plan('a cat {"reference_path": "cat.png;end.png", "mask_strategy": "0;0,1,0,-1,1"}')
    assert request.prompt == request.text.strip() == "a cat"
    sources, edits = request.given.resolve(length=2)
    assert sources == ["cat.png", "end.png"]
    assert [(edit.reference, edit.target_start) for edit in edits] == [(0, 0), (1, -1)]


def test_lists_of_references_have_one_item_a_prompt() -> None:
    options = {"reference_path": ["a.png", "", "c.png"], "mask_strategy": ["0", "", "0"]}
    requests = plan(["a", "b", "c"], **options)
    assert [request.given.reference_path for request in requests] == ["a.png", None, "c.png"]
    assert plan(["a", "b", "c"], start_index=2, **options)[0].given.reference_path == "c.png"
    with pytest.raises(ConfigError, match="reference_path has 3 items for 2 prompts"):
        plan(["a", "b"], **options)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ('a {"reference_path": "x.png", "mask_strategy": "0,1"}', {}, "reference 1 is missing"),
        ('a {"reference_path": "x.png", "mask_strategy": "2"}', {"loop": 2}, "round"),
        ("|0|a|3|b", {"loop": 2}, "round 3 of 2 is none"),
        ("a", {"image": "x.png", "edit": "y.mp4"}, "image and edit contradict each other"),
        ("a", {"image": "x.png", "mask_strategy": "0"}, "image and mask_strategy can't be given together"),
        ("a", {"strength": 0.4}, "strength is given without edit"),
        ("a {b}", {}, "JSON"),
    ],
    ids=["missing reference", "missing round", "late text", "contradiction", "two ways", "strength", "brace"],
)
def test_what_a_prompt_can_not_have_is_said_with_the_prompt(prompt: str, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        plan(["fine", prompt] if "image" not in options and "strength" not in options else [prompt], **options)
    assert "prompt " in str(caught.value)


def test_prompt_files_have_settings_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text(
        "prompt,seed,num_frames,image_size,negative_prompt,loop,cfg_scale,name,fps\n"
        "a cat,7,4,32x16,blurry,2,3.5,tom,12\n"
        "a dog,,,,,,,,\n"
    )
    cat, dog = plan(None, prompt_path=str(path), negative_prompt="ugly", fps=24, frame_interval=2)
    assert (cat.seed, cat.size, cat.negative_prompt, cat.loop, cat.cfg_scale) == (7, (4, 32, 16), "blurry", 2, 3.5)
    assert (cat.path.name, cat.fps, cat.file_fps) == ("tom.mp4", 12, 6)
    assert (dog.seed, dog.size, dog.negative_prompt, dog.loop, dog.cfg_scale) == (43, (8, 16, 32), "ugly", 1, None)
    assert (dog.path.name, dog.fps, dog.file_fps) == ("sample_0001.mp4", 24, 12)


def test_a_bad_size_in_a_prompt_file_is_located(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text("prompt,resolution\na cat,240q\n")
    with pytest.raises(ConfigError, match=rf"{path}:2: .*240q"):
        plan(None, prompt_path=str(path), aspect_ratio="9:16")


def test_batches_have_one_kind_and_keep_the_order() -> None:
    requests = [*plan(["a", "b", "c"]), *plan(["d"], num_frames=4), *plan(["e", "f"])]
    batches = [[request.prompt for request in batch] for batch in iter_batches(requests, 2)]
    assert batches == [["a", "b"], ["c", "e"], ["d"], ["f"]]


def test_videos_with_given_frames_have_batches_of_their_own() -> None:
    requests = [*plan(["a"]), *plan(["b"], image="x.png"), *plan(["c"]), *plan(["d"], extend="y.mp4")]
    batches = [[request.prompt for request in batch] for batch in iter_batches(requests, 2)]
    assert batches == [["a", "c"], ["b", "d"]]


def test_endless_prompts_are_numbered_and_cost_no_memory() -> None:
    chosen = spec(prompt_generator="a wave", start_index=3)
    requests = plan_requests(read_plans(choose_entries(chosen), chosen), chosen, FOLDER)
    assert isinstance(requests, EndlessRequests)
    assert len(requests) == 1_000_000
    mine = requests[1::2]
    assert [(each.prompt, each.seed, each.path.name) for each in (mine[0], mine[1])] == [
        ("a wave", 46, "sample_0004.mp4"),
        ("a wave", 48, "sample_0006.mp4"),
    ]
    assert len(plan(None, prompt_generator="a wave", end_index=2)) == 2


def test_endless_prompts_that_end_at_once_are_refused() -> None:
    with pytest.raises(ConfigError, match="No prompt is left: start_index is 2, end_index 2"):
        plan(None, prompt_generator="a wave", start_index=2, end_index=2)


def test_endless_prompts_have_references_and_any_name() -> None:
    names = {"sample_name": "v1.2", "format": "frames", "start_index": 3, "end_index": 5}
    requests = plan(None, prompt_generator="a", reference_path=["a.png"], mask_strategy=["0"], **names)
    assert [request.path.name for request in requests] == ["v1.2_0003", "v1.2_0004"]
    assert [request.given.reference_path for request in requests] == ["a.png", "a.png"]
    with pytest.raises(ConfigError, match="reference_path has 2 items for 1 prompts"):
        plan(None, prompt_generator="a", reference_path=["a.png", "b.png"], mask_strategy="0")


class Shouter:
    """A prompter."""

    def refine(self, texts: list[str]) -> list[str]:
        return [text.upper() or f"NEW {index}" for index, text in enumerate(texts)]


def test_prompters_see_every_text_and_no_syntax() -> None:
    chosen = spec(prompt=["|0|a|1|b", 'c {"reference_path": "x.png", "mask_strategy": "0"}', "", ""], loop=2, aes=6.5)
    plans = refine_plans(read_plans(choose_entries(chosen), chosen), Shouter())
    requests = plan_requests(plans, chosen, FOLDER)
    score = "aesthetic score: 6.5."
    texts = [f"|0|A {score}|1|B {score}", f"C {score}", f"NEW 3 {score}", f"NEW 4 {score}"]
    assert [" ".join(request.text.split()) for request in requests] == texts
    assert [request.prompt for request in requests] == ["|0|a|1|b", "c", "", ""]


def test_formats_have_their_names(tmp_path: Path) -> None:
    assert plan("a")[0].path.name == "sample_0000.mp4"
    assert plan("a", num_frames=1)[0].path.name == "sample_0000.png"
    assert plan("a", format="gif")[0].path.name == "sample_0000.gif"
    assert plan("a", format="frames")[0].path.name == "sample_0000"
    assert plan("photo.webm", format="frames", prompt_as_path=True)[0].path.name == "photo_webm"


class Texts:
    """A text encoder."""

    def encode(self, prompts: list[str]) -> Conditioning:
        return Conditioning(text_embedding=torch.zeros(len(prompts), 2, 4))


class Quarter:
    """An autoencoder."""

    def latent_size(self, size: tuple[int, int, int]) -> tuple[int, int, int]:
        return -(-size[0] // 4), size[1] // 8, size[2] // 8


def test_denoisers_are_told_sizes_as_published(golden: Callable[[str], Any]) -> None:
    parts: Any = SimpleNamespace(text_encoder=Texts(), vae=Quarter())
    names = {"ar": "aspect_ratio", "height": "height", "width": "width", "num_frames": "num_frames", "fps": "fps"}
    checked = 0
    for row in golden("multi_resolution"):
        (request,) = plan("a", num_frames=row["num_frames"], image_size=row["image_size"], fps=row["fps"])
        told = build_conditioning(parts, [request] * row["batch_size"])
        for name, expected in row.get("ok", {}).items():
            if name == "hw":
                found = torch.stack([told.height, told.width], dim=1)
            else:
                found = getattr(told, names[name]).view(torch.tensor(expected).shape)
            torch.testing.assert_close(found, torch.tensor(expected))
            checked += 1
    assert checked == 24


def test_a_kind_of_size_conditions_that_nobody_knows_is_refused() -> None:
    with pytest.raises(ConfigError, match="multi_resolution"):
        plan("a", multi_resolution="stdit2")
