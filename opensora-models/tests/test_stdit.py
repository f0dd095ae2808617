"""STDiT: reference vectors, published shapes, and what must hold for any weights."""

from __future__ import annotations

import attrs
import pytest
import torch
from safetensors.torch import save_file

from opensora.core.conditioning import Conditioning
from opensora.core.errors import ConfigError, ShapeError, WeightsError
from opensora.core.weights import load_weights
from opensora.models.pixart import PixArt
from opensora.models.stdit import STDiT, STDiT_XL_2

FILES = ["stdit_base", "stdit_scaled_rect", "stdit_patch222"]
CASES = ["mask", "nomask", "xmask", "cfg_halfmask"]
RUNTIME = ("in_channels", "caption_channels", "model_max_length", "input_size")


def build_golden(golden) -> STDiT:
    options = {key: value for key, value in golden.config.items() if key not in RUNTIME}
    model = STDiT(
        STDiT.Spec(**options | {"patch_size": tuple(options["patch_size"])}),
        latent_channels=golden.config["in_channels"],
        latent_size=tuple(golden.config["input_size"]),
        text_width=golden.config["caption_channels"],
        text_length=golden.config["model_max_length"],
    )
    model.load_state_dict(golden.state)
    return model.eval()


def golden_conditioning(golden, case) -> Conditioning:
    """The recorded conditions; a mask of half the batch is repeated, and frame masks spread from tokens to frames."""
    given = golden.inputs(case)
    batch, mask, frame_mask = len(given["x"]), given.get("mask"), given.get("x_mask")
    return Conditioning(
        text_embedding=given["y"].squeeze(1),
        text_mask=None if mask is None else mask.bool().repeat(batch // len(mask), 1),
        frame_mask=None if frame_mask is None else frame_mask.repeat_interleave(golden.config["patch_size"][0], dim=1),
    )


def fresh(*, size=(3, 4, 6), **options) -> STDiT:
    """A small model as it is before training."""
    torch.manual_seed(0)
    spec = STDiT.Spec(**{"hidden_size": 16, "depth": 2, "num_heads": 2, **options})
    return STDiT(spec, latent_channels=3, latent_size=size, text_width=6, text_length=5).eval()


def tiny(*, size=(3, 4, 6), **options) -> STDiT:
    """A small model whose weights are all random, zero-initialised ones included."""
    model = fresh(size=size, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(*, batch: int = 2, size=(3, 4, 6), **conditions):
    """(latents, timestep, conditioning) of random samples."""
    generator = torch.Generator().manual_seed(1)
    fixed = {
        "text_embedding": torch.randn(batch, 5, 6, generator=generator),
        "text_mask": torch.arange(5) < torch.arange(1, batch + 1)[:, None],
    }
    latents = torch.randn(batch, 3, *size, generator=generator)
    return latents, torch.linspace(100.5, 900, batch), Conditioning(**fixed | conditions)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("file", FILES)
def test_reference_outputs_and_gradients(golden, assert_gradients, file, case):
    golden = golden(file)
    model = build_golden(golden)
    latents = golden.inputs(case)["x"].requires_grad_()
    output = model(latents, golden.inputs(case)["timestep"], golden_conditioning(golden, case))
    torch.testing.assert_close(output, golden.outputs(case)["x"], atol=1e-5, rtol=0)
    if expected := golden.grads(case):
        assert_gradients(model, latents, output, expected)


def test_preset_has_the_published_keys_and_counts(assert_key_table):
    with torch.device("meta"):
        model = STDiT_XL_2(
            STDiT_XL_2.Spec(), latent_channels=4, latent_size=(16, 32, 32), text_width=4096, text_length=120
        )
    assert_key_table(model, "STDiT-XL-2")


def test_fresh_model_predicts_zero():
    assert not fresh()(*inputs()).any()


def test_initial_weights():
    model = fresh(hidden_size=96)
    width = 96
    for name in ["t_block.1", "t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.y_proj.fc2"]:
        assert model.get_parameter(f"{name}.weight").std().item() == pytest.approx(0.02, rel=0.1)
    for name in ("attn.qkv", "attn_temp.qkv", "mlp.fc1"):
        weight = model.blocks[0].get_parameter(f"{name}.weight")
        bound = (6 / sum(weight.shape)) ** 0.5  # Xavier, uniform
        assert bound == pytest.approx(weight.abs().max().item(), rel=0.02)
    for name in ("attn_temp.proj", "cross_attn.proj"):
        assert not any(model.blocks[1].get_parameter(f"{name}.{kind}").any() for kind in ("weight", "bias"))
    assert model.blocks[0].scale_shift_table.std().item() == pytest.approx(width**-0.5, rel=0.15)


def test_starts_as_an_image_model():
    """A fresh temporal attention adds nothing, so each frame of a video comes out as it would alone."""
    video_model, image_model = tiny(), fresh(size=(1, 4, 6))
    with torch.no_grad():
        for block in video_model.blocks:
            block.attn_temp.proj.weight.zero_()
            block.attn_temp.proj.bias.zero_()
    state = {key: value for key, value in video_model.state_dict().items() if "attn_temp" not in key}
    image_model.load_state_dict(image_model.adapt_state_dict(state), strict=False)
    latents, timestep, conditioning = inputs()
    frames = [image_model(latents[:, :, [index]], timestep, conditioning) for index in range(3)]
    torch.testing.assert_close(
        video_model(latents, timestep, conditioning), torch.cat(frames, dim=2), atol=1e-5, rtol=0
    )


def test_frames_know_their_order_and_their_scale():
    latents, timestep, conditioning = inputs()
    model = tiny()
    flipped = model(latents.flip(2), timestep, conditioning).flip(2)
    assert not torch.allclose(flipped, model(latents, timestep, conditioning), atol=1e-3)
    scaled = tiny(time_scale=2 / 3, space_scale=0.5)
    assert torch.equal(scaled.pos_embed_temporal[0, 2], tiny(size=(4, 4, 6)).pos_embed_temporal[0, 3])
    assert torch.equal(scaled.pos_embed[0, 1], tiny(size=(3, 4, 6)).pos_embed[0, 2])


def test_samples_do_not_depend_on_their_batch():
    model = tiny()
    latents, timestep, conditioning = inputs(batch=3, frame_mask=torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 1]]).bool())
    together = model(latents, timestep, conditioning)
    for index in range(3):
        one = slice(index, index + 1)
        torch.testing.assert_close(
            model(latents[one], timestep[one], conditioning[one]), together[one], atol=1e-5, rtol=0
        )


