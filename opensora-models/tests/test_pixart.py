"""PixArt and PixArtMS: reference vectors, published shapes, and what must hold for any weights."""

from __future__ import annotations

import attrs
import pytest
import torch

from opensora.core.conditioning import Conditioning
from opensora.core.errors import ConfigError, ShapeError
from opensora.models.pixart import PixArt, PixArt_1B_2, PixArt_XL_2, PixArtMS, PixArtMS_XL_2

FILES = {
    "pixart_video": PixArt,
    "pixart_image_base": PixArt,
    "pixartms": PixArtMS,
    "pixartms_video": PixArtMS,
}
RUNTIME = ("input_size", "caption_channels", "model_max_length")


def build_golden(golden, kind) -> PixArt:
    model = kind(
        kind.Spec(**{key: value for key, value in golden.config.items() if key not in RUNTIME}),
        latent_channels=4,
        latent_size=tuple(golden.config["input_size"]),
        text_width=golden.config["caption_channels"],
        text_length=golden.config["model_max_length"],
    )
    model.load_state_dict(golden.state)
    return model.eval()


def golden_conditioning(inputs) -> Conditioning:
    """The recorded conditions; those of half the batch are repeated."""
    batch = len(inputs["x"])
    inputs = {key: value.repeat(batch // len(value), *[1] * (value.dim() - 1)) for key, value in inputs.items()}
    sizes = {}
    if "hw" in inputs:
        height, width = inputs["hw"].unbind(1)
        sizes = {"height": height, "width": width, "aspect_ratio": inputs["ar"].squeeze(1)}
    mask = inputs["mask"].bool() if "mask" in inputs else None
    return Conditioning(text_embedding=inputs["y"].squeeze(1), text_mask=mask, **sizes)


def tiny(kind=PixArt, *, size=(2, 4, 6), text_length: int = 5, **options) -> PixArt:
    """A small model whose weights are all random, zero-initialised ones included."""
    torch.manual_seed(0)
    spec = kind.Spec(**{"hidden_size": 24, "depth": 2, "num_heads": 2, **options})
    model = kind(spec, latent_channels=3, latent_size=size, text_width=6, text_length=text_length).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(*, batch: int = 2, size=(2, 4, 6), text_length: int = 5, **conditions):
    """(latents, timestep, conditioning) of random samples."""
    generator = torch.Generator().manual_seed(1)
    fixed = {
        "text_embedding": torch.randn(batch, text_length, 6, generator=generator),
        "text_mask": torch.arange(text_length) < torch.arange(1, batch + 1)[:, None],
        "height": torch.full((batch,), 32.0),
        "width": torch.full((batch,), 48.0),
        "aspect_ratio": torch.full((batch,), 32 / 48),
    }
    latents = torch.randn(batch, 3, *size, generator=generator)
    return latents, torch.linspace(100.5, 900, batch), Conditioning(**fixed | conditions)


@pytest.mark.parametrize("case", ["mask", "nomask", "halfmask"])
@pytest.mark.parametrize(("file", "kind"), FILES.items(), ids=FILES)
def test_reference_outputs_and_gradients(golden, assert_gradients, file, kind, case):
    golden = golden(file)
    model = build_golden(golden, kind)
    given = golden.inputs(case)
    latents = given["x"].requires_grad_()
    output = model(latents, given["timestep"], golden_conditioning(given))
    torch.testing.assert_close(output, golden.outputs(case)["x"], atol=1e-5, rtol=0)
    if expected := golden.grads(case):
        assert_gradients(model, latents, output, expected)


@pytest.mark.parametrize(("file", "kind"), FILES.items(), ids=FILES)
def test_position_tables_are_those_of_the_reference(golden, file, kind):
    golden = golden(file)
    spec = kind.Spec(**{key: value for key, value in golden.config.items() if key not in RUNTIME})
    fresh = kind(spec, latent_channels=4, latent_size=tuple(golden.config["input_size"]), text_width=16, text_length=6)
    for name in ("pos_embed", "pos_embed_temporal"):
        torch.testing.assert_close(fresh.get_buffer(name), golden.state[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("preset", "table", "side", "length"),
    [
        (PixArt_XL_2, "PixArt-XL-2", 64, 120),
        (PixArt_1B_2, "PixArt-1B-2", 128, 300),
        (PixArtMS_XL_2, "PixArtMS-XL-2", 128, 120),
    ],
)
def test_presets_have_the_published_keys_and_counts(assert_key_table, preset, table, side, length):
    with torch.device("meta"):
        model = preset(
            preset.Spec(), latent_channels=4, latent_size=(1, side, side), text_width=4096, text_length=length
        )
    assert_key_table(model, table)


@pytest.mark.parametrize("case", ["pixart_extend_text", "pixart_shrink_text"])
def test_published_weights_are_adapted(golden, case):
    golden = golden("ckpt_adapt")
    options = dict(golden.kwargs(case)["model_config"])
    runtime = {"latent_channels": 4, "latent_size": tuple(options.pop("input_size"))}
    runtime |= {"text_width": options.pop("caption_channels"), "text_length": options.pop("model_max_length")}
    model = PixArt(PixArt.Spec(**options), **runtime)
    expected = golden.outputs(case) | {name: model.get_buffer(name) for name in golden.kwargs(case)["missing"]}
    adapted = model.adapt_state_dict(golden.inputs(case))
    assert adapted.keys() == expected.keys() == model.state_dict().keys()
    assert all(torch.equal(adapted[key], value) for key, value in expected.items())
    model.load_state_dict(adapted)


def test_weights_of_one_size_serve_another(golden):
    golden = golden("pixart_video")
    spec = PixArt.Spec(hidden_size=48, depth=2, num_heads=4)
    model = PixArt(spec, latent_channels=4, latent_size=(5, 4, 10), text_width=16, text_length=6)
    model.load_state_dict(model.adapt_state_dict(golden.state))
    assert (model.pos_embed.shape, model.pos_embed_temporal.shape) == ((1, 10, 48), (1, 5, 48))


def test_fresh_model_predicts_zero_and_has_yet_to_listen_to_text():
    spec = PixArt.Spec(hidden_size=16, depth=2, num_heads=2)
    model = PixArt(spec, latent_channels=3, latent_size=(2, 4, 6), text_width=6, text_length=5)
    latents, timestep, conditioning = inputs()
    assert not model(latents, timestep, conditioning).any()
    torch.nn.init.ones_(model.final_layer.linear.weight)
    assert torch.equal(model(latents, timestep, conditioning), model(latents, timestep, conditioning.unconditional()))


@pytest.mark.parametrize("kind", [PixArt, PixArtMS])
def test_samples_do_not_depend_on_their_batch(kind):
    model = tiny(kind)
    latents, timestep, conditioning = inputs(batch=3, height=torch.tensor([32.0, 512.0, 64.0]))
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


@pytest.mark.parametrize("same", [False, True], ids=["positions", "no_temporal_pos_emb"])
def test_frames_know_their_order_unless_told_otherwise(same):
    model = tiny(no_temporal_pos_emb=same)
    latents, *others = inputs()
    output = model(latents.flip(2), *others).flip(2)
    assert torch.allclose(output, model(latents, *others), atol=1e-5) is same


def test_base_size_and_space_scale_set_the_spacing_of_positions():
    """The table of a model with twice the base size and twice the scale is the same."""
    table = tiny(base_size=8).pos_embed
    assert torch.equal(tiny(base_size=16, space_scale=2.0).pos_embed, table)
    assert not torch.equal(tiny().pos_embed, table)
    assert torch.equal(tiny(base_size=4, size=(1, 4, 4)).pos_embed, tiny(size=(1, 4, 4)).pos_embed)  # its own size


def test_multi_scale_model_does_other_sizes_as_if_built_for_them():
    built_for_it = tiny(PixArtMS, size=(3, 8, 2), base_size=4)
    other = tiny(PixArtMS, size=(2, 4, 6), base_size=4)
    given = inputs(size=(3, 8, 2))
    torch.testing.assert_close(other(*given), built_for_it(*given), atol=1e-6, rtol=0)
    by_base_size = tiny(PixArtMS, size=None, base_size=4)  # for clips of different sizes
    assert by_base_size.latent_size == (1, 4, 4)
    torch.testing.assert_close(by_base_size(*given), built_for_it(*given), atol=1e-6, rtol=0)


def test_multi_scale_model_is_told_the_size():
    model = tiny(PixArtMS)
    latents, timestep, conditioning = inputs()
    output = model(latents, timestep, conditioning)
    for name in ("height", "width", "aspect_ratio"):
        changed = attrs.evolve(conditioning, **{name: getattr(conditioning, name) * 2})
        assert not torch.allclose(model(latents, timestep, changed), output, atol=1e-4), name


@pytest.mark.parametrize("autocast", [False, True], ids=["cast", "autocast"])
@pytest.mark.parametrize("kind", [PixArt, PixArtMS])
def test_bfloat16_stays_near_float32_and_returns_float32(kind, autocast):
    given = inputs()
    expected = tiny(kind)(*given)
    model = tiny(kind) if autocast else tiny(kind).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(*given)
    assert output.dtype == torch.float32
    assert (output - expected).abs().max() < 0.1 * expected.abs().max()


def test_gradients_reach_every_parameter():
    model = tiny(PixArtMS)
    model(*inputs(dropped=torch.tensor([False, True]))).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_freezing_the_attention_to_the_text():
    frozen = {name for name, parameter in tiny(freeze="text").named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in tiny().named_parameters() if "cross_attn" in name}


def test_drop_path_grows_with_depth_and_is_off_in_eval_mode():
    model = tiny(drop_path=0.5)
    assert [block.drop_path.probability for block in model.blocks] == [0, 0.5]
    assert torch.equal(model(*inputs()), tiny()(*inputs()))


def test_patch_size_and_sigma_shape_the_output():
    assert tiny(patch_size=(2, 2, 3), pred_sigma=False)(*inputs()).shape == (2, 3, 2, 4, 6)


@pytest.mark.parametrize(
    ("size", "nearest"),
    [((1, 33, 64), "1x32x64"), ((1, 32, 53), "1x32x52"), ((3, 1, 1), "3x2x2")],
    ids=["height", "width", "smaller-than-a-patch"],
)
@pytest.mark.parametrize("kind", [PixArt, PixArtMS])
def test_latent_size_that_can_not_be_done(kind, size, nearest):
    with pytest.raises(ShapeError, match=f"{kind.__name__} needs latents in multiples of .* Nearest: {nearest}"):
        tiny(kind, size=size)


def test_clips_of_different_sizes_are_refused():
    with pytest.raises(ShapeError, match=r"PixArt has one size, .* Use PixArtMS or STDiT3, or one image_size"):
        tiny(size=None)
    with pytest.raises(ShapeError, match=r"PixArtMS measures positions by one size, .* Set model\.base_size"):
        tiny(PixArtMS, size=None)


def test_latents_of_another_size():
    with pytest.raises(ShapeError, match="The latents are 2x6x4; this model was built for 2x4x6"):
        tiny()(*inputs(size=(2, 6, 4)))
    with pytest.raises(ShapeError, match=r"PixArtMS needs latents in multiples .* not 2x5x6 .* Nearest: 2x4x6"):
        tiny(PixArtMS)(*inputs(size=(2, 5, 6)))


def test_wrong_number_of_latent_channels():
    latents, *others = inputs()
    with pytest.raises(ShapeError, match="The latents have 2 channels; this model was built for 3"):
        tiny()(latents[:, :2], *others)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_embedding": None}, "PixArtMS needs the condition `text_embedding`"),
        ({"height": None}, "PixArtMS needs the condition `height`"),
        ({"aspect_ratio": None}, "PixArtMS needs the condition `aspect_ratio`"),
        ({"text_embedding": torch.zeros(2, 5, 7)}, "5 tokens of width 7; this model takes up to 5 of width 6"),
        ({"text_embedding": torch.zeros(2, 9, 6), "text_mask": None}, "text_encoder.model_max_length = 5"),
    ],
    ids=["no-text", "no-height", "no-aspect-ratio", "text-width", "text-length"],
)
def test_conditions_that_do_not_fit(changes, message):
    latents, timestep, conditioning = inputs()
    with pytest.raises(ShapeError, match=message):
        tiny(PixArtMS)(latents, timestep, attrs.evolve(conditioning, **changes))


@pytest.mark.parametrize("kind", [PixArt, PixArtMS])
def test_text_encoder_of_class_labels_is_refused(kind):
    with pytest.raises(ConfigError, match=f"{kind.__name__} is conditioned on text"):
        kind(kind.Spec(), latent_channels=4, latent_size=(1, 4, 4), text_width=None, text_length=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 18, "num_heads": 3}, "hidden_size 18 must be a multiple of 4"),
        ({"hidden_size": 16}, "hidden_size 16 must be a multiple of 3"),
        ({"patch_size": (0, 2, 2)}, "patch_size"),
        ({"base_size": 1}, "base_size 1 must be at least one patch"),
        ({"space_scale": 0.0}, "space_scale"),
        ({"freeze": "not_temporal"}, "freeze"),
        ({"class_dropout_prob": 1.5}, "class_dropout_prob"),
    ],
    ids=str,
)
def test_options_that_make_no_model(options, message):
    with pytest.raises(ValueError, match=message):
        PixArtMS.Spec(**{"num_heads": 2, **options})
