"""The video autoencoder of two parts: reference vectors, chunks, streams, loading, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from opensora.core import components
from opensora.core.config.structure import ComponentConfig
from opensora.core.errors import ConfigError, ShapeError, WeightsError
from opensora.core.randomness import SampleDraws, SampleKey
from opensora.models.vae.video_vae import OpenSoraVAE_V1_2, VideoAutoencoderPipeline

DRAWN = ["micro5_t12", "micro4_t8", "nomicro_t5", "image", "micro17_t6"]


@pytest.fixture(scope="module")
def reference(golden):
    return golden("vae_pipeline")


@pytest.fixture(scope="module")
def parts(reference, tmp_path_factory):
    """Options that name a folder with an image autoencoder of other weights than the recorded ones."""
    folder = tmp_path_factory.mktemp("vae2d")
    AutoencoderKL(**reference.config["vae_2d"]).save_pretrained(folder)
    return {
        "vae_2d": {"type": "VideoAutoencoderKL", "from_pretrained": str(folder)},
        "vae_temporal": {"type": "VAE_Temporal", **reference.config["vae_temporal"]},
    }


@pytest.fixture(scope="module")
def checkpoint(reference, tmp_path_factory):
    """Both parts in one file."""
    path = tmp_path_factory.mktemp("whole") / "model.safetensors"
    save_file(reference.state, path)
    return path


@pytest.fixture(scope="module")
def build(parts, checkpoint):
    """Builds the published type with the recorded weights."""

    def make(**options) -> VideoAutoencoderPipeline:
        return components.build(
            "vaes", {"type": "OpenSoraVAE_V1_2", **parts, "from_pretrained": str(checkpoint), **options}
        )

    return make


class RecordedNoise:
    """Draws as the reference did: one generator, first for all frames in micro-batches, then for chunk after chunk."""

    def __init__(self, options, video) -> None:
        torch.manual_seed(options["seed"])
        _, _, frames, height, width = video.shape
        size = (height // 8, width // 8)
        micro_batches = torch.zeros(frames).split(options["micro_batch_size"] or frames)
        images = torch.cat([torch.randn(len(part), 4, *size) for part in micro_batches])
        chunks = images.split(options["micro_frame_size"] or frames)
        self.noise = {
            f"posterior of frame {t} of chunk {k}": frame
            for k, chunk in enumerate(chunks)
            for t, frame in enumerate(chunk)
        }
        for k, chunk in enumerate(chunks):
            self.noise[f"temporal posterior of chunk {k}"] = torch.randn(1, 4, -(-len(chunk) // 4), *size)[0]

    def normal(self, name, shape):
        assert self.noise[name].shape == tuple(shape)
        return self.noise[name][None]


@pytest.mark.parametrize("case", DRAWN)
def test_reference_latents_and_reconstructions(reference, build, case):
    options, video, expected = reference.kwargs(case), reference.inputs(case)["x"], reference.outputs(case)
    vae = build(micro_frame_size=options["micro_frame_size"], micro_batch_size=options["micro_batch_size"])
    latents = vae.encode(video, draws=RecordedNoise(options, video))
    torch.testing.assert_close(latents, expected["z"], atol=1e-5, rtol=0)
    decoded = vae.decode(expected["z"], num_frames=options["num_frames"])
    torch.testing.assert_close(
        decoded, expected["rec"], atol=1e-5, rtol=1e-6
    )  # recorded rounding: 9e-6 of values up to 5


def test_reference_training_call(reference, build):
    case = "micro5_t5_loss"
    options, video, expected = reference.kwargs(case), reference.inputs(case)["x"], reference.outputs(case)
    vae = build(micro_frame_size=5, micro_batch_size=None, cal_loss=True)
    found = vae.reconstruct(video, draws=RecordedNoise(options, video))
    for key in ("x_rec", "x_z_rec", "z", "x_z"):
        torch.testing.assert_close(getattr(found, key), expected[key], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.posterior.mean, expected["post_mean"], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.posterior.logvar, expected["post_logvar"], atol=1e-5, rtol=0)
    torch.testing.assert_close(vae.encode(video, draws=RecordedNoise(options, video)), expected["z"], atol=1e-5, rtol=0)
    torch.testing.assert_close(vae.decode(expected["z"], num_frames=5), expected["x_rec"], atol=1e-5, rtol=0)


def test_posterior_of_all_chunks(build):
    video = torch.rand(2, 3, 7, 16, 16)
    draws = SampleDraws([SampleKey(0, 0), SampleKey(0, 1)])
    found = build(micro_frame_size=5).reconstruct(video, draws=draws)
    assert found.posterior.mean.shape == found.z.shape == (2, 4, 3, 2, 2)
    last = build(micro_frame_size=5).reconstruct(video[:, :, 5:]).posterior
    mean = build(micro_frame_size=5).reconstruct(video).posterior
    torch.testing.assert_close(mean.mean[:, :, 2:], last.mean, atol=1e-5, rtol=0)
    assert (found.posterior.kl() > last.kl()).all()
    assert found.x_rec.shape == video.shape


@pytest.mark.parametrize("freeze", [False, True], ids=["all", "temporal"])
def test_training_reaches_the_parts_that_are_trained(build, freeze):
    vae = build(freeze_vae_2d=freeze)
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    trained = vae.train_parts()
    found = vae.reconstruct(torch.rand(1, 3, 5, 16, 16), draws=SampleDraws([SampleKey(0, 0)]))
    (found.x_rec.mean() + found.posterior.kl().sum()).backward()
    assert all(parameter.grad is not None for parameter in trained)
    assert any(parameter.requires_grad for parameter in vae.spatial_vae.parameters()) is not freeze
    assert vae.temporal_last_layer.grad is not None
    assert vae.temporal_last_layer.shape == (4, 8, 3, 3, 3)


@pytest.mark.parametrize("rule", ["micro17", "nomicro"])
def test_recorded_latent_sizes(reference, build, rule):
    vae = build() if rule == "micro17" else build(micro_frame_size=None)
    sizes = [(tuple(size), tuple(z)) for size, z in reference.about[f"latent_sizes_{rule}"] if None not in size]
    assert len(sizes) == 14
    assert [vae.latent_size(size) for size, _ in sizes] == [latent for _, latent in sizes]


def test_published_keys(assert_key_table):
    with torch.device("meta"):
        vae = OpenSoraVAE_V1_2(OpenSoraVAE_V1_2.Spec(), meta=True)
    assert vae.shift.shape == (1, 4, 1, 1, 1)
    vae.train_parts()
    assert_key_table(vae, "OpenSoraVAE_V1_2")


@pytest.mark.parametrize("draws", [None, SampleDraws([SampleKey(0, 0), SampleKey(0, 1)])], ids=["mean", "sample"])
def test_micro_batches_do_not_change_the_result(build, draws):
    video = torch.rand(2, 3, 7, 16, 24) * 2 - 1
    whole, pieces = (build(micro_frame_size=5, micro_batch_size=size) for size in (None, 3))
    latents = whole.encode(video, draws=draws)
    torch.testing.assert_close(pieces.encode(video, draws=draws), latents, atol=1e-5, rtol=0)
    decoded = whole.decode(latents, num_frames=7)
    torch.testing.assert_close(pieces.decode(latents, num_frames=7), decoded, atol=1e-5, rtol=0)


def test_streams_are_lazy_and_exact(build):
    """A stream of pieces of any length gives the latents of the whole, and each piece is computed when it is asked for."""
    vae, video = build(micro_frame_size=5), torch.rand(1, 3, 12, 16, 16)
    draws = SampleDraws([SampleKey(0, 0)])
    asked = []

    def pieces():
        for start in range(0, 12, 3):
            asked.append(start)
            yield video[:, :, start : start + 3]

    stream = vae.iter_encode(pieces(), draws=draws)
    latents = [next(stream)]
    assert asked == [0, 3]
    latents = torch.cat([*latents, *stream], dim=2)
    assert torch.equal(latents, vae.encode(video, draws=draws))

    calls = []
    vae.temporal_vae.decoder.register_forward_hook(lambda *_: calls.append("temporal"))
    vae.spatial_vae.module.decoder.register_forward_hook(lambda *_: calls.append("image"))
    stream = vae.iter_decode(latents, num_frames=12)
    assert not calls
    frames = [next(stream)]
    assert calls == ["temporal", "image"]
    frames = torch.cat([*frames, *stream], dim=2)
    assert torch.equal(frames, vae.decode(latents, num_frames=12))
    assert frames.shape == video.shape


def test_gradients_reach_the_video_through_decode(build):
    latents = torch.randn(1, 4, 2, 2, 2, requires_grad=True)
    build(micro_frame_size=5).decode(latents, num_frames=5).sum().backward()
    assert latents.grad is not None
    assert (latents.grad != 0).all()


def test_parts_with_weights_of_their_own(parts, reference, tmp_path):
    temporal = {key: value for key, value in reference.state.items() if key.startswith("temporal_vae.")}
    save_file(temporal, tmp_path / "temporal.safetensors")
    named = {**parts["vae_temporal"], "from_pretrained": str(tmp_path / "temporal.safetensors")}
    vae = components.build("vaes", {"type": "VideoAutoencoderPipeline", **parts, "vae_temporal": named})
    state = vae.state_dict()
    assert all(torch.equal(state[key], value) for key, value in temporal.items())
    key = "module.decoder.conv_in.weight"
    image = components.build("vaes", parts["vae_2d"])
    assert torch.equal(state[f"spatial_vae.{key}"], image.state_dict()[key])
    assert vae.shift.shape == vae.scale.shape == ()
    video = torch.rand(1, 3, 2, 16, 16)
    torch.testing.assert_close(vae.encode(video), build_unscaled(vae, video))


def build_unscaled(vae, video):
    return vae.temporal_vae.encode(vae.spatial_vae.encode(video))


def test_half_precision_checkpoint_becomes_float32(build, reference, tmp_path):
    save_file({key: value.half() for key, value in reference.state.items()}, tmp_path / "model.safetensors")
    vae = build(from_pretrained=str(tmp_path))
    assert {value.dtype for value in vae.state_dict().values()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in vae.parameters())


def test_the_image_part_is_not_looked_for_where_the_weights_hold_it(parts, reference, checkpoint, monkeypatch):
    """As with the published weights: the image autoencoder's own repository is never asked."""
    monkeypatch.setattr(
        "opensora.models.vae.image_vae.VideoAutoencoderKL.published", reference.config["vae_2d"], raising=True
    )
    spec = OpenSoraVAE_V1_2.Spec(
        vae_temporal=ComponentConfig("VAE_Temporal", reference.config["vae_temporal"]), from_pretrained=str(checkpoint)
    )
    assert spec.vae_2d.options["from_pretrained"] == "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers"
    vae = OpenSoraVAE_V1_2(spec)
    assert all(torch.equal(value, reference.state[key]) for key, value in vae.state_dict().items())


