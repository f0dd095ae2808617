"""IDDPM with the law of timesteps and the weights of SpeeD: reference vectors, and what must hold for any batch."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from opensora.core.conditioning import Conditioning
from opensora.core.randomness import SampleDraws, SampleKey
from opensora.schedulers import IDDPM, IDDPMSpec, IDDPMSpeed, IDDPMSpeedSpec

SHAPE = (4, 4, 5, 3, 2)
DRAWS = SampleDraws([SampleKey(seed=7, index=i) for i in range(4)])


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def told():
    return Conditioning(text_embedding=randn(4, 6, 8, seed=1))


def speed(**options) -> IDDPMSpeed:
    return IDDPMSpeed(IDDPMSpeedSpec(**options))


@pytest.mark.goldens("iddpm_speed")
def test_reference_law_of_timesteps(goldens, case):
    vectors, scheduler = goldens.case("iddpm_speed", case["name"]), speed(**case["cfg"])
    assert scheduler.num_timesteps == case["num_timesteps"]
    assert scheduler.meaningful_steps == case["meaningful_steps"]
    assert_close(scheduler.weights.float(), vectors["weights"], rtol=1e-3, atol=1e-7)
    assert_close(scheduler.probabilities.float(), vectors["p"], rtol=0, atol=3e-5)


@pytest.mark.goldens("iddpm_speed")
def test_reference_duals(goldens, case):
    """The reference draws half of a batch and appends the duals of what it drew."""
    vectors, scheduler = goldens.case("iddpm_speed", case["name"]), speed(**case["cfg"])
    drawn = vectors["draws"]
    for batch in (8, 9):
        both = torch.cat([drawn, scheduler.dual(drawn)])[:batch]
        assert torch.equal(both, vectors[f"t_for_{batch}"])


@pytest.mark.goldens("iddpm_speed")
def test_reference_losses(goldens, replay, toy, case):
    vectors = goldens.case("iddpm_speed", case["name"])
    terms = speed(**case["cfg"]).loss_terms(
        toy(),
        vectors["loss.x_start"],
        Conditioning(text_embedding=vectors["loss.y"].squeeze(1), frame_mask=vectors["loss.mask"]),
        draws=replay({"noise": vectors["loss.noise"]}),
        timestep=vectors["loss.t"],
    )
    assert set(terms) == {"loss", "mse", "vb"}
    for name, values in terms.items():
        rtol, atol = (1e-3, 1e-7) if name == "mse" else (5e-3, 5e-4)
        assert_close(values, vectors[f"loss.out.{name}"], rtol=rtol, atol=atol)


@pytest.mark.parametrize("options", [{}, {"timestep_respacing": "100"}, {"num_sampling_steps": 4}], ids=str)
def test_draws_follow_the_law(replay, options):
    scheduler = speed(**options)
    count = 20_000
    record = {"timestep": (torch.arange(count) + 0.5) / count, "dual": torch.zeros(count, dtype=torch.int64)}
    steps = scheduler.draw_timestep(replay(record))
    shares = torch.bincount(steps, minlength=scheduler.num_timesteps) / count
    assert_close(shares.double(), scheduler.probabilities, rtol=0, atol=1e-4)
    duals = scheduler.draw_timestep(replay(record | {"dual": torch.ones_like(steps)}))
    assert torch.equal(duals, scheduler.dual(steps))
    assert duals.min() >= 0
    assert duals.max() < scheduler.num_timesteps


def test_the_ends_of_the_draw_are_steps(replay):
    ends = {"timestep": torch.tensor([0.0, 1 - 2**-24]), "dual": torch.zeros(2, dtype=torch.int64)}
    assert speed().draw_timestep(replay(ends)).tolist() == [0, 999]


def test_early_steps_are_drawn_more_often_and_late_ones_weigh_more():
    scheduler = speed()
    assert scheduler.probabilities[:600].min() > 4.9 * scheduler.probabilities[700:].max()
    assert (scheduler.weights.diff() > 0).all()


def test_error_is_weighted_and_the_bound_is_not(toy):
    timestep = torch.tensor([0, 10, 500, 999])
    both = [
        scheduler.loss_terms(toy(), randn(*SHAPE), told(), draws=DRAWS, timestep=timestep)
        for scheduler in (speed(), IDDPM(IDDPMSpec()))
    ]
    assert_close(both[0]["mse"], both[1]["mse"] * speed().weights[timestep].float())
    assert torch.equal(both[0]["vb"], both[1]["vb"])
    assert_close(both[0]["loss"], both[0]["mse"] + both[0]["vb"])


@pytest.mark.parametrize("options", [{"use_kl": True}, {"learn_sigma": False}], ids=str)
def test_other_losses_work(toy, options):
    scheduler = speed(**options)
    denoiser = toy(learn_sigma=scheduler.spec.learn_sigma)
    timestep = torch.tensor([0, 10, 500, 999])
    loss = scheduler.loss(denoiser, randn(*SHAPE), told(), draws=DRAWS, timestep=timestep)
    plain = IDDPM(IDDPMSpec(**options)).loss(denoiser, randn(*SHAPE), told(), draws=DRAWS, timestep=timestep)
    weights = scheduler.weights[timestep].float() if "learn_sigma" in options else 1
    assert_close(loss, plain * weights)


def test_a_batch_of_four_trains_as_four_batches_of_one(toy):
    latents, conditioning = randn(*SHAPE), told()
    together = speed().loss(toy(), latents, conditioning, draws=DRAWS)
    for i in range(4):
        one = slice(i, i + 1)
        alone = speed().loss(toy(), latents[one], conditioning[one], draws=SampleDraws(DRAWS.keys[one]))
        assert_close(alone, together[one], rtol=1e-5, atol=1e-6)


def test_samples_as_iddpm_does(toy):
    results = [
        list(scheduler.sample(toy(torch.zeros(1, 6, 8)), randn(*SHAPE), told(), draws=DRAWS))[-1].latents
        for scheduler in (speed(num_sampling_steps=5), IDDPM(IDDPMSpec(num_sampling_steps=5)))
    ]
    assert torch.equal(*results)


def test_a_single_step_trains(toy):
    assert speed(num_sampling_steps=1).loss(toy(), randn(*SHAPE), told(), draws=DRAWS).isfinite().all()


def test_bad_options_are_those_of_iddpm():
    with pytest.raises(ValueError, match="Keep one"):
        IDDPMSpeedSpec(num_sampling_steps=10, timestep_respacing="10")
