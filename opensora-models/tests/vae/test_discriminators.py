"""Discriminators against reference vectors, and what they make of sizes and files."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from opensora.core import ConfigError, ShapeError, WeightsError, build
from opensora.models.vae.discriminators import (
    NLayerDiscriminator,
    NLayerDiscriminator3D,
    NLayerDiscriminatorSpec,
    StyleGANDiscriminator3D,
    StyleGANDiscriminatorSpec,
)

GOLDENS = {
    "disc_nlayer2d": (NLayerDiscriminator, "main.0.weight"),
    "disc_nlayer3d": (NLayerDiscriminator3D, "main.0.weight"),
    "disc_stylegan_blur": (StyleGANDiscriminator3D, "conv1.weight"),
}
TABLES = {
    "NLayerDiscriminator": "NLayerDiscriminator",
    "N_Layer_DISCRIMINATOR_3D": "N_Layer_DISCRIMINATOR_3D",
    "DISCRIMINATOR_3D": "DISCRIMINATOR_3D",
}


def tiny(cls=NLayerDiscriminator, **options):
    torch.manual_seed(0)
    return cls(cls.Spec(**{"ndf": 4, "n_layers": 2, **options}))


def tiny_style_gan(**options):
    torch.manual_seed(0)
    spec = {"image_size": (8, 8), "num_frames": 5, "filters": 8, "channel_multipliers": (1, 1), "num_groups": 4}
    return StyleGANDiscriminator3D(StyleGANDiscriminatorSpec(**{**spec, **options}))


@pytest.mark.parametrize("name", GOLDENS)
def test_outputs_and_gradients_are_the_reference_ones(name, golden):
    cls, weight = GOLDENS[name]
    vectors = golden(name)
    config = {key: tuple(value) if isinstance(value, list) else value for key, value in vectors.config.items()}
    model = cls(cls.Spec(**config))
    model.load_state_dict(vectors.state)
    x = vectors.inputs("run")["x"].requires_grad_()
    expected = vectors.outputs("run")
    torch.testing.assert_close(model.eval()(x), expected["eval"], rtol=0, atol=1e-5)
    output = model.train()(x)
    torch.testing.assert_close(output, expected["train"], rtol=0, atol=1e-5)
    output.square().mean().backward()
    found = {"input.x": x.grad, f"param.{weight}": model.get_parameter(weight).grad}
    for key, gradient in vectors.grads("run").items():
        assert (found[key] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), key


@pytest.mark.parametrize("name", TABLES)
def test_keys_and_counts_are_those_of_the_published_class(name, assert_key_table):
    with torch.device("meta"):
        model = build("discriminators", {"type": name})
    assert_key_table(model, TABLES[name])


@pytest.mark.parametrize("cls", [NLayerDiscriminator, NLayerDiscriminator3D])
@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_smallest_is_the_smallest(cls, n_layers):
    model = tiny(cls, n_layers=n_layers).eval()
    smallest = model.smallest
    assert model.judge(torch.zeros(1, 3, *smallest)).shape[2:].numel() == 1
    with pytest.raises(ShapeError, match=f"at least {smallest[1]}x{smallest[2]}"):
        model.judge(torch.zeros(1, 3, smallest[0], smallest[1] - 1, smallest[2]))
    if model.is_3d:
        with pytest.raises(RuntimeError):
            model(torch.zeros(1, 3, smallest[0] - 1, *smallest[1:]))


def test_a_2d_discriminator_judges_each_frame():
    model, video = tiny().eval(), torch.randn(2, 3, 5, 16, 16)
    logits = model.judge(video)
    assert logits.shape[:2] == (10, 1)
    torch.testing.assert_close(logits[7:8], model(video[1:, :, 2]))


@pytest.mark.parametrize("make", [lambda: tiny(NLayerDiscriminator3D), tiny_style_gan], ids=["patches", "style-gan"])
def test_a_3d_discriminator_extends_short_videos_by_their_last_frame(make):
    model = make().eval()
    video = torch.randn(2, 3, 3, *model.smallest[1:])
    extended = torch.cat([video, video[:, :, -1:].repeat(1, 1, model.smallest[0] - 3, 1, 1)], dim=2)
    torch.testing.assert_close(model.judge(video), model(extended))


@pytest.mark.parametrize("num_frames", [1, 2, 3, 4, 16])
def test_a_style_gan_discriminator_can_be_built_for_any_length(num_frames):
    model = tiny_style_gan(num_frames=num_frames, image_size=(16, 32), channel_multipliers=(1, 2, 1))
    assert model.judge(torch.randn(2, 3, num_frames, 16, 32)).shape == (2, 1)


@pytest.mark.parametrize("size", [(5, 16, 16), (9, 8, 8)], ids=["larger", "longer"])
def test_a_style_gan_discriminator_says_what_it_was_built_for(size):
    with pytest.raises(ShapeError, match=rf"5 x 8 x 8 .*num_frames={size[0]}, image_size=\({size[1]}, {size[2]}\)"):
        tiny_style_gan().judge(torch.zeros(1, 3, *size))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_size": (100, 128)}, r"Nearest: \(96, 128\)"),
        ({"filters": 40}, "40 channels can't be split into 32 groups"),
    ],
)
def test_impossible_options_of_the_style_gan_discriminator(options, words):
    with pytest.raises(ConfigError, match=words):
        StyleGANDiscriminatorSpec(**options)


def test_actnorm_is_refused():
    with pytest.raises(ConfigError, match="only batch norm"):
        NLayerDiscriminatorSpec(use_actnorm=True)


def test_inflated_kernels_lie_in_the_central_slice(tmp_path):
    flat = tiny()
    save_file(flat.state_dict(), tmp_path / "discriminator.safetensors")
    model = tiny(NLayerDiscriminator3D, from_pretrained=str(tmp_path), inflate_from_2d=True)
    report = model.load_pretrained()
    assert report.is_complete
    for key, kernel in flat.state_dict().items():
        inflated = model.state_dict()[key]
        if kernel.dim() == 4:
            assert inflated.shape[2] == 4
            torch.testing.assert_close(inflated[:, :, 1], kernel, rtol=0, atol=0)
            assert not inflated[:, :, [0, 2, 3]].any()
        else:
            torch.testing.assert_close(inflated, kernel, rtol=0, atol=0)


def test_an_inflated_discriminator_judges_a_still_video_as_its_frame(tmp_path):
    flat = tiny().eval()
    save_file(flat.state_dict(), tmp_path / "flat.safetensors")
    source = str(tmp_path / "flat.safetensors")
    model = tiny(NLayerDiscriminator3D, from_pretrained=source, inflate_from_2d=True).eval()
    model.load_pretrained()
    frame = torch.randn(1, 3, 32, 32)
    logits = model(frame[:, :, None].repeat(1, 1, 12, 1, 1))
    assert logits.shape[2] > 1
    for t in range(logits.shape[2]):
        torch.testing.assert_close(logits[:, :, t], flat(frame))


def test_weights_without_inflation_do_not_fit(tmp_path):
    save_file(tiny().state_dict(), tmp_path / "discriminator.safetensors")
    with pytest.raises(WeightsError, match=r"main\.0\.weight"):
        tiny(NLayerDiscriminator3D, from_pretrained=str(tmp_path)).load_pretrained()


@pytest.mark.parametrize("layout", ["discriminator/model.safetensors", "discriminator.safetensors"])
def test_a_folders_discriminator_is_found(layout, tmp_path):
    other = NLayerDiscriminator(NLayerDiscriminatorSpec(ndf=4, n_layers=2))
    (tmp_path / layout).parent.mkdir(exist_ok=True)
    save_file(other.state_dict(), tmp_path / layout)
    model = tiny(from_pretrained=str(tmp_path))
    model.load_pretrained()
    torch.testing.assert_close(model.main[0].weight, other.main[0].weight, rtol=0, atol=0)
    assert tiny(from_pretrained=str(tmp_path), use_pretrained=False).load_pretrained() is None


def test_a_folder_without_discriminator_says_what_to_do(tmp_path):
    with pytest.raises(WeightsError, match="use_pretrained=False"):
        tiny(from_pretrained=str(tmp_path)).load_pretrained()
