"""DiT: reference vectors, published shapes, and what must hold for any weights."""

from __future__ import annotations

import pytest
import torch

from opensora.core.conditioning import Conditioning
from opensora.core.errors import ConfigError, ShapeError
from opensora.models import dit
from opensora.models.dit import DiT, DiT_XL_2, DiT_XL_2x2

FILES = ["dit_text_video", "dit_label_image", "dit_patch222_nosigma"]
RUNTIME = ("input_size", "caption_channels", "model_max_length")


def build_golden(golden) -> DiT:
    options = {key: value for key, value in golden.config.items() if key not in RUNTIME}
    if "patch_size" in options:
        options["patch_size"] = tuple(options["patch_size"])
    spec = DiT.Spec(**options)
    width = golden.config["caption_channels"] if spec.condition == "text" else None
    model = DiT(spec, latent_channels=4, latent_size=tuple(golden.config["input_size"]), text_width=width)
    model.load_state_dict(golden.state)
    return model.eval()


def golden_conditioning(model, y) -> Conditioning:
    return Conditioning(labels=y) if model.spec.num_classes else Conditioning(text_embedding=y.squeeze(1))


def tiny(*, size=(2, 4, 4), text_width=None, **options) -> DiT:
    """A small model whose weights are all random, zero-initialised ones included."""
    torch.manual_seed(0)
    condition = "label_3" if text_width is None else "text"
    spec = DiT.Spec(**{"hidden_size": 16, "depth": 2, "num_heads": 2, "condition": condition, **options})
    model = DiT(spec, latent_channels=3, latent_size=size, text_width=text_width).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


LATENTS = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
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
    half = len(given["x"]) // 2
    latents = given["x"][:half].repeat(2, 1, 1, 1, 1)
    output = model(latents, given["timestep"], golden_conditioning(model, given["y"]))
    guided = options.get("cfg_channel") or output.shape[1] // 2
    conditional, null = output[:, :guided].chunk(2)
    prediction = (null + options["cfg_scale"] * (conditional - null)).repeat(2, 1, 1, 1, 1)
    output = torch.cat([prediction, output[:, guided:]], dim=1)
    torch.testing.assert_close(output, golden.outputs(case)["x"], atol=1e-5 * options["cfg_scale"], rtol=0)


@pytest.mark.parametrize(
    ("preset", "condition", "table"),
    [
        (DiT_XL_2, "text", "DiT-XL-2"),
        (DiT_XL_2, "label_1000", "DiT-XL-2-label_1000"),
        (DiT_XL_2x2, "text", "DiT-XL-2x2"),
    ],
)
def test_presets_have_the_published_keys_and_counts(assert_key_table, golden_json, preset, condition, table):
    frames, tokens = (golden_json(f"keys_{table}")["keys"][f"pos_embed_{axis}"][1] for axis in ("temporal", "spatial"))
    spec = preset.Spec(condition=condition)
    size = (frames * spec.patch_size[0], *[int(tokens**0.5) * spec.patch_size[1]] * 2)
    with torch.device("meta"):
        model = preset(spec, latent_channels=4, latent_size=size, text_width=512 if condition == "text" else None)
    assert_key_table(model, table)


# The paper's table 1 (millions of parameters, rounded down) at 256x256 with 1000 classes.
@pytest.mark.parametrize(("size", "millions"), [("S", 32), ("B", 130), ("L", 457), ("XL", 674)])
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_presets_have_the_sizes_of_the_paper(size, millions, patch):
    preset = getattr(dit, f"DiT_{size}_{patch}")
    with torch.device("meta"):
        model = preset(preset.Spec(condition="label_1000"), latent_channels=4, latent_size=(1, 32, 32), text_width=None)
    assert model.patch_size == (1, patch, patch)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert abs(count / 1e6 - millions) < 2


def test_fresh_model_predicts_zero():
    model = DiT(DiT.Spec(hidden_size=16, depth=2, num_heads=2, condition="label_3"), latent_channels=3,
                latent_size=(2, 4, 4), text_width=None)  # fmt: skip
    assert not model(LATENTS, TIMESTEP, LABELS).any()


def test_samples_do_not_depend_on_their_batch():
    model = tiny()
    together = model(LATENTS, TIMESTEP, LABELS)
    for one in (slice(0, 1), slice(1, 2)):
        torch.testing.assert_close(model(LATENTS[one], TIMESTEP[one], LABELS[one]), together[one], atol=1e-5, rtol=0)


