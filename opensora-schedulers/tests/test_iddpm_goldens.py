"""Improved DDPM against the reference vectors."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from opensora.core.conditioning import Conditioning
from opensora.core.errors import ConfigError
from opensora.schedulers.iddpm import IDDPM, IDDPMSpec
from opensora.schedulers.noise_schedules import cosine_betas, kept_steps


def told(vectors):
    return Conditioning(text_embedding=vectors["y"].squeeze(1))


def arrays(scheduler):
    s = scheduler.schedule
    abar = s.alphas_cumprod
    return {
        "betas": s.betas,
        "alphas_cumprod": abar,
        "alphas_cumprod_prev": s.alphas_cumprod_prev,
        "alphas_cumprod_next": torch.cat([abar[1:], torch.zeros_like(abar[:1])]),
        "sqrt_alphas_cumprod": abar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - abar).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - abar).log(),
        "sqrt_recip_alphas_cumprod": (1 / abar).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / abar - 1).sqrt(),
        "posterior_variance": s.posterior_variance,
        "posterior_log_variance_clipped": s.posterior_log_variance,
        "posterior_mean_coef1": s.posterior_mean_coef1,
        "posterior_mean_coef2": s.posterior_mean_coef2,
        "timestep_map": scheduler.timesteps,
    }


@pytest.mark.parametrize(
    ("file", "rtol", "atol"), [("iddpm_schedule_f64", 1e-10, 1e-300), ("iddpm_schedule", 1e-3, 1e-7)]
)
def test_schedule(goldens, file, rtol, atol):
    tensors, cases = goldens.tensors(file), goldens.json("index")[file]["cases"]
    assert len(tensors) == 14 * len(cases)
    for i, options in enumerate(cases):
        for name, array in arrays(IDDPM(IDDPMSpec(**options))).items():
            expected = tensors[f"{i}.{name}"]
            assert_close(array, expected.to(array.dtype), rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def test_cosine_betas(goldens):
    for name, betas in goldens.tensors("iddpm_cosine_betas").items():
        assert_close(cosine_betas(int(name.removeprefix("betas_"))), betas, rtol=1e-10, atol=0)


def test_kept_steps(goldens):
    cases = goldens.json("space_timesteps")
    for case in cases:
        if "ok" in case:
            assert kept_steps(case["num_timesteps"], case["sections"]) == case["ok"]
        else:
            with pytest.raises(ConfigError):
                kept_steps(case["num_timesteps"], case["sections"])


@pytest.mark.parametrize("sigma_small", [False, True])
@pytest.mark.parametrize("predict_xstart", [False, True])
def test_fixed_variance(goldens, toy, sigma_small, predict_xstart):
    vectors = goldens.case("iddpm_fixed_variance", f"small{sigma_small:d}_xstart{predict_xstart:d}")
    options = goldens.json("index")["iddpm_fixed_variance"]["config"]
    scheduler = IDDPM(IDDPMSpec(learn_sigma=False, sigma_small=sigma_small, predict_xstart=predict_xstart, **options))
    output = toy(learn_sigma=False)(vectors["x"], scheduler.timesteps[vectors["t"]], told(vectors))

    posterior = scheduler.posterior(output, vectors["x"], scheduler.schedule.at(vectors["t"]))

    log_variance = posterior.log_variance.expand_as(posterior.mean)
    assert_close(posterior.mean, vectors["mean"], rtol=1e-4, atol=1e-4)
    assert_close(posterior.denoised, vectors["pred_xstart"], rtol=1e-4, atol=1e-4)
    assert_close(log_variance, vectors["log_variance"], rtol=1e-4, atol=1e-4)
    if sigma_small:  # step 0: the clipped logarithm is used, the plain variance is 0
        log_variance = log_variance[vectors["t"] > 0]
        vectors["variance"] = vectors["variance"][vectors["t"] > 0]
    assert_close(log_variance.exp(), vectors["variance"], rtol=1e-4, atol=1e-7)


@pytest.mark.goldens("iddpm_losses_f64")
def test_losses_in_double_precision(goldens, replay, toy, case):
    vectors = goldens.case("iddpm_losses_f64", case["name"])
    terms = IDDPM(IDDPMSpec(**case["cfg"])).loss_terms(
        toy(), vectors["x_start"], told(vectors), draws=replay({"noise": vectors["noise"]}), timestep=vectors["t"]
    )
    assert set(terms) == {name.removeprefix("out.") for name in vectors if name.startswith("out.")}
    for name, values in terms.items():
        assert_close(values, vectors[f"out.{name}"], rtol=1e-4, atol=1e-5)


@pytest.mark.goldens("iddpm_losses")
def test_losses(goldens, replay, toy, case):
    vectors = goldens.case("iddpm_losses", case["name"])
    spec = IDDPMSpec(**case["cfg"])
    denoiser = toy(learn_sigma=spec.learn_sigma)
    terms = IDDPM(spec).loss_terms(
        denoiser,
        vectors["x_start"],
        told(vectors).replace(frame_mask=vectors.get("mask")),
        draws=replay({"noise": vectors["noise"], "timestep": vectors["t"]}),
    )
    if "weights" in vectors:  # the parts are given by sample, so a weight is a product
        terms["mse"] = terms["mse"] * vectors["weights"][vectors["t"]]
        terms["loss"] = terms["mse"] + terms["vb"]

    [(noised, timestep, frame_mask)] = denoiser.calls
    assert_close(noised, vectors["x_t"], rtol=1e-4, atol=1e-4)
    assert torch.equal(timestep, vectors["model_t"])
    assert frame_mask is vectors.get("mask")
    for name, values in terms.items():
        rtol, atol = (1e-4, 0) if name == "mse" else (5e-3, 5e-4)
        assert_close(values, vectors[f"out.{name}"], rtol=rtol, atol=atol)


def replayed_steps(noise, *, masked, batch):
    """The reference draws for both halves of its state; the conditional half is the one it returns."""
    noise = noise[:, :batch]
    if not masked:
        return {f"step {i}": row for i, row in enumerate(noise)}
    return {f"join {i}": row for i, row in enumerate(noise[0::2])} | {
        f"step {i}": row for i, row in enumerate(noise[1::2])
    }


@pytest.mark.goldens("iddpm_sample_f64")
def test_sample_in_double_precision(goldens, replay, toy, case):
    vectors = goldens.case("iddpm_sample_f64", case["name"])
    batch = len(vectors["z"])
    scheduler = IDDPM(IDDPMSpec(cfg_channel=3, **case["cfg"]))
    states = scheduler.sample(
        scheduler.guide(toy(vectors["y_null"].squeeze(1))),
        vectors["z"],
        told(vectors),
        draws=replay(replayed_steps(vectors["noise"], masked=False, batch=batch)),
    )
    trajectory = torch.stack([state.latents for state in states])
    assert_close(trajectory, vectors["traj"][:, :batch], rtol=1e-4, atol=1e-4)


@pytest.mark.goldens("iddpm_sample")
def test_sample(goldens, replay, toy, case):
    vectors = goldens.case("iddpm_sample", case["name"])
    batch = len(vectors["z"])
    denoiser = toy(vectors["y_null"].squeeze(1))
    scheduler = IDDPM(IDDPMSpec(**case["cfg"]))
    states = scheduler.sample(
        scheduler.guide(denoiser),
        vectors["z"],
        told(vectors),
        draws=replay(replayed_steps(vectors["noise"], masked="mask" in vectors, batch=batch)),
        frame_mask=vectors.get("mask"),
    )
    trajectory = torch.stack([state.latents for state in states])

    assert_close(trajectory, vectors["traj"][:, :batch], rtol=1e-3, atol=1e-3)
    assert_close(trajectory[-1], vectors["final"], rtol=1e-3, atol=1e-3)
    rows = batch if case["cfg"]["cfg_scale"] == 1 else 2 * batch  # without guidance there is no null half
    assert torch.equal(torch.stack([timestep for _, timestep, _ in denoiser.calls]), vectors["model_t"][:, :rows])
    assert_close(
        torch.stack([latents for latents, _, _ in denoiser.calls])[:, :batch],
        vectors["model_x"][:, :batch],
        rtol=1e-3,
        atol=1e-3,
    )
    if "x_mask" in vectors:
        assert torch.equal(torch.stack([frame_mask for _, _, frame_mask in denoiser.calls]), vectors["x_mask"])


class Clipped:
    """A denoiser whose noise prediction is changed so that the clean latents it stands for lie in [-1, 1]."""

    def __init__(self, denoiser, scheduler):
        self.denoiser, self.scheduler = denoiser, scheduler

    def __call__(self, latents, timestep, conditioning):
        epsilon, rest = self.denoiser(latents, timestep, conditioning).chunk(2, dim=1)
        steps = torch.searchsorted(self.scheduler.timesteps, timestep.contiguous())
        abar = self.scheduler.schedule.at(steps).alphas_cumprod
        denoised = ((latents - (1 - abar).sqrt() * epsilon) / abar.sqrt()).clamp(-1, 1)
        return torch.cat([(latents - abar.sqrt() * denoised) / (1 - abar).sqrt(), rest], dim=1)


@pytest.mark.goldens("iddpm_ddim")
def test_ddim(goldens, replay, toy, case):
    vectors = goldens.case("iddpm_ddim", case["name"])
    scheduler = IDDPM(IDDPMSpec(num_sampling_steps=case["steps"], ddim_eta=case["eta"]))
    denoiser = Clipped(toy(), scheduler) if case["clip"] else toy()
    draws = replay(replayed_steps(vectors["noise"], masked=False, batch=len(vectors["z"])))

    states = list(scheduler.sample(denoiser, vectors["z"], told(vectors), draws=draws))

    assert_close(torch.stack([state.latents for state in states]), vectors["traj"], rtol=1e-3, atol=1e-3)
    assert_close(torch.stack([state.denoised for state in states]), vectors["pred_xstart"], rtol=1e-3, atol=1e-3)

    steps = torch.tensor([0, case["steps"] - 2])
    output = denoiser(vectors["z"], scheduler.timesteps[steps], told(vectors))
    towards_noise = scheduler.reverse_step(output, vectors["z"], steps)
    assert_close(towards_noise, vectors["reverse_one_step"], rtol=1e-3, atol=1e-3)

    steps = torch.tensor([0, case["steps"] - 1])
    output = denoiser(vectors["z"], scheduler.timesteps[steps], told(vectors))
    posterior = scheduler.posterior(output, vectors["z"], scheduler.schedule.at(steps))
    assert_close(posterior.mean, vectors["pmv_mean"], rtol=1e-3, atol=1e-3)
    assert_close(posterior.log_variance, vectors["pmv_log_variance"], rtol=1e-3, atol=1e-3)
    assert_close(posterior.log_variance.exp(), vectors["pmv_variance"], rtol=1e-3, atol=1e-3)
    assert_close(posterior.denoised, vectors["pmv_pred_xstart"], rtol=1e-3, atol=1e-3)
