"""Classifier-free guidance as a wrapper of a denoiser."""

from __future__ import annotations

import gc
import logging
from weakref import ref

import pytest
import torch
from torch.testing import assert_close

from opensora.core.conditioning import Conditioning
from opensora.core.errors import ConfigError, ShapeError
from opensora.core.randomness import SampleDraws, SampleKey
from opensora.schedulers import IDDPM, DPMSolver, DPMSolverSpec, Guidance, IDDPMSpec, RectifiedFlow, RectifiedFlowSpec
from opensora.schedulers.guidance import rescale_guidance

LATENTS = torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
TIMESTEP = torch.tensor([10.0, 700.0])
TOLD = Conditioning(text_embedding=torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1)))
NULL = torch.zeros(2, 5, 3)
MASK = torch.tensor([[True, False, True], [True, True, True]])


def halves(toy, conditioning=TOLD, latents=LATENTS, timestep=TIMESTEP):
    conditional = toy(NULL)(latents, timestep, conditioning)
    null = toy(NULL)(latents, timestep, conditioning.unconditional())
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


def test_scale_one_runs_the_conditional_half_alone_and_may_change_at_any_call(toy):
    denoiser = toy(NULL)
    guided = Guidance(denoiser, scale=1.0)
    assert torch.equal(guided(LATENTS, TIMESTEP, TOLD), halves(toy)[0])
    guided.scale = 3.0
    assert_close(guided(LATENTS, TIMESTEP, TOLD), Guidance(toy(NULL), scale=3.0)(LATENTS, TIMESTEP, TOLD))
    guided.scale = 1.0
    guided(LATENTS, TIMESTEP, TOLD)
    assert [len(latents) for latents, _, _ in denoiser.calls] == [2, 4, 2]


def test_a_negative_text_stands_in_for_the_null(toy):
    away = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(2))
    conditioning = TOLD.replace(text_mask=torch.ones(2, 5, dtype=torch.bool)).replace(
        negative_embedding=away, negative_mask=torch.zeros(2, 5, dtype=torch.bool)
    )
    seen = []

    def denoiser(latents, timestep, conditioning):
        seen.append(conditioning)
        return toy()(latents, timestep, conditioning)  # without a null, which nothing may ask for

    guided = Guidance(denoiser, scale=3.0)(LATENTS, TIMESTEP, conditioning)
    conditional, negative = (
        toy()(LATENTS, TIMESTEP, Conditioning(text_embedding=each)) for each in (TOLD.text_embedding, away)
    )
    assert_close(guided[:, :4], (negative + 3 * (conditional - negative))[:, :4])
    assert seen[0].negative_embedding is None
    assert seen[0].dropped is None
    assert seen[0].text_mask.tolist() == [[True] * 5] * 2 + [[False] * 5] * 2

    Guidance(denoiser, scale=1.0)(LATENTS, TIMESTEP, conditioning)
    assert seen[1].negative_embedding is None
    assert torch.equal(seen[1].text_embedding, TOLD.text_embedding)


# ---- one call or two


@pytest.mark.parametrize("options", [{}, {"channels": 2, "rescale": 0.5, "interval": (0.0, 0.5)}], ids=["plain", "all"])
def test_two_calls_of_half_as_many_give_the_same(toy, options):
    at_once, apart = toy(NULL), toy(NULL)
    conditioning = TOLD.replace(frame_mask=MASK)
    a = Guidance(at_once, scale=3.0, batched=True, **options)(LATENTS, TIMESTEP, conditioning)
    b = Guidance(apart, scale=3.0, batched=False, **options)(LATENTS, TIMESTEP, conditioning)
    assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert [len(latents) for latents, _, _ in at_once.calls] == [4]
    assert [len(latents) for latents, _, _ in apart.calls] == [2, 2]


class Cramped:
    """A denoiser with memory for so many rows."""

    def __init__(self, denoiser, rows):
        self.denoiser, self.rows, self.calls = denoiser, rows, []

    def __call__(self, latents, timestep, conditioning):
        self.calls.append(len(latents))
        if len(latents) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.denoiser(latents, timestep, conditioning)


def test_from_the_first_time_that_memory_is_short_it_takes_two_calls_and_says_so_once(toy, caplog):
    denoiser = Cramped(toy(NULL), rows=2)
    guided = Guidance(denoiser, scale=3.0)
    with caplog.at_level(logging.WARNING):
        results = [guided(LATENTS, TIMESTEP, TOLD) for _ in range(3)]
    expected = Guidance(toy(NULL), scale=3.0)(LATENTS, TIMESTEP, TOLD)
    for result in results:
        assert_close(result, expected, rtol=1e-6, atol=1e-6)
    assert denoiser.calls == [4, 2, 2, 2, 2, 2, 2]
    [message] = [record.getMessage() for record in caplog.records]
    assert "guide 2 samples in one call" in message
    assert "cfg_batched=False" in message


