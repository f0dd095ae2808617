"""What holds for every scheduler: samples don't depend on their batch, given frames stay, and bad arguments say so."""

from __future__ import annotations

import attrs
import pytest
import torch
from torch.testing import assert_close

from opensora.core.conditioning import Conditioning
from opensora.core.errors import ConfigError, ShapeError
from opensora.core.randomness import SampleDraws, SampleKey
from opensora.schedulers import IDDPM, IDDPMSpec, RectifiedFlow, RectifiedFlowSpec

SCHEDULERS = {
    "rflow": RectifiedFlow(RectifiedFlowSpec(num_sampling_steps=6, use_timestep_transform=True)),
    "rflow-logit-normal": RectifiedFlow(RectifiedFlowSpec(num_sampling_steps=6, sample_method="logit-normal")),
    "iddpm": IDDPM(IDDPMSpec(num_sampling_steps=6)),
    "ddim": IDDPM(IDDPMSpec(num_sampling_steps=6, ddim_eta=0.5)),
    "iddpm-kl-fixed": IDDPM(
        IDDPMSpec(num_sampling_steps=6, learn_sigma=False, use_kl=True, noise_schedule="squaredcos_cap_v2")
    ),
}
SHAPE = (4, 4, 5, 3, 2)
NULL = torch.zeros(1, 6, 8)
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0.3, 0.5, 1, 1], [0, 0, 0, 0, 0]])
DRAWS = SampleDraws([SampleKey(seed=7, index=i) for i in range(4)])


@pytest.fixture(params=SCHEDULERS)
def scheduler(request):
    return SCHEDULERS[request.param]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def told(batch=4):
    return Conditioning(
        text_embedding=randn(4, 6, 8, seed=1)[:batch],
        height=torch.tensor([240.0, 240.0, 512.0, 720.0])[:batch],
        width=torch.tensor([426.0, 426.0, 512.0, 1280.0])[:batch],
        num_frames=torch.tensor([51.0, 1.0, 10.0, 102.0])[:batch],
    )


def last(states):
    return list(states)[-1].latents


def one_draw(i):
    return SampleDraws(DRAWS.keys[i : i + 1])


@pytest.mark.parametrize("frame_mask", [None, MASK], ids=["free", "masked"])
def test_a_batch_of_four_samples_as_four_batches_of_one(scheduler, toy, frame_mask):
    noise, conditioning = randn(*SHAPE), told()
    together = last(scheduler.sample(toy(NULL), noise, conditioning, draws=DRAWS, frame_mask=frame_mask))
    alone = [
        last(
            scheduler.sample(
                toy(NULL),
                noise[i : i + 1],
                conditioning[i : i + 1],
                draws=one_draw(i),
                frame_mask=None if frame_mask is None else frame_mask[i : i + 1],
            )
        )
        for i in range(4)
    ]
    assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_a_batch_of_four_trains_as_four_batches_of_one(scheduler, toy):
    latents, conditioning = randn(*SHAPE), told().replace(frame_mask=MASK == 1)
    together = scheduler.loss(toy(), latents, conditioning, draws=DRAWS)
    alone = [scheduler.loss(toy(), latents[i : i + 1], conditioning[i : i + 1], draws=one_draw(i)) for i in range(4)]
    assert together.shape == (4,)
    assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_a_sample_without_noised_frames_has_loss_zero(scheduler, toy):
    frame_mask = torch.tensor([[True] * 5, [False] * 5, [True] * 5, [False] * 5])
    loss = scheduler.loss(toy(), randn(*SHAPE), told().replace(frame_mask=frame_mask), draws=DRAWS)
    assert loss[[1, 3]].tolist() == [0, 0]
    assert (loss[[0, 2]] > 0).all()


def test_given_frames_do_not_count_in_the_loss(scheduler, toy):
    latents, frame_mask = randn(*SHAPE), torch.tensor([[False, True, True, True, True]] * 4)

    def loss(wrong):
        def denoiser(*args):
            output = toy()(*args)
            output[:, :, 0] += wrong
            return output

        return scheduler.loss(denoiser, latents, told().replace(frame_mask=frame_mask), draws=DRAWS)

    assert torch.equal(loss(0.0), loss(100.0))


def test_sampling_twice_gives_the_same(scheduler, toy):
    runs = [last(scheduler.sample(toy(NULL), randn(*SHAPE), told(), draws=DRAWS, frame_mask=MASK)) for _ in range(2)]
    assert torch.equal(*runs)


