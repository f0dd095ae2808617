"""Transformers and autoencoders of diffusers in this project's pipelines: trained, resumed and sampled by the commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from runs import Command, losses, tiny_training, weights
from safetensors.torch import load_file

from opensora.core.components import build
from opensora.core.video import write_video
from opensora.core.weights import load_weights

SMALL: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2}
BLOCKS = (8, 8, 8, 8)
PAIRS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "CogVideoXTransformer3DModel": (
        {"attention_head_dim": 16, "time_embed_dim": 8, "use_rotary_positional_embeddings": True},
        "AutoencoderKLCogVideoX",
        {
            "block_out_channels": BLOCKS,
            "down_block_types": ("CogVideoXDownBlock3D",) * 4,
            "up_block_types": ("CogVideoXUpBlock3D",) * 4,
            "layers_per_block": 1,
            "latent_channels": 4,
            "norm_num_groups": 2,
        },
    ),
    "WanTransformer3DModel": (
        {"ffn_dim": 32, "freq_dim": 16},
        "AutoencoderKLWan",
        {
            "base_dim": 4,
            "z_dim": 4,
            "dim_mult": [1, 1, 1, 1],
            "num_res_blocks": 1,
            "latents_mean": [0.0] * 4,
            "latents_std": [1.0] * 4,
        },
    ),
    "LTXVideoTransformer3DModel": (
        {"cross_attention_dim": 24},
        "AutoencoderKLLTXVideo",
        {
            "latent_channels": 8,
            "block_out_channels": BLOCKS,
            "decoder_block_out_channels": BLOCKS,
            "layers_per_block": (1,) * 5,
            "decoder_layers_per_block": (1,) * 5,
            "spatio_temporal_scaling": (True, True, False, False),
            "decoder_spatio_temporal_scaling": (True, True, False, False),
            "patch_size": 2,
        },
    ),
}
NUM_FRAMES, SIDE = 9, 32


@pytest.fixture(scope="module")
def long_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 8 captioned mp4 files that are long enough for autoencoders of videos."""
    folder = tmp_path_factory.mktemp("long-clips")
    rows = ["path,text"]
    for index in range(8):
        frames = torch.zeros(NUM_FRAMES, SIDE, SIDE, 3, dtype=torch.uint8)
        for step in range(NUM_FRAMES):
            frames[step, 4 : 10 + index, step : step + 8] = 220
        write_video(folder / f"{index}.mp4", frames, fps=8, crf=4)
        rows.append(f"{index}.mp4,a bar of size {index}")
    (folder / "clips.csv").write_text("\n".join(rows) + "\n")
    return folder / "clips.csv"


ONE, *OTHERS = PAIRS


@pytest.fixture(
    params=[ONE, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)],
    ids=[name.removesuffix("Model") for name in PAIRS],
)
def training(request: pytest.FixtureRequest, long_clips: Path, tmp_path: Path) -> dict[str, Any]:
    """A config that trains a tiny model of a class, with its own autoencoder."""
    config, vae_name, vae_config = PAIRS[request.param]
    torch.manual_seed(0)
    getattr(diffusers, vae_name)(**vae_config).save_pretrained(tmp_path / "vae")
    dataset = {"type": "VideoTextDataset", "data_path": str(long_clips)}
    return tiny_training(
        long_clips,
        model={"type": "diffusers", "class_name": request.param, "config": SMALL | config},
        vae={"type": "diffusers", "from_pretrained": str(tmp_path / "vae")},
        text_encoder={"type": "hashed-words", "width": 16},
        dataset={**dataset, "num_frames": NUM_FRAMES, "image_size": (SIDE, SIDE)},
        batch_size=4,
        max_steps=4,
        ckpt_every=2,
        grad_checkpoint=True,
    )


def sampling(training: dict[str, Any], **changes: object) -> dict[str, Any]:
    """The config that samples from that run, which alone says which class it trained."""
    kept = {key: training[key] for key in ("vae", "text_encoder", "scheduler", "dtype")}
    model = {"type": "diffusers", "from_pretrained": "run"}
    prompts = {"prompt": "a bar", "num_frames": NUM_FRAMES, "image_size": (SIDE, SIDE)}
    return {"pipeline": "sample", "model": model, **kept, **prompts, **changes}


def test_trained_resumed_and_sampled(
    training: dict[str, Any], write: Callable[..., Path], command: Command, tmp_path: Path
) -> None:
    config = write(training)
    dry = command("opensora-run", config, "--dry-run")
    assert "TFLOP a micro-batch at most" in dry.stdout, dry.stderr
    trained = command("opensora-run", config, "--run-folder", "run")
    assert trained.returncode == 0, trained.stderr
    unbroken = losses(tmp_path / "run")
    assert len(unbroken) == 4
    assert unbroken[-1] != unbroken[0]

    halfway = tmp_path / "run" / "checkpoints" / "step-000002"
    resumed = command("opensora-run", config, "--load", halfway, "--run-folder", "again")
    assert resumed.returncode == 0, resumed.stderr
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "again")
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)

    sampled = command("opensora-run", write(sampling(training), "sample.py"), "--save-dir", "samples")
    assert sampled.returncode == 0, sampled.stderr
    assert (tmp_path / "samples" / "sample_0000.mp4").stat().st_size > 0
    assert "random weights" not in sampled.stderr

    channels = 8 if "LTX" in training["model"]["class_name"] else 4
    model = {"type": "diffusers", "from_pretrained": str(tmp_path / "run")}
    denoiser = build("models", model, latent_channels=channels, text_width=16, text_length=16)
    load_weights(denoiser, tmp_path / "run" / "checkpoints" / "step-000004" / "model.safetensors")
    denoiser.module.save_pretrained(tmp_path / "for-diffusers")
    cls = getattr(diffusers, training["model"]["class_name"])
    theirs = load_file(tmp_path / "for-diffusers" / "diffusion_pytorch_model.safetensors")
    assert cls.from_config(cls.load_config(tmp_path / "for-diffusers")).load_state_dict(theirs)
    assert ours.keys() == {f"module.{key}" for key in theirs}
    assert all(torch.equal(ours[f"module.{key}"], each) for key, each in theirs.items())


def test_a_run_of_another_type_is_refused(
    clips: Path, write: Callable[..., Path], command: Command, tmp_path: Path
) -> None:
    assert command("opensora-run", write(tiny_training(clips, max_steps=1)), "--run-folder", "run").returncode == 0
    parts = {"vae": {"type": "identity"}, "text_encoder": {"type": "hashed-words"}, "scheduler": {"type": "rflow"}}
    config = {"pipeline": "sample", "model": {"type": "diffusers", "from_pretrained": "run"}, **parts}
    config |= {"prompt": "a bar", "num_frames": 4, "image_size": (16, 16), "dtype": "fp32"}
    refused = command("opensora-run", write(config, "sample.py"))
    assert refused.returncode == 2
    assert 'run trained a model of type "STDiT3", not "diffusers"' in refused.stderr