def test_padded_text_is_not_seen():
    model = tiny()
    latents, timestep, conditioning = inputs()
    noise = torch.where(conditioning.text_mask[..., None], 0, torch.randn(conditioning.text_embedding.shape))
    changed = conditioning.replace(text_embedding=conditioning.text_embedding + noise)
    torch.testing.assert_close(
        model(latents, timestep, changed), model(latents, timestep, conditioning), atol=1e-6, rtol=0
    )


def test_dropped_captions_become_the_null_caption_under_their_own_mask():
    model = tiny()
    latents, timestep, conditioning = inputs()
    text = conditioning.text_embedding.clone()
    text[1] = model.y_embedder.y_embedding
    dropped = model(latents, timestep, conditioning.replace(dropped=torch.tensor([False, True])))
    expected = model(latents, timestep, conditioning.replace(text_embedding=text))
    torch.testing.assert_close(dropped, expected, atol=1e-6, rtol=0)
    assert not torch.allclose(dropped[1], model(latents, timestep, conditioning)[1], atol=1e-3)


def test_frame_mask_of_ones_is_no_mask():
    model = tiny()
    latents, timestep, conditioning = inputs()
    ones = conditioning.replace(frame_mask=torch.ones(2, 3, dtype=torch.bool))
    torch.testing.assert_close(
        model(latents, timestep, ones), model(latents, timestep, conditioning), atol=1e-6, rtol=0
    )


