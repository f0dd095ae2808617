"""Autoencoders of diffusers: sizes, scale and shift of latents, memory savers, folders, and what can't be."""

from __future__ import annotations

import diffusers
import pytest
import torch

from opensora.core.components import build
from opensora.core.errors import ConfigError, ShapeError, WeightsError
from opensora.core.randomness import SampleDraws, SampleKey
from opensora.core.testing import check_vae
from opensora.models.from_diffusers.vae import DiffusersVAE

DRAWS = SampleDraws([SampleKey(0, 0)])


@pytest.fixture
def folder(tiny_vae, tmp_path):
    """Writes a small autoencoder of a class as diffusers does."""

    def write(name, **changes):
        torch.manual_seed(0)
        module = getattr(diffusers, name)(**tiny_vae(name)[0] | changes).eval()
        module.save_pretrained(tmp_path / name)
        return tmp_path / name, module

    return write


def make(folder, **options) -> DiffusersVAE:
    return build("vaes", {"type": "diffusers", "from_pretrained": str(folder), **options})


def example(size):
    return torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_passes_the_conformance_kit(folder, tiny_vae, vae_name):
    path, _ = folder(vae_name)
    check_vae("diffusers", from_pretrained=str(path), size=tiny_vae(vae_name)[1])


@pytest.mark.parametrize("chunks", [0, 1, 3])
def test_announced_sizes_are_those_of_latents_and_decoded_videos(folder, tiny_vae, vae_name, chunks):
    vae = make(folder(vae_name)[0])
    _, height, width = tiny_vae(vae_name)[1]
    size = (1 + chunks * vae.grid.chunk, height, width)
    latents = vae.encode(example(size))
    assert tuple(latents.shape[2:]) == vae.latent_size(size)
    assert vae._decode(latents).shape == (1, 3, *size)  # before the surplus is cut


