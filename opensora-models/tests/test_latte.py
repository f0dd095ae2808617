"""Latte: reference vectors, published shapes, and what sets it apart from DiT, whose tests hold for the rest."""

from __future__ import annotations

import pytest
import torch

from opensora.core.conditioning import Conditioning
from opensora.core.errors import ConfigError, ShapeError
from opensora.models.latte import Latte, Latte_XL_2, Latte_XL_2x2

FILES = ["latte_text", "latte_label"]
RUNTIME = ("input_size", "caption_channels", "model_max_length")


def build_golden(golden) -> Latte:
    spec = Latte.Spec(**{key: value for key, value in golden.config.items() if key not in RUNTIME})
    width = golden.config["caption_channels"] if spec.condition == "text" else None
    model = Latte(spec, latent_channels=4, latent_size=tuple(golden.config["input_size"]), text_width=width)
    model.load_state_dict(golden.state)
    return model.eval()


def golden_conditioning(model, y) -> Conditioning:
    return Conditioning(labels=y) if model.spec.num_classes else Conditioning(text_embedding=y.squeeze(1))


def tiny(*, size=(3, 4, 4), text_width=None, **options) -> Latte:
    """A small model whose weights are all random, zero-initialised ones included."""
    torch.manual_seed(0)
    condition = "label_3" if text_width is None else "text"
    spec = Latte.Spec(**{"hidden_size": 16, "depth": 3, "num_heads": 2, "condition": condition, **options})
    model = Latte(spec, latent_channels=3, latent_size=size, text_width=text_width).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


