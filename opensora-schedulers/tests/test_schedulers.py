"""What holds for every scheduler: samples don't depend on their batch, given frames stay, and bad arguments say so."""

from __future__ import annotations

import attrs
import pytest
import torch
from torch.testing import assert_close

from opensora.core.conditioning import Conditioning
from opensora.core.errors import ConfigError, ShapeError
from opensora.core.randomness import SampleDraws, SampleKey
from opensora.schedulers import IDDPM, DPMSolver, DPMSolverSpec, IDDPMSpec, RectifiedFlow, RectifiedFlowSpec
from opensora.schedulers.solvers import SOLVERS

TRAINERS = {
    "rflow": RectifiedFlow(RectifiedFlowSpec(num_sampling_steps=6, use_timestep_transform=True)),
    "rflow-logit-normal": RectifiedFlow(RectifiedFlowSpec(num_sampling_steps=6, sample_method="logit-normal")),
    "iddpm": IDDPM(IDDPMSpec(num_sampling_steps=6)),
    "ddim": IDDPM(IDDPMSpec(num_sampling_steps=6, ddim_eta=0.5)),
    "iddpm-kl-fixed": IDDPM(
        IDDPMSpec(num_sampling_steps=6, learn_sigma=False, use_kl=True, noise_schedule="squaredcos_cap_v2")
    ),
}
SAMPLERS = (
    TRAINERS
    | {
        f"rflow {name}": RectifiedFlow(
            RectifiedFlowSpec(num_sampling_steps=6, use_timestep_transform=True, solver=name, eta=0.7)
        )
        for name in SOLVERS
    }
    | {
        f"dpm-solver {name}": DPMSolver(DPMSolverSpec(num_sampling_steps=6, solver=name, predict_xstart=name == "heun"))
        for name in SOLVERS
    }
    | {f"dpm-solver {order}": DPMSolver(DPMSolverSpec(num_sampling_steps=6, order=order)) for order in (1, 2, 3)}
)
SHAPE = (4, 4, 5, 3, 2)
NULL = torch.zeros(1, 6, 8)
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0.3, 0.5, 1, 1], [0, 0, 0, 0, 0]])
DRAWS = SampleDraws([SampleKey(seed=7, index=i) for i in range(4)])


@pytest.fixture(params=TRAINERS)
def trainer(request):
    return TRAINERS[request.param]


@pytest.fixture(params=SAMPLERS)
def scheduler(request):
    return SAMPLERS[request.param]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def told(batch=4):
    return Conditioning(
        text_embedding=randn(4, 6, 8, seed=1)[:batch],
        height=torch.tensor([240.0, 240.0, 512.0, 720.0])[:batch],
        width=torch.tensor([426.0, 426.0, 512.0, 1280.0])[:batch],
        num_frames=torch.tensor([51.0, 1.0, 10.0, 102.0])[:batch],
    )


def sample(scheduler, denoiser, noise, conditioning, **options):
    """Under guidance, as the pipeline does it."""
    return list(scheduler.sample(scheduler.guide(denoiser), noise, conditioning, **{"draws": DRAWS} | options))


def last(*arguments, **options):
    return sample(*arguments, **options)[-1].latents


def one_draw(i):
    return SampleDraws(DRAWS.keys[i : i + 1])


def two_draws():
    return SampleDraws(DRAWS.keys[:2])


@pytest.mark.parametrize("frame_mask", [None, MASK], ids=["free", "masked"])
def test_a_batch_of_four_samples_as_four_batches_of_one(scheduler, toy, frame_mask):
    noise, conditioning = randn(*SHAPE), told()
    together = last(scheduler, toy(NULL), noise, conditioning, frame_mask=frame_mask)
    for i in range(4):
        one = slice(i, i + 1)
        mask = None if frame_mask is None else frame_mask[one]
        alone = last(scheduler, toy(NULL), noise[one], conditioning[one], draws=one_draw(i), frame_mask=mask)
        assert_close(alone, together[one], rtol=1e-5, atol=1e-5)


