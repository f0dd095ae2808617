"""Published checkpoints in the models' own keys: recorded cases, and real key lists."""

from __future__ import annotations

import pytest
import torch

from opensora.models.dit import DiT
from opensora.models.stdit3 import STDiT3, STDiT3_XL_2


def build(golden, case):
    options = dict(golden.kwargs(case)["model_config"])
    text_width, text_length = options.pop("caption_channels", None), options.pop("model_max_length", None)
    size = tuple(options.pop("input_size", ()))
    if golden.kwargs(case)["model_type"] == "DiT":
        return DiT(DiT.Spec(**options), latent_channels=4, latent_size=size, text_width=text_width)
    return STDiT3(STDiT3.Spec(**options), latent_channels=4, text_width=text_width, text_length=text_length)


@pytest.mark.parametrize("case", ["sigma_to_stdit3", "dit_official"])
def test_reference_cases(golden, case):
    """Recorded entries come out as recorded; position tables of DiT, which were left to the model, are the model's own."""
    golden = golden("ckpt_adapt")
    model = build(golden, case)
    own, expected = model.state_dict(), golden.outputs(case)
    tables = {key: own[key] for key in golden.kwargs(case)["missing"] if key.startswith("pos_embed")}
    adapted = model.adapt_state_dict(golden.inputs(case))
    assert adapted.keys() == expected.keys() | tables.keys()
    assert all(torch.equal(adapted[key], value) for key, value in (expected | tables).items())
    report = model.load_state_dict(adapted, strict=False)
    assert set(report.missing_keys) == set(golden.kwargs(case)["missing"]) - tables.keys()
    assert report.unexpected_keys == golden.kwargs(case)["unexpected"]


def test_dit_takes_the_weights_of_another_size(golden):
    state = golden("dit_label_image").state
    spec = DiT.Spec(hidden_size=48, depth=2, num_heads=2, condition="label_10")
    model = DiT(spec, latent_channels=4, latent_size=(2, 10, 10), text_width=None)
    model.load_state_dict(model.adapt_state_dict(state))
    assert model.pos_embed_spatial.shape == (1, 25, 48)


@pytest.mark.parametrize("case", ["pixart_extend_text", "pixart_shrink_text"])
def test_null_caption_is_fitted_to_the_length_of_the_text(golden, case):
    golden = golden("ckpt_adapt")
    length = golden.kwargs(case)["model_config"]["model_max_length"]
    model = STDiT3(STDiT3.Spec(hidden_size=12, depth=1, num_heads=2, mlp_ratio=1.0, qk_norm=False), latent_channels=4,
                   text_width=8, text_length=length)  # fmt: skip
    adapted = model.adapt_state_dict(golden.inputs(case))
    key = "y_embedder.y_embedding"
    assert torch.equal(adapted[key], golden.outputs(case)[key])
    assert not model.load_state_dict(adapted, strict=False).unexpected_keys


def test_own_state_comes_back_unchanged(golden):
    state = golden("stdit3_qknorm").state
    model = STDiT3(STDiT3.Spec(hidden_size=48, depth=2, num_heads=4), latent_channels=4, text_width=16, text_length=6)
    adapted = model.adapt_state_dict(state)
    assert adapted.keys() == state.keys()
    assert all(adapted[key] is state[key] for key in state)


def test_real_pixart_keys_fill_the_spatial_half_of_the_preset(golden_json):
    """Published shapes of PixArt-Sigma, in the layout of its own files (2-D patch weights, a position table)."""
    keys = golden_json("keys_PixArt-Sigma-XL-2")["keys"] | {"x_embedder.proj.weight": [1152, 4, 2, 2]}
    state = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
    with torch.device("meta"):
        model = STDiT3_XL_2(STDiT3_XL_2.Spec(), latent_channels=4, text_width=4096, text_length=300)
    own = model.state_dict()
    adapted = model.adapt_state_dict(state)
    assert all(own[key].shape == value.shape for key, value in adapted.items())
    missing = {key for key in own if key not in adapted}
    assert all(
        key.startswith(("temporal_blocks.", "fps_embedder.", "rope.")) or "_norm.weight" in key for key in missing
    )
    assert len(own) - len(missing) == len(keys) - 2  # all but the two position tables
