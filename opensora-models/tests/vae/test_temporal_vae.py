"""The temporal autoencoder: reference vectors with gradients, its posterior, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from opensora.core.errors import ConfigError, ShapeError, WeightsError
from opensora.core.randomness import SampleDraws, SampleKey
from opensora.models.vae.posterior import Posterior
from opensora.models.vae.temporal_vae import TemporalVAE, TemporalVAE_SD

FILES = ["vae_temporal_sd", "vae_temporal_default_ds", "vae_temporal_relu"]
CASES = ["even", "odd", "single", "t3", "t9"]
SMALL = {"filters": 8, "num_res_blocks": 1, "num_groups": 4}


def build(reference) -> TemporalVAE:
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in reference.config.items()}
    vae = TemporalVAE(TemporalVAE.Spec(**options))
    vae.load_state_dict(reference.state)
    return vae


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FILES)
def test_reference_posteriors_and_reconstructions(golden, name, case):
    reference = golden(name)
    vae, video, expected = build(reference), reference.inputs(case)["x"], reference.outputs(case)
    options = reference.kwargs(case)
    posterior = vae.encode_distribution(video)
    sampled = posterior.sample(torch.Generator().manual_seed(options["seed"]))
    found = {
        "mean": posterior.mean,
        "logvar": posterior.logvar,
        "std": posterior.std,
        "z_sample": sampled,
        "rec_mode": vae.decode(posterior.mode(), num_frames=options["num_frames"]),
        "rec_sample": vae.decode(expected["z_sample"], num_frames=options["num_frames"]),
    }
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], atol=1e-5, rtol=0, msg=lambda text, key=key: f"{key}: {text}")
    torch.testing.assert_close(posterior.kl(), expected["kl"], atol=0, rtol=1e-5)
    torch.testing.assert_close(posterior.nll(expected["z_sample"]), expected["nll"], atol=0, rtol=1e-5)


@pytest.mark.parametrize("name", FILES)
def test_reference_gradients(golden, assert_gradients, name):
    reference = golden(name)
    vae, video = build(reference), reference.inputs("odd")["x"].requires_grad_()
    vae.train_parts()
    output = vae.decode(vae.encode(video), num_frames=video.shape[2])
    assert_gradients(vae, video, output, reference.grads("odd"))


@pytest.mark.parametrize("name", FILES)
def test_recorded_latent_sizes(golden, name):
    reference = golden(name)
    vae = build(reference)
    sizes = [(tuple(size), tuple(latent)) for size, latent in reference.about["latent_sizes"] if None not in size]
    assert len(sizes) == 21
    assert [vae.latent_size(size) for size, _ in sizes] == [latent for _, latent in sizes]


def test_published_keys(assert_key_table):
    with torch.device("meta"):
        vae = TemporalVAE_SD(TemporalVAE_SD.Spec(), meta=True)
    assert len(vae.train_parts()) == 267
    assert_key_table(vae, "VAE_Temporal_SD")


def test_is_causal_but_for_normalisation(golden):
    vae = build(golden("vae_temporal_sd"))
    for module in vae.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = lambda x: x
    video = torch.randn(1, 4, 8, 4, 4)
    changed = video.clone()
    changed[:, :, 4:] += 1
    first, second = vae.encode(video), vae.encode(changed)
    torch.testing.assert_close(second[:, :, 0], first[:, :, 0])
    assert not torch.allclose(second[:, :, 1], first[:, :, 1])


def test_sampling_belongs_to_the_sample_not_to_the_batch(golden):
    vae, video = build(golden("vae_temporal_sd")), torch.randn(2, 4, 5, 4, 6)
    keys = [SampleKey(0, 5), SampleKey(0, 6)]
    together = vae.encode(video, draws=SampleDraws(keys))
    alone = vae.encode(video[1:], draws=SampleDraws(keys[1:]))
    torch.testing.assert_close(alone, together[1:], atol=1e-5, rtol=0)
    assert not torch.allclose(together, vae.encode(video))


def test_is_frozen_and_half_precision_returns_float32(golden):
    vae = build(golden("vae_temporal_sd"))
    assert not vae.training
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    latents = vae.bfloat16().encode(torch.zeros(1, 4, 3, 4, 4))
    assert latents.dtype == vae.decode(latents, num_frames=3).dtype == torch.float32


@pytest.mark.parametrize("prefix", ["", "temporal_vae."], ids=["own", "of-a-whole"])
def test_weights_of_its_own_or_of_a_whole_pipeline(golden, tmp_path, prefix):
    reference = golden("vae_temporal_sd")
    extra = {"spatial_vae.module.decoder.conv_in.bias": torch.zeros(1), "scale": torch.ones(())} if prefix else {}
    save_file({prefix + key: value for key, value in reference.state.items()} | extra, tmp_path / "vae.safetensors")
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in reference.config.items()}
    vae = TemporalVAE(TemporalVAE.Spec(from_pretrained=str(tmp_path / "vae.safetensors"), **options))
    assert all(torch.equal(value, reference.state[key]) for key, value in vae.state_dict().items())
    with pytest.raises(WeightsError, match="don't fit TemporalVAE"):
        TemporalVAE(TemporalVAE.Spec(from_pretrained=str(tmp_path / "vae.safetensors"), **SMALL))


def test_wrong_shapes_are_refused():
    vae = TemporalVAE_SD(TemporalVAE_SD.Spec(**SMALL))
    with pytest.raises(ShapeError, match="Videos have 3 channels, and this autoencoder's 4"):
        vae.encode(torch.zeros(1, 3, 4, 4, 4))
    with pytest.raises(ShapeError, match=r"must be \[batch, 4, frames, height, width\], not \[4, 4, 4, 4\]"):
        vae.encode(torch.zeros(4, 4, 4, 4))
    with pytest.raises(ShapeError, match="Latents have 8 channels"):
        vae.decode(torch.zeros(1, 8, 2, 4, 4), num_frames=5)
    with pytest.raises(ShapeError, match=r"0 frames of 4x4 are no video. Nearest that fits: 1 frames of 4x4"):
        vae.encode(torch.zeros(1, 4, 0, 4, 4))


@pytest.mark.parametrize(("num_frames", "nearest"), [(4, 5), (9, 8), (0, 5)])
def test_latents_of_another_length_are_refused(num_frames, nearest):
    vae = TemporalVAE_SD(TemporalVAE_SD.Spec(**SMALL))
    message = f"2 latent frames are not those of {num_frames} frames of video. Nearest that fits: {nearest}"
    with pytest.raises(ShapeError, match=message):
        vae.decode(torch.zeros(1, 4, 2, 4, 4), num_frames=num_frames)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channel_multipliers": (1, 2)}, "temporal_downsample has 3 entries and channel_multipliers 2"),
        ({"num_groups": 24}, "num_groups is 24, which doesn't divide the width 128"),
    ],
    ids=["levels", "groups"],
)
def test_options_that_contradict_each_other(options, message):
    with pytest.raises(ConfigError, match=message):
        TemporalVAE.Spec(**options)


def test_posterior_distances():
    wide = Posterior(torch.ones(2, 3, 1, 2, 2), torch.full((2, 3, 1, 2, 2), 1.5))
    standard = Posterior(torch.zeros_like(wide.mean), torch.zeros_like(wide.mean))
    pair = [torch.distributions.Normal(each.mean, each.std) for each in (wide, standard)]
    expected = torch.distributions.kl_divergence(*pair).flatten(1).sum(1)
    torch.testing.assert_close(wide.kl(), expected)
    torch.testing.assert_close(wide.kl(standard), expected)
    torch.testing.assert_close(wide.nll(standard.mean), -pair[0].log_prob(standard.mean).flatten(1).sum(1))
    torch.testing.assert_close(wide.var, wide.std.square())
    assert Posterior(wide.mean, wide.mean * -99).logvar.unique().tolist() == [-30.0]
