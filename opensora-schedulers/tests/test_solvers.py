"""Solvers: what their weights add up to, how fast they converge, and the same steps by diffusers' schedulers."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from opensora.core.conditioning import Conditioning
from opensora.core.randomness import SampleDraws, SampleKey
from opensora.schedulers import SOLVERS, DPMSolver, DPMSolverSpec, Levels, RectifiedFlow, RectifiedFlowSpec, Sampler
from opensora.schedulers.sampling import from_clean, from_noise, from_velocity
from opensora.schedulers.solvers import NOISY_SOLVERS

SHAPE = (2, 4, 3, 2, 2)
NULL = torch.zeros(1, 6, 8)
DRAWS = SampleDraws([SampleKey(seed=7, index=i) for i in range(2)])
TOLD = Conditioning(text_embedding=torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1)))


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def flow(steps, *, first=1.0, last=0.0, shift=1.0):
    u = torch.linspace(first, last, steps + 1, dtype=torch.float64)[:, None]
    u = shift * u / (1 + (shift - 1) * u)
    return Levels(timesteps=1000 * u, alphas=1 - u, sigmas=u)


def two_flows(steps):
    """Samples of different levels, as under the timestep transform."""
    each = [flow(steps), flow(steps, shift=3.0)]
    timesteps, alphas, sigmas = (
        torch.cat([getattr(one, name) for one in each], dim=1) for name in ("timesteps", "alphas", "sigmas")
    )
    return Levels(timesteps=timesteps, alphas=alphas, sigmas=sigmas)


def diffusion(steps, **options):
    return DPMSolver(DPMSolverSpec(num_sampling_steps=steps, **options)).levels()


def run(name, levels, denoiser, noise, *, foresee=from_velocity, draws=DRAWS, eta=1.0):
    sampler = Sampler(levels=levels, weights=SOLVERS[name](levels, eta=eta), foresee=foresee)
    *_, last = sampler.sample(denoiser, noise, TOLD, draws=draws)
    return last.latents


# ---- weights


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(
    "levels",
    [*(flow(steps) for steps in (1, 2, 3, 4, 9, 10, 20)), two_flows(7), diffusion(8), diffusion(12, spacing="logSNR")],
    ids=["1", "2", "3", "4", "9", "10", "20", "two flows", "diffusion", "diffusion in lambda"],
)
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_a_prediction_that_stays_the_same_leads_to_its_levels(name, levels, eta):
    """alpha * clean + sigma * noise goes to just that at the next level, whatever the solver; fresh noise takes its share."""
    weights = SOLVERS[name](levels, eta=eta)
    fresh = torch.zeros_like(weights.latents) if weights.noise is None else weights.noise
    sums = [(weights.latents, weights.predictions)]
    if weights.again is not None:
        sums.append((weights.again.latents, weights.again.predictions))
    for latents, predictions in sums:
        assert_close(latents * levels.alphas[:-1] + predictions.sum(dim=1), levels.alphas[1:], rtol=1e-9, atol=1e-9)
        noise = ((latents * levels.sigmas[:-1]).square() + fresh.square()).sqrt()
        assert_close(noise, levels.sigmas[1:], rtol=1e-7, atol=1e-9)
    assert all(each.isfinite().all() for each in (weights.latents, weights.predictions, fresh))
    assert (fresh[:-1] > 0).all() if name in NOISY_SOLVERS and eta > 0 else (fresh == 0).all()


LAMBDAS = torch.linspace(-2, 3, 12, dtype=torch.float64) ** 3 / 9  # uneven
UNEVEN = Levels(
    timesteps=-LAMBDAS[:, None],
    alphas=torch.sigmoid(2 * LAMBDAS).sqrt()[:, None],
    sigmas=torch.sigmoid(-2 * LAMBDAS).sqrt()[:, None],
)


def solution(power, start, end):
    """Of the equation, from 0 at level ``start``, if the clean latents are lambda ** ``power``."""
    fine = torch.linspace(LAMBDAS[start].item(), LAMBDAS[end].item(), 200_001, dtype=torch.float64)
    return UNEVEN.alphas[end].item() * torch.trapezoid(fine**power * (fine - LAMBDAS[end]).exp(), fine).item()


def step(weights, step, latents, power):
    """What a step makes of latents, if the clean latents are lambda ** ``power``."""
    kinds = weights.predictions[step]
    seen = torch.stack([LAMBDAS[step - k] ** power for k in range(len(kinds))])[:, None]
    return (weights.latents[step] * latents + (kinds * seen).sum(dim=0)).item()


@pytest.mark.parametrize(("name", "powers"), [("euler", [0]), ("dpm++2m", [0]), ("dpm++3m", [0, 1, 2])])
def test_polynomials_in_lambda_are_followed_exactly(name, powers):
    """All follow a constant, order 3 a square too. (The middle of a step, at order 2, is no exact integral of a line.)"""
    for power in powers:
        assert step(SOLVERS[name](UNEVEN, eta=0.0), 6, 0.0, power) == pytest.approx(solution(power, 6, 7), abs=1e-9)


@pytest.mark.parametrize("power", [0, 1, 2])
def test_unipc_corrects_a_step_to_the_exact_one_before_it_goes_on(power):
    predictor, unipc = SOLVERS["dpm++2m"](UNEVEN, eta=0.0), SOLVERS["unipc"](UNEVEN, eta=0.0)
    predicted = step(predictor, 6, 0.0, power)
    assert power == 0 or predicted != pytest.approx(solution(power, 6, 7), abs=1e-4)
    corrected = step(predictor, 7, solution(power, 6, 7), power)
    assert step(unipc, 7, predicted, power) == pytest.approx(corrected, abs=1e-9)


def test_few_steps_end_on_a_lower_order_and_none_extrapolates_to_no_noise():
    def orders(levels):
        return levels.orders(3).flatten().tolist()

    assert [orders(diffusion(steps)) for steps in (5, 9, 10)] == [
        [1, 2, 3, 2, 1],
        [1, 2, 3, 3, 3, 3, 3, 2, 1],
        [1, 2] + 8 * [3],
    ]
    assert orders(flow(12)) == [1, 2] + 9 * [3] + [1]
    assert orders(flow(1)) == [1]


def test_heun_asks_twice_a_step_but_for_the_one_to_no_noise(toy):
    denoiser = toy(NULL, learn_sigma=False)
    run("heun", flow(5), denoiser, randn(*SHAPE))
    assert [timestep[0].item() for _, timestep, _ in denoiser.calls] == [1000, 800, 800, 600, 600, 400, 400, 200, 200]
    denoiser.calls.clear()
    run("heun", diffusion(5), denoiser, randn(*SHAPE), foresee=from_noise)
    assert len(denoiser.calls) == 10


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "heun"])
def test_the_others_ask_once_a_step(toy, name):
    denoiser = toy(NULL, learn_sigma=False)
    run(name, flow(5), denoiser, randn(*SHAPE))
    assert [timestep[0].item() for _, timestep, _ in denoiser.calls] == [1000, 800, 600, 400, 200]


@pytest.mark.parametrize("name", sorted(NOISY_SOLVERS))
def test_noise_on_the_way_leaves_the_law_of_the_results_as_it_is(name):
    """Data of a normal law, each pixel for itself: mean and deviation come out, with one noise for all as well."""
    mean, deviation = 1.5, 0.5

    def denoiser(latents, timestep, conditioning):
        u = (timestep.double() / 1000).view(-1, 1, 1, 1, 1)
        share = deviation**2 * (1 - u) / (((1 - u) * deviation) ** 2 + u**2)
        return (mean + share * (latents - (1 - u) * mean)).float()

    result = run(name, flow(300), denoiser, torch.ones(2, 4, 8, 32, 32), foresee=from_clean)
    assert result.mean().item() == pytest.approx(mean, abs=0.01)
    assert result.std().item() == pytest.approx(deviation, abs=0.01)


# ---- convergence


def error(name, levels, *, deviation=0.5, mean=1.5):
    """Of the result for data of a normal law, whose best denoiser and whose path are known."""

    def denoiser(latents, timestep, conditioning):
        u = (timestep.double() / 1000).view(-1, 1, 1, 1, 1)
        share = deviation**2 * (1 - u) / (((1 - u) * deviation) ** 2 + u**2)
        denoised = mean + share * (latents - (1 - u) * mean)
        return ((denoised - latents) / u).float()

    noise = randn(2, 1, 1, 8, 8)
    exact = mean + deviation * noise
    return (run(name, levels, denoiser, noise, eta=0.0) - exact).abs().max().item()


@pytest.mark.parametrize(
    ("name", "factor"), [("euler", 3.9), ("euler-ancestral", 3.9), ("heun", 14), ("dpm++2m", 10), ("unipc", 14)]
)
def test_four_times_the_steps_of_a_flow_shrink_the_error_as_the_order_says(name, factor):
    """4 times at order 1, 16 times at order 2, all the way from noise alone to no noise; for dpm++2m with a logarithm.

    Next to both ends its steps are long in lambda, however many there are.
    """
    assert error(name, flow(80)) > factor * error(name, flow(320))


@pytest.mark.parametrize("name", ["heun", "dpm++2m", "dpm++3m", "unipc"])
@pytest.mark.parametrize("steps", [6, 10, 20])
def test_solvers_of_order_2_are_more_exact_than_euler_with_few_steps_too(name, steps):
    assert error(name, flow(steps)) < 0.6 * error("euler", flow(steps))


def test_no_parabola_goes_through_noise_alone():
    second, third = (SOLVERS[name](flow(12), eta=0.0).predictions for name in ("dpm++2m", "dpm++3m"))
    assert torch.equal(third[:3, :2], second[:3])
    assert (third[:3, 2] == 0).all()
    assert (third[3:11, 2] != 0).all()


def test_the_second_step_from_noise_alone_makes_use_of_the_first():
    """In lambda that is infinitely far away, so that a slope would be worth nothing."""
    levels = flow(10)
    assert levels.ratios[:2].flatten().tolist() == pytest.approx([0.0, 1.0])
    weights = SOLVERS["dpm++2m"](levels, eta=0.0)
    assert weights.predictions[1, 1].item() == pytest.approx(-0.5 * (weights.predictions[1].sum().item()))


# ---- diffusers

of_diffusers = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
"""What its schedulers make NumPy 2 say."""


def along(peer, levels, *, sigmas):
    """A scheduler of diffusers, made to go through these levels, of one sample."""
    peer.set_timesteps(levels.num_steps)
    peer.sigmas = sigmas[:, 0].float()
    peer.timesteps = levels.timesteps[:-1, 0].float()
    peer.set_begin_index(0)
    return peer


def run_peer(peer, denoiser, latents, *, scale=None, **options):
    """Its loop; ``scale`` [S + 1]: what its latents are larger by than those that the denoiser is to see."""
    for step, timestep in enumerate(peer.timesteps):
        seen = latents if scale is None else latents / scale[step]
        output = denoiser(seen, timestep.expand(len(latents)), TOLD)
        more = {name: values[step] for name, values in options.items()}
        if hasattr(peer, "is_scale_input_called"):
            peer.is_scale_input_called = True
        latents = peer.step(output, timestep, latents, return_dict=False, **more)[0]
    return latents if scale is None else latents / scale[-1]


def negated(denoiser):
    """diffusers predicts noise - clean."""
    return lambda *arguments: -denoiser(*arguments)


def flow_peer(name):
    import diffusers

    common = {"num_train_timesteps": 1000, "prediction_type": "flow_prediction", "use_flow_sigmas": True}
    solvers = {
        "dpm++2m": ("DPMSolverMultistepScheduler", {"solver_order": 2}),
        "dpm++3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
        "dpm++2m-sde": ("DPMSolverMultistepScheduler", {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"}),
        "unipc": ("UniPCMultistepScheduler", {"solver_order": 2, "solver_type": "bh2"}),
    }
    kind, options = solvers[name]
    return getattr(diffusers, kind)(**common, **options)


def recorded_noise(steps):
    """What our sampler draws at each step."""
    return [DRAWS.normal(f"step {step}", SHAPE[1:]) for step in range(steps)]


@of_diffusers
@pytest.mark.parametrize("name", ["dpm++2m", "dpm++2m-sde", "unipc"])
@pytest.mark.parametrize(("steps", "shift"), [(3, 1.0), (8, 3.0), (20, 1.0)])
def test_flow_solvers_step_as_those_of_diffusers(toy, name, steps, shift):
    """From a little signal on: where there is none, diffusers' second step learns nothing from the first, and its
    corrector divides infinities."""
    denoiser = toy(NULL, learn_sigma=False)
    levels = flow(steps, first=0.98, shift=shift)
    peer = along(flow_peer(name), levels, sigmas=levels.sigmas)
    more = {"variance_noise": recorded_noise(steps)} if name in NOISY_SOLVERS else {}
    expected = run_peer(peer, negated(denoiser), randn(*SHAPE), **more)
    assert_close(run(name, levels, denoiser, randn(*SHAPE)), expected, rtol=1e-4, atol=1e-4)


@of_diffusers
def test_from_noise_alone_the_first_step_is_that_of_diffusers(toy):
    denoiser = toy(NULL, learn_sigma=False)
    levels = flow(2)
    peer = along(flow_peer("dpm++2m"), levels, sigmas=levels.sigmas)
    expected = run_peer(peer, negated(denoiser), randn(*SHAPE))
    assert_close(run("dpm++2m", levels, denoiser, randn(*SHAPE)), expected, rtol=1e-5, atol=1e-5)


@of_diffusers
@pytest.mark.parametrize("transform", [False, True])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_rectified_flow_samples_as_diffusers_flow_matching(toy, solver, transform):
    """Per sample, as the shift differs: diffusers has one for the whole batch."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

    conditioning = TOLD.replace(
        height=torch.tensor([240.0, 512.0]), width=torch.tensor([426.0, 512.0]), num_frames=torch.tensor([51.0, 1.0])
    )
    scheduler = RectifiedFlow(RectifiedFlowSpec(num_sampling_steps=7, solver=solver, use_timestep_transform=transform))
    denoiser = toy(NULL, learn_sigma=False)
    *_, last = scheduler.sample(denoiser, randn(*SHAPE), conditioning, draws=DRAWS)
    levels = scheduler.levels(conditioning, batch=2)
    for row in range(2):
        u = levels.sigmas[:, row].float()
        peer = FlowMatchEulerDiscreteScheduler() if solver == "euler" else FlowMatchHeunDiscreteScheduler()
        peer.set_timesteps(7)
        peer.sigmas = u if solver == "euler" else torch.cat([u[:1], u[1:-1].repeat_interleave(2), u[-1:]])
        peer.timesteps = 1000 * (u[:-1] if solver == "euler" else torch.cat([u[:1], u[1:-1].repeat_interleave(2)]))
        peer.set_begin_index(0)
        expected = run_peer(peer, negated(denoiser), randn(*SHAPE))
        assert_close(last.latents[row], expected[row], rtol=1e-4, atol=1e-4)


