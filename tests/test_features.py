"""Latents and embeddings that are computed once: the same training, and nothing stale, whatever happens meanwhile."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import clip
from runs import Command, command_line, environment, losses, tiny_training, weights

from opensora.core.commands.opensora_run import main
from opensora.core.config.write import write_config
from opensora.core.video import write_video

ROWS = 6
Run = Callable[..., Path]


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small image autoencoder with random weights, whose posterior is not narrow."""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    ).save_pretrained(folder)
    age(folder)
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of clips of 7 frames, with 3 captions."""
    folder = tmp_path_factory.mktemp("videos")
    rows = ["path,text"]
    for index in range(ROWS):
        write_video(folder / f"{index}.mp4", clip(index, num_frames=7), fps=8, crf=4)
        rows.append(f"{index}.mp4,a square of size {index % 3}")
    (folder / "clips.csv").write_text("\n".join(rows) + "\n")
    return folder


def age(folder: Path) -> None:
    """Wait until no file there changed just now: until then it is looked at again and again."""
    newest = max(path.stat().st_ctime for path in folder.rglob("*"))
    time.sleep(max(0.0, newest + 2.1 - time.time()))


@pytest.fixture
def here(vae: Path, videos: Path, tmp_path: Path) -> Path:
    """A folder with copies of the clips and the autoencoder, to be changed."""
    shutil.copytree(vae, tmp_path / "vae")
    shutil.copytree(videos, tmp_path / "videos")
    return tmp_path


def config(here: Path, **changes: object) -> dict[str, object]:
    values = tiny_training(here / "videos/clips.csv", batch_size=3, max_steps=6)
    model = {**values["model"], "patch_size": (1, 2, 2)}  # type: ignore[dict-item]
    dataset = {"num_starts": 1, **values["dataset"], **changes.pop("dataset", {})}  # type: ignore[dict-item]
    vae = {"type": "VideoAutoencoderKL", "from_pretrained": str(here / "vae")}
    features = {"folder": str(here / "features")}
    return {**values, "model": model, "dataset": dataset, "vae": vae, "features": features, **changes}


@pytest.fixture
def run(here: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a config in this process, in a folder that it returns."""

    def run(name: str, *flags: object, code: int = 0, **changes: object) -> Path:
        values = config(here, **changes)
        if values["features"] is None:
            del values["features"]
        write_config(here / f"{name}.py", values, "A test's config.")
        capsys.readouterr()
        assert main([str(each) for each in (here / f"{name}.py", "--run-folder", here / name, *flags)]) == code
        return here / name

    return run


def extract(run: Run, *flags: object, **changes: object) -> dict[str, object]:
    """Extract, and return the summary; a folder that is named again is written over."""
    folder = run("extracted", "--pipeline", "extract", *flags, **changes)
    return json.loads((folder / "summary.json").read_text())


def made(run: Run, **changes: object) -> tuple[int, int]:
    """How many latents and embeddings an extraction had to compute; together with those found they are all."""
    summary = extract(run, **changes)
    for kind, total in (("latents", ROWS), ("texts", 3)):
        assert total <= sum(summary[kind].values()) <= ROWS  # type: ignore[attr-defined]
    return summary["latents"]["made"], summary["texts"]["made"]  # type: ignore[index]


