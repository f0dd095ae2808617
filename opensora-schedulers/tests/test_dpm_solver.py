"""DPM-Solver++: reference vectors, orders of convergence, given frames, bad options."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from opensora.core.conditioning import Conditioning
from opensora.core.errors import ConfigError, ShapeError
from opensora.core.randomness import SampleDraws, SampleKey
from opensora.schedulers import IDDPM, DPMSolver, DPMSolverSpec, IDDPMSpec
from opensora.schedulers.dpm_solver import step_weights

SHAPE = (4, 4, 5, 3, 2)
NULL = torch.zeros(1, 6, 8)
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0.3, 0.5, 1, 1], [0, 0, 0, 0, 0]])
DRAWS = SampleDraws([SampleKey(seed=7, index=i) for i in range(4)])


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def told(batch=4):
    return Conditioning(text_embedding=randn(4, 6, 8, seed=1)[:batch])


def solver(**options) -> DPMSolver:
    return DPMSolver(DPMSolverSpec(**{"num_sampling_steps": 6, **options}))


def last(states):
    return list(states)[-1].latents


@pytest.mark.goldens("dpm_solver")
def test_reference_trajectories(goldens, replay, toy, case):
    vectors = goldens.case("dpm_solver", case["name"])
    denoiser = toy(vectors["y_null"].squeeze(1))
    states = solver(num_sampling_steps=case["steps"], cfg_scale=case["cfg_scale"]).sample(
        denoiser, vectors["z"], Conditioning(text_embedding=vectors["y"].squeeze(1)), draws=replay({})
    )
    trajectory = torch.stack([state.latents for state in states])
    assert_close(trajectory, vectors["traj"][1:], rtol=1e-3, atol=1e-4)
    assert_close(trajectory[-1], vectors["final"], rtol=1e-3, atol=1e-4)
    assert_close(torch.stack([timestep for _, timestep, _ in denoiser.calls]), vectors["model_t"], rtol=1e-3, atol=1e-4)


def test_reference_noise_levels(goldens):
    """The vectors count time from 1/1000 at the first step to 1 at the last."""
    vectors = goldens.tensors("dpm_solver")
    curve = solver().curve
    assert_close(curve.log_alphas, vectors["log_alpha_array"].double(), rtol=1e-3, atol=1e-4)
    timesteps = (vectors["t"].double() - 1e-3) * 1000
    log_alphas = curve.log_alpha(timesteps)
    sigmas = (1 - (2 * log_alphas).exp()).sqrt()
    found = {"log_alpha": log_alphas, "alpha": log_alphas.exp(), "sigma": sigmas, "lam": log_alphas - sigmas.log()}
    for name, values in found.items():
        assert_close(values, vectors[name].double(), rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert_close(curve.timestep(vectors["lam"]) / 1000 + 1e-3, vectors["inverse_lambda"].double(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("schedule", "is_cut"), [("linear", False), ("squaredcos_cap_v2", True)])
def test_noise_levels_are_those_of_iddpm_without_an_end_of_noise_alone(schedule, is_cut):
    curve = solver(noise_schedule=schedule).curve
    expected = IDDPM(IDDPMSpec(noise_schedule=schedule)).schedule.alphas_cumprod
    assert_close((2 * curve.log_alphas).exp(), expected[: curve.last + 1], rtol=1e-10, atol=0)
    lambdas = 0.5 * (expected / (1 - expected)).log()
    assert (lambdas[: curve.last + 1] >= -5.1).all()
    assert (lambdas[curve.last + 1 :] < -5.1).all()
    assert (curve.last < 999) is is_cut


MEAN, DEVIATION = 1.5, 0.5


def error(order, steps, *, spacing="logSNR", predict_xstart=True):
    """Of the result for data of a normal law, whose best denoiser and whose path are known."""
    scheduler = solver(
        order=order, num_sampling_steps=steps, spacing=spacing, cfg_scale=1, predict_xstart=predict_xstart
    )

    def levels(timestep):
        alpha = scheduler.curve.log_alpha(timestep.double()).exp().view(-1, 1, 1, 1, 1)
        return alpha, (1 - alpha**2).sqrt()

    def denoiser(latents, timestep, conditioning):
        alpha, sigma = levels(timestep)
        share = DEVIATION**2 * alpha / (alpha**2 * DEVIATION**2 + sigma**2)
        denoised = MEAN + share * (latents - alpha * MEAN)
        return denoised if predict_xstart else (latents - alpha * denoised) / sigma

    noise = randn(1, 1, 1, 8, 8)
    result = last(scheduler.sample(denoiser, noise, Conditioning(), draws=DRAWS))
    (start, end), sigmas = levels(torch.tensor([999.0, 0.0]))
    spread = ((end * DEVIATION) ** 2 + sigmas[1] ** 2).sqrt() / ((start * DEVIATION) ** 2 + sigmas[0] ** 2).sqrt()
    return (result - (end * MEAN + (noise - start * MEAN) * spread)).abs().max().item()


@pytest.mark.parametrize(("order", "factor"), [(1, 1.9), (2, 3.7), (3, 9.0)])
def test_twice_the_steps_shrink_the_error_as_the_order_says(order, factor):
    assert error(order, 20) > factor * error(order, 40)


@pytest.mark.parametrize("spacing", ["logSNR", "time_uniform"])
def test_noise_or_clean_latents_may_be_predicted(spacing):
    by_noise = error(2, 20, spacing=spacing, predict_xstart=False)
    assert by_noise == pytest.approx(error(2, 20, spacing=spacing), rel=1e-3)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_step_weights_integrate_a_polynomial_exactly(order):
    """All orders a constant; order 3 a square too. (The midpoint form of order 2 is no exact integral of a line.)"""
    lambdas = [-2.0, -1.3, -0.4, 0.5]
    weights = step_weights(lambdas[-order - 1 :], order)
    points = lambdas[-2 : -order - 2 : -1]  # newest first
    fine = torch.linspace(lambdas[-2], lambdas[-1], 200_001, dtype=torch.float64)
    for power in {1: [0], 2: [0], 3: [0, 1, 2]}[order]:
        integral = torch.trapezoid(fine**power * (fine - lambdas[-1]).exp(), fine).item()
        assert sum(w * p**power for w, p in zip(weights, points, strict=True)) == pytest.approx(integral, abs=1e-9)


def test_few_steps_end_on_a_lower_order():
    orders = [[solver(num_sampling_steps=steps, order=3).order_at(i) for i in range(steps)] for steps in (5, 9, 10)]
    assert orders == [[1, 2, 3, 2, 1], [1, 2, 3, 3, 3, 3, 3, 2, 1], [1, 2] + 8 * [3]]


def test_states_count_down_and_draw_nothing(toy, replay):
    states = list(solver().sample(toy(NULL), randn(*SHAPE), told(), draws=replay({})))
    assert [state.step for state in states] == list(range(6))
    timesteps = [state.timestep for state in states]
    assert timesteps[0] == 999
    assert timesteps == sorted(timesteps, reverse=True)
    assert states[0].num_steps == 6


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("frame_mask", [None, MASK], ids=["free", "masked"])
def test_a_batch_of_four_samples_as_four_batches_of_one(toy, order, frame_mask):
    noise, scheduler = randn(*SHAPE), solver(order=order)
    together = last(scheduler.sample(toy(NULL), noise, told(), draws=DRAWS, frame_mask=frame_mask))
    for i in range(4):
        one = slice(i, i + 1)
        mask = None if frame_mask is None else frame_mask[one]
        alone = scheduler.sample(
            toy(NULL), noise[one], told()[one], draws=SampleDraws(DRAWS.keys[one]), frame_mask=mask
        )
        assert_close(last(alone), together[one], rtol=1e-5, atol=1e-5)


def test_given_frames_come_back_bit_for_bit(toy):
    noise = randn(*SHAPE)
    denoiser = toy(NULL)
    states = list(solver().sample(denoiser, noise, told(), draws=DRAWS, frame_mask=MASK))
    kept = (MASK == 0)[:, None, :, None, None].expand(SHAPE)
    for state in states:
        assert torch.equal(state.latents[kept], noise[kept])
        assert torch.equal(state.denoised[kept], noise[kept])
    assert not torch.isclose(states[-1].latents[~kept], noise[~kept]).any()
    assert torch.equal(denoiser.calls[-1][2], (MASK > 0).repeat(2, 1))


def test_a_mask_of_ones_is_no_mask(toy):
    free, masked = toy(NULL), toy(NULL)
    a = last(solver().sample(free, randn(*SHAPE), told(), draws=DRAWS))
    b = last(solver().sample(masked, randn(*SHAPE), told(), draws=DRAWS, frame_mask=torch.ones(4, 5)))
    assert torch.equal(a, b)
    assert all(frame_mask is None for _, _, frame_mask in masked.calls)


@pytest.mark.parametrize("ratio", [0.05 * k for k in range(1, 20)])
def test_a_frame_joins_at_the_step_that_its_ratio_names(toy, ratio):
    mask = torch.ones(4, 5)
    mask[:, 0] = ratio  # rounded to float32 on the way
    denoiser = toy(NULL)
    last(solver(num_sampling_steps=20).sample(denoiser, randn(*SHAPE), told(), draws=DRAWS, frame_mask=mask))
    noisy = [frame_mask[0, 0].item() for _, _, frame_mask in denoiser.calls]
    assert noisy.index(True) == 20 - round(ratio * 20)


@pytest.mark.parametrize("order", [2, 3])
def test_a_frame_that_joins_starts_anew(order):
    """As a run would that begins there: what the denoiser was told before says nothing about it."""
    clean, mask = randn(1, 4, 5, 3, 2, seed=3), torch.full((1, 5), 0.5)

    def denoiser(latents, timestep, conditioning):
        return 0.3 * latents + (timestep / 2000).view(-1, 1, 1, 1, 1)

    draws = SampleDraws(DRAWS.keys[:1])
    scheduler = solver(num_sampling_steps=20, cfg_scale=1, order=order)
    joined = list(scheduler.sample(denoiser, clean, told(1), draws=draws, frame_mask=mask))[10]
    alone = solver(num_sampling_steps=20, cfg_scale=1, order=1)
    expected = list(alone.sample(denoiser, clean, told(1), draws=draws, frame_mask=mask))[10]
    assert_close(joined.latents, expected.latents, rtol=1e-5, atol=1e-6)


def test_guidance_of_one_runs_no_null_half(toy):
    denoiser = toy()
    last(solver(cfg_scale=1.0).sample(denoiser, randn(*SHAPE), told(), draws=DRAWS))
    assert {len(latents) for latents, _, _ in denoiser.calls} == {4}


def test_half_precision_latents_are_computed_in_float32(toy):
    assert last(solver().sample(toy(NULL), randn(*SHAPE).bfloat16(), told(), draws=DRAWS)).dtype is torch.float32


def test_training_is_refused(toy):
    with pytest.raises(ConfigError, match=r'only samples.*"iddpm"'):
        solver().loss(toy(), randn(*SHAPE), told(), draws=DRAWS)


def test_a_denoiser_with_a_wrong_number_of_channels_is_refused():
    sampling = solver(cfg_scale=1).sample(lambda x, *_: x.repeat(1, 3, 1, 1, 1), randn(*SHAPE), told(), draws=DRAWS)
    with pytest.raises(ShapeError, match="12 channels for latents of 4"):
        next(sampling)


@pytest.mark.parametrize(
    ("frame_mask", "problem", "message"),
    [
        (torch.ones(4, 3), ShapeError, r"\[4, 3\].*\[4, 5\]"),
        (torch.full((4, 5), 1.5), ConfigError, r"\[0, 1\].*1\.5"),
        (torch.full((4, 5), torch.nan), ConfigError, r"\[0, 1\]"),
    ],
)
def test_bad_frame_masks_are_refused(toy, frame_mask, problem, message):
    with pytest.raises(problem, match=message):
        next(solver().sample(toy(NULL), randn(*SHAPE), told(), draws=DRAWS, frame_mask=frame_mask))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_sampling_steps": 1}, "num_sampling_steps=1 is too few for order=2.*order=1"),
        ({"num_sampling_steps": 0}, "num_sampling_steps"),
        ({"order": 4}, "order"),
        ({"spacing": "karras"}, "spacing.*logSNR"),
        ({"cfg_scale": -1.0}, "cfg_scale"),
        ({"noise_schedule": "sigmoid"}, "noise_schedule.*linear"),
        ({"diffusion_steps": 20}, "more than 20"),
    ],
)
def test_bad_options_are_refused_when_they_are_given(options, message):
    with pytest.raises(ValueError, match=message):
        DPMSolverSpec(**options)


def test_one_step_of_order_one_works(toy):
    assert (
        last(solver(num_sampling_steps=1, order=1).sample(toy(NULL), randn(*SHAPE), told(), draws=DRAWS))
        .isfinite()
        .all()
    )