def test_old_names_of_attention_layers(build, reference, tmp_path):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = dict(reference.state)
    for key in list(state):
        for new, name in old.items():
            if f".attentions.0.{new}." in key:
                state[key.replace(new, name)] = state.pop(key)
    assert sum("proj_attn" in key for key in state) == 4
    save_file(state, tmp_path / "model.safetensors")
    vae = build(from_pretrained=str(tmp_path))
    assert all(torch.equal(value, reference.state[key]) for key, value in vae.state_dict().items())


def test_incomplete_and_missing_weights(build, reference, tmp_path):
    save_file({key: value for key, value in reference.state.items() if "spatial" in key}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match="don't fit OpenSoraVAE_V1_2"):
        build(from_pretrained=str(tmp_path / "x.safetensors"))
    with pytest.raises(WeightsError, match="There is no file or folder"):
        build(from_pretrained=str(tmp_path / "nowhere"))
    with pytest.raises(WeightsError, match="local cache: set local_files_only = False"):
        build(from_pretrained="nobody/nothing", local_files_only=True)


def test_a_hub_id_in_the_cache_is_found_offline(build, reference, checkpoint, tmp_path, monkeypatch):
    repository = tmp_path / "models--hpcai-tech--OpenSora-VAE-v1.2"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(checkpoint)
    (snapshot / "config.json").write_text(json.dumps({"model_type": "VideoAutoencoderPipeline"}))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    vae = build(from_pretrained="hpcai-tech/OpenSora-VAE-v1.2", local_files_only=True)
    assert torch.equal(vae.scale, reference.state["scale"])


