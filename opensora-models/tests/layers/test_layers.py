"""Shared layers against reference vectors, one recorded case each. (No model uses a patch embedding's optional norm.)"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from opensora.models._layers.attention import CrossAttention, RMSNorm, SelfAttention, attention_mask
from opensora.models._layers.embedders import CaptionEmbedder, LabelEmbedder, NumberEmbedder, frequencies, sinusoid
from opensora.models._layers.final_layers import FinalLayer, TableFinalLayer
from opensora.models._layers.modulation import FrameChoice
from opensora.models._layers.patches import PatchEmbed3D, token_grid, unpatchify
from opensora.models._layers.positions import (
    RotaryEmbedding,
    grid_coordinates,
    rotate,
    sincos_2d,
    spatial_table,
    temporal_table,
)


@pytest.fixture(scope="module")
def layers(golden):
    return golden("layers")


def loaded(layers, case, module):
    module.load_state_dict(layers.state_of(case))
    return module.eval()


def assert_close(found, layers, case):
    torch.testing.assert_close(found, layers.outputs(case)["x"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", ["patch_embed_0", "patch_embed_1", "patch_embed_2"])
def test_patch_embedding(layers, case):
    options = layers.kwargs(case)
    embed = PatchEmbed3D(tuple(options["patch_size"]), options["in_chans"], options["embed_dim"])
    assert_close(loaded(layers, case, embed)(layers.inputs(case)["x"]).flatten(1, 2), layers, case)


def test_patch_embedding_keeps_the_grid_in_order(layers):
    """The recorded case has a norm on top and the grid as separate axes."""
    case = "patch_embed_norm_noflat"
    state, video = layers.state_of(case), layers.inputs(case)["x"]
    embed = PatchEmbed3D((1, 2, 2), 4, 48)
    embed.load_state_dict({key: value for key, value in state.items() if key.startswith("proj.")})
    tokens = F.layer_norm(embed(video), (48,), state["norm.weight"], state["norm.bias"])
    _, h, w = token_grid(video.shape[2:], (1, 2, 2))
    assert_close(tokens.unflatten(2, (h, w)).permute(0, 4, 1, 2, 3), layers, case)


def test_unpatchify_undoes_cutting_into_patches():
    video = torch.randn(2, 3, 5, 7, 4)
    patch = (2, 3, 2)
    padded = F.pad(video, (0, 0, 0, 2, 0, 1))
    tokens = padded.reshape(2, 3, 3, 2, 3, 3, 2, 2).permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(2, 3, 6, -1)
    assert torch.equal(unpatchify(tokens, patch, (5, 7, 4)), video)


def test_rms_norm(layers):
    assert_close(loaded(layers, "rmsnorm", RMSNorm(12))(layers.inputs("rmsnorm")["x"]), layers, "rmsnorm")


@pytest.mark.parametrize("case", ["timestep_sinusoid_0", "timestep_sinusoid_1", "timestep_sinusoid_2"])
def test_sinusoid(layers, case):
    assert_close(sinusoid(layers.inputs(case)["t"], layers.kwargs(case)["dim"]), layers, case)


def test_frequencies_are_powers_of_a_ten_thousandth():
    exact = 10000.0 ** -(torch.arange(128, dtype=torch.float64) / 128)
    torch.testing.assert_close(frequencies(128).double(), exact, atol=0, rtol=1e-6)


def test_number_embedder(layers):
    embedder = loaded(layers, "timestep_embedder", NumberEmbedder(48))
    assert_close(embedder(layers.inputs("timestep_embedder")["t"]), layers, "timestep_embedder")


def test_number_embedder_of_sizes(layers):
    rate = layers.inputs("size_embedder_1d")["s"].repeat(4)  # recorded for a batch of 4
    assert_close(loaded(layers, "size_embedder_1d", NumberEmbedder(48))(rate), layers, "size_embedder_1d")
    sizes = layers.inputs("size_embedder_2d")["s"].repeat(2, 1)
    found = loaded(layers, "size_embedder_2d", NumberEmbedder(16))(sizes).flatten(1)
    assert_close(found, layers, "size_embedder_2d")


def test_label_embedder(layers):
    case = "label_embedder_drop"
    given = layers.inputs(case)
    embedder = loaded(layers, case, LabelEmbedder(10, 48, has_null=True))
    assert_close(embedder(given["labels"], given["force_drop_ids"] == 1), layers, case)

    case = "label_embedder_nodropout"
    embedder = loaded(layers, case, LabelEmbedder(10, 48, has_null=False))
    assert_close(embedder(layers.inputs(case)["labels"], None), layers, case)


@pytest.mark.parametrize("case", ["caption_embedder", "caption_embedder_drop"])
def test_caption_embedder(layers, case):
    given = layers.inputs(case)
    dropped = given["force_drop_ids"] == 1 if "force_drop_ids" in given else None
    embedder = loaded(layers, case, CaptionEmbedder(16, 48, 6))
    assert_close(embedder(given["y"].squeeze(1), dropped)[:, None], layers, case)


@pytest.mark.parametrize("index", range(5))
def test_spatial_positions(layers, index):
    options = layers.kwargs(f"pos2d_{index}")
    height, width = options["h"], options["w"]
    stretch = {"scale": options["scale"], "base_size": options["base_size"]}
    assert_close(spatial_table(48, height, width, **stretch), layers, f"np_pos2d_{index}")
    rows, columns = grid_coordinates(height, **stretch), grid_coordinates(width, **stretch)
    assert_close(sincos_2d(48, rows, columns)[None], layers, f"pos2d_{index}")


def test_spatial_positions_of_an_integer_grid(layers):
    expected = layers.outputs("np_pos2d_cls")["x"]  # recorded with a row of zeros for a class token in front
    torch.testing.assert_close(spatial_table(48, 3, 3), expected[1:], atol=1e-5, rtol=0)


def test_temporal_positions(layers):
    assert_close(temporal_table(48, 7, scale=2 / 3), layers, "np_pos1d")


def test_rotary_embedding(layers):
    query = layers.inputs("rope")["q"]
    assert_close(rotate(query, RotaryEmbedding(12)(query.shape[-2])), layers, "rope")


@pytest.mark.parametrize(
    "case", ["attn_plain", "attn_bias", "attn_qknorm", "attn_rope_qknorm", "attn_rope_qknorm_legacy"]
)
def test_self_attention(layers, case):
    options = layers.kwargs(case)
    attend = SelfAttention(
        options["dim"],
        options["num_heads"],
        qkv_bias=options.get("qkv_bias", False),
        qk_norm=options.get("qk_norm", False),
        rotate_first=options.get("qk_norm_legacy", False),
    )
    x = layers.inputs(case)["x"]
    rotations = RotaryEmbedding(options["dim"] // options["num_heads"])(x.shape[1]) if "rope" in options else None
    assert_close(loaded(layers, case, attend)(x, rotations), layers, case)


def test_self_attention_takes_leading_axes_in_any_layout():
    attend = SelfAttention(8, 2, qk_norm=True)
    x = torch.randn(2, 3, 5, 8)
    expected = attend(x.transpose(1, 2).reshape(10, 3, 8)).reshape(2, 5, 3, 8)
    torch.testing.assert_close(attend(x.transpose(1, 2)), expected, atol=1e-6, rtol=0)


def test_cross_attention(layers):
    case = "cross_attn_packed"
    given, lengths = layers.inputs(case), layers.kwargs(case)["lens"]
    text = torch.nn.utils.rnn.pad_sequence(given["cond"][0].split(lengths), batch_first=True)
    mask = attention_mask(torch.arange(text.shape[1]) < torch.tensor(lengths)[:, None])
    assert_close(loaded(layers, case, CrossAttention(48, 4))(given["x"], text, mask), layers, case)


def test_final_layer(layers):
    given = layers.inputs("final_layer")
    assert_close(loaded(layers, "final_layer", FinalLayer(48, 32))(given["x"], given["c"]), layers, "final_layer")


def test_table_final_layer_with_given_frames(layers):
    case = "t2i_final_layer"
    given, options = layers.inputs(case), layers.kwargs(case)
    x = given["x"].unflatten(1, (options["T"], options["S"]))
    layer = loaded(layers, case, TableFinalLayer(48, 32))
    found = layer(x, given["t"], given["t0"], FrameChoice(given["x_mask"], 1))
    assert_close(found.flatten(1, 2), layers, case)
