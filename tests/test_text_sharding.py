"""A text encoder whose weights are spread over processes gives what a whole one gives."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Command, environment, losses, tiny_training
from torch.testing import assert_close
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from opensora.core.commands.opensora_run import main


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 that knows a few words, with random weights; its sizes are odd, so that shares differ."""
    folder = tmp_path_factory.mktemp("t5")
    words = [
        (word, 0.0) for word in ("<pad>", "</s>", "<unk>", "▁a", "▁red", "▁sea", "▁wave", "▁square", "▁of", "▁size")
    ]
    T5Tokenizer(vocab=words, extra_ids=0).save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=13, d_model=18, d_kv=5, d_ff=27, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu"
    )
    T5EncoderModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def results(t5: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes got."""
    folder = tmp_path_factory.mktemp("results")
    worker = Path(__file__).parent / "workers" / "share_text.py"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", worker, t5, folder],
        env={**environment(), "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def test_each_process_encodes_what_a_whole_encoder_would(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert_close(result["embedding"], result["expected"], rtol=1e-6, atol=1e-6)
        assert_close(result["embedding of a batch"], result["expected of a batch"], rtol=1e-6, atol=1e-6)
    assert [len(result["embedding"]) for result in results] == [2, 5]


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_each_process_holds_half(dtype: str, results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result[dtype]["is dealt out"]
        assert result[dtype]["own"] == pytest.approx(result[dtype]["whole"] / 2, rel=0.1)
    assert sum(result[dtype]["own"] for result in results) == results[0][dtype]["whole"]
    assert all(result["own afterwards"] == result["fp32"]["own"] for result in results)


def test_what_overflows_in_fp16_stays_float32(results: list[dict[str, Any]]) -> None:
    assert results[0]["fp16"]["dtypes"] == ["torch.float16", "torch.float32"]
    assert results[0]["fp32"]["dtypes"] == ["torch.float32"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"preview_every": 5},
            "text_encoder.shard needs all processes to encode together, and the hook previews encodes",
        ),
        ({"hooks": [{"type": "validation"}]}, "and the hook validation encodes in one alone"),
        ({"device": "cpu"}, "Leave text_encoder.device out"),
    ],
)
def test_what_needs_an_encoder_of_its_own_is_refused(
    changes: dict[str, Any], message: str, t5: Path, clips: Path, write: Callable[..., Path], capsys: Any
) -> None:
    encoder = {"type": "t5", "from_pretrained": str(t5), "model_max_length": 6, "shard": True}
    if device := changes.pop("device", None):
        encoder["device"] = device
    assert main([str(write(tiny_training(clips, text_encoder=encoder, **changes))), "--dry-run"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("cache", [1.0, 0.0])
def test_training_is_the_same(
    cache: float, t5: Path, command: Command, clips: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    found = []
    for shard in (False, True):
        encoder = {"type": "t5", "from_pretrained": str(t5), "model_max_length": 6, "shard": shard}
        config = write(tiny_training(clips, text_encoder=encoder, text_cache_gib=cache, batch_size=4, max_steps=6))
        done = command("opensora-run", config, "--run-folder", tmp_path / str(shard), "--nproc", 2)
        assert done.returncode == 0, done.stderr
        found.append(losses(tmp_path / str(shard)))
    assert found[0] == pytest.approx(found[1], rel=1e-6)
