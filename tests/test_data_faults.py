"""Training on data with broken clips, on balanced batches, and on shards, through the real command."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from runs import Command, losses, tiny_training

from opensora.core.video import write_image, write_video


def broken_files(folder: Path, good: Path) -> dict[str, str]:
    """A file of each unusable kind, and what is said of it."""
    whole = good.read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    (folder / "text.mp4").write_text("path,text\n" * 30)
    (folder / "empty.mp4").write_bytes(b"")
    write_image(folder / "picture.png", torch.zeros(16, 16, 3, dtype=torch.uint8))
    (folder / "image.mp4").write_bytes((folder / "picture.png").read_bytes())
    with av.open(str(folder / "frameless.mp4"), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.height, stream.width, stream.pix_fmt = 16, 16, "yuv420p"
        container.start_encoding()
    return {
        "missing.mp4": "missing.mp4 is missing",
        "truncated.mp4": "truncated",
        "text.mp4": "it holds text",
        "empty.mp4": "the file is empty",
        "image.mp4": "is an image (png), not a video",
        "frameless.mp4": "has no video frames",
    }


def test_one_clip_in_twenty_broken_in_six_ways_is_listed_and_the_run_goes_on(
    command: Command, clips: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    good = [clips.with_name(f"clip_{index % 24:02d}.mp4") for index in range(114)]
    broken = broken_files(tmp_path, good[0])
    rows = [f"{path},a square" for path in (*good, *(tmp_path / name for name in broken))]
    np.random.default_rng(0).shuffle(rows)
    (tmp_path / "mixed.csv").write_text("\n".join(["path,text", *rows]))
    config = write(tiny_training(tmp_path / "mixed.csv", epochs=1, max_steps=None, num_workers=1))
    done = command("opensora-run", config, "--run-folder", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "run")) == 15
    listed = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert len(listed) == len(broken)  # 5 % are allowed unless the config says otherwise
    for name, reason in broken.items():
        row = next(number for number, each in enumerate(rows) if name in each)
        (record,) = [each for each in listed if each["row"] == row]
        assert reason in record["reason"]

    first = write(tiny_training(tmp_path / "mixed.csv", max_unreadable=0, epochs=1, max_steps=None), "first.py")
    done = command("opensora-run", first, "--run-folder", tmp_path / "first")
    assert done.returncode == 2
    assert "1 of 120 rows can't be read, more than max_unreadable=0 allows" in done.stderr


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("path,text,num_frames,height\na.mp4,x,9,144\n", 'no column "width"'),
        ("path,text,num_frames,height,width\n", "has no rows"),
        (
            "path,text,num_frames,height,width\na.mp4,x,NaN,144,256\n",
            "num_frames is 'NaN', not a whole number in data row 1",
        ),
        ("path,text,num_frames,height,width\na.mp4,x,9,144,256\nb.mp4,x,0,144,256\n", "num_frames is 0 in data row 2"),
        (
            "path,text,num_frames,height,width\na.mp4,x,9,-144,256\n",
            "height is -144 in data row 1; it must be at least 1",
        ),
        ("path,text,num_frames,height,width\na.mp4,x,9.5,144,256\n", "num_frames is '9.5', not a whole number"),
    ],
    ids=["column missing", "empty", "NaN", "no frames", "negative", "half a frame"],
)
def test_tables_that_are_wrong_are_refused(table: str, message: str, tmp_path: Path, capsys) -> None:
    from opensora.core.commands.opensora_run import main

    (tmp_path / "clips.csv").write_text(table)
    (tmp_path / "train.py").write_text(bucket_config(tmp_path / "clips.csv"))
    assert main([str(tmp_path / "train.py"), "--outputs", str(tmp_path / "outputs")]) == 2
    assert message in capsys.readouterr().err


def bucket_config(table: Path) -> str:
    return f"""
dataset = dict(type="VariableVideoTextDataset", data_path="{table}")
bucket_config = {{"144p": {{1: (1.0, 3), 4: (1.0, 2)}}}}
model = dict(type="STDiT3", depth=1, hidden_size=16, num_heads=2, patch_size=(4, 32, 32))
scheduler = dict(type="rflow")
balance = "tokens"
batch_size = None
epochs = 2
ema_decay = 0
num_workers = 0
without_hooks = ["tensorboard", "loss-plot"]
"""


@pytest.mark.slow
def test_balanced_batches_are_trained_on_by_two_processes_and_gone_on_with_by_one(
    command: Command, tmp_path: Path
) -> None:
    rows = ["path,text,num_frames,height,width"]
    generator = torch.Generator().manual_seed(0)
    for number, (height, width) in enumerate([(144, 256), (256, 144), (192, 192)] * 3):
        video = torch.randint(0, 256, (6, height, width, 3), generator=generator, dtype=torch.uint8)
        write_video(tmp_path / f"{number}.mp4", video, 8)
        rows.append(f"{number}.mp4,clip {number},6,{height},{width}")
    (tmp_path / "clips.csv").write_text("\n".join(rows))
    (tmp_path / "train.py").write_text(bucket_config(tmp_path / "clips.csv"))
    done = command("opensora-run", "train.py", "--run-folder", "run", "--nproc", 2, "--max-steps", 2)
    assert done.returncode == 0, done.stderr
    waiting = [json.loads(line) for line in (tmp_path / "run/waiting.jsonl").read_text().splitlines()]
    assert {record["processes"] for record in waiting} == {2}
    assert all(len(record["rows"]) == 1 for record in waiting)  # nine rows, of nearly one cost, for two
    begun = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    done = command(
        "opensora-run", "run/config.py", "--load", "run", "--run-folder", "run", "--resume", "True", "--max-steps", 90
    )
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert records[: len(begun)] == begun
    assert records[-1]["epoch"] == 2
    assert records[-1]["samples"] == 18  # alone, the process had to leave out nothing


@pytest.mark.slow
def test_shards_are_trained_on_and_a_resumed_run_goes_on_bit_for_bit(
    command: Command, clips: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    for shard in range(3):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for index in range(8 * shard, 8 * shard + 8):
                for ending, content in (
                    ("mp4", clips.with_name(f"clip_{index:02d}.mp4").read_bytes()),
                    ("txt", f"a square of size {index % 6}".encode()),
                ):
                    info = tarfile.TarInfo(f"{index:04}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    pytest.importorskip("webdataset")
    dataset = {"type": "WebDataset", "data_path": str(tmp_path / "{0..2}.tar"), "num_frames": 4, "image_size": (16, 16)}
    values = tiny_training(clips, dataset=dataset, max_steps=8, num_workers=1)
    config = write(values)
    for arguments in (("whole",), ("half", "--max-steps", 3), ("half", "--load", tmp_path / "half")):
        done = command("opensora-run", config, "--run-folder", tmp_path / arguments[0], *arguments[1:])
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "half") == losses(tmp_path / "whole")