def test_a_batch_of_four_trains_as_four_batches_of_one(trainer, toy):
    latents, conditioning = randn(*SHAPE), told().replace(frame_mask=MASK == 1)
    together = trainer.loss(toy(), latents, conditioning, draws=DRAWS)
    alone = [trainer.loss(toy(), latents[i : i + 1], conditioning[i : i + 1], draws=one_draw(i)) for i in range(4)]
    assert together.shape == (4,)
    assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_a_sample_without_noised_frames_has_loss_zero(trainer, toy):
    frame_mask = torch.tensor([[True] * 5, [False] * 5, [True] * 5, [False] * 5])
    loss = trainer.loss(toy(), randn(*SHAPE), told().replace(frame_mask=frame_mask), draws=DRAWS)
    assert loss[[1, 3]].tolist() == [0, 0]
    assert (loss[[0, 2]] > 0).all()


def test_given_frames_do_not_count_in_the_loss(trainer, toy):
    latents, frame_mask = randn(*SHAPE), torch.tensor([[False, True, True, True, True]] * 4)

    def loss(wrong):
        def denoiser(*args):
            output = toy()(*args)
            output[:, :, 0] += wrong
            return output

        return trainer.loss(denoiser, latents, told().replace(frame_mask=frame_mask), draws=DRAWS)

    assert torch.equal(loss(0.0), loss(100.0))


def test_sampling_twice_gives_the_same(scheduler, toy):
    runs = [last(scheduler, toy(NULL), randn(*SHAPE), told(), frame_mask=MASK) for _ in range(2)]
    assert torch.equal(*runs)


def test_sampling_leaves_its_arguments_alone(scheduler, toy):
    noise, mask, conditioning = randn(*SHAPE), MASK.clone(), told()
    last(scheduler, toy(NULL), noise, conditioning, frame_mask=mask)
    assert torch.equal(noise, randn(*SHAPE))
    assert torch.equal(mask, MASK)
    assert conditioning.frame_mask is None


def test_states_count_their_steps_down_to_the_data(scheduler, toy):
    states = sample(scheduler, toy(NULL), randn(*SHAPE), told())
    assert [state.step for state in states] == list(range(6))
    assert {state.num_steps for state in states} == {6}
    timesteps = [state.timestep for state in states]
    assert timesteps == sorted(timesteps, reverse=True)
    assert all(0 <= timestep <= scheduler.num_timesteps for timestep in timesteps)
    assert not any(state.latents.requires_grad for state in states)


def test_a_mask_of_ones_is_no_mask(scheduler, toy):
    free, masked = toy(NULL), toy(NULL)
    a = last(scheduler, free, randn(*SHAPE), told())
    b = last(scheduler, masked, randn(*SHAPE), told(), frame_mask=torch.ones(4, 5))
    assert torch.equal(a, b)
    assert all(frame_mask is None for _, _, frame_mask in masked.calls)


def test_guidance_of_one_runs_no_null_half(scheduler, toy):
    denoiser = toy()
    unguided = type(scheduler)(attrs.evolve(scheduler.spec, cfg_scale=1.0))
    last(unguided, denoiser, randn(*SHAPE), told())
    assert {len(latents) for latents, _, _ in denoiser.calls} == {4}


def test_half_precision_latents_are_computed_in_float32(scheduler, toy):
    assert last(scheduler, toy(NULL), randn(*SHAPE).bfloat16(), told()).dtype is torch.float32


def test_half_precision_latents_are_trained_on_in_float32(trainer, toy):
    assert trainer.loss(toy(), randn(*SHAPE).bfloat16(), told(), draws=DRAWS).dtype is torch.float32


@pytest.mark.parametrize(
    ("frame_mask", "error", "message"),
    [
        (torch.ones(4, 3), ShapeError, r"\[4, 3\].*\[4, 5\]"),
        (torch.full((4, 5), 1.5), ConfigError, r"\[0, 1\].*1\.5"),
        (torch.full((4, 5), torch.nan), ConfigError, r"\[0, 1\]"),
    ],
)
def test_bad_frame_masks_are_refused(scheduler, toy, frame_mask, error, message):
    with pytest.raises(error, match=message):
        sample(scheduler, toy(NULL), randn(*SHAPE), told(), frame_mask=frame_mask)


def test_a_denoiser_with_a_wrong_number_of_channels_is_refused(trainer):
    with pytest.raises(ShapeError, match="12 channels for latents of 4"):
        trainer.loss(lambda latents, *_: latents.repeat(1, 3, 1, 1, 1), randn(*SHAPE), told(), draws=DRAWS)


