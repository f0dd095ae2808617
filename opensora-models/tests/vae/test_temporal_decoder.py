"""The image autoencoder whose decoder sees neighbouring frames."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder

from opensora.core.errors import ShapeError, WeightsError
from opensora.core.randomness import SampleDraws, SampleKey
from opensora.models.vae.temporal_decoder import VideoAutoencoderKLTemporalDecoder


@pytest.fixture(scope="module")
def reference(golden):
    return golden("vae2d_temporal_decoder")


@pytest.fixture(scope="module")
def folder(reference, tmp_path_factory):
    """The recorded decoder, beside a random encoder, in a folder as diffusers writes it."""
    torch.manual_seed(0)
    module = AutoencoderKLTemporalDecoder(**reference.config)
    state = {key.removeprefix("module."): value for key, value in reference.state.items()}
    found = module.load_state_dict(state, strict=False)
    assert not found.unexpected_keys
    path = tmp_path_factory.mktemp("vae")
    module.save_pretrained(path)
    return path


def build(folder, **options) -> VideoAutoencoderKLTemporalDecoder:
    spec = VideoAutoencoderKLTemporalDecoder.Spec(from_pretrained=str(folder), **options)
    return VideoAutoencoderKLTemporalDecoder(spec)


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 2}, {"micro_frame_size": 3}], ids=str)
def test_reference_decoding(reference, folder, options):
    latents, expected = reference.inputs("decode")["z"], reference.outputs("decode")["rec"]
    decoded = build(folder, **options).decode(latents, num_frames=3)
    torch.testing.assert_close(decoded, expected, atol=1e-5, rtol=0)


def test_encoding_is_that_of_diffusers_frame_by_frame(folder):
    vae, video = build(folder, micro_batch_size=2), torch.rand(2, 3, 3, 16, 18) * 2 - 1
    latents = vae.encode(video)
    expected = vae.module.encode(video[1, :, 2:].transpose(0, 1)).latent_dist.mean * 0.18215
    torch.testing.assert_close(latents[1:, :, 2], expected, atol=1e-5, rtol=0)
    assert tuple(latents.shape[2:]) == vae.latent_size((3, 16, 18)) == (3, 8, 9)
    draws = SampleDraws([SampleKey(0, 0), SampleKey(0, 1)])
    assert not torch.allclose(vae.encode(video, draws=draws), latents)


def test_chunks_of_frames_are_decoded_apart(folder):
    latents = torch.randn(1, 4, 5, 4, 6)
    vae = build(folder, micro_frame_size=2)
    pieces = list(vae.iter_decode(latents, num_frames=5))
    assert [piece.shape[2] for piece in pieces] == [2, 2, 1]
    alone = build(folder).decode(latents[:, :, 2:4], num_frames=2)
    torch.testing.assert_close(pieces[1], alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(vae.decode(latents, num_frames=5), torch.cat(pieces, dim=2))


def test_more_frames_than_latents_are_refused(folder):
    with pytest.raises(ShapeError, match=r"2 latent frames can't give 3 frames. Nearest that fits: 2"):
        build(folder).decode(torch.zeros(1, 4, 2, 4, 4), num_frames=3)


def test_shapes_without_weights_and_missing_folder(tmp_path):
    with torch.device("meta"):
        spec = VideoAutoencoderKLTemporalDecoder.Spec(from_pretrained="stabilityai/svd-vae")
        vae = VideoAutoencoderKLTemporalDecoder(spec, meta=True)
    assert vae.latent_size((25, 576, 1024)) == (25, 72, 128)
    with pytest.raises(WeightsError, match="there is no folder"):
        build(tmp_path / "nowhere")
