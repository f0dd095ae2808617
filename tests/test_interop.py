"""Converted folders sample in diffusers' own pipelines, and folders of diffusers sample here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from runs import Command
from safetensors.torch import save_file
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from opensora.core.components import load

SMALL = {"hidden_size": 24, "depth": 2, "num_heads": 2}
IMAGE = {**SMALL, "no_temporal_pos_emb": True}
SIZES = {"DiT": (1, 8, 8), "PixArt": (1, 8, 8), "LatteT2V": (3, 8, 8)}
THEIRS = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "num_layers": 2, "patch_size": 2}


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of an image autoencoder, with a latent for 2x2 pixels."""
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a text encoder with a vocabulary of five words."""
    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    words = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *[(word, -1.0) for word in ("▁a", "▁wave", "▁sea", "▁red", "▁")],
    ]
    tokenizer = T5Tokenizer(vocab=words, extra_ids=0)
    tokenizer.save_pretrained(folder)
    T5EncoderModel(T5Config(vocab_size=16, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)).save_pretrained(
        folder
    )
    return folder


def convert(command: Command, tmp_path: Path, name: str, **options: object) -> Path:
    """A random model in this project's layout, handed over by the real command."""
    component = load("models", name)
    text = {"text_width": None} if name == "DiT" else {"text_width": 16, "text_length": 6}
    torch.manual_seed(0)
    model = component(component.Spec(**options), latent_channels=4, latent_size=SIZES[name], **text)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.02)
    (tmp_path / "own").mkdir()
    save_file(model.state_dict(), tmp_path / "own" / "model.safetensors")
    size = "x".join(map(str, SIZES[name]))
    done = command("opensora", "convert", "own", "theirs", "--to", "diffusers", "--latent-size", size,
                   "--model", name, "num_heads=2")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "theirs"
    return tmp_path / "theirs"


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def read_vae(folder: Path) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False)


def test_dit_in_their_pipeline(command: Command, tmp_path: Path, vae: Path) -> None:
    folder = convert(command, tmp_path, "DiT", **IMAGE, condition="label_1000")
    transformer = diffusers.DiTTransformer2DModel.from_pretrained(folder, low_cpu_mem_usage=False)
    pipeline = diffusers.DiTPipeline(transformer, read_vae(vae), diffusers.DDIMScheduler(), id2label={7: "cock"})
    images = quiet(pipeline)(pipeline.get_label_ids(["cock"]), num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 16, 16, 3)
    assert np.isfinite(images).all()


def test_pixart_in_their_pipeline(command: Command, tmp_path: Path, vae: Path, t5: Path) -> None:
    folder = convert(command, tmp_path, "PixArt", **IMAGE)
    pipeline = diffusers.PixArtAlphaPipeline(
        tokenizer=T5Tokenizer.from_pretrained(t5),
        text_encoder=T5EncoderModel.from_pretrained(t5),
        vae=read_vae(vae),
        transformer=diffusers.PixArtTransformer2DModel.from_pretrained(folder, low_cpu_mem_usage=False),
        scheduler=diffusers.DDIMScheduler(),
    )
    images = quiet(pipeline)("a red wave", num_inference_steps=2, height=16, width=16, max_sequence_length=6,
                             use_resolution_binning=False, clean_caption=False, output_type="np").images  # fmt: skip
    assert images.shape == (1, 16, 16, 3)
    assert np.isfinite(images).all()


def test_latte_in_their_pipeline(command: Command, tmp_path: Path, vae: Path, t5: Path) -> None:
    folder = convert(command, tmp_path, "LatteT2V", **SMALL)
    pipeline = diffusers.LattePipeline(
        tokenizer=T5Tokenizer.from_pretrained(t5),
        text_encoder=T5EncoderModel.from_pretrained(t5),
        vae=read_vae(vae),
        transformer=diffusers.LatteTransformer3DModel.from_pretrained(folder, low_cpu_mem_usage=False),
        scheduler=diffusers.DDIMScheduler(),
    )
    frames = quiet(pipeline)("a red wave", num_inference_steps=2, height=16, width=16, video_length=3,
                             clean_caption=False, output_type="np").frames  # fmt: skip
    assert frames.shape == (1, 3, 16, 16, 3)
    assert np.isfinite(frames).all()


FOLDERS: dict[str, tuple[Any, dict[str, object], dict[str, object], int]] = {
    "DiT": (
        diffusers.DiTTransformer2DModel,
        {"num_embeds_ada_norm": 10, "sample_size": 8, "out_channels": 8},
        {"condition": "label_10", "no_temporal_pos_emb": True, "frequency_shift": 1},
        1,
    ),
    "PixArt": (
        diffusers.PixArtTransformer2DModel,
        {"sample_size": 8, "caption_channels": 16, "cross_attention_dim": 24},
        {"no_temporal_pos_emb": True},
        1,
    ),
    "LatteT2V": (
        diffusers.LatteTransformer3DModel,
        {"sample_size": 8, "caption_channels": 16, "cross_attention_dim": 24, "out_channels": 8, "video_length": 3,
         "attention_bias": True, "activation_fn": "gelu-approximate", "norm_type": "ada_norm_single",
         "norm_elementwise_affine": False},
        {},
        3,
    ),
}  # fmt: skip


ONE, *OTHERS = FOLDERS


@pytest.mark.parametrize("name", [ONE, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_their_folder_in_this_pipeline(
    name: str, command: Command, write: Callable[..., Path], tmp_path: Path, vae: Path, t5: Path
) -> None:
    network_class, their_options, options, frames = FOLDERS[name]
    torch.manual_seed(0)
    network = network_class(**THEIRS, **their_options)
    if name == "DiT":  # as published weights have them
        for block in network.transformer_blocks:
            block.norm1.emb.load_state_dict(network.transformer_blocks[0].norm1.emb.state_dict())
    network.save_pretrained(tmp_path / "theirs")
    text_encoder: dict[str, object] = {"type": "t5", "from_pretrained": str(t5), "model_max_length": 6}
    if name == "DiT":
        text_encoder = {"type": "classes", "num_classes": 10}
    values = {
        "model": {"type": name, **SMALL, **options, "from_pretrained": "theirs"},
        "vae": {"type": "VideoAutoencoderKL", "from_pretrained": str(vae)},
        "text_encoder": text_encoder,
        "scheduler": {"type": "iddpm", "num_sampling_steps": 2},
        "prompt": ["7" if name == "DiT" else "a red wave"],
        "num_frames": frames,
        "image_size": (16, 16),
        "dtype": "fp32",
    }
    done = command("opensora-run", write({**values, "save_dir": str(tmp_path / "samples")}))
    assert done.returncode == 0, done.stderr
    (told,) = (tmp_path / "samples").glob("sample_*.json")
    assert told.with_suffix(".png" if frames == 1 else ".mp4").stat().st_size
