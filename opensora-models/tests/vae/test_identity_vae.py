"""The autoencoder that is none."""

from __future__ import annotations

import torch

from opensora.models.vae.identity import IdentityVAE


def test_latents_are_the_video():
    vae = IdentityVAE(IdentityVAE.Spec())
    video = torch.randn(2, 3, 5, 7, 9)
    assert torch.equal(vae.decode(vae.encode(video), num_frames=5), video)
    assert vae.decode(video, num_frames=3).shape[2] == 3
    assert vae.latent_size((5, 7, 9)) == (5, 7, 9)
    assert vae.latent_channels == video.shape[1]