def test_given_frames_see_the_timestep_in_the_temporal_gate_alone():
    """... and in the final layer, whose share is taken out here."""
    model = tiny()
    latents, timestep, conditioning = inputs(frame_mask=torch.zeros(2, 3, dtype=torch.bool))
    with torch.no_grad():
        model.final_layer.scale_shift_table.zero_()
        model.final_layer.linear.weight.zero_()
        earlier = timestep * 0.5
        assert torch.equal(model(latents, timestep, conditioning), model(latents, earlier, conditioning))

        model = tiny()
        model.final_layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        seen: list[torch.Tensor] = []
        for each in (timestep, earlier):
            model(latents, each, conditioning)
        assert not torch.allclose(seen[0], seen[1], atol=1e-4)
        for block in model.blocks:
            block.attn_temp.proj.weight.zero_()
            block.attn_temp.proj.bias.zero_()
        for each in (timestep, earlier):
            model(latents, each, conditioning)
        assert torch.equal(seen[2], seen[3])


def test_patch_size_and_sigma_shape_the_output():
    model = tiny(size=(4, 6, 6), patch_size=(2, 3, 2), pred_sigma=False)
    assert model(*inputs(size=(4, 6, 6))).shape == (2, 3, 4, 6, 6)


@pytest.mark.parametrize("autocast", [False, True], ids=["cast", "autocast"])
def test_bfloat16_stays_near_float32_and_returns_float32(autocast):
    latents, timestep, conditioning = inputs()
    expected = tiny()(latents, timestep, conditioning)
    model = tiny() if autocast else tiny().bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(latents, timestep, conditioning)
    assert output.dtype == torch.float32
    assert (output - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize(
    ("freeze", "is_trained"),
    [
        (None, lambda name: True),
        ("not_temporal", lambda name: "attn_temp" in name),
        ("text", lambda name: "cross_attn" not in name),
    ],
    ids=["nothing", "not_temporal", "text"],
)
def test_freezing(freeze, is_trained):
    trained = {name for name, parameter in tiny(freeze=freeze).named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in tiny().named_parameters() if is_trained(name)}


def test_drop_path_grows_with_depth_and_changes_training_only():
    model = tiny(drop_path=0.5)
    assert [block.drop_path.probability for block in model.blocks] == [0, 0.5]
    expected = tiny()(*inputs(batch=8))
    assert torch.equal(model(*inputs(batch=8)), expected)
    assert not torch.allclose(model.train()(*inputs(batch=8)), expected, atol=1e-3)


def test_published_image_weights_fill_all_but_the_temporal_attention(golden):
    """Recorded entries come out as recorded; position tables are the model's own."""
    golden = golden("ckpt_adapt")
    case = golden.kwargs("pixart_to_stdit")
    spec = STDiT.Spec(hidden_size=12, depth=1, num_heads=2, mlp_ratio=1.0)
    model = STDiT(spec, latent_channels=4, latent_size=(2, 4, 4), text_width=8, text_length=6)
    adapted = model.adapt_state_dict(golden.inputs("pixart_to_stdit"))
    assert all(torch.equal(adapted[key], value) for key, value in golden.outputs("pixart_to_stdit").items())
    report = model.load_state_dict(adapted, strict=False)
    tables = {"pos_embed", "pos_embed_temporal"}
    assert set(report.missing_keys) == set(case["missing"]) - tables
    assert report.unexpected_keys == case["unexpected"]


def test_every_frame_comes_out_as_the_image_model_makes_it():
    torch.manual_seed(0)
    options = {"hidden_size": 16, "depth": 2, "num_heads": 2}
    told = {"latent_channels": 3, "text_width": 6, "text_length": 5}
    image_model = PixArt(PixArt.Spec(no_temporal_pos_emb=True, **options), latent_size=(1, 6, 6), **told).eval()
    with torch.no_grad():
        for parameter in image_model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    video_model = STDiT(STDiT.Spec(**options), latent_size=(3, 6, 6), **told).eval()
    video_model.load_state_dict(video_model.adapt_state_dict(image_model.state_dict()), strict=False)
    latents, timestep, conditioning = inputs(size=(3, 6, 6))
    video = video_model(latents, timestep, conditioning)
    for index in range(3):
        frame = image_model(latents[:, :, [index]], timestep, conditioning)
        torch.testing.assert_close(video[:, :, [index]], frame, atol=1e-5, rtol=0)


def test_only_a_whole_temporal_attention_may_be_missing(tmp_path):
    state = tiny().state_dict()
    image = {key: value for key, value in state.items() if "attn_temp" not in key}
    save_file(image, tmp_path / "image.safetensors")
    report = load_weights(model := fresh(), tmp_path / "image.safetensors")
    assert report.started == [key for key in state if "attn_temp" in key]
    assert torch.equal(model.blocks[1].attn.qkv.weight, image["blocks.1.attn.qkv.weight"])

    damaged = {key: value for key, value in state.items() if "blocks.1.attn_temp" not in key}
    save_file(damaged, tmp_path / "damaged.safetensors")
    with pytest.raises(WeightsError, match=r"4 missing: blocks\.1\.attn_temp"):
        load_weights(fresh(), tmp_path / "damaged.safetensors")


def test_published_weights_fit_another_size_and_length(golden):
    state = golden("stdit_base").state
    spec = STDiT.Spec(hidden_size=48, depth=2, num_heads=4, space_scale=1.0)
    model = STDiT(spec, latent_channels=4, latent_size=(5, 8, 4), text_width=16, text_length=9)
    model.load_state_dict(model.adapt_state_dict(state))
    assert model.pos_embed.shape == (1, 8, 48)
    assert torch.equal(model.y_embedder.y_embedding[8], state["y_embedder.y_embedding"][5])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_embedding": None}, "STDiT needs the condition `text_embedding`"),
        ({"text_embedding": torch.zeros(2, 5, 7)}, "5 tokens of width 7; this model takes up to 5 of width 6"),
        ({"text_embedding": torch.zeros(2, 9, 6), "text_mask": None}, "text_encoder.model_max_length = 5"),
    ],
    ids=["no-text", "text-width", "text-length"],
)
def test_conditions_that_do_not_fit(changes, message):
    latents, timestep, conditioning = inputs()
    with pytest.raises(ShapeError, match=message):
        tiny()(latents, timestep, attrs.evolve(conditioning, **changes))


