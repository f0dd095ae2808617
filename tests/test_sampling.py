"""Sampling as users do it: prompts with settings, frames to start from, long videos, files of all kinds, and repeats."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import tiny_training
from safetensors.torch import save_file
from torch import Tensor

from opensora.core.commands.opensora_run import main
from opensora.core.components import build
from opensora.core.frame_sources import frames_of as frames_of_any
from opensora.core.run_folder import held
from opensora.core.sampling import load
from opensora.core.video import probe_video, read_image, read_video, write_image, write_video

Sample = Callable[..., Path]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights that don't make nothing, as fresh ones do."""
    model = tiny_training(Path())["model"]
    module = build("models", model, latent_channels=3, latent_size=(4, 16, 16), text_width=64, text_length=16)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    state = {key: 0.2 * torch.randn(value.shape, generator=generator) for key, value in module.state_dict().items()}
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(state, path)
    return path


@pytest.fixture
def values(weights: Path) -> dict[str, Any]:
    return {
        "model": {**tiny_training(Path())["model"], "from_pretrained": str(weights)},  # type: ignore[dict-item]
        "scheduler": {"type": "rflow", "num_sampling_steps": 3, "cfg_scale": 2.0},
        "text_encoder": {"type": "hashed-words", "width": 64, "model_max_length": 16},
        "num_frames": 4,
        "image_size": (16, 16),
        "fps": 8,
        "dtype": "fp32",
        "crf": 0,
    }


