"""DPM-Solver++ on diffusion processes: reference vectors, noise levels, orders of convergence, bad options."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from opensora.core.conditioning import Conditioning
from opensora.core.errors import ConfigError
from opensora.core.randomness import SampleDraws, SampleKey
from opensora.schedulers import IDDPM, DPMSolver, DPMSolverSpec, IDDPMSpec
from opensora.schedulers.solvers import SOLVERS

SHAPE = (4, 4, 5, 3, 2)
NULL = torch.zeros(1, 6, 8)
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
    scheduler = solver(num_sampling_steps=case["steps"], cfg_scale=case["cfg_scale"])
    states = scheduler.sample(
        scheduler.guide(denoiser), vectors["z"], Conditioning(text_embedding=vectors["y"].squeeze(1)), draws=replay({})
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


def error(steps, *, predict_xstart=True, **options):
    """Of the result for data of a normal law, whose best denoiser and whose path are known."""
    scheduler = solver(num_sampling_steps=steps, predict_xstart=predict_xstart, **{"spacing": "logSNR"} | options)

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


@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({"order": 1}, 1.9),
        ({"order": 2}, 3.7),
        ({"order": 3}, 9.0),
        ({"solver": "euler"}, 1.9),
        ({"solver": "euler-ancestral", "eta": 0.0}, 1.9),
        ({"solver": "heun"}, 3.7),
        ({"solver": "dpm++2m-sde", "eta": 0.0}, 3.7),
        ({"solver": "unipc"}, 6.0),
    ],
    ids=str,
)
def test_twice_the_steps_shrink_the_error_as_the_order_says(options, factor):
    assert error(20, **options) > factor * error(40, **options)


@pytest.mark.parametrize("spacing", ["logSNR", "time_uniform"])
def test_noise_or_clean_latents_may_be_predicted(spacing):
    by_noise = error(20, spacing=spacing, predict_xstart=False)
    assert by_noise == pytest.approx(error(20, spacing=spacing), rel=1e-3)


@pytest.mark.parametrize(("order", "name"), [(1, "euler"), (2, "dpm++2m"), (3, "dpm++3m")])
def test_without_a_solver_the_order_chooses(toy, order, name):
    by_order, by_name = (
        last(scheduler.sample(toy(), randn(*SHAPE), told(), draws=DRAWS))
        for scheduler in (solver(order=order), solver(solver=name))
    )
    assert torch.equal(by_order, by_name)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_euler_ancestral_is_ddim_with_noise(toy, eta):
    """Both go through timesteps 999, 972, ... 0; DDIM makes one step more, from 0 to no noise."""
    ddim = IDDPM(IDDPMSpec(num_sampling_steps=38, ddim_eta=eta, learn_sigma=False))
    ancestral = solver(num_sampling_steps=37, solver="euler-ancestral", eta=eta)
    results = [
        list(scheduler.sample(toy(learn_sigma=False), randn(*SHAPE), told(), draws=DRAWS))
        for scheduler in (ddim, ancestral)
    ]
    assert_close(results[1][-1].latents, results[0][-2].latents, rtol=1e-4, atol=1e-4)
    assert_close(results[1][-1].denoised, results[0][-2].denoised, rtol=1e-4, atol=1e-4)


def test_states_count_down_and_draw_nothing(toy, replay):
    states = list(solver().sample(toy(NULL), randn(*SHAPE), told(), draws=replay({})))
    assert [state.step for state in states] == list(range(6))
    timesteps = [state.timestep for state in states]
    assert timesteps[0] == 999
    assert timesteps == sorted(timesteps, reverse=True)
    assert states[0].num_steps == 6


def test_training_is_refused(toy):
    with pytest.raises(ConfigError, match=r'only samples.*"iddpm"'):
        solver().loss(toy(), randn(*SHAPE), told(), draws=DRAWS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_sampling_steps": 1}, "num_sampling_steps=1 is too few for order=2.*order=1"),
        ({"num_sampling_steps": 0}, "num_sampling_steps"),
        ({"order": 4}, "order"),
        ({"order": 3, "solver": "unipc"}, 'order=3 is one of DPM-Solver.*solver="unipc"'),
        ({"solver": "rk4"}, "solver.*unipc"),
        ({"eta": -0.1}, "eta"),
        ({"spacing": "karras"}, "spacing.*logSNR"),
        ({"cfg_scale": -1.0}, "cfg_scale"),
        ({"noise_schedule": "sigmoid"}, "noise_schedule.*linear"),
        ({"diffusion_steps": 20}, "more than 20"),
    ],
)
def test_bad_options_are_refused_when_they_are_given(options, message):
    with pytest.raises(ValueError, match=message):
        DPMSolverSpec(**options)


@pytest.mark.parametrize("name", SOLVERS)
def test_named_solvers_need_no_more_than_a_step(name):
    assert DPMSolverSpec(num_sampling_steps=1, solver=name).num_sampling_steps == 1
