"""What is kept of a video's latents is enough to draw them as `encode` does, without weights."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL

from opensora.core.components import build
from opensora.core.feature_keys import identify
from opensora.core.randomness import SampleDraws, SampleKey

SMALL = {"block_out_channels": (8, 8), "norm_num_groups": 4}
TEMPORAL = {"filters": 4, "num_res_blocks": 1, "num_groups": 2}
DRAWS = SampleDraws([SampleKey(3, 0), SampleKey(3, 5, epoch=2)])


@pytest.fixture(scope="module")
def image_vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small one whose posterior is wide."""
    folder = tmp_path_factory.mktemp("image-vae")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(**SMALL, **blocks).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def options(image_vae: str) -> dict[str, dict[str, object]]:
    image = {"type": "VideoAutoencoderKL", "from_pretrained": image_vae}
    parts = {"vae_2d": image, "vae_temporal": {"type": "VAE_Temporal_SD", **TEMPORAL}}
    return {
        "image": image,
        "image, two frames at a time": {**image, "micro_batch_size": 2},
        "temporal": {"type": "VAE_Temporal", "in_out_channels": 3, **TEMPORAL},
        "diffusers": {"type": "diffusers", "from_pretrained": image_vae},
        "pipeline": {"type": "OpenSoraVAE_V1_2", **parts, "micro_frame_size": 4},
        "pipeline without scale": {"type": "VideoAutoencoderPipeline", **parts, "cal_loss": True},
    }


def video(frames: int = 6) -> torch.Tensor:
    return torch.rand(2, 3, frames, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def built(options: dict[str, object], *, meta: bool = False):
    torch.manual_seed(0)
    with torch.device("meta" if meta else "cpu"):
        return build("vaes", options, meta=meta)


@pytest.mark.parametrize("name", ["image", "image, two frames at a time", "temporal", "diffusers"])
def test_latents_are_drawn_as_they_are_encoded(name: str, options) -> None:
    vae, draw = built(options[name]), built(options[name], meta=True).latents_of
    moments = vae.moments(video())
    assert all(len(each) == 2 for each in moments.values())
    torch.testing.assert_close(draw(moments, DRAWS), vae.encode(video(), draws=DRAWS), rtol=1e-6, atol=1e-7)
    assert not torch.equal(draw(moments, DRAWS), vae.encode(video()))
    each = torch.cat([draw({key: part[row : row + 1] for key, part in moments.items()}, SampleDraws([DRAWS.keys[row]]))
                      for row in range(2)])  # fmt: skip
    assert torch.equal(each, draw(moments, DRAWS))


class FirstAtItsMean:
    """Draws of which those of the image autoencoder are zero."""

    def normal(self, name, shape):
        return DRAWS.normal(name, shape) * (not name.startswith("posterior of frame"))


@pytest.mark.parametrize("name", ["pipeline", "pipeline without scale"])
def test_of_two_posteriors_the_first_is_at_its_mean(name: str, options) -> None:
    vae, draw = built(options[name]), built(options[name], meta=True).latents_of
    moments = vae.moments(video())
    assert all(len(each) == 2 for each in moments.values())
    expected = vae.encode(video(), draws=FirstAtItsMean())
    torch.testing.assert_close(draw(moments, DRAWS), expected, rtol=1e-6, atol=1e-6)
    assert draw(moments, DRAWS).shape[2] == vae.latent_frames(6)


def test_options_that_save_memory_make_no_other_autoencoder(options) -> None:
    known = identify(built(options["image"]), dtype=torch.float32)
    assert identify(built(options["image, two frames at a time"]), dtype=torch.float32) == known
    assert identify(built(options["diffusers"]), dtype=torch.float32) != known


def test_what_an_encoder_gives_in_half_precision_is_kept_in_it() -> None:
    from opensora.core.features import narrowed

    exact = torch.randn(100).bfloat16().float()
    assert narrowed(exact, torch.bfloat16).dtype is torch.bfloat16
    assert narrowed(exact + 1e-6, torch.bfloat16).dtype is torch.float32
    assert torch.equal(narrowed(exact, torch.bfloat16).float(), exact)