@pytest.fixture
def sample(
    values: dict[str, Any], write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Sample:
    """Runs the command in this process and returns the folder of the samples."""
    monkeypatch.chdir(tmp_path)

    def sample(name: str, *flags: object, **changes: object) -> Path:
        config = write({**values, "save_dir": str(tmp_path / name), **changes}, f"{name}.py")
        assert main([str(config), *map(str, flags)]) == 0
        return tmp_path / name

    return sample


def frames_of(path: Path) -> Tensor:
    return read_video(path)[0]


def frames_of_folder(path: Path) -> Tensor:
    return frames_of_any(path)[0]


def picture(path: Path, *, size: int = 16, seed: int = 0) -> Path:
    pixels = torch.randint(0, 256, (size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    write_image(path, pixels)
    return path


def clip(path: Path, *, num_frames: int = 6, fps: float = 8, size: int = 16) -> Path:
    ramp = torch.linspace(0, 255, num_frames)[:, None, None, None].expand(num_frames, size, size, 3)
    write_video(path, ramp.round().to(torch.uint8), fps, crf=0)
    return path


# ---- again from a file


def test_a_sample_is_made_again_byte_for_byte_out_of_its_batch(sample: Sample, tmp_path: Path) -> None:
    prompts = ["a", "a square of size two that is red", "a wave"]
    picture(tmp_path / "first.png")
    folder = sample("first", "--prompt", *prompts, "--batch-size", 3, "--image", "first.png", "--negative-prompt", "b")
    for index in range(3):
        again = tmp_path / f"again{index}"
        assert main(["--from", str(folder / f"sample_{index:04d}.mp4"), "--save-dir", str(again)]) == 0
        for kind in (".mp4", ".json"):
            name = f"sample_{index:04d}{kind}"
            assert (again / name).read_bytes() == (folder / name).read_bytes(), name


def test_each_prompt_of_a_file_is_made_again(sample: Sample, tmp_path: Path) -> None:
    rows = [
        {"prompt": "|0|a seed|1|a flower", "loop": 2, "num_frames": 8, "seed": 7},
        {"prompt": "a wave", "num_frames": 1, "image_size": [32, 16], "cfg_scale": 1.0, "num_sampling_steps": 2},
        {"prompt": "text {with} braces".replace("{", "(").replace("}", ")"), "name": "named", "fps": 12},
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = sample("first", "--prompt-path", "prompts.jsonl")
    made = sorted(
        path for path in folder.iterdir() if path.name != "contact-sheet.png" and path.suffix in (".mp4", ".png")
    )
    assert [path.name for path in made] == ["named.mp4", "sample_0000.mp4", "sample_0001.png"]
    for path in made:
        assert main(["--from", str(path.with_suffix(".json")), "--save-dir", str(tmp_path / "again")]) == 0
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    assert probe_video(folder / "sample_0000.mp4").num_frames == 2 * 8 - 2
    assert read_image(folder / "sample_0001.png").size == (16, 32)


def test_a_sample_can_be_varied(sample: Sample, tmp_path: Path) -> None:
    folder = sample("first", "--prompt", "a wave")
    source = str(folder / "sample_0000.mp4")
    assert main(["--from", source, "--save-dir", str(tmp_path / "other"), "--seed", "5"]) == 0
    recipe = json.loads((tmp_path / "other" / "sample_0000.json").read_text())
    assert recipe["seed"] == 5
    assert not torch.equal(frames_of(tmp_path / "other" / "sample_0000.mp4"), frames_of(folder / "sample_0000.mp4"))


def test_a_sample_is_made_several_times_with_other_seeds(sample: Sample, tmp_path: Path) -> None:
    folder = sample("first", "--prompt", "a", "b", "--batch-size", 2)
    again = tmp_path / "again"
    flags = ["--num-sample", "2", "--batch-size", "2", "--save-dir", str(again)]
    assert main(["--from", str(folder / "sample_0001.mp4"), *flags]) == 0
    assert sorted(path.name for path in again.glob("*.mp4")) == ["sample_0000-0.mp4", "sample_0000-1.mp4"]
    first, second = (frames_of(again / f"sample_0000-{repeat}.mp4") for repeat in (0, 1))
    assert torch.equal(first, frames_of(folder / "sample_0001.mp4"))
    assert not torch.equal(first, second)


def test_a_sample_is_made_again_with_other_prompts(sample: Sample, tmp_path: Path) -> None:
    folder = sample("first", "--prompt", "a", "b", "--batch-size", 2)
    picture(tmp_path / "first.png")
    again = tmp_path / "again"
    given = 'y {"reference_path": "first.png", "mask_strategy": "0"}'
    assert main(["--from", str(folder / "sample_0001.mp4"), "--prompt", "x", given, "--save-dir", str(again)]) == 0
    recipes = [json.loads((again / f"sample_{index:04d}.json").read_text()) for index in (0, 1)]
    assert [recipe["text"].strip() for recipe in recipes] == ["x", "y"]
    assert list(recipes[1]["references"]) == [str(tmp_path / "first.png")]


def test_a_sample_has_its_companions_and_another_negative_prompt(sample: Sample, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "negative_prompt": "b c d e f"}, {"prompt": "g h", "negative_prompt": "i"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = sample("first", "--prompt-path", "prompts.jsonl", "--batch-size", 2)
    source = folder / "sample_0001.mp4"
    batch = json.loads(source.with_suffix(".json").read_text())["batch"]
    assert batch == {"row": 1, "texts": ["a", "g h"], "negative_prompts": ["b c d e f", "i"]}
    for name, flags in {"again": [], "other": ["--negative-prompt", "k"]}.items():
        assert main(["--from", str(source), "--save-dir", str(tmp_path / name), *flags]) == 0
    assert (tmp_path / "again" / source.name).read_bytes() == source.read_bytes()
    assert not torch.equal(frames_of(tmp_path / "other" / source.name), frames_of(source))


def test_a_recipe_holds_from_any_folder(sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "mark.png"), picture(tmp_path / "first.png")
    (tmp_path / "0").write_text("a file that is called as a mask strategy is")
    flags = ("--reference-path", " first.png", "--mask-strategy", "0", "--watermark", "mark.png")
    folder = sample("first", "--prompt", "a", *flags, "--format", "frames", "--sample-name", "v1.2")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["--from", str(folder / "v1.2_0000"), "--save-dir", "again"]) == 0
    assert torch.equal(frames_of_folder(Path("again/v1.2_0000")), frames_of_folder(folder / "v1.2_0000"))
    assert Path("again/v1.2_0000_watermark").is_dir()


@pytest.mark.parametrize(
    "change",
    [
        {"batch": {"row": 2, "texts": ["a", "b"]}},
        {"batch": {"texts": ["a", "b"]}},
        {"batch": {"row": 0, "texts": ["a", "b"], "negative_prompts": ["c"]}},
        {"references": ["a.png"]},
        {"prompt": None},
        {"config": None},
    ],
    ids=lambda change: str(next(iter(change))),
)
def test_a_recipe_that_no_run_has_written_is_refused(
    change: dict[str, Any], sample: Sample, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = json.loads((sample("first", "--prompt", "a") / "sample_0000.json").read_text())
    (tmp_path / "changed.json").write_text(json.dumps({**recipe, **change}))
    assert main(["--from", str(tmp_path / "changed.json"), "--save-dir", str(tmp_path / "again")]) == 2
    assert "has a recipe that no sampling run has written" in capsys.readouterr().err
    assert not list((tmp_path / "again").glob("*.mp4"))


def test_a_changed_reference_is_noticed(sample: Sample, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / "first.png")
    folder = sample("first", "--prompt", "a", "--image", "first.png")
    picture(tmp_path / "first.png", seed=1)
    assert main(["--from", str(folder / "sample_0000.mp4")]) == 2
    assert "its content has changed" in capsys.readouterr().err


def test_a_file_without_a_recipe_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip(tmp_path / "foreign.mp4")
    assert main(["--from", str(tmp_path / "foreign.mp4")]) == 2
    assert "no recipe" in capsys.readouterr().err
    assert main(["--from", ""]) == 2
    assert "no result of sampling" in capsys.readouterr().err
    assert main(["--from", str(tmp_path / "foreign.mp4"), "config.py"]) == 2
    assert "Leave one out" in capsys.readouterr().err


# ---- frames to start from


def test_given_images_are_kept(sample: Sample, tmp_path: Path) -> None:
    first, last = picture(tmp_path / "first.png"), picture(tmp_path / "last.png", seed=1)
    folder = sample("kept", "--prompt", "a", "--image", first, "--last-image", last, "--format", "frames")
    for name, path in (("0000.png", first), ("0003.png", last)):
        kept = torch.tensor(list(read_image(folder / "sample_0000" / name).tobytes()))
        given = torch.tensor(list(read_image(path).tobytes()))
        assert (kept - given).abs().max() <= 1


@pytest.mark.parametrize(
    ("readable", "grammar"),
    [
        (["--extend", "clip.mp4"], ["clip.mp4", "0,0,-1,0,1"]),
        (["--connect", "clip.mp4", "first.png"], ["clip.mp4;first.png", "0,0,-1,0,1;0,1,0,-1,1"]),
        (["--edit", "clip.mp4", "--strength", 0.4], ["clip.mp4", "0,0,0,0,32,0.4"]),
    ],
    ids=["extend", "connect", "edit"],
)
def test_readable_names_mean_the_same_as_the_grammar(
    readable: list[object], grammar: list[str], sample: Sample, tmp_path: Path
) -> None:
    clip(tmp_path / "clip.mp4"), picture(tmp_path / "first.png")
    named = sample("named", "--prompt", "a", *readable)
    written = sample("written", "--prompt", "a", "--reference-path", grammar[0], "--mask-strategy", grammar[1])
    inside = json.dumps({"reference_path": grammar[0], "mask_strategy": grammar[1]})
    in_prompt = sample("in_prompt", "--prompt", f"a {inside}")
    expected = frames_of(named / "sample_0000.mp4")
    assert torch.equal(frames_of(written / "sample_0000.mp4"), expected)
    assert torch.equal(frames_of(in_prompt / "sample_0000.mp4"), expected)
    assert not torch.equal(frames_of(sample("plain", "--prompt", "a") / "sample_0000.mp4"), expected)


def test_extending_starts_with_the_last_frames(sample: Sample, tmp_path: Path) -> None:
    clip(tmp_path / "clip.mp4", num_frames=6)
    folder = sample("extended", "--prompt", "a", "--extend", "clip.mp4", "--condition-frame-length", 2)
    difference = frames_of(folder / "sample_0000.mp4")[:2].int() - frames_of(tmp_path / "clip.mp4")[-2:].int()
    assert difference.abs().max() <= 2


def test_references_of_another_size_and_rate_are_changed_and_that_is_said(
    sample: Sample, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clip(tmp_path / "clip.mp4", num_frames=12, fps=16, size=32)
    with caplog.at_level(logging.INFO, "opensora"):
        sample("edited", "--prompt", "a", "--edit", "clip.mp4")
    (note,) = [record.getMessage() for record in caplog.records if "resampled" in record.getMessage()]
    assert "from 16 to 8 frames/s" in note
    assert "32 x 32" in note


def test_a_reference_shorter_than_asked_is_said(
    sample: Sample, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clip(tmp_path / "clip.mp4", num_frames=2)
    sample("edited", "--prompt", "a", "--edit", "clip.mp4")
    assert "2 latent frames of it are used, 2 more were wanted" in caplog.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--extend", "short.mp4", "--condition-frame-length", 3], "starts at latent frame -3"),
        (["--image", "missing.png"], "missing.png"),
        (["--image", "text.png"], "text.png"),
        (["--image", "first.png", "--edit", "short.mp4"], "contradict each other"),
        (["--reference-path", "first.png", "--mask-strategy", "0,2"], "reference 2 is missing"),
        (["--reference-path", "first.png", "--mask-strategy", "1"], "round"),
        (["--reference-path", "first.png", "--mask-strategy", "0,x"], "^"),
        (["--num-sampling-steps", 0], "num_sampling_steps"),
        (["--cfg-scale", -1], "cfg_scale"),
        (["--loop", 2, "--condition-frame-length", 4], "nothing would be new"),
        (["--strength", 0.5], "without edit"),
        (["--format", "webm"], "webm"),
        (["--num-frames", "3s"], "3s"),
        (["--resolution", "240p"], 'resolution "240p" alone is no size'),
    ],
    ids=lambda value: str(value[0])[2:] if isinstance(value, list) else "",
)
def test_bad_input_is_refused(
    flags: list[object],
    message: str,
    values: dict[str, Any],
    write: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    clip(tmp_path / "short.mp4", num_frames=2), picture(tmp_path / "first.png")
    (tmp_path / "text.png").write_text("no picture")
    config = write({**values, "save_dir": str(tmp_path / "samples")})
    assert main([str(config), "--prompt", "a", *map(str, flags)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.glob("samples/*.mp4"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image_size": [16, 0]}, "image_size"),
        ({"num_sampling_steps": 2000}, "2000"),
        ({"loop": 2, "num_frames": 1}, "nothing would be new"),
    ],
    ids=["size", "steps", "rounds"],
)
def test_what_one_prompt_can_not_have_is_refused_before_anything_is_made(
    row: dict[str, Any],
    message: str,
    values: dict[str, Any],
    write: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [{"prompt": "fine"}, {"prompt": "a", **row}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"prompt_path": str(tmp_path / "prompts.jsonl"), "save_dir": str(tmp_path / "samples")}
    config = write({**values, **changes, "scheduler": {"type": "iddpm", "learn_sigma": False, "num_sampling_steps": 3}})
    assert main([str(config)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "samples").exists()


def test_a_watermark_that_is_no_picture_is_refused_before_anything_is_made(
    values: dict[str, Any], write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mark.png").write_text("no picture")
    config = write({**values, "save_dir": str(tmp_path / "samples")})
    assert main([str(config), "--prompt", "a", "--watermark", str(tmp_path / "mark.png")]) == 2
    assert "mark.png" in capsys.readouterr().err
    assert not (tmp_path / "samples").exists()


def test_two_runs_do_not_write_into_one_folder(
    values: dict[str, Any], write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "samples"
    folder.mkdir()
    with held(folder):
        assert main([str(write({**values, "save_dir": str(folder)})), "--prompt", "a"]) == 2
    assert "Another run is writing" in capsys.readouterr().err
    assert not list(folder.glob("*.mp4"))


# ---- long videos


def test_rounds_join_into_one_video(sample: Sample) -> None:
    shape = ("--num-frames", 8, "--format", "frames")
    folder = sample("long", "--prompt", "|0|a seed|2|a flower", "--loop", 4, *shape)
    frames = frames_of_folder(folder / "sample_0000").int()
    assert len(frames) == 4 * 8 - 3 * 2
    seams = json.loads((folder / "summary.json").read_text())["seams"]["sample_0000"]
    for seam, last in zip(seams, (7, 13, 19), strict=True):
        jump = (frames[last + 1] - frames[last]).abs().double().mean() / 255
        assert seam["jump"] == pytest.approx(jump.item())
    # Its first round is the video without rounds.
    alone = frames_of_folder(sample("alone", "--prompt", "a seed", *shape) / "sample_0000")
    assert torch.equal(frames[:8], alone.int())


def test_seams_of_an_earlier_run_are_not_told_again(sample: Sample) -> None:
    for loop in (3, 2):
        folder = sample("long", "--prompt", "a", "--loop", loop, "--num-frames", 8)
        assert len(json.loads((folder / "summary.json").read_text())["seams"]["sample_0000.mp4"]) == loop - 1
    sample("long", "--prompt", "a")
    assert "seams" not in json.loads((folder / "summary.json").read_text())


def test_each_round_goes_on_from_the_last_and_has_noise_of_its_own(
    values: dict[str, Any], write: Callable[..., Path]
) -> None:
    pipeline = load(write(values))
    two, three = (pipeline("a", loop=loop, num_frames=8).frames for loop in (2, 3))
    assert torch.equal(three[:14], two)
    assert not torch.equal(three[14:], two[8:])


# ---- files


def test_a_batch_half_done_goes_on(sample: Sample, tmp_path: Path) -> None:
    flags = ("--prompt", "a", "b", "c", "--skip_existing", "True")
    folder = sample("some", *flags, "--batch-size", 2)
    whole = {path.name: path.read_bytes() for path in folder.glob("sample_*")}
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.mp4")}
    (folder / "sample_0001.mp4").unlink()
    sample("some", *flags)
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["saved"], summary["left_out_existing"]) == (1, 2)
    assert (folder / "sample_0000.mp4").stat().st_mtime_ns == times["sample_0000.mp4"]
    assert torch.equal(frames_of(folder / "sample_0001.mp4"), frames_of_bytes(whole["sample_0001.mp4"], tmp_path))


def frames_of_bytes(data: bytes, folder: Path) -> Tensor:
    (folder / "kept.mp4").write_bytes(data)
    return frames_of(folder / "kept.mp4")


@pytest.mark.parametrize("kind", ["mp4", "gif", "frames"])
def test_every_format_has_its_recipe_and_its_marked_copy(kind: str, sample: Sample, tmp_path: Path) -> None:
    folder = sample("made", "--prompt", "a", "--format", kind, "--watermark", "yes", image_size=(64, 64))
    ending = "" if kind == "frames" else f".{kind}"
    assert (folder / f"sample_0000{ending}").exists()
    assert (folder / f"sample_0000_watermark{ending}").exists()
    assert (folder / "contact-sheet.png").exists()
    again = tmp_path / "again"
    assert main(["--from", str(folder / f"sample_0000{ending}"), "--save-dir", str(again)]) == 0
    if kind == "frames":
        names = sorted(path.name for path in (folder / "sample_0000").iterdir())
        assert len([name for name in names if name.endswith(".png")]) == 4
        for name in names:
            assert (again / "sample_0000" / name).read_bytes() == (folder / "sample_0000" / name).read_bytes()
    else:
        assert (again / f"sample_0000{ending}").read_bytes() == (folder / f"sample_0000{ending}").read_bytes()


def test_previews_of_a_sample_made_again_show_that_sample(sample: Sample, tmp_path: Path) -> None:
    folder = sample("watched", "--prompt", "a", "b b", "--batch-size", 2, "--preview", 3)
    for index in (0, 1):
        again = tmp_path / f"again{index}"
        name = f"sample_{index:04d}"
        assert main(["--from", str(folder / f"{name}.mp4"), "--save-dir", str(again), "--preview", "3"]) == 0
        shown, expected = (read_image(each / "previews" / f"{name}.png") for each in (again, folder))
        assert shown.tobytes() == expected.tobytes()


def test_previews_show_what_comes(sample: Sample) -> None:
    folder = sample("watched", "--prompt", "a", "b", "--preview", 1)
    assert sorted(path.name for path in (folder / "previews").iterdir()) == ["sample_0000.png", "sample_0001.png"]
    assert read_image(folder / "previews" / "sample_0000.png").size[1] > 150  # three rows


def test_previews_of_long_videos_have_a_sheet_a_round(sample: Sample) -> None:
    flags = ("--prompt", "a", "b", "--loop", 2, "--num-frames", 8, "--format", "frames", "--sample-name", "v1.2")
    folder = sample("watched", *flags, "--preview", 3)
    names = [f"v1.2_{index:04d}-round-{number}.png" for index in (0, 1) for number in (1, 2)]
    assert sorted(path.name for path in (folder / "previews").iterdir()) == names
    first, second = (read_image(folder / "previews" / name) for name in names[:2])
    assert first.size == second.size
    assert first.tobytes() != second.tobytes()


def test_a_cut_prompt_is_reported_with_what_was_cut(sample: Sample, caplog: pytest.LogCaptureFixture) -> None:
    prompt = " ".join(f"word{index}" for index in range(10_000))
    sample("long", "--prompt", prompt)
    (warning,) = [record.getMessage() for record in caplog.records if "are cut" in record.getMessage()]
    assert "9,985 of 10,000 words don't fit the text encoder's 16 tokens" in warning
    assert "word9999" in warning


def test_a_size_that_the_autoencoder_does_not_fill_is_said_once(
    sample: Sample, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    vae = type(build("vaes", {"type": "identity"}))
    monkeypatch.setattr(vae, "latent_size", lambda self, size: (size[0], size[1] // 8 * 8, size[2] // 8 * 8))
    folder = sample("blocks", "--prompt", "a", "b", "--image-size", 18, 21)
    assert frames_of(folder / "sample_0000.mp4").shape == (4, 16, 16, 3)
    told = [record.getMessage() for record in caplog.records if "asked for" in record.getMessage()]
    assert told == ["18 x 21 (height x width) was asked for; the autoencoder gives 16 x 16"]


def test_prompters_rewrite_prompts(sample: Sample) -> None:
    folder = sample("refined", "--prompt", "a wave", prompter={"type": "templates"})
    recipe = json.loads((folder / "sample_0000.json").read_text())
    assert recipe["prompt"] == "a wave"
    assert "a wave" in recipe["text"]
    assert len(recipe["text"]) > len("a wave") + 10


def test_the_phases_add_up(sample: Sample) -> None:
    folder = sample("timed", "--prompt", *"abcdef", "--num-sampling-steps", 100, "--batch-size", 2)
    summary = json.loads((folder / "summary.json").read_text())
    phases = summary["seconds_by_phase"]
    assert sum(phases.values()) >= 0.95 * summary["seconds"]
    after_loading = summary["seconds"] - phases["load"] - phases["text"]
    assert sum(phases.values()) - phases["load"] - phases["text"] >= 0.95 * after_loading
    assert phases["denoise"] >= 0.5 * after_loading


# ---- from Python


def test_python_makes_what_the_command_makes(
    values: dict[str, Any], write: Callable[..., Path], sample: Sample, tmp_path: Path
) -> None:
    expected = sample("command", "--prompt", "a wave", "--num-frames", 8, "--seed", 3)
    pipeline = load(write(values))
    video = pipeline("a wave", num_frames=8, seed=3)
    video.save(tmp_path / "python.mp4", crf=0)
    assert torch.equal(frames_of(tmp_path / "python.mp4"), frames_of(expected / "sample_0000.mp4"))
    assert json.loads((tmp_path / "python.json").read_text())["seed"] == 3


@pytest.mark.parametrize(
    ("name", "crf"), [("saved.mp4", None), ("saved.mp4", 30), ("saved.gif", None), ("saved", None)]
)
def test_what_python_saves_is_made_again(
    name: str, crf: int | None, values: dict[str, Any], write: Callable[..., Path], tmp_path: Path
) -> None:
    load(write({**values, "crf": 12}))("a wave").save(tmp_path / name, crf=crf)
    assert main(["--from", str(tmp_path / name), "--save-dir", str(tmp_path / "again")]) == 0
    if name == "saved":
        assert torch.equal(frames_of_folder(tmp_path / "again" / name), frames_of_folder(tmp_path / name))
    else:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_python_refines_prompts_as_the_command_does(values: dict[str, Any], write: Callable[..., Path]) -> None:
    request = load(write(values), prompter={"type": "templates"})("a wave").request
    assert request.prompt == "a wave"
    assert len(request.text) > len("a wave") + 10


def test_several_prompts_come_back_in_their_order(values: dict[str, Any], write: Callable[..., Path]) -> None:
    pipeline = load(write({**values, "batch_size": 2}))
    videos = pipeline(["a", "b", "c"])
    assert [video.request.prompt for video in videos] == ["a", "b", "c"]
    assert [key.seed for key in pipeline.start(["a", "b"], seed=7).keys] == [7, 8]
    assert torch.equal(videos[2].frames, pipeline("c", seed=videos[2].request.seed).frames)


def test_changes_reach_components(values: dict[str, Any], write: Callable[..., Path]) -> None:
    pipeline = load(write(values), scheduler={"num_sampling_steps": 5}, num_frames=8)
    states = list(pipeline.start("a"))
    assert [state.step for state in states] == [0, 1, 2, 3, 4]
    assert states[-1].latents.shape == (1, 3, 8, 16, 16)


def test_denoising_can_be_watched_stopped_and_forked(values: dict[str, Any], write: Callable[..., Path]) -> None:
    pipeline = load(write({**values, "scheduler": {"type": "rflow", "num_sampling_steps": 6, "cfg_scale": 2.0}}))
    whole = pipeline.start("a").finish()
    denoising = pipeline.start("a")
    for state in denoising:
        if state.step == 2:
            break
    fork = denoising.fork(guidance_scale=5.0)
    same = denoising.fork()
    next(fork), next(same)  # in turns
    assert torch.equal(denoising.finish(), whole)
    assert torch.equal(same.finish(), whole)
    assert not torch.allclose(fork.finish(), whole)
    assert fork.guidance_scale == 5.0
    assert denoising.guidance_scale == 2.0
    (frames,) = pipeline.decode(whole)
    assert frames.shape == (4, 16, 16, 3)


def test_guidance_can_change_in_the_middle(values: dict[str, Any], write: Callable[..., Path]) -> None:
    pipeline = load(write(values))
    denoising = pipeline.start("a")
    next(denoising)
    denoising.guidance_scale = 7.0
    assert not torch.allclose(denoising.finish(), pipeline.start("a").finish())
    with pytest.raises(ValueError, match="guidance_scale is -1"):
        denoising.guidance_scale = -1


def test_latents_of_another_length_are_not_cut(values: dict[str, Any], write: Callable[..., Path]) -> None:
    pipeline = load(write(values))
    latents = pipeline.start("a", num_frames=8).finish()
    with pytest.raises(ValueError, match="4 frames have 4 latent frames, but there are 8"):
        pipeline.decode(latents)
    assert len(pipeline.decode(latents, num_frames=8)[0]) == 8


def test_what_python_can_not_start_is_refused(values: dict[str, Any], write: Callable[..., Path]) -> None:
    pipeline = load(write(values), reference_path=["a.png"], mask_strategy="0")
    with pytest.raises(ValueError, match="reference_path has 1 items for 2 prompts"):
        pipeline(["a", "b"])
    with pytest.raises(ValueError, match="no prompt"):
        load(write(values)).start([])


def test_a_video_says_what_it_is_and_not_its_pixels(values: dict[str, Any], write: Callable[..., Path]) -> None:
    assert repr(load(write(values))("a wave", seed=5)) == "<Video 4 x 16 x 16 at 8 fps: 'a wave', seed 5>"


def test_unknown_settings_are_refused(values: dict[str, Any], write: Callable[..., Path]) -> None:
    pipeline = load(write(values))
    with pytest.raises(ValueError, match='Did you mean "num_frames"'):
        pipeline("a", num_frame=3)


def test_negative_prompts_lead_away(values: dict[str, Any], write: Callable[..., Path]) -> None:
    pipeline = load(write(values))
    plain, away = pipeline("a wave").frames, pipeline("a wave", negative_prompt="noise").frames
    assert not torch.equal(plain, away)
    same = pipeline("a wave", negative_prompt="a wave", cfg_scale=3.0).frames  # away from itself: no guidance
    assert (same.int() - pipeline("a wave", cfg_scale=1.0).frames.int()).abs().max() <= 1
