"""Losses weighted by noise level: by hand, from the papers' formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from opensora.core import ConfigError
from opensora.core.components import build
from opensora.core.conditioning import Conditioning
from opensora.core.randomness import SampleDraws, SampleKey

CLEAN = torch.linspace(-1, 1, 3 * 2 * 2).view(1, 3, 1, 2, 2).expand(3, -1, -1, -1, -1)
DRAWS = SampleDraws([SampleKey(seed=3, index=index) for index in range(3)])
NOISE = DRAWS.normal("noise", CLEAN.shape[1:])


def silent(latents, timestep, conditioning):
    """Predicts zeros."""
    return torch.zeros_like(latents)


def loss(scheduler, timestep):
    return build("schedulers", scheduler).loss(
        silent, CLEAN, Conditioning(), draws=DRAWS, timestep=torch.tensor(timestep)
    )


def mean_square(values):
    return values.square().mean(dim=(1, 2, 3, 4))


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_of_a_flow_is_that_of_the_clean_latents(gamma):
    """The clean latents that a velocity v foresees are noised + u v; their error is weighed by min(SNR, gamma)."""
    timestep = [50.0, 400.0, 990.0]
    u = torch.tensor(timestep).view(-1, 1, 1, 1, 1) / 1000
    noised = (1 - u) * CLEAN + u * NOISE
    snr = ((1 - u) / u).square().flatten()
    expected = snr.clamp(max=gamma) * mean_square(noised - CLEAN)
    assert_close(loss({"type": "rflow", "loss_weighting": "min-snr", "min_snr_gamma": gamma}, timestep), expected)


def test_cosmap_of_a_flow():
    timestep = [0.0, 500.0, 1000.0]
    expected = torch.tensor([2 / math.pi, 4 / math.pi, 2 / math.pi]) * mean_square(CLEAN - NOISE)
    assert_close(loss({"type": "rflow", "loss_weighting": "cosmap"}, timestep), expected)


@pytest.mark.parametrize("predicts_clean", [False, True])
@pytest.mark.parametrize("sections", [None, "100"])
def test_min_snr_of_diffusion(predicts_clean, sections):
    """Of both predictions the weight is that of the clean latents' error: that of the noise is 1 / SNR of it."""
    options = {"learn_sigma": False, "predict_xstart": predicts_clean, "timestep_respacing": sections}
    step = [0, 30, 99]
    scheduler = build("schedulers", {"type": "iddpm", **options})
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    abar = torch.cumprod(1 - betas, dim=0)[scheduler.timesteps[step]]
    snr = abar / (1 - abar)
    weight = snr.clamp(max=5) if predicts_clean else snr.clamp(max=5) / snr
    expected = weight.float() * mean_square(CLEAN if predicts_clean else NOISE)
    assert_close(loss({"type": "iddpm", "loss_weighting": "min-snr", **options}, step), expected)


def test_the_bound_is_not_weighted():
    options = {"type": "iddpm", "noise_schedule": "linear"}

    def doubled(latents, timestep, conditioning):
        return torch.zeros_like(latents).repeat(1, 2, 1, 1, 1)

    terms = [
        build("schedulers", {**options, **more}).loss_terms(
            doubled, CLEAN, Conditioning(), draws=DRAWS, timestep=torch.tensor([10, 20, 30])
        )
        for more in ({}, {"loss_weighting": "min-snr"})
    ]
    assert torch.equal(terms[0]["vb"], terms[1]["vb"])
    assert (terms[1]["mse"] < terms[0]["mse"]).all()


def test_weights_keep_given_frames_out():
    mask = torch.tensor([[True, False]]).expand(3, -1)
    latents = CLEAN.repeat(1, 1, 2, 1, 1)
    scheduler = build("schedulers", {"type": "rflow", "loss_weighting": "min-snr"})
    timestep = torch.tensor([100.0, 500.0, 900.0])
    whole = scheduler.loss(silent, latents, Conditioning(frame_mask=mask), draws=DRAWS, timestep=timestep)
    noise = DRAWS.normal("noise", latents.shape[1:])
    u = timestep / 1000
    expected = torch.minimum((1 - u) ** 2, 5 * u**2) * mean_square((latents - noise)[:, :, :1])
    assert_close(whole, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "iddpm", "loss_weighting": "min-snr", "use_kl": True}, "use_kl"),
        ({"type": "iddpm-speed", "loss_weighting": "min-snr"}, "own weights"),
        ({"type": "iddpm", "loss_weighting": "cosmap"}, "loss_weighting"),
        ({"type": "rflow", "loss_weighting": "min_snr"}, 'Did you mean "min-snr"'),
        ({"type": "rflow", "min_snr_gamma": 0}, "min_snr_gamma"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        build("schedulers", options)
