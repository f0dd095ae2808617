"""PixArt-Sigma: reference vectors, published shapes, and attention to a coarser image."""

from __future__ import annotations

import pytest
import torch

from opensora.core.components import build
from opensora.core.conditioning import Conditioning
from opensora.core.errors import ConfigError, ShapeError
from opensora.models._layers.compressed_attention import CompressedAttention
from opensora.models.pixart_sigma import KVCompression, PixArtSigma, PixArtSigma_XL_2

FILES = [
    "pixart_sigma",
    "pixart_sigma_kv_conv",
    "pixart_sigma_kv_ave",
    "pixart_sigma_kv_uniform",
    "pixart_sigma_kv_every",
]
RUNTIME = ("input_size", "caption_channels", "model_max_length")
SAMPLINGS = ["conv", "ave", "uniform", "uniform_every"]


def build_golden(golden) -> PixArtSigma:
    """From the recorded options as a config has them."""
    model = build(
        "models",
        {"type": "PixArt_Sigma"} | {key: value for key, value in golden.config.items() if key not in RUNTIME},
        latent_channels=4,
        latent_size=tuple(golden.config["input_size"]),
        text_width=golden.config["caption_channels"],
        text_length=golden.config["model_max_length"],
    )
    model.load_state_dict(golden.state)
    return model.eval()


def tiny(*, size=(1, 8, 12), sampling=None, ratio=2, **options) -> PixArtSigma:
    """A small model whose weights are all random; with ``sampling``, its second block compresses."""
    torch.manual_seed(0)
    compression = KVCompression(sampling=sampling, scale_factor=ratio, kv_compress_layer=(1,)) if sampling else None
    spec = PixArtSigma.Spec(hidden_size=16, depth=2, num_heads=2, kv_compress_config=compression, **options)
    model = PixArtSigma(spec, latent_channels=3, latent_size=size, text_width=6, text_length=5).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(size=(1, 8, 12)):
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(2, 5, 6, generator=generator)
    latents = torch.randn(2, 3, *size, generator=generator)
    return latents, torch.tensor([100.5, 900]), Conditioning(text_embedding=text)