def test_sampling_leaves_its_arguments_alone(scheduler, toy):
    noise, mask, conditioning = randn(*SHAPE), MASK.clone(), told()
    last(scheduler.sample(toy(NULL), noise, conditioning, draws=DRAWS, frame_mask=mask))
    assert torch.equal(noise, randn(*SHAPE))
    assert torch.equal(mask, MASK)
    assert conditioning.frame_mask is None


def test_states_count_their_steps_down_to_the_data(scheduler, toy):
    states = list(scheduler.sample(toy(NULL), randn(*SHAPE), told(), draws=DRAWS))
    assert [state.step for state in states] == list(range(6))
    assert {state.num_steps for state in states} == {6}
    timesteps = [state.timestep for state in states]
    assert timesteps == sorted(timesteps, reverse=True)
    assert all(0 <= timestep <= scheduler.num_timesteps for timestep in timesteps)
    assert not any(state.latents.requires_grad for state in states)


def test_a_mask_of_ones_is_no_mask(scheduler, toy):
    free, masked = toy(NULL), toy(NULL)
    a = last(scheduler.sample(free, randn(*SHAPE), told(), draws=DRAWS))
    b = last(scheduler.sample(masked, randn(*SHAPE), told(), draws=DRAWS, frame_mask=torch.ones(4, 5)))
    assert torch.equal(a, b)
    assert all(frame_mask is None for _, _, frame_mask in masked.calls)


def test_guidance_of_one_runs_no_null_half(scheduler, toy):
    denoiser = toy()
    unguided = type(scheduler)(attrs.evolve(scheduler.spec, cfg_scale=1.0))
    last(unguided.sample(denoiser, randn(*SHAPE), told(), draws=DRAWS))
    assert {len(latents) for latents, _, _ in denoiser.calls} == {4}


def test_half_precision_latents_are_computed_in_float32(scheduler, toy):
    latents = randn(*SHAPE).bfloat16()
    assert scheduler.loss(toy(), latents, told(), draws=DRAWS).dtype is torch.float32
    assert last(scheduler.sample(toy(NULL), latents, told(), draws=DRAWS)).dtype is torch.float32


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
        next(scheduler.sample(toy(NULL), randn(*SHAPE), told(), draws=DRAWS, frame_mask=frame_mask))


def test_a_denoiser_with_a_wrong_number_of_channels_is_refused(scheduler):
    with pytest.raises(ShapeError, match="12 channels for latents of 4"):
        scheduler.loss(lambda latents, *_: latents.repeat(1, 3, 1, 1, 1), randn(*SHAPE), told(), draws=DRAWS)