@pytest.mark.parametrize(("batched", "rows", "calls"), [(True, 2, [4]), (None, 1, [4, 2]), (False, 1, [2])])
def test_memory_that_is_short_all_the_same_is_an_error(toy, batched, rows, calls):
    denoiser = Cramped(toy(NULL), rows=rows)
    with pytest.raises(torch.OutOfMemoryError):
        Guidance(denoiser, scale=3.0, batched=batched)(LATENTS, TIMESTEP, TOLD)
    assert denoiser.calls == calls


@pytest.mark.parametrize("batched", [True, False])
def test_conditions_are_made_once_for_all_steps(batched):
    seen = []

    def denoiser(latents, timestep, conditioning):
        seen.append(conditioning)
        return latents

    guided = Guidance(denoiser, scale=2.0, batched=batched)
    for conditioning in (TOLD, TOLD, TOLD[[1, 0]]):
        guided(LATENTS, TIMESTEP, conditioning)
    if batched:
        assert seen[0] is seen[1]
        assert torch.equal(seen[2].text_embedding, TOLD.text_embedding[[1, 0, 1, 0]])
        assert seen[0].dropped.tolist() == [False, False, True, True]
    else:
        assert seen[0] is seen[2]
        assert seen[1] is seen[3]
        assert seen[1].dropped.tolist() == [True, True]
        assert torch.equal(seen[4].text_embedding, TOLD.text_embedding[[1, 0]])


def test_conditions_are_let_go_with_what_they_were_made_of(toy):
    kept = []

    def denoiser(latents, timestep, conditioning):
        kept.append(ref(conditioning))
        return latents

    guided = Guidance(denoiser, scale=2.0)
    conditioning = TOLD[[1, 0]]
    guided(LATENTS, TIMESTEP, conditioning)
    assert kept[0]() is not None
    del conditioning
    gc.collect()
    assert kept[0]() is None


# ---- interval


def test_outside_the_interval_the_conditional_half_runs_alone(toy):
    denoiser = toy(NULL)
    guided = Guidance(denoiser, scale=3.0, interval=(0.2, 0.8))
    for share, rows in ((0.1, 2), (0.2, 4), (0.5, 4), (0.8, 4), (0.81, 2), (1.0, 2)):
        timestep = torch.full((2,), 1000 * share)
        denoiser.calls.clear()
        result = guided(LATENTS, timestep, TOLD)
        assert [len(latents) for latents, _, _ in denoiser.calls] == [rows], share
        plain = Guidance(toy(NULL), scale=3.0 if rows == 4 else 1.0)
        assert torch.equal(result, plain(LATENTS, timestep, TOLD)), share


def test_the_ends_of_an_interval_hold_for_timesteps_that_rounding_has_moved(toy):
    ends = torch.tensor([200.0, 800.0])
    for timestep in (ends, ends.nextafter(torch.zeros(2)), ends.nextafter(torch.full((2,), 1e9))):
        result = Guidance(toy(NULL), scale=3.0, interval=(0.2, 0.8))(LATENTS, timestep, TOLD)
        assert torch.equal(result, Guidance(toy(NULL), scale=3.0)(LATENTS, timestep, TOLD))


def test_an_interval_holds_for_each_sample_by_its_own_timestep(toy):
    """As each of them alone."""
    result = Guidance(toy(NULL), scale=3.0, interval=(0.5, 1.0))(LATENTS, TIMESTEP, TOLD)
    plain = Guidance(toy(NULL), scale=3.0)(LATENTS, TIMESTEP, TOLD)
    assert torch.equal(result[0], halves(toy)[0][0])
    assert torch.equal(result[1], plain[1])


@pytest.mark.parametrize("scheduler", ["rflow", "iddpm", "dpm-solver"])
def test_an_interval_counts_in_shares_of_what_the_denoiser_is_told(toy, scheduler):
    """Whatever the number of steps: iddpm counts its own after respacing."""
    options = {"num_sampling_steps": 10, "cfg_interval": (0.0, 0.5), "cfg_scale": 3.0}
    component = {
        "rflow": lambda: RectifiedFlow(RectifiedFlowSpec(num_timesteps=500, **options)),
        "iddpm": lambda: IDDPM(IDDPMSpec(**options)),
        "dpm-solver": lambda: DPMSolver(DPMSolverSpec(**options)),
    }[scheduler]()
    denoiser, scale = toy(NULL), 500 if scheduler == "rflow" else 1000
    draws = SampleDraws([SampleKey(0, 0), SampleKey(0, 1)])
    list(component.sample(component.guide(denoiser), LATENTS, TOLD, draws=draws))
    assert len(denoiser.calls) == 10
    for latents, timestep, _ in denoiser.calls:
        assert len(latents) == (4 if timestep[0] <= scale / 2 else 2)


# ---- rescaling


