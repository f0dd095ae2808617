"""What becomes of rows, by the real command: fates, summaries, tables, and what can't be trained at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import torch

from opensora.core.commands.opensora import main
from opensora.core.video import write_image, write_video

CONFIG = """
dataset = dict(type="VariableVideoTextDataset", data_path="clips.csv")
bucket_config = {"144p": {1: (1.0, 3), 4: (1.0, 2), 8: (1.0, 1), 20: (0.0, None)}, "256": {4: ((1.0, 1.0), 2)}}
model = dict(type="DiT", depth=1, hidden_size=16, num_heads=2)
scheduler = dict(type="rflow")
epochs = 3
"""
HEADER = "path,text,num_frames,height,width,fps"
ROWS = """\
a.mp4,x,9,144,256,24
b.mp4,x,3,144,256,24
c.png,x,1,20,20,
d.png,x,1,150,250,
e.mp4,x,30,300,300,30.5
f.mp4,x,30,144,256,24
g.png,x,1,300,300,"""

pytest.importorskip("opensora.models")
pytest.importorskip("opensora.schedulers")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "train.py").write_text(CONFIG)
    (tmp_path / "clips.csv").write_text(f"{HEADER}\n{ROWS}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan(*arguments: object, code: int = 0) -> None:
    assert main(["data", "plan", *map(str, arguments)]) == code


def test_each_row_has_a_fate_and_what_is_asked_and_used(folder, capsys):
    plan("train.py", "--output", "plan.csv")
    printed = capsys.readouterr().out
    assert "used         4 rows" in printed
    assert "1 longer than a length of probability 0" in printed
    assert "enlarged     1 of them, by up to 1.01 times" in printed
    assert "steps        4 in epoch 0" in printed
    rows = pl.read_csv("plan.csv")
    assert rows["fate"].to_list() == ["used", "dropped", "dropped", "used", "used", "dropped", "used"]
    a, b, c, _, e, f, _ = rows.iter_rows(named=True)
    assert (a["resolution"], a["num_frames"], a["used_num_frames"], a["used_height"], a["used_width"]) == (
        *("144p", 9, 8),
        *(144, 256),
    )
    assert (e["resolution"], e["used_num_frames"], e["fps"], e["used_fps"], e["scale"] < 1) == (
        "256",
        4,
        30.5,
        30,
        True,
    )
    assert b["reason"].startswith("too short")
    assert c["reason"].startswith("too small")
    assert f["reason"].startswith("longer than a length of probability 0")
    assert b["used_num_frames"] is None


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_other_tables(folder, ending):
    plan("train.py", "--output", f"plan.{ending}")
    read = pl.read_parquet if ending == "parquet" else pl.read_ndjson
    assert read(f"plan.{ending}")["path"].to_list() == [line[:5] for line in ROWS.splitlines()]
    plan("train.py", "--output", "plan.txt", code=2)


def test_a_row_that_draws_turn_away_may_be_taken_in_another_epoch(folder, capsys):
    fates = set()
    for epoch in range(12):
        buckets = '{"144p": {1: (0.5, 1), 8: (1.0, 1)}}'
        plan("train.py", "--bucket_config", buckets, "--epoch", epoch, "--output", "p.jsonl")
        rows = [json.loads(line) for line in Path("p.jsonl").read_text().splitlines()]
        fates.add((rows[3]["fate"], rows[3]["reason"]))
        if fates == {("used", None), ("dropped", "turned away by the probabilities, in this epoch")}:
            return
    raise AssertionError(fates)


def test_rows_that_wait_for_balance_are_told(folder, capsys):
    rows = "\n".join(f"{number}.mp4,x,9,144,256,24" for number in range(7))
    Path("clips.csv").write_text(f"{HEADER}\n{rows}\n")
    plan("train.py", "--balance", "tokens", "--nproc", "3", "--output", "plan.csv")
    fates = pl.read_csv("plan.csv")["fate"].to_list()
    assert sorted(fates) == ["used"] * 6 + ["waits"]
    printed = capsys.readouterr().out
    assert "waits        1 rows" in printed
    assert "steps        2 in epoch 0, each of 1 micro-batches on each of 3 processes" in printed


def test_values_that_cannot_be_used_are_listed_with_their_rows(folder, capsys):
    Path("clips.csv").write_text(f"{HEADER}\na.mp4,x,nine,144,256,24\nb.mp4,x,9,144,256,\n,x,0,144,,24\n")
    plan("train.py", "--output", "plan.jsonl", code=2)
    printed = capsys.readouterr()
    assert "unreadable   2 rows" in printed.out
    assert "clips.csv: path is empty in data row 3" in printed.err
    rows = [json.loads(line) for line in Path("plan.jsonl").read_text().splitlines()]
    assert {(row["row"], row["reason"]) for row in rows} == {
        (0, "num_frames is 'nine', not a whole number"),
        (2, "path is empty"),
        (2, "num_frames less than 1"),
        (2, "width is empty"),
    }


@pytest.mark.parametrize(
    ("buckets", "message"),
    [
        (
            '{"480p": {4: (1.0, 1)}}',
            r'The largest row has 300 x 300 pixels, less than 0.8 of 480p\'s: add "240p": {4: (1.0, 1)}',
        ),
        (
            '{"144p": {51: (1.0, 1)}}',
            'has 30 frames; at least 52 frames are asked for: add 29: (1.0, 1) to bucket_config["144p"]',
        ),
        ('{"144p": {8: (0.0, None)}}', 'bucket_config["144p"][8] has probability 0, which keeps out 3 longer ones'),
        (
            '{"144p": {8: (1e-9, 1)}}',
            'against all that would fit (3): raise the probability of bucket_config["144p"][8]',
        ),
    ],
    ids=["small", "short", "stopped", "unlikely"],
)
def test_buckets_that_nothing_fits_are_an_error_with_the_smallest_change_in_training_too(
    folder, capsys, buckets, message
):
    from opensora.core.commands.opensora_run import main as run

    plan("train.py", "--bucket_config", buckets, code=2)
    printed = capsys.readouterr()
    assert "used         0 rows" in printed.out
    assert message.replace("\\'", "'") in printed.err
    assert run(["train.py", "--bucket_config", buckets]) == 2
    assert message.replace("\\'", "'") in capsys.readouterr().err


def test_images_alone_are_told_to_have_a_length_of_one(folder, capsys):
    Path("clips.csv").write_text(f"{HEADER}\nd.png,x,1,150,250,\n")
    plan("train.py", "--bucket_config", '{"144p": {8: (1.0, 1)}}', code=2)
    assert 'an image: add 1: (1.0, 1) to bucket_config["144p"]' in capsys.readouterr().err


def test_less_than_a_step_is_an_error_with_the_change(folder, capsys):
    plan("train.py", "--epochs", "1", "--nproc", "2", "--accumulation_steps", "3", code=2)
    assert (
        "give 4 batches; a step takes 6 (3 on each of 2 processes). Lower accumulation_steps to 2 or set epochs = 2"
        in (capsys.readouterr().err)
    )


def test_a_dataset_of_one_size_and_what_probing_sees(folder, capsys):
    write_video("a.mp4", torch.zeros(9, 32, 48, 3, dtype=torch.uint8), 12)
    write_video("b.mp4", torch.zeros(3, 32, 48, 3, dtype=torch.uint8), 12)
    write_image("d.png", torch.zeros(8, 8, 3, dtype=torch.uint8))
    Path("e.mp4").write_text("path,text\n" * 30)
    Path("notes.txt").write_text("x")
    Path("fixed.csv").write_text("path,text\na.mp4,x\nb.mp4,x\nd.png,x\ne.mp4,x\ngone.mp4,x\nnotes.txt,x\n")
    dataset = 'dict(type="VideoTextDataset", data_path="fixed.csv", num_frames=4, image_size=(16, 16))'
    Path("fixed.py").write_text(
        f'dataset = {dataset}\nmodel = dict(type="DiT")\nscheduler = dict(type="rflow")\nepochs = 9\n'
    )
    plan("fixed.py")
    assert "4 used if it is long enough: the table has no num_frames (see --probe)" in capsys.readouterr().out
    plan("fixed.py", "--probe", "--output", "plan.csv")
    assert "training stops when more than 5% of the rows can't be read" in capsys.readouterr().out
    rows = list(pl.read_csv("plan.csv").iter_rows(named=True))
    assert [row["fate"] for row in rows] == ["used", "dropped", "used", "dropped", "dropped", "dropped"]
    assert (rows[0]["num_frames"], rows[0]["used_num_frames"], rows[0]["fps"], rows[0]["scale"]) == (9, 4, 12, 0.5)
    assert rows[2]["used_fps"] == 120
    for row, reason in zip(
        rows[1:], ("too short", None, "it holds text", "is missing", "neither a video"), strict=True
    ):
        assert (reason or "") in (row["reason"] or "")


def test_what_has_no_rows_is_refused(folder, capsys):
    Path("sample.py").write_text(
        'model = dict(type="DiT")\nscheduler = dict(type="rflow")\nimage_size = (32, 32)\nnum_frames = 1\nprompt = ["a"]\n'
    )
    plan("sample.py", code=2)
    assert "is no training with a dataset" in capsys.readouterr().err
    plan("train.py", "--nproc", "0", code=2)
    assert "--nproc: must be a whole number from 1" in capsys.readouterr().err


def test_help_imports_nothing_heavy():
    code = "import sys; from opensora.core.commands.opensora import main\ntry: main(['data', 'plan', '--help'])\n"
    code += "except SystemExit: pass\nprint(sorted({'torch', 'polars', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "--probe" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
