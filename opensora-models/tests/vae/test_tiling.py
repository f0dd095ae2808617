"""Tiles: the result differs by rounding alone, at most by BOUND of the largest entry, and takes less memory."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder
from torch.overrides import TorchFunctionMode

from opensora.core import components

BOUND = 1e-5
"""Largest difference of float32 results, in shares of the largest entry; on these small networks seen are 2.7e-6."""
LEVELS = {"block_out_channels": (8, 16, 16), "norm_num_groups": 4, "layers_per_block": 1}
TEMPORAL = {"filters": 8, "num_res_blocks": 1, "num_groups": 4}


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Of each kind of autoencoder, small ones with random weights."""
    torch.manual_seed(0)
    image, frames, temporal = (tmp_path_factory.mktemp(name) for name in ("image", "frames", "temporal"))
    down, up = ("DownEncoderBlock2D",) * 3, ("UpDecoderBlock2D",) * 3
    AutoencoderKL(**LEVELS, down_block_types=down, up_block_types=up).save_pretrained(image)
    AutoencoderKLTemporalDecoder(block_out_channels=(32, 32), down_block_types=down[:2]).save_pretrained(frames)
    vae = components.build("vaes", {"type": "VAE_Temporal_SD", **TEMPORAL, "in_out_channels": 3})
    torch.save(vae.state_dict(), temporal / "vae.pt")
    vae = components.build("vaes", {"type": "VAE_Temporal_SD", **TEMPORAL})
    torch.save(vae.state_dict(), temporal / "of-latents.pt")
    parts = {
        "vae_2d": {"type": "VideoAutoencoderKL", "from_pretrained": str(image)},
        "vae_temporal": {
            "type": "VAE_Temporal_SD",
            **TEMPORAL,
            "from_pretrained": str(temporal / "of-latents.pt"),
        },
    }
    return {
        "image": parts["vae_2d"],
        "temporal-decoder": {"type": "VideoAutoencoderKLTemporalDecoder", "from_pretrained": str(frames)},
        "temporal": {
            "type": "VAE_Temporal_SD",
            **TEMPORAL,
            "in_out_channels": 3,
            "from_pretrained": str(temporal / "vae.pt"),
        },
        "pipeline": {"type": "OpenSoraVAE_V1_2", **parts, "micro_frame_size": 5},
    }


@pytest.mark.parametrize("tile", [1, 7, 16])
@pytest.mark.parametrize("size", [(6, 40, 53), (1, 16, 64)], ids=["video", "image"])
@pytest.mark.parametrize("kind", ["image", "temporal-decoder", "temporal", "pipeline"])
def test_tiles_change_nothing_but_rounding(options, kind, size, tile):
    if tile == 1:
        size = (min(size[0], 2), 8, 12)  # a tile for each entry takes its time
    if kind == "temporal":
        size = (size[0], size[1] // 2, size[2] // 2)  # its latents are as large as its frames
    whole = components.build("vaes", options[kind])
    tiled = components.build("vaes", {**options[kind], "tile_size": tile})
    video = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        latents = whole.encode(video)
        decoded = whole.decode(latents, num_frames=size[0])
        assert (tiled.encode(video) - latents).abs().max() <= BOUND * latents.abs().max()
        assert (tiled.decode(latents, num_frames=size[0]) - decoded).abs().max() <= BOUND * decoded.abs().max()
    assert tiled.state_dict().keys() == whole.state_dict().keys()


@pytest.mark.parametrize("kind", ["image", "temporal"])
def test_half_precision_is_as_close_to_float32_with_tiles_as_without(options, kind):
    exact, whole = (components.build("vaes", options[kind]) for _ in range(2))
    tiled = components.build("vaes", {**options[kind], "tile_size": 16})
    video = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = exact.encode(video)
        errors = [(vae.bfloat16().encode(video) - expected).square().mean().sqrt() for vae in (whole, tiled)]
    assert errors[1] < 1.5 * errors[0]


@pytest.mark.parametrize("kind", ["image", "temporal"])
def test_gradients_are_the_same(options, kind):
    video = torch.rand(1, 3, 4, 16, 24)
    grads = []
    for tile in (None, 7):
        vae = components.build("vaes", {**options[kind], "tile_size": tile}).requires_grad_(True)
        vae.decode(vae.encode(video), num_frames=4).square().mean().backward()
        grads.append({name: parameter.grad for name, parameter in vae.named_parameters()})
    for name, grad in grads[0].items():
        assert (grads[1][name] - grad).abs().max() <= 1e-4 * grad.abs().max() + 1e-9, name


def test_a_copy_works_on_its_own_weights(options):
    vae = components.build("vaes", {**options["image"], "tile_size": 8})
    other, latents = copy.deepcopy(vae), torch.randn(1, 4, 1, 4, 4)
    before = vae.decode(latents, num_frames=1)
    for parameter in other.parameters():
        parameter.zero_()
    assert not other.decode(latents, num_frames=1).any()
    assert torch.equal(vae.decode(latents, num_frames=1), before)


@pytest.mark.parametrize("kind", ["image", "temporal"])
def test_what_is_between_layers_is_never_there_as_a_whole(options, kind):
    """Each activation is of one tile and its margin."""
    vae = components.build("vaes", {**options[kind], "tile_size": 8})
    sizes = []

    class Activations(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is torch.nn.functional.silu:
                sizes.append(max(result.shape[-2:]))
            return result

    with Activations():
        vae.decode(vae.encode(torch.rand(1, 3, 2, 64, 48)), num_frames=2)
    assert max(sizes) == 8 + 2
