"""STDiT2: reference vectors, published shapes, and what must hold for any weights."""

from __future__ import annotations

import attrs
import pytest
import torch

from opensora.core.conditioning import Conditioning
from opensora.core.errors import ConfigError, ShapeError
from opensora.models.stdit2 import STDiT2, STDiT2_XL_2

FILES = ["stdit2_legacy_qknorm", "stdit2_qknorm", "stdit2_noqknorm"]
CASES = ["mask", "nomask", "odd_pad", "xmask", "halfcond"]
RUNTIME = ("in_channels", "caption_channels", "model_max_length", "input_size")
SIZES = ("num_frames", "height", "width", "fps")


def build_golden(golden) -> STDiT2:
    options = {key: value for key, value in golden.config.items() if key not in RUNTIME}
    model = STDiT2(
        STDiT2.Spec(**options | {"patch_size": tuple(options["patch_size"])}),
        latent_channels=golden.config["in_channels"],
        text_width=golden.config["caption_channels"],
        text_length=golden.config["model_max_length"],
    )
    model.load_state_dict(golden.state)
    return model.eval()


def golden_conditioning(golden, case) -> Conditioning:
    """The recorded conditions; those of half the batch are repeated."""
    given = golden.inputs(case)
    batch = len(given["x"])
    given = {key: value.repeat(batch // len(value), *[1] * (value.dim() - 1)) for key, value in given.items()}
    return Conditioning(
        text_embedding=given["y"].squeeze(1),
        text_mask=given["mask"].bool() if "mask" in given else None,
        frame_mask=given.get("x_mask"),
        aspect_ratio=given["ar"],
        **{name: given[name] for name in SIZES},
    )


def fresh(**options) -> STDiT2:
    """A small model as it is before training."""
    torch.manual_seed(0)
    spec = STDiT2.Spec(**{"hidden_size": 24, "depth": 2, "num_heads": 2, "qk_norm": True, **options})
    return STDiT2(spec, latent_channels=3, text_width=6, text_length=5).eval()


def tiny(**options) -> STDiT2:
    """A small model whose weights are all random, zero-initialised ones included."""
    model = fresh(**options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "rope.freqs":
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(*, batch: int = 2, size=(3, 4, 6), **conditions):
    """(latents, timestep, conditioning) of random samples."""
    generator = torch.Generator().manual_seed(1)
    fixed = {
        "text_embedding": torch.randn(batch, 5, 6, generator=generator),
        "text_mask": torch.arange(5) < torch.arange(1, batch + 1)[:, None],
        "fps": torch.linspace(8, 24, batch),
        "height": torch.full((batch,), 32.0),
        "width": torch.full((batch,), 48.0),
        "num_frames": torch.full((batch,), 3.0),
        "aspect_ratio": torch.full((batch,), 2 / 3),
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
        model = STDiT2_XL_2(STDiT2_XL_2.Spec(qk_norm=True), latent_channels=4, text_width=4096, text_length=200)
    assert_key_table(model, "STDiT2-XL-2")


def test_fresh_model_predicts_zero():
    assert not fresh()(*inputs()).any()


def test_initial_weights():
    model = fresh(hidden_size=96)
    width = 96
    for name in ["t_block.1", "t_block_temp.1", "t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.y_proj.fc2"]:
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
    model = tiny()
    with torch.no_grad():
        for block in model.blocks:
            block.attn_temp.proj.weight.zero_()
            block.attn_temp.proj.bias.zero_()
    latents, timestep, conditioning = inputs()
    video = model(latents, timestep, conditioning)
    frames = [model(latents[:, :, [index]], timestep, conditioning) for index in range(3)]
    torch.testing.assert_close(video, torch.cat(frames, dim=2), atol=1e-5, rtol=0)


def test_order_of_norm_and_rotation_is_told_apart():
    legacy, current = tiny(qk_norm_legacy=True), tiny()
    current.load_state_dict(legacy.state_dict())
    assert not torch.allclose(legacy(*inputs()), current(*inputs()), atol=1e-4)
    with torch.no_grad():  # they differ by the norms' weights alone, which a rotation doesn't pass by
        for model in (legacy, current):
            for block in model.blocks:
                block.attn_temp.q_norm.weight.fill_(1)
                block.attn_temp.k_norm.weight.fill_(1)
    torch.testing.assert_close(legacy(*inputs()), current(*inputs()), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["num_frames", "height", "width", "aspect_ratio", "fps"])
def test_every_size_and_rate_counts_for_its_own_sample(name):
    """Height and width of the second sample, that is: positions follow the first sample's."""
    model = tiny()
    latents, timestep, conditioning = inputs()
    before = model(latents, timestep, conditioning)
    changed = getattr(conditioning, name) * torch.tensor([1.0, 1.5])
    after = model(latents, timestep, conditioning.replace(**{name: changed}))
    torch.testing.assert_close(after[0], before[0], atol=1e-6, rtol=0)
    assert not torch.allclose(after[1], before[1], atol=1e-4)


def test_first_sample_decides_the_scale_of_positions():
    model = tiny()
    latents, _, conditioning = inputs()
    taller = conditioning.replace(height=torch.tensor([320.0, 32.0]))
    x, rescaled = model.embed_patches(latents, conditioning), model.embed_patches(latents, taller)
    assert not torch.allclose(rescaled[1], x[1], atol=1e-3)
    last = conditioning.replace(height=torch.tensor([32.0, 320.0]))
    assert torch.equal(model.embed_patches(latents, last), x)


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


def test_frame_mask_of_ones_is_no_mask_and_of_zeros_hides_the_timestep_from_the_blocks():
    model = tiny()
    latents, timestep, conditioning = inputs()
    ones = conditioning.replace(frame_mask=torch.ones(2, 3, dtype=torch.bool))
    torch.testing.assert_close(
        model(latents, timestep, ones), model(latents, timestep, conditioning), atol=1e-6, rtol=0
    )
    seen: list[torch.Tensor] = []
    model.final_layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    zeros = conditioning.replace(frame_mask=torch.zeros(2, 3, dtype=torch.bool))
    for each in (timestep, timestep * 0.5):
        model(latents, each, zeros)
    assert torch.equal(*seen)


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 3, 5), (7, 2, 9)], ids=str)
def test_any_size_comes_back_as_it_was(size):
    assert tiny()(*inputs(size=size)).shape == (2, 6, *size)


def test_patch_size_and_sigma_shape_the_output():
    assert tiny(patch_size=(2, 3, 2), pred_sigma=False)(*inputs(size=(3, 5, 6))).shape == (2, 3, 3, 5, 6)


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
        (None, lambda name: name != "rope.freqs"),
        ("not_temporal", lambda name: "attn_temp" in name),
        ("text", lambda name: name != "rope.freqs" and "cross_attn" not in name),
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


def test_published_image_weights_fill_what_an_image_model_has(golden):
    golden = golden("ckpt_adapt")
    spec = STDiT2.Spec(hidden_size=12, depth=1, num_heads=2, mlp_ratio=1.0)
    model = STDiT2(spec, latent_channels=4, text_width=8, text_length=9)
    report = model.load_state_dict(model.adapt_state_dict(golden.inputs("pixart_to_stdit")), strict=False)
    assert not report.unexpected_keys
    temporal = ("attn_temp", "_temporal", "t_block_temp", "csize_", "ar_", "fl_", "fps_", "rope.")
    assert all(any(part in key for part in temporal) for key in report.missing_keys)
    given = golden.inputs("pixart_to_stdit")
    assert torch.equal(model.x_embedder.proj.weight.squeeze(2), given["x_embedder.proj.weight"])
    assert torch.equal(model.y_embedder.y_embedding[6:], given["y_embedder.y_embedding"][[5, 5, 5]])


def test_own_state_comes_back_unchanged(golden):
    golden = golden("stdit2_qknorm")
    adapted = build_golden(golden).adapt_state_dict(golden.state)
    assert adapted.keys() == golden.state.keys()
    assert all(adapted[key] is golden.state[key] for key in adapted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *[({name: None}, f"STDiT2 needs the condition `{name}`") for name in (*SIZES, "aspect_ratio")],
        ({"text_embedding": None}, "STDiT2 needs the condition `text_embedding`"),
        ({"text_embedding": torch.zeros(2, 5, 7)}, "5 tokens of width 7; this model takes up to 5 of width 6"),
        ({"text_embedding": torch.zeros(2, 9, 6), "text_mask": None}, "text_encoder.model_max_length = 5"),
    ],
    ids=[*SIZES, "aspect-ratio", "no-text", "text-width", "text-length"],
)
def test_conditions_that_do_not_fit(changes, message):
    latents, timestep, conditioning = inputs()
    with pytest.raises(ShapeError, match=message):
        tiny()(latents, timestep, attrs.evolve(conditioning, **changes))


def test_wrong_number_of_latent_channels():
    latents, timestep, conditioning = inputs()
    with pytest.raises(ShapeError, match="The latents have 2 channels; this model was built for 3"):
        tiny()(latents[:, :2], timestep, conditioning)


def test_text_encoder_of_class_labels_is_refused():
    with pytest.raises(ConfigError, match="conditioned on text"):
        STDiT2(STDiT2.Spec(), latent_channels=4, text_width=None, text_length=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 32, "num_heads": 2}, "hidden_size 32 must be a multiple of 12"),
        ({"hidden_size": 36, "num_heads": 4}, r"twice num_heads \(8\)"),
        ({"patch_size": (0, 2, 2)}, "patch_size"),
        ({"depth": 0}, "depth"),
        ({"input_sq_size": 0}, "input_sq_size"),
        ({"freeze": "temporal"}, "freeze"),
    ],
)
def test_options_that_make_no_model(options, message):
    with pytest.raises(ValueError, match=message):
        STDiT2.Spec(**options)