def test_normalized_as_the_wan_pipeline_does(folder, tiny_vae):
    path, module = folder("AutoencoderKLWan")
    video = example(tiny_vae("AutoencoderKLWan")[1])
    mean = module.encode(video).latent_dist.mean
    shift, std = (torch.tensor(module.config[key]).view(1, 4, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    vae = make(path)
    torch.testing.assert_close(vae.encode(video), (mean - shift) / std)
    decoded = vae.decode((mean - shift) / std, num_frames=9)
    torch.testing.assert_close(decoded, module.decode(mean).sample, atol=1e-4, rtol=1e-4)


def test_normalized_as_the_mochi_pipeline_does(folder, tiny_vae):
    path, module = folder("AutoencoderKLMochi", scaling_factor=0.5)
    latents = torch.randn(1, 4, 2, 4, 6)
    shift, std = (torch.tensor(module.config[key]).view(1, 4, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    expected = module.decode(latents * std / 0.5 + shift).sample
    torch.testing.assert_close(make(path).decode(latents, num_frames=7), expected)


def test_normalized_as_the_ltx_pipeline_does(folder, tiny_vae):
    """Its mean and deviation are among the weights; it is told the timestep 0 when decoding."""
    path, module = folder("AutoencoderKLLTXVideo")
    module.latents_mean += torch.linspace(-1, 1, 8)
    module.latents_std *= 2.0
    module.save_pretrained(path)
    video = example(tiny_vae("AutoencoderKLLTXVideo")[1])
    mean = module.encode(video).latent_dist.mean
    latents = diffusers.LTXPipeline._normalize_latents(mean, module.latents_mean, module.latents_std)
    vae = make(path)
    torch.testing.assert_close(vae.encode(video), latents)
    expected = module.decode(mean, temb=torch.zeros(1)).sample
    torch.testing.assert_close(vae.decode(latents, num_frames=5), expected)


@pytest.mark.parametrize("name", ["AutoencoderKLCogVideoX", "AutoencoderKLHunyuanVideo"])
def test_scaled(folder, tiny_vae, name):
    path, module = folder(name)
    video = example(tiny_vae(name)[1])
    mean = module.encode(video).latent_dist.mean
    torch.testing.assert_close(make(path).encode(video), mean * module.config.scaling_factor)


def test_image_latents_are_shifted_and_scaled(folder):
    path, module = folder("AutoencoderKL")
    video = example((2, 16, 16))
    mean = module.encode(video[0].transpose(0, 1)).latent_dist.mean
    torch.testing.assert_close(make(path).encode(video)[0].transpose(0, 1), (mean - 0.1) * 0.36)


def test_draws_sample_the_posterior(folder):
    path, module = folder("AutoencoderKLWan")
    video, vae = example((5, 32, 32)), make(path)
    std = module.encode(video).latent_dist.std
    noise = DRAWS.normal("posterior", std.shape[1:])
    expected = std * noise / torch.tensor(module.config.latents_std).view(1, 4, 1, 1, 1)
    torch.testing.assert_close(vae.encode(video, draws=DRAWS) - vae.encode(video), expected, atol=1e-5, rtol=1e-4)


def test_tiles_and_slices(folder):
    path, _ = folder("AutoencoderKLHunyuanVideo")
    tiles = {"tile_sample_min_height": 32, "tile_sample_min_width": 32}
    tiles |= {"tile_sample_stride_height": 16, "tile_sample_stride_width": 16}
    vae = make(path, enable_tiling=tiles, enable_slicing=True)
    assert vae.module.use_tiling
    assert vae.module.use_slicing
    assert vae.encode(example((5, 64, 64))).shape == (1, 4, 2, 8, 8)
    assert make(path, enable_tiling=True).module.use_tiling


def test_subfolder_and_pipeline_folder(folder, tmp_path):
    path, _ = folder("AutoencoderKLWan")
    (tmp_path / "pipeline").mkdir()
    path.rename(tmp_path / "pipeline" / "vae")
    video = example((5, 32, 32))
    found = make(tmp_path / "pipeline").encode(video)
    assert torch.equal(make(tmp_path / "pipeline", subfolder="vae").encode(video), found)


def test_random_weights_are_reported(tiny_vae, caplog):
    config, size = tiny_vae("AutoencoderKLWan")
    vae = build("vaes", {"type": "diffusers", "class_name": "AutoencoderKLWan", "config": config})
    assert "vae.from_pretrained is not set: AutoencoderKLWan has random weights" in caplog.text
    assert vae.encode(example(size)).shape == (1, 4, *vae.latent_size(size))


# ---- what can't be


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("AutoencoderKLWan", (8, 32, 32), r"1 \+ a multiple of 4 frames .* multiples of 8. Nearest: 9x32x32"),
        ("AutoencoderKLCogVideoX", (5, 32, 32), r"1 \+ a multiple of 8 frames"),
        ("AutoencoderKLMochi", (9, 30, 32), "Nearest: 7x32x32"),
        ("AutoencoderKL", (2, 17, 1), "it takes sides that are multiples of 2. Nearest: 2x16x2"),
    ],
)
def test_sizes_that_the_class_can_not_do(folder, name, size, message):
    vae = make(folder(name)[0])
    with pytest.raises(ShapeError, match=message):
        vae.latent_size(size)
    with pytest.raises(ShapeError, match=message):
        vae.encode(torch.zeros(1, 3, *size))


def test_unknown_class():
    with pytest.raises(ConfigError, match=r'no Autoencoder class "AutoencoderKLWann".*mean "AutoencoderKLWan"'):
        build("vaes", {"type": "diffusers", "class_name": "AutoencoderKLWann"})


def test_class_that_can_not_be_driven():
    with pytest.raises(
        ConfigError, match=r"AutoencoderOobleck can't be driven\. Autoencoders that can: .*AutoencoderKLWan"
    ):
        build("vaes", {"type": "diffusers", "class_name": "AutoencoderOobleck"})


def test_no_class():
    with pytest.raises(ConfigError, match=r"vae names no class: set vae\.from_pretrained"):
        build("vaes", {"type": "diffusers"})


def test_transformer_folder_for_an_autoencoder(tmp_path):
    diffusers.WanTransformer3DModel(
        num_layers=1, ffn_dim=8, num_attention_heads=1, attention_head_dim=12
    ).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match='no Autoencoder class "WanTransformer3DModel"'):
        make(tmp_path)


def test_missing_folder(tmp_path):
    with pytest.raises(WeightsError, match=r"there is no folder \".*nowhere\".*vae\.from_pretrained"):
        make(tmp_path / "nowhere")


def test_truncated_weights(folder):
    path, _ = folder("AutoencoderKLWan")
    file = path / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(WeightsError, match=r"AutoencoderKLWan .* can't be read"):
        make(path)


def test_tiles_that_the_class_can_not_do(folder):
    path, _ = folder("AutoencoderKLWan")
    with pytest.raises(ConfigError, match=r"can't do that with vae\.enable_tiling = \{'tile': 3\}"):
        make(path, enable_tiling={"tile": 3})