def test_dropped_label_is_the_null_class():
    model = tiny()
    dropped = model(LATENTS, TIMESTEP, LABELS.replace(dropped=torch.tensor([False, True])))
    expected = model(LATENTS, TIMESTEP, Conditioning(labels=torch.tensor([0, 3])))
    assert torch.equal(dropped, expected)
    assert torch.equal(model(LATENTS, TIMESTEP, LABELS.unconditional())[1], expected[1])


def test_dropped_caption_is_the_null_caption():
    model = tiny(text_width=5)
    text = Conditioning(text_embedding=torch.randn(2, 1, 5))
    null = Conditioning(text_embedding=model.y_embedder.y_embedding.expand(2, 1, 5))
    torch.testing.assert_close(
        model(LATENTS, TIMESTEP, text.unconditional()), model(LATENTS, TIMESTEP, null), atol=1e-6, rtol=0
    )


def test_labels_can_not_be_dropped_without_a_null_class():
    model = tiny(class_dropout_prob=0.0)
    assert model(LATENTS, TIMESTEP, LABELS).isfinite().all()
    with pytest.raises(ConfigError, match=r"scheduler\.cfg_scale = 1"):
        model(LATENTS, TIMESTEP, LABELS.unconditional())


def test_frames_know_their_order_unless_told_otherwise():
    swapped = LATENTS.flip(2)
    for option, same in ((False, False), (True, True)):
        model = tiny(no_temporal_pos_emb=option)
        output = model(swapped, TIMESTEP, LABELS).flip(2)
        assert torch.allclose(output, model(LATENTS, TIMESTEP, LABELS), atol=1e-5) is same


def test_gradients_reach_every_parameter():
    for model, conditioning in (
        (tiny(), LABELS),
        (tiny(text_width=5), Conditioning(text_embedding=torch.randn(2, 1, 5))),
    ):
        model(LATENTS, TIMESTEP, conditioning).square().mean().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


def test_bfloat16_returns_float32():
    output = tiny().bfloat16()(LATENTS, TIMESTEP, LABELS)
    expected = tiny()(LATENTS, TIMESTEP, LABELS)
    assert output.dtype == torch.float32
    assert (output - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize(
    ("size", "nearest"),
    [((16, 32, 30), "16x32x32"), ((16, 33, 33), "16x32x32"), ((3, 1, 1), "3x2x2"), ((1, 30, 53), "1x30x30")],
    ids=["not-square", "not-a-multiple", "smaller-than-a-patch", "wide"],
)
def test_latent_size_that_can_not_be_done(size, nearest):
    with pytest.raises(ShapeError, match=f"Nearest: {nearest}"):
        tiny(size=size)


def test_clips_of_different_sizes_are_refused():
    with pytest.raises(ShapeError, match="DiT has one size"):
        tiny(size=None)


def test_latents_of_another_size():
    with pytest.raises(ShapeError, match="The latents are 2x4x6; this model was built for 2x4x4"):
        tiny()(torch.zeros(2, 3, 2, 4, 6), TIMESTEP, LABELS)


def test_missing_condition():
    with pytest.raises(ShapeError, match="DiT needs the condition `labels`"):
        tiny()(LATENTS, TIMESTEP, Conditioning(text_embedding=torch.zeros(2, 1, 5)))


@pytest.mark.parametrize(
    ("condition", "text_width", "text_length", "message"),
    [
        ("text", None, None, 'is "text", but the text encoder gives class labels'),
        ("label_10", 512, 1, 'is "label_10", but the text encoder gives text'),
        ("text", 4096, 300, "one vector a caption; this text encoder gives 300 tokens"),
    ],
)
def test_text_encoder_of_the_wrong_kind(condition, text_width, text_length, message):
    with pytest.raises(ConfigError, match=message):
        DiT(DiT.Spec(condition=condition), latent_channels=4, latent_size=(1, 4, 4), text_width=text_width,
            text_length=text_length)  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"condition": "labels_10"},
        {"condition": "label_0"},
        {"hidden_size": 18},
        {"patch_size": (1, 2, 4)},
        {"depth": 0},
    ],
    ids=str,
)
def test_options_that_make_no_model(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        DiT.Spec(**options)
