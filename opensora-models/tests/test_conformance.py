"""Every registered component passes the kit that third-party ones are checked with."""

from __future__ import annotations

import pytest
from diffusers import AutoencoderKL

from opensora.core.testing import check_denoiser, check_text_encoder, check_vae

SMALL = {"hidden_size": 16, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize("name", ["STDiT3", "STDiT3-XL/2", "STDiT3-3B/2"])
@pytest.mark.parametrize("options", [{}, {"qk_norm": False, "pred_sigma": False, "patch_size": (2, 2, 2)}], ids=str)
def test_stdit3(name, options):
    check_denoiser(name, **SMALL | options)


@pytest.mark.parametrize("name", ["DiT", "DiT-XL/2", "DiT-XL/2x2"])
@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "text"])
def test_dit(name, labelled):
    condition = {"condition": "label_4"} if labelled else {"condition": "text"}
    check_denoiser(name, text_width=None if labelled else 16, text_length=1, **SMALL | condition)


def test_identity_vae():
    check_vae("identity")


def test_image_vae(golden, tmp_path):
    AutoencoderKL(**golden("vae2d").config).save_pretrained(tmp_path)
    check_vae("VideoAutoencoderKL", from_pretrained=str(tmp_path), micro_batch_size=2)


def test_class_labels():
    check_text_encoder("classes", num_classes=10, prompts=["3", "0", "9"])


def test_hashed_words():
    check_text_encoder("hashed-words")
