"""Every registered component passes the kit that third-party ones are checked with."""

from __future__ import annotations

import pytest
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder

from opensora.core.testing import check_denoiser, check_text_encoder, check_vae

SMALL_TEMPORAL_VAE = {"filters": 8, "num_res_blocks": 1, "num_groups": 4}
SMALL = {"hidden_size": 16, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize("name", ["STDiT3", "STDiT3-XL/2", "STDiT3-3B/2"])
@pytest.mark.parametrize("options", [{}, {"qk_norm": False, "pred_sigma": False, "patch_size": (2, 2, 2)}], ids=str)
def test_stdit3(name, options):
    check_denoiser(name, **SMALL | options)


@pytest.mark.parametrize("name", ["STDiT", "STDiT-XL/2"])
@pytest.mark.parametrize("options", [{}, {"pred_sigma": False, "patch_size": (2, 2, 2)}], ids=str)
def test_stdit(name, options):
    check_denoiser(name, **SMALL | options)


@pytest.mark.parametrize("name", ["STDiT2", "STDiT2-XL/2"])
@pytest.mark.parametrize(
    "options",
    [{}, {"qk_norm": True, "qk_norm_legacy": True}, {"patch_size": (2, 2, 2), "pred_sigma": False}],
    ids=str,
)
def test_stdit2(name, options):
    check_denoiser(name, **SMALL | {"hidden_size": 24} | options)


DIT_SIZES = [f"DiT-{size}/{patch}" for size in ("S", "B", "L", "XL") for patch in (2, 4, 8)]


@pytest.mark.parametrize("name", ["DiT", *DIT_SIZES, "DiT-XL/2x2", "Latte", "Latte-XL/2", "Latte-XL/2x2"])
@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "text"])
def test_dit_and_latte(name, labelled):
    condition = {"condition": "label_4"} if labelled else {"condition": "text"}
    check_denoiser(name, text_width=None if labelled else 16, text_length=1, **SMALL | condition)


@pytest.mark.parametrize("name", ["LatteT2V", "LatteT2V-XL/2"])
@pytest.mark.parametrize("options", [{}, {"pred_sigma": False, "patch_size": (2, 2, 2)}], ids=str)
def test_latte_t2v(name, options):
    check_denoiser(name, **SMALL | options)


@pytest.mark.parametrize("name", ["PixArt", "PixArt-XL/2", "PixArt-1B/2", "PixArtMS", "PixArtMS-XL/2"])
@pytest.mark.parametrize("options", [{}, {"pred_sigma": False, "patch_size": (2, 2, 2)}, {"base_size": 16}], ids=str)
def test_pixart(name, options):
    check_denoiser(name, **SMALL | {"hidden_size": 24} | options)


@pytest.mark.parametrize("name", ["PixArt_Sigma", "PixArt-Sigma-XL/2"])
@pytest.mark.parametrize("sampling", [None, "conv", "ave", "uniform", "uniform_every"])
def test_pixart_sigma(name, sampling):
    compression = {"sampling": sampling, "scale_factor": 2, "kv_compress_layer": (1,)}
    check_denoiser(name, latent_size=(1, 8, 8), qk_norm=True, kv_compress_config=compression, **SMALL)


def test_identity_vae():
    check_vae("identity")


def test_image_vae(golden, tmp_path):
    AutoencoderKL(**golden("vae2d").config).save_pretrained(tmp_path)
    check_vae("VideoAutoencoderKL", from_pretrained=str(tmp_path), micro_batch_size=2)


def test_temporal_decoder_vae(golden, tmp_path):
    AutoencoderKLTemporalDecoder(**golden("vae2d_temporal_decoder").config).save_pretrained(tmp_path)
    check_vae("VideoAutoencoderKLTemporalDecoder", from_pretrained=str(tmp_path), micro_frame_size=2)


@pytest.mark.parametrize("name", ["VAE_Temporal", "VAE_Temporal_SD"])
def test_temporal_vae(name):
    check_vae(name, in_out_channels=3, **SMALL_TEMPORAL_VAE)


@pytest.mark.parametrize("name", ["VideoAutoencoderPipeline", "OpenSoraVAE_V1_2"])
@pytest.mark.parametrize("options", [{}, {"micro_frame_size": 2, "micro_batch_size": 1, "tile_size": 16}], ids=str)
def test_video_vae(golden, tmp_path, name, options):
    AutoencoderKL(**golden("vae2d").config).save_pretrained(tmp_path)
    parts = {
        "vae_2d": {"type": "VideoAutoencoderKL", "from_pretrained": str(tmp_path)},
        "vae_temporal": {"type": "VAE_Temporal_SD", **SMALL_TEMPORAL_VAE},
    }
    check_vae(name, size=(5, 32, 48), **parts, **options)


def test_class_labels():
    check_text_encoder("classes", num_classes=10, prompts=["3", "0", "9"])


def test_hashed_words():
    check_text_encoder("hashed-words")