LATENTS = torch.randn(2, 3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
TIMESTEP = torch.tensor([3, 700])
LABELS = Conditioning(labels=torch.tensor([0, 2]))


@pytest.mark.parametrize("file", FILES)
def test_reference_outputs_and_gradients(golden, assert_gradients, file):
    golden = golden(file)
    model = build_golden(golden)
    given = golden.inputs("plain")
    latents = given["x"].requires_grad_()
    output = model(latents, given["timestep"], golden_conditioning(model, given["y"]))
    torch.testing.assert_close(output, golden.outputs("plain")["x"], atol=1e-5, rtol=0)
    assert_gradients(model, latents, output, golden.grads("plain"))


@pytest.mark.parametrize("case", ["cfg", "cfg3"])
@pytest.mark.parametrize("file", FILES)
def test_reference_outputs_under_guidance(golden, file, case):
    """The recorded wrapper runs both halves on the first half's latents; guidance itself belongs to the schedulers."""
    golden = golden(file)
    model = build_golden(golden)
    given, options = golden.inputs(case), golden.kwargs(case)
    latents = given["x"][: len(given["x"]) // 2].repeat(2, 1, 1, 1, 1)
    output = model(latents, given["timestep"], golden_conditioning(model, given["y"]))
    guided = options.get("cfg_channel") or output.shape[1] // 2
    conditional, null = output[:, :guided].chunk(2)
    prediction = (null + options["cfg_scale"] * (conditional - null)).repeat(2, 1, 1, 1, 1)
    output = torch.cat([prediction, output[:, guided:]], dim=1)
    torch.testing.assert_close(output, golden.outputs(case)["x"], atol=1e-5 * options["cfg_scale"], rtol=0)


@pytest.mark.parametrize(
    ("preset", "condition", "table"),
    [
        (Latte_XL_2, "text", "Latte-XL-2"),
        (Latte_XL_2, "label_101", "Latte-XL-2-label_101"),
        (Latte_XL_2x2, "text", "Latte-XL-2x2"),
    ],
)
def test_presets_have_the_published_keys_and_counts(assert_key_table, preset, condition, table):
    with torch.device("meta"):
        model = preset(preset.Spec(condition=condition), latent_channels=4, latent_size=(16, 32, 32),
                       text_width=512 if condition == "text" else None)  # fmt: skip
    assert_key_table(model, table)


def test_fresh_model_predicts_zero():
    spec = Latte.Spec(hidden_size=16, depth=2, num_heads=2, condition="label_3")
    model = Latte(spec, latent_channels=3, latent_size=(3, 4, 4), text_width=None)
    assert not model(LATENTS, TIMESTEP, LABELS).any()


def test_spatial_blocks_see_one_frame_and_temporal_blocks_one_position():
    def reached(depth: int) -> torch.Tensor:
        """[T, 4 tokens] Where a change of the first token of frame 1 is felt."""
        model = tiny(depth=depth)
        changed = LATENTS.clone()
        changed[:, :, 1, :2, :2] += 1
        difference = (model(changed, TIMESTEP, LABELS) - model(LATENTS, TIMESTEP, LABELS)).abs().amax((0, 1))
        return torch.nn.functional.max_pool2d(difference, 2).flatten(1) > 1e-6

    assert reached(1).tolist() == [[False] * 4, [True] * 4, [False] * 4]
    assert reached(2).all()
    temporal = tiny(depth=2).blocks[1]
    x = torch.randn(2, 3, 4, 16)
    changed = x.clone()
    changed[:, 1, 0] = torch.randn(2, 16)
    felt = (temporal(changed, torch.zeros(2, 16)) - temporal(x, torch.zeros(2, 16))).abs().amax((0, 3)) > 1e-6
    assert felt.tolist() == [[True, False, False, False]] * 3


def test_frames_know_their_order_from_the_first_temporal_block_on():
    swapped = LATENTS.flip(2)
    for depth, same in ((1, True), (2, False)):
        model = tiny(depth=depth, no_temporal_pos_emb=True)  # an option that has no effect here
        output = model(swapped, TIMESTEP, LABELS).flip(2)
        assert torch.allclose(output, model(LATENTS, TIMESTEP, LABELS), atol=1e-5) is same


def test_samples_do_not_depend_on_their_batch():
    model = tiny()
    together = model(LATENTS, TIMESTEP, LABELS)
    for one in (slice(0, 1), slice(1, 2)):
        torch.testing.assert_close(model(LATENTS[one], TIMESTEP[one], LABELS[one]), together[one], atol=1e-5, rtol=0)


def test_dropped_caption_is_the_null_caption():
    model = tiny(text_width=5)
    text = Conditioning(text_embedding=torch.randn(2, 1, 5))
    null = Conditioning(text_embedding=model.y_embedder.y_embedding.expand(2, 1, 5))
    torch.testing.assert_close(
        model(LATENTS, TIMESTEP, text.unconditional()), model(LATENTS, TIMESTEP, null), atol=1e-6, rtol=0
    )


def test_patch_over_several_frames():
    assert tiny(size=(4, 4, 4), patch_size=(2, 2, 2), learn_sigma=False)(
        torch.zeros(2, 3, 4, 4, 4), TIMESTEP, LABELS
    ).shape == (2, 3, 4, 4, 4)


def test_bfloat16_returns_float32():
    output = tiny().bfloat16()(LATENTS, TIMESTEP, LABELS)
    expected = tiny()(LATENTS, TIMESTEP, LABELS)
    assert output.dtype == torch.float32
    assert (output - expected).abs().max() < 0.1 * expected.abs().max()


def test_messages_name_latte():
    with pytest.raises(ShapeError, match="Latte needs square latents in multiples of its patch 1x2x2, not 16x32x30"):
        tiny(size=(16, 32, 30))
    with pytest.raises(ShapeError, match="Latte has one size"):
        tiny(size=None)
    with pytest.raises(ShapeError, match="The latents are 2x4x4; this model was built for 3x4x4"):
        tiny()(LATENTS[:, :, :2], TIMESTEP, LABELS)
    with pytest.raises(ShapeError, match="Latte needs the condition `labels`"):
        tiny()(LATENTS, TIMESTEP, Conditioning(text_embedding=torch.zeros(2, 1, 5)))
    with pytest.raises(ConfigError, match="Latte takes one vector a caption; this text encoder gives 300 tokens"):
        Latte(Latte.Spec(), latent_channels=4, latent_size=(1, 4, 4), text_width=4096, text_length=300)


def test_published_weights_are_adapted(golden):
    golden = golden("ckpt_adapt")
    options = dict(golden.kwargs("latte_official")["model_config"])
    size = tuple(options.pop("input_size"))
    model = Latte(Latte.Spec(**options), latent_channels=4, latent_size=size, text_width=None)
    tables = {name: model.get_buffer(name) for name in golden.kwargs("latte_official")["missing"]}
    adapted = model.adapt_state_dict(golden.inputs("latte_official"))
    expected = golden.outputs("latte_official") | tables
    assert adapted.keys() == expected.keys() == model.state_dict().keys()
    assert all(torch.equal(adapted[key], value) for key, value in expected.items())
    model.load_state_dict(adapted)
