"""Every config that ships composes, and so do copies of Open-Sora's own, in the styles of its three versions."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from opensora.core.commands.opensora_run import main
from opensora.core.config.evaluate import evaluate
from opensora.core.config.names import iter_configs, resolve
from opensora.core.config.write import write_config

ORIGINALS = sorted(Path(__file__).with_name("originals").glob("*.py"))
SHIPPED = [config for config in iter_configs() if config.distribution == "opensora-models"]
TRAINING = [
    "dit/train/16x256x256",
    "latte/train/16x256x256",
    "opensora/train/16x256x256",
    "opensora-v1-1/train/stage1",
    "opensora-v1-2/train/stage3",
    "pixart/train/1x512x512",
]


def dry_run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    code = main([*map(str, arguments), "--dry-run"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return printed.out


@pytest.mark.parametrize("name", [config.name for config in SHIPPED])
def test_a_shipped_config_composes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "parameters" in dry_run(capsys, name)


@pytest.mark.parametrize("path", ORIGINALS, ids=lambda path: path.stem)
def test_a_config_of_open_sora_composes(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "parameters" in dry_run(capsys, path)


@pytest.mark.parametrize("name", TRAINING)
def test_older_keys_change_nothing_and_are_named(name, tmp_path, capsys, caplog) -> None:
    values = dict(evaluate(resolve(name)).values)
    values["model"] = {**values["model"], "enable_flash_attn": True, "enable_layernorm_kernel": True}
    values |= {"plugin": "zero2", "sp_size": 1, "num_bucket_build_workers": 16, "wandb": False, "load": None}
    write_config(tmp_path / "old.py", values, "")
    with caplog.at_level(logging.WARNING, logger="opensora"):
        old = dry_run(capsys, tmp_path / "old.py")
    (note,) = [record.getMessage() for record in caplog.records if "Keys of an older config" in record.getMessage()]
    assert "model.enable_flash_attn" in note
    assert "num_bucket_build_workers" in note
    assert old == dry_run(capsys, name)


def test_a_flat_config_trains_on_the_table_of_the_flag(tmp_path, capsys, caplog) -> None:
    (tmp_path / "clips.csv").write_text("path,text\na.mp4,a wave\nb.mp4,a cat\n")
    with caplog.at_level(logging.WARNING, logger="opensora"):
        printed = dry_run(capsys, ORIGINALS[0].with_name("v1_0_train.py"), "--data-path", tmp_path / "clips.csv")
    assert "VideoTextDataset: 2 samples" in printed
    assert "16 x 256 x 256" in printed
    assert "A flat config of Open-Sora 1.0: data_path, num_frames, frame_interval, image_size moved into dataset." in [
        record.getMessage() for record in caplog.records
    ]


def test_a_flat_config_with_a_root_is_refused(tmp_path, capsys) -> None:
    text = ORIGINALS[0].with_name("v1_0_train.py").read_text(encoding="utf-8").replace("root = None", 'root = "/data"')
    (tmp_path / "rooted.py").write_text(text)
    assert main([str(tmp_path / "rooted.py"), "--dry-run"]) == 2
    assert "root = '/data': paths of a table are relative to" in capsys.readouterr().err


def test_what_needs_colossalai_composes_without_it_and_says_so_when_it_is_run(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["opensora/train/360x512x512"]) == 2
    printed = capsys.readouterr().err
    assert "needs ColossalAI, which is not installed" in printed
    assert 'dict(type="fsdp", sp_size=2)' in printed
    assert not list(tmp_path.iterdir())


def test_references_of_the_shipped_config_are_to_be_brought(tmp_path, monkeypatch, capsys) -> None:
    name = "opensora-v1-1/inference/sample-ref"
    printed = dry_run(capsys, name)
    assert "starts from  cat.png: mask strategy 0" in printed
    assert "rounds       2, each with 4 frames of the one before: 28 frames" in printed
    monkeypatch.chdir(tmp_path)
    assert main([name]) == 2
    assert "cat.png is missing" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_published_weights_of_1_1_keep_their_order_of_norm_and_rotation(caplog, capsys) -> None:
    with caplog.at_level(logging.WARNING, logger="opensora"):
        dry_run(capsys, ORIGINALS[0].with_name("v1_1_sample.py"))
    assert any("model.qk_norm_legacy=True added" in record.getMessage() for record in caplog.records)
    assert any(
        "prompts/t2v_samples.txt (a list of our own) is used" in record.getMessage() for record in caplog.records
    )
