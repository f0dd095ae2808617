"""Classifier-free guidance as a wrapper of a denoiser."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from opensora.core.conditioning import Conditioning
from opensora.core.errors import ShapeError
from opensora.schedulers import Guidance, guide

LATENTS = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
TIMESTEP = torch.tensor([10.0, 700.0])
TOLD = Conditioning(text_embedding=torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1)))
NULL = torch.zeros(2, 5, 3)


def halves(toy):
    conditional = toy(NULL)(LATENTS, TIMESTEP, TOLD)
    null = toy(NULL)(LATENTS, TIMESTEP, TOLD.unconditional())
    return conditional, null


def test_scale_moves_away_from_the_null_and_leaves_variance_values(toy):
    conditional, null = halves(toy)
    guided = Guidance(toy(NULL), scale=3.0)(LATENTS, TIMESTEP, TOLD)
    assert_close(guided[:, :4], null[:, :4] + 3 * (conditional - null)[:, :4])
    assert torch.equal(guided[:, 4:], conditional[:, 4:])


def test_channels_beyond_the_guided_ones_are_conditional(toy):
    conditional, null = halves(toy)
    guided = Guidance(toy(NULL), scale=3.0, channels=3)(LATENTS, TIMESTEP, TOLD)
    assert_close(guided[:, :3], null[:, :3] + 3 * (conditional - null)[:, :3])
    assert torch.equal(guided[:, 3:], conditional[:, 3:])


def test_scale_zero_is_the_null_prediction(toy):
    assert torch.equal(Guidance(toy(NULL), scale=0)(LATENTS, TIMESTEP, TOLD)[:, :4], halves(toy)[1][:, :4])


def test_scale_one_leaves_the_denoiser_alone(toy):
    denoiser = toy(NULL)
    assert guide(denoiser, 1.0) is denoiser


def test_halves_are_joined_once_for_all_steps():
    seen = []

    def denoiser(latents, timestep, conditioning):
        seen.append(conditioning)
        return latents

    guided = Guidance(denoiser, scale=2.0)
    for conditioning in (TOLD, TOLD, TOLD[[1, 0]]):
        guided(LATENTS, TIMESTEP, conditioning)
    assert seen[0] is seen[1]
    assert torch.equal(seen[2].text_embedding, TOLD.text_embedding[[1, 0, 1, 0]])
    assert seen[0].dropped.tolist() == [False, False, True, True]


def test_nothing_to_drop_is_a_clear_error():
    with pytest.raises(ShapeError, match="cfg_scale = 1"):
        Guidance(lambda latents, *_: latents, scale=2.0)(LATENTS, TIMESTEP, Conditioning())


def test_more_guided_channels_than_latents_have_is_a_clear_error(toy):
    with pytest.raises(ShapeError, match=r"5 channels .* have 4"):
        Guidance(toy(NULL), scale=2.0, channels=5)(LATENTS, TIMESTEP, TOLD)
