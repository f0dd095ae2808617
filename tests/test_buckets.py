"""Training on clips of different sizes and lengths, sorted into buckets, through the real command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from runs import Command, losses

from opensora.core.video import write_image, write_video

CONFIG = """
dataset = dict(type="VariableVideoTextDataset", data_path="clips.csv")
bucket_config = {"144p": {1: (1.0, 3), 4: (1.0, 2), 8: (1.0, 1)}, "256": {4: ((0.5, 0.5), 2)}}
model = dict(type="STDiT3", depth=1, hidden_size=16, num_heads=2, patch_size=(4, 32, 32))
scheduler = dict(type="rflow")
batch_size = None
epochs = 4
lr = 1e-3
ema_decay = 0
num_workers = 1
seed = 3
without_hooks = ["tensorboard", "loss-plot"]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("buckets")
    generator = torch.Generator().manual_seed(0)
    rows = ["path,text,num_frames,height,width"]
    for number, (frames, height, width) in enumerate(
        [(6, 144, 256), (12, 256, 144), (5, 200, 200), (9, 256, 256), (3, 144, 256)]
    ):
        video = torch.randint(0, 256, (frames, height, width, 3), generator=generator, dtype=torch.uint8)
        write_video(folder / f"{number}.mp4", video, 8)
        rows.append(f"{number}.mp4,clip {number},{frames},{height},{width}")
    for number, (height, width) in enumerate([(150, 250), (300, 200), (20, 20)]):
        write_image(
            folder / f"{number}.png", torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
        )
        rows.append(f"{number}.png,image {number},1,{height},{width}")
    (folder / "clips.csv").write_text("\n".join(rows))
    (folder / "config.py").write_text(CONFIG)
    return folder


def run(run_in: Command, folder: Path, *arguments: object, code: int = 0):
    done = run_in(folder, "opensora-run", *arguments)
    assert done.returncode == code, done.stderr
    return done


def test_each_fitting_clip_is_seen_and_a_resumed_run_goes_on_bit_for_bit(folder: Path, run_in: Command) -> None:
    run(run_in, folder, "config.py", "--run-folder", "whole")
    whole = losses(folder / "whole")
    last = json.loads((folder / "whole/metrics.jsonl").read_text().splitlines()[-1])
    assert last["epoch"] > 3
    assert last["samples"] >= 3 * 6  # all but the short clip and the tiny image
    run(run_in, folder, "config.py", "--run-folder", "half", "--max-steps", "5")
    run(run_in, folder, "config.py", "--load", "half", "--run-folder", "half", "--resume", "True")
    assert losses(folder / "half") == whole


def test_previews_have_the_first_batchs_size(folder: Path, run_in: Command) -> None:
    run(run_in, folder, "config.py", "--run-folder", "previews", "--max-steps", "2", "--preview_every", "2")
    assert (folder / "previews/previews/step-000002.png").is_file()


def test_a_dry_run_tells_of_the_buckets_and_the_rows_used(folder: Path, run_in: Command) -> None:
    printed = run(run_in, folder, "config.py", "--dry-run").stdout
    assert "buckets      91: from" in printed
    assert "of the 8 samples" in printed


def test_data_that_fit_no_bucket_are_an_error(folder: Path, run_in: Command) -> None:
    (folder / "large.py").write_text(CONFIG.replace('"144p"', '"1080p"').replace('"256"', '"720p"'))
    failed = run(run_in, folder, "large.py", code=2)
    assert "None of the 8 rows falls into a bucket in epoch 0" in failed.stderr


def test_a_model_of_one_size_is_refused(folder: Path, run_in: Command) -> None:
    (folder / "fixed.py").write_text(CONFIG.replace('"STDiT3"', '"PixArt"'))
    failed = run(run_in, folder, "fixed.py", code=2)
    assert "PixArt" in failed.stderr


def test_buckets_without_use_are_said(folder: Path, run_in: Command) -> None:
    options = 'data_path="clips.csv", num_frames=4, image_size=(32, 32)'
    text = CONFIG.replace("VariableVideoTextDataset", "VideoTextDataset").replace('data_path="clips.csv"', options)
    (folder / "one-size.py").write_text(text)
    printed = run(run_in, folder, "one-size.py", "--dry-run")
    assert "bucket_config is without effect" in printed.stderr