def found(folder: Path) -> list[float]:
    return [json.loads(line)["features_found"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on no encoder has weights, and no video can be opened."""

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("This should not be needed.")

    monkeypatch.setattr("opensora.models.vae.image_vae.VideoAutoencoderKL._read", refuse)
    monkeypatch.setattr("opensora.models.text_encoders.hashed_words.HashedWords.encode", refuse)
    monkeypatch.setattr("opensora.core.video.VideoFile.__init__", refuse)


def test_training_is_the_same_while_features_are_made_and_when_all_are_there(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = {"mask_ratios": {"image_head": 0.5, "random": 0.5}}
    plain = run("plain", features=None, **masks)
    filling = run("filling", **masks)
    age(here / "vae")
    run("again", **masks)  # the files have settled: what they are is remembered
    no_work(monkeypatch)
    reading = run("reading", "--features.fill", False, **masks)
    assert found(filling)[0] == 0
    assert found(filling)[-1] == found(reading)[0] == 1
    for other in (filling, reading):
        torch.testing.assert_close(losses(other), losses(plain), rtol=1e-6, atol=0)
    assert losses(filling) == losses(reading)
    for key, tensor in weights(plain).items():
        torch.testing.assert_close(weights(reading)[key], tensor, rtol=1e-5, atol=1e-6)
        assert torch.equal(weights(reading)[key], weights(filling)[key])


def change_a_byte(path: Path) -> None:
    """One byte of a clip that its frames don't depend on: of the name of the program that wrote it."""
    data = bytearray(path.read_bytes())
    data[data.rindex(b"Lavf")] ^= 1
    path.write_bytes(data)


def test_what_changes_is_made_again_and_nothing_else(run: Run, here: Path) -> None:
    from safetensors.torch import load_file, save_file

    assert made(run) == (ROWS, 3)
    assert made(run) == (0, 0)
    change_a_byte(here / "videos/3.mp4")
    assert made(run) == (1, 0)
    assert made(run) == (0, 0)
    (weights_file,) = (here / "vae").glob("*.safetensors")
    state = load_file(weights_file)
    state["encoder.conv_in.bias"][0] += 1e-6
    save_file(state, weights_file)
    assert made(run) == (ROWS, 0)
    assert made(run, dataset={"transform_name": "resize_crop"}) == (ROWS, 0)
    assert made(run, dataset={"frame_interval": 2, "num_frames": 3}) == (ROWS, 0)
    assert made(run, text_encoder={"type": "hashed-words", "width": 32}) == (0, 3)
    one_by_one = {"type": "VideoAutoencoderKL", "from_pretrained": str(here / "vae"), "micro_batch_size": 1}
    assert made(run, vae=one_by_one) == (0, 0)
    assert made(run) == (0, 0)  # what was made for the first options is still there
    shutil.copytree(here / "vae", here / "moved")
    assert made(run, vae={"type": "VideoAutoencoderKL", "from_pretrained": str(here / "moved")}) == (0, 0)


def test_one_name_in_two_folders_and_one_content_under_two_names(run: Run, here: Path) -> None:
    (here / "videos/other").mkdir()
    shutil.copy(here / "videos/5.mp4", here / "videos/other/0.mp4")
    (here / "videos/clips.csv").write_text("path,text\n0.mp4,a\nother/0.mp4,b\n5.mp4,c\n")
    summary = extract(run)
    assert summary["entries"] == {"latents": 2, "texts": 3}
    assert summary["latents"]["made"] >= 2  # type: ignore[index]


@pytest.mark.parametrize("kind", ["latents", "texts"])
def test_a_missing_feature_is_named_with_the_way_to_make_it(
    kind: str, run: Run, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extract(run)
    next((here / "features" / kind).rglob("*.safetensors")).unlink()
    stopped = run("stopped", "--features.fill", False, code=2)
    error = capsys.readouterr().err
    assert " of row " in error
    assert "a square of size" in error
    assert f"opensora-run {stopped}/config.py --pipeline extract" in error
    assert main([str(stopped / "config.py"), "--pipeline", "extract", "--run-folder", str(here / "mended")]) == 0
    shutil.rmtree(stopped)
    run("stopped", "--features.fill", False)


def test_a_folder_that_is_not_there_is_not_made_where_it_is_only_read(
    run: Run, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("stopped", "--features.fill", False, code=2)
    assert "features is missing" in capsys.readouterr().err
    assert not (here / "features").exists()
    write_config(here / "nowhere.py", {**config(here), "features": None}, "")
    assert main([str(here / "nowhere.py"), "--pipeline", "extract"]) == 2
    assert "Where are features to be kept?" in capsys.readouterr().err


def test_a_damaged_feature_is_made_again(run: Run, here: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = run("before")
    entry = next((here / "features/latents").rglob("*.safetensors"))
    whole = entry.read_bytes()
    entry.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert losses(run("after")) == losses(before)
    assert "is damaged" in caplog.text
    assert sorted(entry.read_bytes()) == sorted(whole)  # the order of its metadata is any
    entry.write_bytes(whole[:100])
    summary = extract(run)
    assert (summary["damaged"], summary["latents"]["made"]) == (1, 1)  # type: ignore[index]


def test_starts_in_turns_are_all_made_ahead(run: Run, here: Path) -> None:
    dataset = {"num_starts": 2, "num_frames": 3}
    summary = extract(run, dataset=dataset)
    assert summary["entries"]["latents"] == 2 * ROWS  # type: ignore[index]
    reading = run("reading", "--features.fill", False, dataset=dataset, epochs=3)
    assert found(reading) == [1.0] * 6
    anew = run("anew", dataset={**dataset, "num_starts": None})
    assert 0 < sum(found(anew)) < 6  # captions are found, and latents where a start is met again


def test_only_captions_or_only_videos(run: Run, here: Path) -> None:
    plain = losses(run("plain", features=None))
    for kind, other in (("video", "text"), ("text", "video")):
        folder = here / kind
        options = {"folder": str(folder), other: False}
        for name in ("first", "second"):
            torch.testing.assert_close(losses(run(f"{kind}-{name}", features=options)), plain, rtol=1e-6, atol=0)
        assert sorted(path.name for path in folder.iterdir() if path.name in ("latents", "texts")) == [
            "latents" if kind == "video" else "texts"
        ]


def test_a_limit_that_is_too_small_is_said(run: Run, here: Path, caplog: pytest.LogCaptureFixture) -> None:
    size = extract(run)["bytes"]
    shutil.rmtree(here / "features")
    summary = extract(run, "--features.max_gib", size / 2 / 2**30)  # type: ignore[operator]
    assert summary["evicted"] > 0  # type: ignore[operator]
    assert summary["bytes"] <= size / 2  # type: ignore[operator]
    assert "too small for all of them" in caplog.text


def test_unreadable_rows_are_listed(run: Run, here: Path) -> None:
    (here / "videos/2.mp4").write_bytes(b"no video")
    summary = extract(run, "--max_unreadable", 0.5)
    assert summary["unreadable_rows"] == 1
    listed = json.loads((here / "extracted/skipped.jsonl").read_text())
    assert listed["row"] == 2
    assert summary["latents"]["made"] == ROWS - 1  # type: ignore[index]
    assert summary["clips"] == ROWS
    training = run("training", "--max_unreadable", 0.5, "--features.fill", False, batch_size=1)
    assert losses(training).count(0.0) == 1  # of the step that has nothing to learn from


def test_a_run_that_is_resumed_is_the_unbroken_one(run: Run, here: Path) -> None:
    dataset = {"num_starts": None, "num_frames": 3}
    whole = run("whole", features=None, dataset=dataset)
    filled = run("filled", dataset=dataset)
    run("half", "--max-steps", 3, dataset=dataset)
    run("half", "--load", here / "half", dataset=dataset)
    assert losses(here / "half") == losses(filled)
    torch.testing.assert_close(losses(filled), losses(whole), rtol=1e-6, atol=0)


BUCKETS = """
dataset = dict(type="VariableVideoTextDataset", data_path="clips.csv")
bucket_config = {"144p": {1: (1.0, 2), 2: (1.0, 2), 4: (0.7, 1)}}
model = dict(type="STDiT3", depth=1, hidden_size=16, num_heads=2, patch_size=(2, 32, 32))
scheduler = dict(type="rflow")
epochs = 3
lr = 1e-3
ema_decay = 0
num_workers = 1
dtype = "fp32"
without_hooks = ["tensorboard", "loss-plot"]
"""


def test_buckets_with_workers(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from opensora.core.video import write_image

    folder = here / "buckets"
    folder.mkdir()
    rows = ["path,text,num_frames,height,width"]
    for number, (frames, height, width) in enumerate([(3, 144, 256), (6, 256, 144), (3, 200, 200), (1, 150, 250)]):
        video = torch.randint(0, 256, (frames, height, width, 3), dtype=torch.uint8)
        name = f"{number}.png" if frames == 1 else f"{number}.mp4"
        write_image(folder / name, video[0]) if frames == 1 else write_video(folder / name, video, 8)
        rows.append(f"{name},clip {number},{frames},{height},{width}")
    (folder / "clips.csv").write_text("\n".join(rows))
    (folder / "plain.py").write_text(BUCKETS)
    (folder / "kept.py").write_text(BUCKETS + 'features = dict(folder="features")\n')
    monkeypatch.chdir(folder)
    for name, flags in {
        "plain": (),
        "kept": (),
        "extracted": ("--pipeline", "extract", "--extract_epochs", "3"),
    }.items():
        config = "kept" if name == "extracted" else name
        assert main([f"{config}.py", "--run-folder", name, *flags]) == 0, capsys.readouterr().err
    assert main(["kept.py", "--run-folder", "reading", "--features.fill", "False"]) == 0, capsys.readouterr().err
    assert set(found(folder / "reading")) == {1.0}
    assert losses(folder / "reading") == losses(folder / "kept")
    torch.testing.assert_close(losses(folder / "kept"), losses(folder / "plain"), rtol=1e-6, atol=0)
    summary = json.loads((folder / "extracted/summary.json").read_text())
    assert summary["latents"]["made"] == 0  # training had made them


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes to be ended with the test."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate(timeout=20)


def start_extraction(here: Path, name: str, started: list[subprocess.Popen[str]]) -> subprocess.Popen[str]:
    arguments = command_line(
        "opensora-run", here / "config.py", "--pipeline", "extract", "--run-folder", here / name, "--num_workers", 1
    )
    process = subprocess.Popen(arguments, cwd=here, env=environment(), stderr=subprocess.PIPE, text=True)
    started.append(process)
    return process


@pytest.mark.slow
def test_two_extractions_at_once_after_one_that_was_killed(
    run: Run, here: Path, started: list[subprocess.Popen[str]]
) -> None:
    repeated = [f"{index % ROWS}.mp4,a square of size {index}" for index in range(60)]
    (here / "videos/clips.csv").write_text("path,text\n" + "\n".join(repeated) + "\n")
    write_config(here / "config.py", config(here), "A test's config.")
    killed = start_extraction(here, "killed", started)
    while len(list((here / "features").rglob("*.safetensors"))) < 20 and killed.poll() is None:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(20) == -signal.SIGKILL
    both = [start_extraction(here, name, started) for name in ("one", "two")]
    for process in both:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
    summaries = [json.loads((here / name / "summary.json").read_text()) for name in ("one", "two")]
    assert all(summary["damaged"] == 0 for summary in summaries)
    summary = extract(run)
    assert summary["latents"]["made"] == summary["texts"]["made"] == summary["damaged"] == 0  # type: ignore[index]
    assert summary["entries"] == {"latents": ROWS, "texts": 60}


@pytest.mark.slow
def test_two_processes_train_from_one_folder(run: Run, here: Path, command: Command) -> None:
    options = {"adam_eps": 1e-6, "mask_ratios": {"image_head": 0.5}}
    plain = run("plain", features=None, batch_size=4, **options)
    write_config(here / "two.py", config(here, batch_size=2, num_workers=1, **options), "A test's config.")
    done = command("opensora-run", here / "two.py", "--run-folder", here / "two", "--nproc", 2)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(losses(here / "two"), losses(plain), rtol=1e-5, atol=0)
    assert (found(here / "two")[0], found(here / "two")[-1]) == (0, 1)
    reading = run("reading", "--features.fill", False, batch_size=4, **options)
    torch.testing.assert_close(losses(reading), losses(plain), rtol=1e-5, atol=0)
