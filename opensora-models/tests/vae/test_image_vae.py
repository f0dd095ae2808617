"""The image autoencoder over frames: reference vectors, micro-batches, and folders that can't be read."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL
from einops import rearrange
from torch import Tensor

from opensora.core.errors import ShapeError, WeightsError
from opensora.core.randomness import SampleDraws, SampleKey
from opensora.models.vae.image_vae import VideoAutoencoderKL

CASES = ["plain", "micro2", "image"]


@pytest.fixture(scope="module")
def reference(golden):
    return golden("vae2d")


@pytest.fixture(scope="module")
def folder(reference, tmp_path_factory):
    """The recorded weights in a folder as diffusers writes it."""
    module = AutoencoderKL(**reference.config)
    module.load_state_dict({key.removeprefix("module."): value for key, value in reference.state.items()})
    path = tmp_path_factory.mktemp("vae")
    module.save_pretrained(path)
    return path


def build(folder, **options) -> VideoAutoencoderKL:
    return VideoAutoencoderKL(VideoAutoencoderKL.Spec(from_pretrained=str(folder), **options))


class RecordedNoise:
    """Draws as the reference did: torch's global generator, one micro-batch of frames after the other."""

    def __init__(self, seed: int, latents: Tensor, micro_batch_size: int | None) -> None:
        batch, channels, frames, height, width = latents.shape
        torch.manual_seed(seed)
        parts = torch.zeros(batch * frames).split(micro_batch_size or batch * frames)
        noise = torch.cat([torch.randn(len(part), channels, height, width) for part in parts])
        self.noise = rearrange(noise, "(b t) c h w -> t b c h w", b=batch)

    def normal(self, name, shape):
        frame = self.noise[int(name.removeprefix("posterior of frame "))]
        assert frame.shape[1:] == tuple(shape)
        return frame


@pytest.mark.parametrize("case", CASES)
def test_reference_latents_and_reconstructions(reference, folder, case):
    options, video = reference.kwargs(case), reference.inputs(case)["x"]
    expected = reference.outputs(case)
    vae = build(folder, micro_batch_size=options["micro_batch_size"])
    noise = RecordedNoise(options["seed"], expected["z_mean"], options["micro_batch_size"])
    mean = vae.encode(video)
    torch.testing.assert_close(mean, expected["z_mean"], atol=1e-5, rtol=0)
    torch.testing.assert_close(vae.encode(video, draws=noise), expected["z_sample"], atol=1e-5, rtol=0)
    decoded = vae.decode(expected["z_mean"], num_frames=video.shape[2])
    torch.testing.assert_close(decoded, expected["rec"], atol=1e-5, rtol=0)


def test_keys_are_those_of_the_published_wrapper(reference, folder):
    assert build(folder).state_dict().keys() == reference.state.keys()


@pytest.mark.parametrize("draws", [None, SampleDraws([SampleKey(0, 0), SampleKey(0, 1)])], ids=["mean", "sample"])
def test_micro_batches_do_not_change_the_result(folder, draws):
    video = torch.rand(2, 3, 3, 16, 16) * 2 - 1
    whole, parts = build(folder), build(folder, micro_batch_size=4)
    latents = whole.encode(video, draws=draws)
    torch.testing.assert_close(parts.encode(video, draws=draws), latents, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        parts.decode(latents, num_frames=3), whole.decode(latents, num_frames=3), atol=1e-5, rtol=0
    )


def test_sampling_belongs_to_the_sample_not_to_the_batch(folder):
    vae, video = build(folder), torch.rand(2, 3, 2, 16, 16)
    keys = [SampleKey(0, 5), SampleKey(0, 6)]
    together = vae.encode(video, draws=SampleDraws(keys))
    alone = vae.encode(video[1:], draws=SampleDraws(keys[1:]))
    torch.testing.assert_close(alone, together[1:], atol=1e-5, rtol=0)
    assert not torch.allclose(together, vae.encode(video))


def test_recorded_latent_sizes(reference, folder):
    vae = build(folder)
    sizes = [(tuple(size), tuple(latent)) for size, latent in reference.about["latent_sizes"] if None not in size]
    assert len(sizes) == 2
    assert [vae.latent_size(size) for size, _ in sizes] == [latent for _, latent in sizes]
    assert vae.latent_size((51, 240, 426)) == (51, 30, 53)


def test_latent_size_is_that_of_encoded_latents(folder):
    vae = build(folder)
    for size in ((1, 17, 31), (2, 8, 23)):
        assert tuple(vae.encode(torch.zeros(1, 3, *size)).shape[2:]) == vae.latent_size(size)


def test_too_small_a_video_is_refused(folder):
    with pytest.raises(ShapeError, match=r"7x64 is too small.*Nearest.*: 8x64"):
        build(folder).latent_size((1, 7, 64))


def test_is_frozen_and_in_eval_mode_and_half_precision_returns_float32(folder):
    vae = build(folder)
    assert not vae.training
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    latents = vae.bfloat16().encode(torch.zeros(1, 3, 1, 16, 16))
    assert latents.dtype == vae.decode(latents, num_frames=1).dtype == torch.float32


def test_subfolder(folder, tmp_path):
    (tmp_path / "vae").symlink_to(folder)
    assert build(tmp_path, subfolder="vae").latent_channels == 4


def test_missing_folder(tmp_path):
    with pytest.raises(WeightsError, match=r'there is no folder ".*nowhere".*Set vae\.from_pretrained'):
        build(tmp_path / "nowhere")


def test_folder_without_weights(tmp_path):
    with pytest.raises(WeightsError, match=r"can't be read.*Check that the folder is whole"):
        build(tmp_path)


def test_truncated_weights(folder, tmp_path):
    for file in folder.iterdir():
        data = file.read_bytes()
        (tmp_path / file.name).write_bytes(data[: len(data) // 2] if file.suffix == ".safetensors" else data)
    with pytest.raises(WeightsError, match="can't be read"):
        build(tmp_path)


def test_hub_repository_that_is_not_in_the_cache(tmp_path):
    with pytest.raises(WeightsError, match="local cache: set local_files_only = False"):
        build("nobody/nothing", local_files_only=True, cache_dir=str(tmp_path))


def test_shapes_without_weights(folder, golden_json):
    with torch.device("meta"):
        local = VideoAutoencoderKL(VideoAutoencoderKL.Spec(from_pretrained=str(folder)), meta=True)
        published = VideoAutoencoderKL(VideoAutoencoderKL.Spec(from_pretrained="stabilityai/sd-vae-ft-ema"), meta=True)
    assert {key: value.shape for key, value in local.state_dict().items()} == {
        key: value.shape for key, value in build(folder).state_dict().items()
    }
    table = golden_json("keys_VideoAutoencoderKL")
    assert {key: list(value.shape) for key, value in published.state_dict().items()} == table["keys"]
    assert published.latent_size((17, 240, 426)) == (17, 30, 53)
    assert all(parameter.is_meta for parameter in published.parameters())


def test_a_folder_in_the_home_folder_is_found(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert build(f"~/{folder.name}").latent_channels == build(folder).latent_channels