def test_sampling_refuses_a_denoiser_with_a_wrong_number_of_channels(scheduler):
    with pytest.raises(ShapeError, match="12 channels for latents of 4"):
        next(scheduler.sample(lambda latents, *_: latents.repeat(1, 3, 1, 1, 1), randn(*SHAPE), told(), draws=DRAWS))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("mask_value", [0.0, 0.3])
def test_a_perfect_velocity_leads_to_the_data(solver, mask_value):
    clean = randn(2, 4, 5, 3, 2, seed=3)

    def denoiser(latents, timestep, conditioning):
        u = (timestep / 1000).view(-1, 1, 1, 1, 1)
        return (clean - latents) / u  # what is left of the way, over what is left of the time

    scheduler = RectifiedFlow(RectifiedFlowSpec(num_sampling_steps=10, solver=solver))
    noise, frame_mask = randn(2, 4, 5, 3, 2), torch.ones(2, 5)
    noise[:, :, 0], frame_mask[:, 0] = clean[:, :, 0], mask_value
    for state in scheduler.sample(denoiser, noise, told(2), draws=two_draws(), frame_mask=frame_mask):
        assert_close(state.denoised, clean, rtol=1e-4, atol=1e-4)
    assert_close(state.latents, clean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eta", [None, 0.0, 1.0])
def test_a_perfect_noise_prediction_leads_to_the_data(eta):
    clean = randn(2, 4, 5, 3, 2, seed=3)
    scheduler = IDDPM(IDDPMSpec(num_sampling_steps=10, learn_sigma=False, ddim_eta=eta))

    def denoiser(latents, timestep, conditioning):
        abar = scheduler.schedule.at(torch.searchsorted(scheduler.timesteps, timestep.contiguous())).alphas_cumprod
        return (latents - abar.sqrt() * clean) / (1 - abar).sqrt()

    for state in scheduler.sample(denoiser, randn(2, 4, 5, 3, 2), told(2), draws=two_draws()):
        assert_close(state.denoised, clean, rtol=1e-3, atol=2e-3)
    assert_close(state.latents, clean, rtol=1e-4, atol=1e-4)


def test_given_frames_come_back(scheduler, toy):
    """Bit for bit; from iddpm, which noises them once more at the last step, nearly so."""
    noise, denoiser = randn(*SHAPE), toy(NULL)
    states = sample(scheduler, denoiser, noise, told(), frame_mask=MASK)
    kept = (MASK == 0)[:, None, :, None, None].expand(SHAPE)
    for state in states[:-1] if isinstance(scheduler, IDDPM) else states:
        assert torch.equal(state.latents[kept], noise[kept])
        assert torch.equal(state.denoised[kept], noise[kept])
    assert_close(states[-1].latents[kept], noise[kept], rtol=0, atol=0.1)
    assert not torch.isclose(states[-1].latents[~kept], noise[~kept]).any()
    told_clean = torch.stack([frame_mask for _, _, frame_mask in denoiser.calls])[:, :, MASK[3] == 0]
    assert not told_clean[:, 3].any()


def test_samplers_say_whether_they_draw_noise(scheduler, toy, replay):
    if not scheduler.adds_noise:
        last(scheduler, toy(NULL), randn(*SHAPE), told(), draws=replay({}))  # an error if anything is drawn
        if not isinstance(scheduler, IDDPM):
            last(scheduler, toy(NULL), randn(*SHAPE), told(), draws=replay({}), frame_mask=(MASK == 1).float())
    else:
        with pytest.raises(KeyError, match="step 0"):
            last(scheduler, toy(NULL), randn(*SHAPE), told(), draws=replay({}))


@pytest.mark.parametrize(
    "scheduler",
    [
        RectifiedFlow(RectifiedFlowSpec(solver="euler-ancestral", eta=0)),
        DPMSolver(DPMSolverSpec(solver="dpm++2m-sde", eta=0)),
        IDDPM(IDDPMSpec(num_sampling_steps=5, ddim_eta=0)),
    ],
    ids=["rflow", "dpm-solver", "iddpm"],
)
def test_without_eta_there_is_no_noise(scheduler, toy, replay):
    assert not scheduler.adds_noise
    last(scheduler, toy(NULL), randn(*SHAPE), told(), draws=replay({}))


@pytest.mark.parametrize("frame_mask", [None, MASK], ids=["free", "masked"])
def test_sampling_goes_on_behind_any_state_bit_for_bit(scheduler, toy, frame_mask):
    states = sample(scheduler, toy(NULL), randn(*SHAPE), told(), frame_mask=frame_mask)
    for state in states:
        rest = sample(scheduler, toy(NULL), randn(*SHAPE), told(), frame_mask=frame_mask, after=state)
        assert [each.step for each in rest] == list(range(state.step + 1, 6))
        for one, other in zip(rest, states[state.step + 1 :], strict=True):
            assert torch.equal(one.latents, other.latents)
            assert torch.equal(one.denoised, other.denoised)
            assert one.timestep == other.timestep
            assert len(one.memory) == len(other.memory)
            assert all(map(torch.equal, one.memory, other.memory))


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_goes_on_behind_the_state_of_another_as_if_it_began_there(solver, toy):
    """It knows of no earlier predictions, so all that it can do is to take the present one for those."""
    first, second = (RectifiedFlow(RectifiedFlowSpec(num_sampling_steps=8, solver=name)) for name in ("euler", solver))
    state = sample(first, toy(NULL), randn(*SHAPE), told())[2]
    assert state.memory == ()
    result = sample(second, toy(NULL), randn(*SHAPE), told(), after=state)
    assert len(result) == 5
    assert result[-1].latents.isfinite().all()
    if solver in ("dpm++2m", "dpm++3m", "unipc"):
        expected = sample(first, toy(NULL), randn(*SHAPE), told())[3]
        assert_close(result[0].latents, expected.latents, rtol=1e-5, atol=1e-5)


def test_the_oldest_prediction_stands_for_those_that_a_solver_misses(toy):
    second, third = (
        RectifiedFlow(RectifiedFlowSpec(num_sampling_steps=12, solver=name)) for name in ("dpm++2m", "dpm++3m")
    )
    state = sample(second, toy(NULL), randn(*SHAPE), told())[5]
    [oldest] = state.memory
    twice = attrs.evolve(state, memory=(oldest, oldest))
    found, expected = (last(third, toy(NULL), randn(*SHAPE), told(), after=each) for each in (state, twice))
    assert torch.equal(found, expected)
    newest_twice = attrs.evolve(state, memory=())
    assert not torch.equal(last(third, toy(NULL), randn(*SHAPE), told(), after=newest_twice), expected)


def test_a_state_of_another_run_is_refused(scheduler, toy):
    state = sample(scheduler, toy(NULL), randn(*SHAPE), told())[2]
    respaced = {"timestep_respacing": None} if isinstance(scheduler, IDDPM) else {}
    longer = type(scheduler)(attrs.evolve(scheduler.spec, num_sampling_steps=9, **respaced))
    with pytest.raises(ConfigError, match=r"step 3 of 6: this scheduler takes 9 steps\. Set num_sampling_steps=6"):
        sample(longer, toy(NULL), randn(*SHAPE), told(), after=state)
    with pytest.raises(ShapeError, match=r"\[4, 4, 5, 3, 2\]; noise is \[4, 4, 5, 2, 2\]"):
        sample(scheduler, toy(NULL), randn(4, 4, 5, 2, 2), told(), after=state)


@pytest.mark.parametrize("ratio", [0.05 * k for k in range(1, 20)])
def test_a_frame_joins_at_the_step_that_its_ratio_names(toy, ratio):
    mask = torch.ones(4, 5)
    mask[:, 0] = ratio  # rounded to float32 on the way
    for scheduler in (
        RectifiedFlow(RectifiedFlowSpec(num_sampling_steps=20)),
        DPMSolver(DPMSolverSpec(num_sampling_steps=20)),
        IDDPM(IDDPMSpec(num_sampling_steps=20)),
    ):
        denoiser = toy(NULL)
        last(scheduler, denoiser, randn(*SHAPE), told(), frame_mask=mask)
        noisy = [frame_mask[0, 0].item() for _, _, frame_mask in denoiser.calls]
        assert noisy.index(True) == 20 - round(ratio * 20)


@pytest.mark.parametrize("solver", ["dpm++2m", "dpm++3m", "unipc"])
@pytest.mark.parametrize("kind", ["rflow", "dpm-solver"])
def test_a_frame_that_joins_starts_anew(kind, solver):
    """As a run would that begins there: what the denoiser was told before says nothing about it."""
    clean, mask = randn(1, 4, 5, 3, 2, seed=3), torch.full((1, 5), 0.5)

    def denoiser(latents, timestep, conditioning):
        return 0.3 * latents + (timestep / 2000).view(-1, 1, 1, 1, 1)

    def after_joining(solver):
        spec = {"num_sampling_steps": 20, "solver": solver}
        scheduler = RectifiedFlow(RectifiedFlowSpec(**spec)) if kind == "rflow" else DPMSolver(DPMSolverSpec(**spec))
        return list(scheduler.sample(denoiser, clean, told(1), draws=one_draw(0), frame_mask=mask))[10].latents

    assert not torch.equal(after_joining("euler"), clean)
    assert_close(after_joining(solver), after_joining("euler"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(117, 312), (125, 291), (208, 304), (512, 512)])
def test_a_small_image_is_denoised_from_the_first_step(toy, height, width):
    conditioning = told(2).replace(
        height=torch.full((2,), float(height)), width=torch.full((2,), float(width)), num_frames=torch.ones(2)
    )
    denoiser, frame_mask = toy(NULL), torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    noise = randn(2, 4, 5, 3, 2)
    last(TRAINERS["rflow"], denoiser, noise, conditioning, draws=two_draws(), frame_mask=frame_mask)
    assert denoiser.calls[0][1].tolist() == [1000] * 4
    assert torch.equal(denoiser.calls[0][2], frame_mask.bool().repeat(2, 1))


def test_a_large_video_is_trained_on_more_noise():
    scheduler = TRAINERS["rflow"]
    draws = SampleDraws([DRAWS.keys[0]] * 4)
    timestep = scheduler.draw_timestep(draws, told())
    assert timestep[3] > timestep[2] > timestep[1]
    assert (timestep > 0).all()


def shares(scheduler, conditioning, *, batch=1):
    """Sampling timesteps as shares of the way, [S + 1, batch]."""
    return scheduler.sampling_timesteps(conditioning, batch=batch) / scheduler.num_timesteps


def shifted(u, factor):
    return factor * u / (1 + (factor - 1) * u)


def test_the_transform_counts_the_frames_that_the_autoencoder_makes():
    scheduler = TRAINERS["rflow"]
    sizes = told().replace(height=torch.full((4,), 512.0), width=torch.full((4,), 512.0))
    u = 1 - torch.arange(7, dtype=torch.float64)[:, None] / 6
    published = torch.tensor([15.0, 1.0, 1.0, 30.0]).double()  # of 51, 1, 10 and 102 frames
    assert_close(shares(scheduler, sizes, batch=4), shifted(u, published.sqrt()))
    real = sizes.replace(latent_frames=torch.tensor([13.0, 1.0, 3.0, 26.0]))
    assert_close(shares(scheduler, real, batch=4), shifted(u, real.latent_frames.double().sqrt()))
    alone = real.replace(num_frames=None)  # is not needed then
    assert torch.equal(shares(scheduler, alone, batch=4), shares(scheduler, real, batch=4))
    trained = scheduler.draw_timestep(DRAWS, real)
    assert_close(trained, scheduler.draw_timestep(DRAWS, alone))
    assert (trained[[0, 2, 3]] != scheduler.draw_timestep(DRAWS, sizes)[[0, 2, 3]]).all()


@pytest.mark.parametrize("transform", [False, True])
def test_the_sampling_shift_takes_shorter_steps_at_noise(transform):
    plain, moved = (
        RectifiedFlow(RectifiedFlowSpec(num_sampling_steps=6, use_timestep_transform=transform, sampling_shift=factor))
        for factor in (1.0, 3.0)
    )
    expected = shifted(shares(plain, told(), batch=4), 3.0)
    assert_close(shares(moved, told(), batch=4), expected)
    assert expected[0].tolist() == [1.0] * 4
    assert expected[-1].tolist() == [0.0] * 4
    assert torch.equal(plain.draw_timestep(DRAWS, told()), moved.draw_timestep(DRAWS, told()))


def test_given_timesteps_are_not_moved(toy):
    denoiser, timestep = toy(), torch.tensor([1.0, 2.0, 500.0, 1000.0])
    TRAINERS["rflow"].loss(denoiser, randn(*SHAPE), told(), draws=DRAWS, timestep=timestep)
    assert torch.equal(denoiser.calls[0][1], timestep)


def test_the_bound_teaches_the_variance_alone():
    output = randn(4, 8, 5, 3, 2, seed=2).requires_grad_()
    scheduler = IDDPM(IDDPMSpec())
    terms = scheduler.loss_terms(lambda *_: output, randn(*SHAPE), told(), draws=DRAWS)
    terms["vb"].sum().backward()
    assert (output.grad[:, :4] == 0).all()
    assert (output.grad[:, 4:] != 0).any()


def test_fewer_steps_are_told_by_their_original_index(toy):
    denoiser = toy(NULL)
    last(IDDPM(IDDPMSpec(num_sampling_steps=3)), denoiser, randn(*SHAPE), told())
    assert [timestep[0].item() for _, timestep, _ in denoiser.calls] == [999, 500, 0]


def test_the_transform_without_sizes_is_a_clear_error(toy):
    without = Conditioning(text_embedding=told().text_embedding)
    with pytest.raises(ShapeError, match="height, width and num_frames"):
        TRAINERS["rflow"].loss(toy(), randn(*SHAPE), without, draws=DRAWS)
    with pytest.raises(ShapeError, match="use_timestep_transform=False"):
        next(TRAINERS["rflow"].sample(toy(NULL), randn(*SHAPE), without, draws=DRAWS))


def test_learned_variance_from_a_denoiser_without_it_is_a_clear_error(toy):
    for spec in (IDDPMSpec(), IDDPMSpec(use_kl=True)):
        with pytest.raises(ShapeError, match="pred_sigma=True"):
            IDDPM(spec).loss(toy(learn_sigma=False), randn(*SHAPE), told(), draws=DRAWS)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (RectifiedFlowSpec, {"num_sampling_steps": 0}, "num_sampling_steps"),
        (RectifiedFlowSpec, {"num_timesteps": -1}, "num_timesteps"),
        (RectifiedFlowSpec, {"solver": "rk4"}, "solver.*dpm"),
        (RectifiedFlowSpec, {"eta": 1.5}, "eta"),
        (RectifiedFlowSpec, {"sampling_shift": 0.0}, "sampling_shift"),
        (
            RectifiedFlowSpec,
            {"use_discrete_timesteps": True, "num_timesteps": 8, "num_sampling_steps": 9},
            "num_sampling_steps=9 is more than.*num_timesteps=8",
        ),
        (RectifiedFlowSpec, {"scale": 0.0}, "scale"),
        (RectifiedFlowSpec, {"sample_method": "normal"}, "sample_method.*uniform.*logit-normal"),
        (
            RectifiedFlowSpec,
            {"sample_method": "logit-normal", "use_discrete_timesteps": True},
            "use_discrete_timesteps=True",
        ),
        (IDDPMSpec, {"num_sampling_steps": 0}, "num_sampling_steps"),
        (IDDPMSpec, {"num_sampling_steps": 1001}, "1001 of the 1000"),
        (IDDPMSpec, {"num_sampling_steps": 10, "timestep_respacing": "10"}, "Keep one"),
        (IDDPMSpec, {"timestep_respacing": "0"}, "keeps no step"),
        (IDDPMSpec, {"timestep_respacing": "ddim7.5"}, "ddim7.5"),
        (IDDPMSpec, {"timestep_respacing": "10,-2"}, "-2"),
        (IDDPMSpec, {"noise_schedule": "sigmoid"}, "noise_schedule.*linear"),
        (IDDPMSpec, {"diffusion_steps": 20}, "more than 20"),
        (IDDPMSpec, {"cfg_channel": 0}, "cfg_channel"),
        (IDDPMSpec, {"ddim_eta": 2.0}, "ddim_eta"),
    ],
)
def test_bad_options_are_refused_when_they_are_given(spec, options, message):
    with pytest.raises(ValueError, match=message):
        spec(**options)


def test_one_step_works(scheduler, toy):
    options = {"timestep_respacing": None} if isinstance(scheduler, IDDPM) else {}
    if getattr(scheduler.spec, "solver", "") is None:
        options["order"] = 1  # of DPM-Solver++, which refuses steps that are too few for its order
    single = type(scheduler)(attrs.evolve(scheduler.spec, num_sampling_steps=1, **options))
    assert last(single, toy(NULL), randn(*SHAPE), told()).isfinite().all()
