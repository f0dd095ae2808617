"""STDiT3: reference vectors, published shapes, and what must hold for any weights."""

from __future__ import annotations

import attrs
import pytest
import torch

from opensora.core.conditioning import Conditioning
from opensora.core.errors import ConfigError, ShapeError
from opensora.models.stdit3 import STDiT3, STDiT3_3B_2, STDiT3_XL_2

FILES = ["stdit3_qknorm", "stdit3_noqknorm", "stdit3_patch222_nosigma"]
CASES = ["mask", "nomask", "odd_pad", "xmask", "image", "cfg_halfmask"]
RUNTIME = ("in_channels", "caption_channels", "model_max_length", "input_size")


def build_golden(golden) -> STDiT3:
    options = {key: value for key, value in golden.config.items() if key not in RUNTIME}
    model = STDiT3(
        STDiT3.Spec(**options | {"patch_size": tuple(options["patch_size"])}),
        latent_channels=golden.config["in_channels"],
        text_width=golden.config["caption_channels"],
        text_length=golden.config["model_max_length"],
    )
    model.load_state_dict(golden.state)
    return model.eval()


def golden_conditioning(golden, case) -> Conditioning:
    """The recorded conditions; those of half the batch are repeated, and frame masks spread from tokens to frames."""
    inputs = golden.inputs(case)
    batch, _, frames = inputs["x"].shape[:3]
    inputs = {key: value.repeat(batch // len(value), *[1] * (value.dim() - 1)) for key, value in inputs.items()}
    frame_mask = inputs.get("x_mask")
    if frame_mask is not None:
        frame_mask = frame_mask.repeat_interleave(golden.config["patch_size"][0], dim=1)[:, :frames]
    return Conditioning(
        text_embedding=inputs["y"].squeeze(1),
        text_mask=inputs["mask"].bool() if "mask" in inputs else None,
        frame_mask=frame_mask,
        fps=inputs["fps"],
        height=inputs["height"],
        width=inputs["width"],
    )


def tiny(*, seed: int = 0, text_length: int = 5, **options) -> STDiT3:
    """A small model whose weights are all random, zero-initialised ones included."""
    torch.manual_seed(seed)
    spec = STDiT3.Spec(**{"hidden_size": 16, "depth": 2, "num_heads": 2, **options})
    model = STDiT3(spec, latent_channels=3, text_width=6, text_length=text_length).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "rope.freqs":
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(*, batch: int = 2, size=(3, 4, 6), text_length: int = 5, text_width: int = 6, **conditions):
    """(latents, timestep, conditioning) of random samples."""
    generator = torch.Generator().manual_seed(1)
    fixed = {
        "text_embedding": torch.randn(batch, text_length, text_width, generator=generator),
        "text_mask": torch.arange(text_length) < torch.arange(1, batch + 1)[:, None],
        "fps": torch.linspace(8, 24, batch),
        "height": torch.full((batch,), 32.0),
        "width": torch.full((batch,), 48.0),
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


def test_reference_output_with_frames_that_do_not_fill_a_patch(golden):
    golden = golden("stdit3_patch222_nosigma")
    given = golden.inputs("odd_T")
    output = build_golden(golden)(given["x"], given["timestep"], golden_conditioning(golden, "odd_T"))
    torch.testing.assert_close(output, golden.outputs("odd_T")["x"], atol=1e-5, rtol=0)


def test_reference_output_with_text_embedded_beforehand(golden, assert_gradients):
    golden = golden("stdit3_skipy")
    given = golden.inputs("packed")
    lengths = golden.kwargs("packed")["y_lens_list"]
    text = torch.nn.utils.rnn.pad_sequence(given["y"][0].split(lengths), batch_first=True)
    mask = torch.arange(text.shape[1]) < torch.tensor(lengths)[:, None]
    sizes = {name: given[name] for name in ("fps", "height", "width")}
    model = build_golden(golden)
    latents = given["x"].requires_grad_()
    output = model(latents, given["timestep"], Conditioning(text_embedding=text, text_mask=mask, **sizes))
    torch.testing.assert_close(output, golden.outputs("packed")["x"], atol=1e-5, rtol=0)
    assert_gradients(model, latents, output, golden.grads("packed"))


@pytest.mark.parametrize(("preset", "table"), [(STDiT3_XL_2, "STDiT3-XL-2"), (STDiT3_3B_2, "STDiT3-3B-2")])
def test_presets_have_the_published_keys_and_counts(assert_key_table, preset, table):
    with torch.device("meta"):
        model = preset(preset.Spec(), latent_channels=4, text_width=4096, text_length=300)
    assert_key_table(model, table)


def test_presets_can_be_overridden():
    spec = STDiT3_3B_2.Spec(depth=2)
    assert (spec.depth, spec.hidden_size, spec.num_heads) == (2, 1872, 26)


def test_starts_as_an_image_model():
    """Fresh temporal blocks add nothing, so each frame of a video comes out as it would alone."""
    torch.manual_seed(0)
    model = STDiT3(
        STDiT3.Spec(hidden_size=16, depth=2, num_heads=2), latent_channels=3, text_width=6, text_length=5
    ).eval()
    latents, timestep, conditioning = inputs()
    video = model(latents, timestep, conditioning)
    frames = [model(latents[:, :, [index]], timestep, conditioning) for index in range(3)]
    torch.testing.assert_close(video, torch.cat(frames, dim=2), atol=1e-5, rtol=0)


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


def test_prompt_without_tokens_gives_finite_values_and_gradients():
    model = tiny()
    latents, timestep, conditioning = inputs(text_mask=torch.zeros(2, 5, dtype=torch.bool))
    output = model(latents, timestep, conditioning)
    output.sum().backward()
    assert output.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("skip_y_embedder", [False, True])
def test_dropped_captions_become_the_null_caption_under_their_own_mask(skip_y_embedder):
    model = tiny(skip_y_embedder=skip_y_embedder)
    latents, timestep, conditioning = inputs(text_width=16 if skip_y_embedder else 6)
    null = model.y_embedder.null() if skip_y_embedder else model.y_embedder.y_embedding
    text = conditioning.text_embedding.clone()
    text[1] = null
    dropped = model(latents, timestep, conditioning.replace(dropped=torch.tensor([False, True])))
    expected = model(latents, timestep, conditioning.replace(text_embedding=text))
    torch.testing.assert_close(dropped, expected, atol=1e-6, rtol=0)
    assert not torch.allclose(dropped[1], model(latents, timestep, conditioning)[1], atol=1e-3)


def test_nothing_is_dropped_unless_asked_for_in_training_either():
    model = tiny()
    torch.testing.assert_close(model.train()(*inputs()), model.eval()(*inputs()), atol=0, rtol=0)
    assert model.condition_dropout == model.spec.class_dropout_prob == 0.1


def test_frame_mask_of_ones_is_no_mask_and_of_zeros_hides_the_timestep_from_the_blocks():
    model = tiny()
    latents, timestep, conditioning = inputs()
    free = model(latents, timestep, conditioning)
    ones = conditioning.replace(frame_mask=torch.ones(2, 3, dtype=torch.bool))
    torch.testing.assert_close(model(latents, timestep, ones), free, atol=1e-6, rtol=0)

    with torch.no_grad():  # without the final layer's share of it
        model.final_layer.scale_shift_table.zero_()
        model.final_layer.linear.weight.zero_()
    zeros = conditioning.replace(frame_mask=torch.zeros(2, 3, dtype=torch.bool))
    torch.testing.assert_close(model(latents, timestep, zeros), model(latents, timestep * 0.5, zeros), atol=0, rtol=0)


def test_token_frame_is_given_only_if_all_its_frames_are():
    model = tiny(patch_size=(2, 2, 2))
    latents, timestep, conditioning = inputs(size=(5, 4, 6))  # token frames: (0, 1), (2, 3), (4, padding)
    masks = [torch.tensor([mask] * 2).bool() for mask in ([0, 0, 0, 1, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 0])]
    partly, wholly, none = (model(latents, timestep, conditioning.replace(frame_mask=mask)) for mask in masks)
    torch.testing.assert_close(partly, wholly, atol=0, rtol=0)
    assert not torch.allclose(partly, none, atol=1e-3)


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


def test_rotations_stay_exact_in_a_model_cast_to_half_precision():
    rope = tiny().rope
    expected = rope(60)
    torch.testing.assert_close(rope.bfloat16()(60), expected, atol=1e-6, rtol=0)


def test_gradients_reach_every_trainable_parameter():
    model = tiny()
    model(*inputs(dropped=torch.tensor([False, True]))).square().mean().backward()
    missing = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    assert not missing


@pytest.mark.parametrize(
    ("option", "trained"),
    [
        ("only_train_temporal", "temporal_blocks."),
        ("freeze_y_embedder", ("x_", "t_", "fps_", "spatial_", "temporal_", "final_")),
    ],
)
def test_freezing(option, trained):
    names = {name for name, parameter in tiny(**{option: True}).named_parameters() if parameter.requires_grad}
    assert names == {name for name, _ in tiny().named_parameters() if name.startswith(trained)}


def test_drop_path_leaves_whole_samples_out_and_keeps_the_mean():
    model = tiny(drop_path=0.5, depth=1)
    assert model.spatial_blocks[0].drop_path.probability == 0  # rates start from 0 at the first block
    deep = tiny(drop_path=0.5)
    assert deep.temporal_blocks[1].drop_path.probability == 0.5
    drop = deep.temporal_blocks[1].drop_path.train()
    torch.manual_seed(0)
    gates = drop(torch.ones(4000, 1, 1, 3))
    assert set(gates.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(gates[..., 0], gates[..., 2])
    assert abs(gates.mean() - 1) < 0.05
    assert torch.equal(drop.eval()(gates), gates)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_embedding": None}, "STDiT3 needs the condition `text_embedding`"),
        ({"fps": None}, "STDiT3 needs the condition `fps`"),
        ({"height": None}, "STDiT3 needs the condition `height`"),
        ({"text_embedding": torch.zeros(2, 5, 7)}, "5 tokens of width 7; this model takes up to 5 of width 6"),
        ({"text_embedding": torch.zeros(2, 9, 6), "text_mask": None}, "text_encoder.model_max_length = 5"),
    ],
    ids=["no-text", "no-fps", "no-height", "text-width", "text-length"],
)
def test_conditions_that_do_not_fit(changes, message):
    latents, timestep, conditioning = inputs()
    with pytest.raises(ShapeError, match=message):
        tiny()(latents, timestep, attrs.evolve(conditioning, **changes))


def test_wrong_number_of_latent_channels():
    latents, timestep, conditioning = inputs()
    with pytest.raises(ShapeError, match="The latents have 2 channels; this model was built for 3"):
        tiny()(latents[:, :2], timestep, conditioning)


def test_text_embedded_beforehand_must_have_the_width_of_the_model():
    with pytest.raises(ShapeError, match="width 16; it has 6"):
        tiny(skip_y_embedder=True)(*inputs())


def test_text_encoder_of_class_labels_is_refused():
    with pytest.raises(ConfigError, match="conditioned on text"):
        STDiT3(STDiT3.Spec(), latent_channels=4, text_width=None, text_length=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 18, "num_heads": 3}, "hidden_size 18 must be a multiple of 4"),
        ({"hidden_size": 20, "num_heads": 4}, r"twice num_heads \(8\)"),
        ({"patch_size": (0, 2, 2)}, "patch_size"),
        ({"depth": 0}, "depth"),
        ({"class_dropout_prob": 1.5}, "class_dropout_prob"),
    ],
)
def test_options_that_make_no_model(options, message):
    with pytest.raises(ValueError, match=message):
        STDiT3.Spec(**options)
