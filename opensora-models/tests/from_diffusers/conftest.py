"""Tiny configs of diffusers' classes."""

from __future__ import annotations

from typing import Any

import pytest

SMALL: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}

TRANSFORMERS: dict[str, dict[str, Any]] = {
    "CogVideoXTransformer3DModel": {"time_embed_dim": 8, "sample_width": 8, "sample_height": 8, "sample_frames": 5},
    "WanTransformer3DModel": {"attention_head_dim": 12, "ffn_dim": 32, "freq_dim": 16},
    "LTXVideoTransformer3DModel": {"cross_attention_dim": 16},
    "MochiTransformer3DModel": {"pooled_projection_dim": 16, "time_embed_dim": 8},
    "HunyuanVideoTransformer3DModel": {
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "rope_axes_dim": (2, 2, 4),
        "guidance_embeds": True,
    },
    "SanaVideoTransformer3DModel": {
        "attention_head_dim": 12,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 12,
        "cross_attention_dim": 24,
    },
    "LatteTransformer3DModel": {
        "cross_attention_dim": 16,
        "sample_size": 8,
        "patch_size": 2,
        "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
    },
    "PixArtTransformer2DModel": {"cross_attention_dim": 16, "sample_size": 8},
    "SanaTransformer2DModel": {
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "sample_size": 8,
    },
    "DiTTransformer2DModel": {"sample_size": 8, "num_embeds_ada_norm": 4},
}

VAES: dict[str, tuple[dict[str, Any], tuple[int, int, int]]] = {
    "AutoencoderKLCogVideoX": (
        {
            "block_out_channels": (8,) * 4,
            "down_block_types": ("CogVideoXDownBlock3D",) * 4,
            "up_block_types": ("CogVideoXUpBlock3D",) * 4,
            "layers_per_block": 1,
            "latent_channels": 4,
            "norm_num_groups": 2,
        },
        (9, 32, 48),
    ),
    "AutoencoderKLWan": (
        {
            "base_dim": 4,
            "z_dim": 4,
            "dim_mult": [1, 1, 1, 1],
            "num_res_blocks": 1,
            "latents_mean": [0.1, -0.2, 0.3, 0.0],
            "latents_std": [1.0, 2.0, 0.5, 1.5],
        },
        (9, 32, 48),
    ),
    "AutoencoderKLLTXVideo": (
        {
            "latent_channels": 8,
            "block_out_channels": (8,) * 4,
            "decoder_block_out_channels": (8,) * 4,
            "layers_per_block": (1,) * 5,
            "decoder_layers_per_block": (1,) * 5,
            "spatio_temporal_scaling": (True, True, False, False),
            "decoder_spatio_temporal_scaling": (True, True, False, False),
            "patch_size": 2,
            "timestep_conditioning": True,
        },
        (5, 32, 48),
    ),
    "AutoencoderKLMochi": (
        {
            "encoder_block_out_channels": (32,) * 4,
            "decoder_block_out_channels": (32,) * 4,
            "latent_channels": 4,
            "layers_per_block": (1,) * 5,
            "latents_mean": (0.1, 0.2, 0.3, 0.4),
            "latents_std": (1.0, 2.0, 0.5, 0.7),
        },
        (7, 32, 48),
    ),
    "AutoencoderKLHunyuanVideo": (
        {"latent_channels": 4, "block_out_channels": (8,) * 4, "layers_per_block": 1, "norm_num_groups": 2},
        (5, 32, 48),
    ),
    "AutoencoderKL": (
        {
            "block_out_channels": (8, 8),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "norm_num_groups": 2,
            "scaling_factor": 0.36,
            "shift_factor": 0.1,
        },
        (3, 16, 24),
    ),
    "AutoencoderKLTemporalDecoder": (
        {"block_out_channels": (32, 32), "down_block_types": ("DownEncoderBlock2D",) * 2},
        (3, 16, 24),
    ),
    "AutoencoderDC": (
        {
            "latent_channels": 4,
            "attention_head_dim": 4,
            "encoder_block_out_channels": (8, 8),
            "decoder_block_out_channels": (8, 8),
            "encoder_block_types": ("ResBlock",) * 2,
            "decoder_block_types": ("ResBlock",) * 2,
            "encoder_layers_per_block": (1, 1),
            "decoder_layers_per_block": (1, 1),
            "encoder_qkv_multiscales": ((), ()),
            "decoder_qkv_multiscales": ((), ()),
            "scaling_factor": 0.4,
        },
        (3, 16, 24),
    ),
    "AutoencoderTiny": (
        {
            "encoder_block_out_channels": (8, 8),
            "decoder_block_out_channels": (8, 8),
            "num_encoder_blocks": (1, 1),
            "num_decoder_blocks": (1, 1),
        },
        (3, 16, 24),
    ),
}


@pytest.fixture(params=TRANSFORMERS, ids=lambda name: name.removesuffix("Model"))
def class_name(request: pytest.FixtureRequest) -> str:
    """Each class that is known by name."""
    return str(request.param)


@pytest.fixture(params=VAES)
def vae_name(request: pytest.FixtureRequest) -> str:
    """Each autoencoder that is known by name."""
    return str(request.param)


@pytest.fixture(scope="session")
def tiny_transformer():
    """Options of a small model of a class."""
    return lambda name, **config: {"class_name": name, "config": SMALL | TRANSFORMERS[name] | config}


@pytest.fixture(scope="session")
def tiny_vae():
    """Arguments of a small autoencoder of a class, and a size that it can do."""
    return VAES.__getitem__