@pytest.mark.parametrize("mask_value", [0.0, 0.3])
def test_a_perfect_velocity_leads_to_the_data(mask_value):
    clean = randn(2, 4, 5, 3, 2, seed=3)

    def denoiser(latents, timestep, conditioning):
        u = (timestep / 1000).view(-1, 1, 1, 1, 1)
        return (clean - latents) / u  # what is left of the way, over what is left of the time

    scheduler = RectifiedFlow(RectifiedFlowSpec(num_sampling_steps=10, cfg_scale=1))
    noise, frame_mask = randn(2, 4, 5, 3, 2), torch.ones(2, 5)
    noise[:, 0], frame_mask[:, 0] = clean[:, 0], mask_value
    noise[:, :, 0] = clean[:, :, 0]
    for state in scheduler.sample(denoiser, noise, told(2), draws=SampleDraws(DRAWS.keys[:2]), frame_mask=frame_mask):
        assert_close(state.denoised, clean, rtol=1e-4, atol=1e-4)
    assert_close(state.latents, clean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eta", [None, 0.0, 1.0])
def test_a_perfect_noise_prediction_leads_to_the_data(eta):
    clean = randn(2, 4, 5, 3, 2, seed=3)
    scheduler = IDDPM(IDDPMSpec(num_sampling_steps=10, cfg_scale=1, learn_sigma=False, ddim_eta=eta))

    def denoiser(latents, timestep, conditioning):
        abar = scheduler.schedule.at(torch.searchsorted(scheduler.timesteps, timestep.contiguous())).alphas_cumprod
        return (latents - abar.sqrt() * clean) / (1 - abar).sqrt()

    draws = SampleDraws(DRAWS.keys[:2])
    for state in scheduler.sample(denoiser, randn(2, 4, 5, 3, 2), told(2), draws=draws):
        assert_close(state.denoised, clean, rtol=1e-3, atol=2e-3)
    assert_close(state.latents, clean, rtol=1e-4, atol=1e-4)


def test_rectified_flow_returns_given_frames_bit_for_bit(toy):
    noise = randn(*SHAPE)
    result = last(SCHEDULERS["rflow"].sample(toy(NULL), noise, told(), draws=DRAWS, frame_mask=MASK))
    kept = (MASK == 0)[:, None, :, None, None].expand(SHAPE)
    assert torch.equal(result[kept], noise[kept])
    assert not torch.isclose(result[~kept], noise[~kept]).any()


def test_rectified_flow_draws_nothing_without_frames_that_join(toy, replay):
    last(SCHEDULERS["rflow"].sample(toy(NULL), randn(*SHAPE), told(), draws=replay({})))
    mask = (MASK == 1).float()
    last(SCHEDULERS["rflow"].sample(toy(NULL), randn(*SHAPE), told(), draws=replay({}), frame_mask=mask))


@pytest.mark.parametrize("ratio", [0.05 * k for k in range(1, 20)])
def test_a_frame_joins_at_the_step_that_its_ratio_names(toy, ratio):
    mask = torch.ones(4, 5)
    mask[:, 0] = ratio  # rounded to float32 on the way
    for scheduler in (RectifiedFlow(RectifiedFlowSpec(num_sampling_steps=20)), IDDPM(IDDPMSpec(num_sampling_steps=20))):
        denoiser = toy(NULL)
        last(scheduler.sample(denoiser, randn(*SHAPE), told(), draws=DRAWS, frame_mask=mask))
        noisy = [frame_mask[0, 0].item() for _, _, frame_mask in denoiser.calls]
        assert noisy.index(True) == 20 - round(ratio * 20)


@pytest.mark.parametrize(("height", "width"), [(117, 312), (125, 291), (208, 304), (512, 512)])
def test_a_small_image_is_denoised_from_the_first_step(toy, height, width):
    conditioning = told(2).replace(
        height=torch.full((2,), float(height)), width=torch.full((2,), float(width)), num_frames=torch.ones(2)
    )
    denoiser, frame_mask = toy(NULL), torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    last(
        SCHEDULERS["rflow"].sample(
            denoiser, randn(2, 4, 5, 3, 2), conditioning, draws=SampleDraws(DRAWS.keys[:2]), frame_mask=frame_mask
        )
    )
    assert denoiser.calls[0][1].tolist() == [1000] * 4
    assert torch.equal(denoiser.calls[0][2], frame_mask.bool().repeat(2, 1))


def test_a_large_video_is_trained_on_more_noise():
    scheduler = SCHEDULERS["rflow"]
    draws = SampleDraws([DRAWS.keys[0]] * 4)
    timestep = scheduler.draw_timestep(draws, told())
    assert timestep[3] > timestep[2] > timestep[1]
    assert (timestep > 0).all()


def test_given_timesteps_are_not_moved(toy):
    denoiser, timestep = toy(), torch.tensor([1.0, 2.0, 500.0, 1000.0])
    SCHEDULERS["rflow"].loss(denoiser, randn(*SHAPE), told(), draws=DRAWS, timestep=timestep)
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
    last(IDDPM(IDDPMSpec(num_sampling_steps=3)).sample(denoiser, randn(*SHAPE), told(), draws=DRAWS))
    assert [timestep[0].item() for _, timestep, _ in denoiser.calls] == [999, 500, 0]


def test_the_transform_without_sizes_is_a_clear_error(toy):
    without = Conditioning(text_embedding=told().text_embedding)
    with pytest.raises(ShapeError, match="height, width and num_frames"):
        SCHEDULERS["rflow"].loss(toy(), randn(*SHAPE), without, draws=DRAWS)
    with pytest.raises(ShapeError, match="use_timestep_transform=False"):
        next(SCHEDULERS["rflow"].sample(toy(NULL), randn(*SHAPE), without, draws=DRAWS))


def test_learned_variance_from_a_denoiser_without_it_is_a_clear_error(toy):
    for spec in (IDDPMSpec(), IDDPMSpec(use_kl=True)):
        with pytest.raises(ShapeError, match="pred_sigma=True"):
            IDDPM(spec).loss(toy(learn_sigma=False), randn(*SHAPE), told(), draws=DRAWS)


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        (RectifiedFlowSpec, {"num_sampling_steps": 0}, "num_sampling_steps"),
        (RectifiedFlowSpec, {"num_timesteps": -1}, "num_timesteps"),
        (RectifiedFlowSpec, {"cfg_scale": -1.0}, "cfg_scale"),
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
    single = type(scheduler)(attrs.evolve(scheduler.spec, num_sampling_steps=1, **options))
    assert last(single.sample(toy(NULL), randn(*SHAPE), told(), draws=DRAWS)).isfinite().all()
    assert single.loss(toy(), randn(*SHAPE), told(), draws=DRAWS).isfinite().all()