def diffusion_peer(name):
    import diffusers

    common = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "prediction_type": "epsilon"}
    solvers = {
        "euler": ("DPMSolverMultistepScheduler", {"solver_order": 1}),
        "dpm++2m": ("DPMSolverMultistepScheduler", {"solver_order": 2}),
        "dpm++2m-sde": ("DPMSolverMultistepScheduler", {"solver_order": 2, "algorithm_type": "sde-dpmsolver++"}),
        "unipc": ("UniPCMultistepScheduler", {"solver_order": 2, "solver_type": "bh2"}),
    }
    kind, options = solvers[name]
    return getattr(diffusers, kind)(**common, **options, lower_order_final=False, final_sigmas_type="sigma_min")


@of_diffusers
@pytest.mark.parametrize("name", ["euler", "dpm++2m", "dpm++2m-sde", "unipc"])
@pytest.mark.parametrize("spacing", ["time_uniform", "logSNR"])
def test_diffusion_solvers_step_as_those_of_diffusers(toy, name, spacing):
    denoiser = toy(NULL, learn_sigma=False)
    levels = diffusion(20, spacing=spacing)
    peer = along(diffusion_peer(name), levels, sigmas=levels.sigmas / levels.alphas)
    more = {"variance_noise": recorded_noise(20)} if name in NOISY_SOLVERS else {}
    expected = run_peer(peer, denoiser, randn(*SHAPE), **more)
    result = run(name, levels, denoiser, randn(*SHAPE), foresee=from_noise)
    assert_close(result, expected, rtol=1e-3, atol=1e-3)


@of_diffusers
def test_euler_ancestral_steps_as_that_of_diffusers(toy, replay):
    from diffusers import EulerAncestralDiscreteScheduler

    denoiser, steps = toy(NULL, learn_sigma=False), 12
    levels = diffusion(steps)
    peer = along(EulerAncestralDiscreteScheduler(), levels, sigmas=levels.sigmas / levels.alphas)
    scale = (1 / levels.alphas[:, 0]).float()
    generator = torch.Generator().manual_seed(3)
    expected = run_peer(peer, denoiser, randn(*SHAPE) * scale[0], scale=scale, generator=[generator] * steps)
    generator = torch.Generator().manual_seed(3)
    draws = replay({f"step {step}": torch.randn(SHAPE, generator=generator) for step in range(steps)})
    result = run("euler-ancestral", levels, denoiser, randn(*SHAPE), foresee=from_noise, draws=draws)
    assert_close(result, expected, rtol=1e-3, atol=1e-3)