@pytest.mark.parametrize(("num_frames", "nearest"), [(40, 34), (18, 30)])
def test_latents_of_another_length_are_refused(build, num_frames, nearest):
    with pytest.raises(ShapeError, match=f"9 latent frames are not those of {num_frames} frames.*fits: "):
        build().decode(torch.zeros(1, 4, 9, 2, 2), num_frames=num_frames)


def test_wrong_shapes_are_refused(build):
    vae = build()
    with pytest.raises(ShapeError, match="Videos have 4 channels, and this autoencoder's 3"):
        vae.encode(torch.zeros(1, 4, 4, 16, 16))
    with pytest.raises(ShapeError, match="Latents have 8 channels, and this autoencoder's 4"):
        vae.decode(torch.zeros(1, 8, 1, 2, 2), num_frames=4)
    with pytest.raises(ShapeError, match=r"7x16 is too small.*Nearest that fits: 8x16"):
        vae.encode(torch.zeros(1, 3, 4, 7, 16))
    with pytest.raises(ShapeError, match="no frames"):
        list(vae.iter_encode([]))
    with pytest.raises(ShapeError, match=r"0 frames.*Nearest that fits: 1"):
        vae.latent_size((0, 16, 16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shift": (0.0, 1.0)}, "shift has 2 numbers, but latents have 4 channels"),
        ({"vae_temporal": {"type": "identity"}}, '"identity", which is no temporal autoencoder'),
        ({"vae_temporal": {"type": "VAE_Temporal_SD", "filter": 8}}, r"vae\.vae_temporal\.filter is not a field"),
        ({"vae_2d": {"type": "identity"}}, "in_out_channels is 4, but latents of vae_2d have 3 channels"),
    ],
    ids=["shift", "no-temporal", "misspelt", "channels"],
)
def test_options_that_do_not_fit(build, options, message):
    if options.get("vae_2d"):
        options = {**options, "micro_batch_size": None}
    with pytest.raises(ConfigError, match=message):
        build(**options)
