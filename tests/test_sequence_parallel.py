"""Processes that share the tokens of each sample learn and make what one process does, and each holds a part alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Command, environment, losses, tiny_training, weights
from safetensors.torch import save_file

from opensora.core.commands.opensora_run import main
from opensora.core.components import build
from opensora.core.video import read_video

WORKER = Path(__file__).parent / "workers" / "share_sequences.py"
TRAINED = ("STDiT3", "STDiT2", "STDiT", "Latte", "PixArt", "DiT")
VARIANTS = (
    "STDiT3 checkpointed",
    "STDiT3 image",
    "LatteT2V",
    "PixArt checkpointed",
    "PixArtMS",
    "PixArtSigma",
    "Rotating",
)
Results = list[dict[str, dict[str, Any]]]


def share(folder: Path, processes: int, *arguments: object) -> Results:
    """What each process wrote."""
    launch = [f"--nproc-per-node={processes}", "--standalone", "--local-addr=127.0.0.1"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *launch, WORKER, folder, *map(str, arguments)],
        env={**environment(), "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return share(tmp_path_factory.mktemp("pair"), 2, "ddp", 2)


def assert_agrees(result: dict[str, Any]) -> None:
    for name in ("losses", "norms"):
        alone, shared = map(torch.tensor, result[name])
        torch.testing.assert_close(shared, alone, rtol=1e-5, atol=0)
    assert max(result["output"], result["gradients"], result["sampled"]) < 1e-5
    assert result["names kept"]


@pytest.mark.parametrize("case", [*TRAINED, *VARIANTS])
def test_two_processes_that_share_samples_do_what_one_does(case: str, pair: Results) -> None:
    for results in pair:
        assert_agrees(results[case])
    assert len(pair[0][case]["losses"][0]) == (20 if case in TRAINED else 4)


def test_a_process_holds_its_share_of_the_positions_and_attends_in_its_share_of_the_frames(pair: Results) -> None:
    # 4 videos of 3 frames of 15 positions, of which the processes have 8 and 7; 12 frames are 6 and 6.
    for results, positions in zip(pair, (8, 7), strict=True):
        shapes = results["STDiT3"]["shapes"]
        assert shapes["spatial_blocks.1.attn.qkv"] == [6, 15, 24]
        assert shapes["temporal_blocks.1.attn.qkv"] == [4 * positions, 3, 24]
        for half in ("spatial", "temporal"):
            assert shapes[f"{half}_blocks.1.mlp"] == [4, 3, positions, 24]


def test_blocks_that_attend_in_turns_are_told_apart(pair: Results) -> None:
    for results, positions in zip(pair, (5, 4), strict=True):
        shapes = results["Latte"]["shapes"]
        assert shapes["blocks.0.attn.qkv"] == [6, 9, 24]
        assert shapes["blocks.1.attn.qkv"] == [4 * positions, 3, 24]


def test_a_process_holds_its_share_of_the_tokens_and_attends_with_its_share_of_the_heads(pair: Results) -> None:
    # 3 frames of 9 positions are 27 tokens: 14 and 13. 3 heads are 2 and 1.
    for results, tokens, heads in zip(pair, (14, 13), (2, 1), strict=True):
        assert results["DiT"]["shapes"]["blocks.1.attn.qkv"] == [4, tokens, 24]
        assert results["DiT"]["shapes"]["blocks.1.mlp"] == [4, tokens, 24]
        assert results["DiT"]["kernels"] == [[4, heads, 27, 8]] * 2


def test_compressed_attention_gets_whole_images(pair: Results) -> None:
    for results, tokens in zip(pair, (8, 7), strict=True):
        shapes, kernels = results["PixArtSigma"]["shapes"], results["PixArtSigma"]["kernels"]
        assert shapes["blocks.0.attn.qkv"] == [4, tokens, 24]
        assert shapes["blocks.1.attn.qkv"] == [2, 15, 24]
        assert [kernel for kernel in kernels if kernel[2] == 15] == [[4, 2, 15, 6], [2, 4, 15, 6]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("accelerator", "sp_size", "cases"),
    [
        ("ddp", 4, ("STDiT3", "PixArt", "STDiT3 image")),
        ("ddp", 2, ("STDiT3", "STDiT", "DiT")),
        ("fsdp", 2, ("STDiT3", "PixArt checkpointed")),
    ],
    ids=["4", "2 x ddp", "2 x fsdp"],
)
def test_four_processes_do_what_one_does(
    accelerator: str, sp_size: int, cases: tuple[str, ...], tmp_path: Path
) -> None:
    for results in share(tmp_path, 4, accelerator, sp_size, *cases):
        for case in cases:
            assert_agrees(results[case])


def shared_training(clips: Path, **changes: object) -> dict[str, object]:
    # eps: see test_equivalence
    options = {"mask_ratios": {"image_head": 0.3, "random": 0.3}, "adam_eps": 1e-6, "max_unreadable": 0.1}
    return tiny_training(clips, **options, grad_checkpoint=True, **changes)


def test_a_run_shares_samples_previews_and_lists(
    command: Command, clips: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    broken = clips.parent / "broken.csv"
    lines = clips.read_text().splitlines()
    broken.write_text("\n".join([*lines[:5], "nowhere.mp4,a square of size 1", *lines[6:]]) + "\n")
    changes = {"preview_every": 6, "preview_prompts": ["a square of size 2"]}
    alone = write(shared_training(broken, **changes), "alone.py")
    both = write(shared_training(broken, **changes, accelerator={"type": "ddp", "sp_size": 2}), "both.py")
    assert main([str(alone), "--run-folder", str(tmp_path / "alone")]) == 0
    done = command("opensora-run", both, "--run-folder", tmp_path / "both", "--nproc", 2)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(losses(tmp_path / "both"), losses(tmp_path / "alone"), rtol=1e-5, atol=0)
    for key, tensor in weights(tmp_path / "alone").items():
        torch.testing.assert_close(weights(tmp_path / "both")[key], tensor, rtol=1e-5, atol=1e-5)
    assert len((tmp_path / "both" / "skipped.jsonl").read_text().splitlines()) == 1
    pictures = [sorted((tmp_path / name / "previews").iterdir()) for name in ("alone", "both")]
    assert [path.name for path in pictures[0]] == [path.name for path in pictures[1]] != []


@pytest.fixture
def sampling(tmp_path: Path) -> dict[str, Any]:
    """Of a model that doesn't make nothing, as fresh ones do."""
    model: dict[str, Any] = dict(tiny_training(Path())["model"])  # type: ignore[call-overload]
    module = build("models", model, latent_channels=3, latent_size=(4, 16, 16), text_width=64, text_length=16)
    generator = torch.Generator().manual_seed(0)
    state = {key: 0.2 * torch.randn(value.shape, generator=generator) for key, value in module.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    return {
        "model": {**model, "from_pretrained": str(tmp_path / "model.safetensors")},
        "scheduler": {"type": "rflow", "num_sampling_steps": 6, "cfg_scale": 2.0},
        "text_encoder": {"type": "hashed-words", "width": 64, "model_max_length": 16},
        "prompt": ["a", "a square of size two", "b"],
        "num_frames": 4,
        "image_size": (16, 16),
        "fps": 8,
        "dtype": "fp32",
        "crf": 0,
        "batch_size": 2,
    }


def videos(folder: Path) -> torch.Tensor:
    return torch.stack([read_video(path)[0] for path in sorted(folder.glob("*.mp4"))]).int()


@pytest.mark.parametrize(
    "changes",
    [
        {"loop": 2, "preview": 3},
        pytest.param({"hooks": [{"type": "pyramid-broadcast"}]}, marks=pytest.mark.slow),
        pytest.param({"hooks": [{"type": "step-cache", "tolerance": 0.2}]}, marks=pytest.mark.slow),
    ],
    ids=["rounds", "pyramid-broadcast", "step-cache"],
)
def test_processes_make_one_video_together(
    changes: dict[str, Any], sampling: dict[str, Any], command: Command, write: Callable[..., Path], tmp_path: Path
) -> None:
    alone = write({**sampling, **changes, "save_dir": str(tmp_path / "alone")}, "alone.py")
    both = {**sampling, **changes, "save_dir": str(tmp_path / "both"), "accelerator": {"type": "ddp", "sp_size": 2}}
    assert main([str(alone)]) == 0
    done = command("opensora-run", write(both, "both.py"), "--nproc", 2)
    assert done.returncode == 0, done.stderr
    assert len(videos(tmp_path / "alone")) == 3
    apart = (videos(tmp_path / "both") - videos(tmp_path / "alone")).abs()
    assert apart.max() <= 2  # the last digit of a sum can move a pixel by a level
    assert apart.float().mean() < 0.01
    names = [sorted(path.name for path in (tmp_path / name).rglob("*.*")) for name in ("alone", "both")]
    assert names[0] == names[1]
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("alone", "both")]
    for summary in summaries:
        for passing in ("samples", "seconds", "seconds_by_phase", "seams"):
            summary.pop(passing, None)
    assert summaries[0] == summaries[1]
    assert summaries[0]["saved"] == 3