def test_rescaling_gives_the_spread_of_the_conditional_prediction_back():
    def denoiser(latents, timestep, conditioning):
        """Of half the spread where the text is dropped."""
        spread = torch.where(conditioning.dropped, 0.5, 1.0)[:, None, None, None, None]
        return torch.cat([spread * latents + 1, latents], dim=1)

    plain = 0.5 * LATENTS + 1 + 8 * 0.5 * LATENTS  # of 4.5 times the spread
    for share, factor in ((0.0, 1.0), (0.5, 0.5 + 0.5 / 4.5), (1.0, 1 / 4.5)):
        result = Guidance(denoiser, scale=8.0, rescale=share)(LATENTS, TIMESTEP, TOLD)
        assert_close(result[:, :4], factor * plain)
        assert torch.equal(result[:, 4:], LATENTS)


def test_rescaling_is_that_of_diffusers():
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    guided, conditional = 3 * LATENTS + 1, LATENTS.flip(1)
    assert_close(rescale_guidance(guided, conditional, 0.7), rescale_noise_cfg(guided, conditional, 0.7))


def test_what_is_predicted_in_given_frames_does_not_count_in_rescaling():
    guided, conditional = 3 * LATENTS + 1, LATENTS.flip(1)
    changed = conditional.clone()
    changed[0, :, 1] = 100.0  # given
    expected = rescale_guidance(guided, conditional, 0.7, frame_mask=MASK)
    assert torch.equal(rescale_guidance(guided, changed, 0.7, frame_mask=MASK), expected)
    assert_close(expected[1], rescale_guidance(guided, conditional, 0.7)[1])
    some = [0, 2]
    assert_close(expected[:1, :, some], rescale_guidance(guided[:1, :, some], conditional[:1, :, some], 0.7))
    seen = TOLD.replace(frame_mask=MASK)
    guided = Guidance(lambda latents, *_: latents.cumsum(0), scale=3.0, rescale=1.0)(LATENTS, TIMESTEP, seen)
    both = torch.cat([LATENTS, LATENTS]).cumsum(0)
    plain = both[2:] + 3 * (both[:2] - both[2:])
    assert_close(guided, rescale_guidance(plain, both[:2], 1.0, frame_mask=MASK))
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert rescale_guidance(guided, conditional, 0.7, frame_mask=nothing).isfinite().all()


# ---- bad input


def test_nothing_to_drop_is_a_clear_error():
    with pytest.raises(ShapeError, match="cfg_scale = 1"):
        Guidance(lambda latents, *_: latents, scale=2.0)(LATENTS, TIMESTEP, Conditioning())


def test_without_conditions_scale_one_works():
    assert torch.equal(Guidance(lambda latents, *_: latents, scale=1.0)(LATENTS, TIMESTEP, Conditioning()), LATENTS)


def test_more_guided_channels_than_latents_have_is_a_clear_error(toy):
    with pytest.raises(ShapeError, match=r"5 channels .* have 4"):
        Guidance(toy(NULL), scale=2.0, channels=5)(LATENTS, TIMESTEP, TOLD)


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf")])
def test_a_bad_scale_is_refused_when_it_is_set(toy, scale):
    guided = Guidance(toy(NULL), scale=2.0)
    with pytest.raises(ConfigError, match=r"cfg_scale\) is .*from 0 up"):
        guided.scale = scale
    assert guided.scale == 2.0


@pytest.mark.parametrize("spec", [RectifiedFlowSpec, IDDPMSpec, DPMSolverSpec])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cfg_scale": -1.0}, r"cfg_scale\) is -1"),
        ({"cfg_channel": 0}, "cfg_channel"),
        ({"cfg_interval": (0.8, 0.2)}, r"cfg_interval is \(0.8, 0.2\).*rising.*\(0.2, 0.8\)"),
        ({"cfg_interval": (-0.1, 0.2)}, r"in \[0, 1\]"),
        ({"cfg_interval": (0.5, 1.1)}, r"in \[0, 1\]"),
        ({"cfg_interval": (0.5, 0.5)}, "rising"),
        ({"cfg_interval": (float("nan"), 0.5)}, "rising"),
        ({"cfg_rescale": 1.5}, "cfg_rescale"),
        ({"cfg_rescale": -0.5}, "cfg_rescale"),
    ],
)
def test_bad_options_are_refused_when_they_are_given(spec, options, message):
    with pytest.raises(ValueError, match=message):
        spec(**options)


def test_options_reach_the_guidance(toy):
    spec = RectifiedFlowSpec(
        cfg_scale=5.0, cfg_channel=3, cfg_interval=(0.1, 0.9), cfg_rescale=0.7, cfg_batched=False, num_timesteps=500
    )
    guided = RectifiedFlow(spec).guide(toy(NULL))
    found = (guided.scale, guided.channels, guided.interval, guided.rescale, guided.batched, guided.num_timesteps)
    assert found == (5.0, 3, (0.1, 0.9), 0.7, False, 500)