def test_latents_of_another_size_or_number_of_channels():
    latents, timestep, conditioning = inputs()
    with pytest.raises(ShapeError, match="The latents are 2x4x6; this model was built for 3x4x6"):
        tiny()(latents[:, :, :2], timestep, conditioning)
    with pytest.raises(ShapeError, match="The latents have 2 channels; this model was built for 3"):
        tiny()(latents[:, :2], timestep, conditioning)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((3, 5, 7), "patch 1x2x2, not 3x5x7 .* Nearest: 3x4x8"),
        ((3, 1, 6), "Nearest: 3x2x6"),
        (None, "STDiT has one size"),
    ],
    ids=["not-a-multiple", "smaller-than-a-patch", "clips-of-different-sizes"],
)
def test_latent_size_that_can_not_be_done(size, message):
    with pytest.raises(ShapeError, match=message):
        tiny(size=size)


def test_text_encoder_of_class_labels_is_refused():
    with pytest.raises(ConfigError, match="conditioned on text"):
        STDiT(STDiT.Spec(), latent_channels=4, latent_size=(1, 4, 4), text_width=None, text_length=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 18, "num_heads": 3}, "hidden_size 18 must be a multiple of 4"),
        ({"patch_size": (0, 2, 2)}, "patch_size"),
        ({"depth": 0}, "depth"),
        ({"space_scale": 0.0}, "space_scale"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"freeze": "temporal"}, "freeze"),
    ],
)
def test_options_that_make_no_model(options, message):
    with pytest.raises(ValueError, match=message):
        STDiT.Spec(**options)