@pytest.mark.parametrize(
    ("file", "case"), [(file, case) for file in FILES for case in ("mask", "nomask")] + [("pixart_sigma", "halfmask")]
)
def test_reference_outputs_and_gradients(golden, assert_gradients, file, case):
    golden = golden(file)
    model = build_golden(golden)
    given = golden.inputs(case)
    mask = given["mask"].bool().repeat(2 // len(given["mask"]), 1) if "mask" in given else None
    latents = given["x"].requires_grad_()
    conditioning = Conditioning(text_embedding=given["y"].squeeze(1), text_mask=mask)
    output = model(latents, given["timestep"], conditioning)
    torch.testing.assert_close(output, golden.outputs(case)["x"], atol=1e-5, rtol=0)
    if expected := golden.grads(case):
        assert_gradients(model, latents, output, expected)


def test_preset_has_the_published_keys_and_count(assert_key_table):
    with torch.device("meta"):
        model = PixArtSigma_XL_2(
            PixArtSigma_XL_2.Spec(), latent_channels=4, latent_size=(1, 128, 128), text_width=4096, text_length=300
        )
    assert_key_table(model, "PixArt-Sigma-XL-2")


def test_only_the_listed_blocks_compress():
    model = tiny(sampling="uniform")
    assert [isinstance(block.attn, CompressedAttention) for block in model.blocks] == [False, True]
    for plain in (tiny(), tiny(sampling="conv", ratio=1)):
        assert not any(isinstance(block.attn, CompressedAttention) for block in plain.blocks)


def test_learned_average_starts_as_the_average():
    attn = CompressedAttention(4, 2, qk_norm=False, sampling="conv", ratio=2)
    image = torch.randn(1, 4, 6, 4)
    average = torch.nn.functional.avg_pool2d(image.permute(0, 3, 1, 2), 2).flatten(2).transpose(1, 2)
    expected = torch.nn.functional.layer_norm(average, (4,))
    torch.testing.assert_close(attn.compress(image.flatten(1, 2), (1, 4, 6)), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("sampling", "grid", "kept"),
    [
        ("uniform", (4, 6), [0, 2, 4, 12, 14, 16]),
        ("ave", (4, 6), [0, 2, 4, 12, 14, 16]),
        ("ave", (5, 3), [0, 6]),
        ("uniform_every", (2, 5), [0, 2, 4, 6, 8]),
    ],
    ids=str,
)
def test_tokens_that_are_kept(sampling, grid, kept):
    attn = CompressedAttention(2, 1, qk_norm=False, sampling=sampling, ratio=2)
    number = torch.arange(grid[0] * grid[1]).float()
    tokens = torch.stack([number, number], dim=-1)[None]
    assert attn.compress(tokens, (1, *grid))[0, :, 0].tolist() == kept


@pytest.mark.parametrize("sampling", [None, *SAMPLINGS])
def test_other_sizes_are_done_as_if_built_for_them(sampling):
    given = inputs(size=(1, 12, 4))
    expected = tiny(size=(1, 12, 4), sampling=sampling, base_size=8, qk_norm=True)(*given)
    other = tiny(sampling=sampling, base_size=8, qk_norm=True)
    torch.testing.assert_close(other(*given), expected, atol=1e-6, rtol=0)


def test_position_scale_is_that_of_the_size_it_was_built_for():
    assert tiny().base_size == 4  # floor of the root of 4 * 6
    assert tiny(size=None, base_size=64).base_size == 32


def test_videos_without_compression():
    given = inputs(size=(3, 4, 4))
    assert tiny(size=(3, 4, 4))(*given).shape == (2, 6, 3, 4, 4)
    with pytest.raises(ShapeError, match="for images; these latents make 3 token frames"):
        tiny(size=(3, 4, 4), sampling="conv")
    with pytest.raises(ShapeError, match="for images; these latents make 3 token frames"):
        tiny(size=(1, 4, 4), sampling="conv")(*given)


@pytest.mark.parametrize(
    ("sampling", "size", "message"),
    [
        ("uniform", (1, 10, 12), "does not divide 5x6 tokens .* Nearest that it does: 4x6"),
        ("uniform_every", (1, 6, 6), "does not divide 3x3 tokens .* Nearest that it does: 4x4"),
        ("conv", (1, 2, 12), "does not divide 1x6 tokens .* Nearest that it does: 2x6"),
        ("ave", (1, 12, 2), "does not divide 6x1 tokens .* Nearest that it does: 6x2"),
    ],
)
def test_sizes_that_compression_does_not_divide(sampling, size, message):
    with pytest.raises(ShapeError, match=message):
        tiny(size=size, sampling=sampling)
    with pytest.raises(ShapeError, match=message):
        tiny(sampling=sampling)(*inputs(size=size))


def test_messages_name_it():
    with pytest.raises(ShapeError, match="PixArt-Sigma measures positions by one size"):
        tiny(size=None)
    with pytest.raises(ConfigError, match="PixArt-Sigma is conditioned on text"):
        PixArtSigma(PixArtSigma.Spec(), latent_channels=4, latent_size=(1, 4, 4), text_width=None, text_length=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_compress_layer": [1, 2]}, r"kv_compress_layer has 2; the model's 2 blocks are 0 to 1"),
        ({"scale_factor": 1.5}, r"scale_factor must be a whole number, not 1\.5"),
        ({"scale_factor": 0}, "scale_factor"),
        ({"sampling": "average"}, "sampling must be one of"),
        ({"ratio": 2}, "kv_compress_config.ratio is not a field"),
    ],
    ids=str,
)
def test_compression_that_makes_no_model(options, message):
    config = {"type": "PixArt-Sigma-XL/2", "depth": 2, "kv_compress_config": {"sampling": "conv"} | options}
    with pytest.raises(ConfigError, match=message):
        build("models", config, latent_channels=4, latent_size=(1, 8, 8), text_width=16, text_length=6)
