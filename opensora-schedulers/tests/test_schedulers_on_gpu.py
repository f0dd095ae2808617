"""Sampling where the latents are on a GPU: the same results, no step that waits for the device, and memory that is short."""

from __future__ import annotations

import logging

import pytest
import torch
from torch.testing import assert_close

from opensora.core.conditioning import Conditioning
from opensora.core.randomness import SampleDraws, SampleKey
from opensora.schedulers import IDDPM, DPMSolver, DPMSolverSpec, Guidance, IDDPMSpec, RectifiedFlow, RectifiedFlowSpec
from opensora.schedulers.solvers import SOLVERS

pytestmark = pytest.mark.gpu
SHAPE = (2, 4, 5, 3, 2)
KEYS = [SampleKey(seed=7, index=i) for i in range(2)]
MASK = torch.tensor([[0, 0.3, 0.5, 1, 1], [0, 0, 1, 1, 1]])
SAMPLERS = {
    **{
        f"rflow {name}": RectifiedFlow(
            RectifiedFlowSpec(num_sampling_steps=6, solver=name, use_timestep_transform=True)
        )
        for name in SOLVERS
    },
    **{f"dpm-solver {name}": DPMSolver(DPMSolverSpec(num_sampling_steps=6, solver=name)) for name in SOLVERS},
    "iddpm": IDDPM(IDDPMSpec(num_sampling_steps=6)),
    "ddim": IDDPM(IDDPMSpec(num_sampling_steps=6, ddim_eta=0.0)),
}


def told(device):
    return Conditioning(
        text_embedding=torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1)),
        height=torch.tensor([240.0, 720.0]),
        width=torch.tensor([426.0, 1280.0]),
        num_frames=torch.tensor([51.0, 1.0]),
    ).to(device)


def states(scheduler, toy, device, frame_mask=None):
    draws = SampleDraws(KEYS, device)
    denoiser = scheduler.guide(OnDevice(toy(torch.zeros(1, 6, 8, device=device))))
    return scheduler.sample(
        denoiser, draws.normal("latents", SHAPE[1:]), told(device), draws=draws, frame_mask=frame_mask
    )


class OnDevice:
    """The toy makes one small tensor on the CPU at each call; here it is made on the device."""

    def __init__(self, denoiser):
        self.denoiser = denoiser

    def __call__(self, latents, timestep, conditioning):
        with latents.device:
            return self.denoiser(latents, timestep, conditioning)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("frame_mask", [None, MASK], ids=["free", "masked"])
def test_results_are_those_of_the_cpu(name, toy, frame_mask):
    here, there = (list(states(SAMPLERS[name], toy, device, frame_mask))[-1] for device in ("cpu", "cuda"))
    assert there.latents.device.type == "cuda"
    assert_close(there.latents.cpu(), here.latents, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
@pytest.mark.parametrize("name", [name for name in SAMPLERS if not SAMPLERS[name].adds_noise])
def test_no_step_waits_for_the_device(name, toy):
    steps = states(SAMPLERS[name], toy, "cuda")
    next(steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(steps)) == 5
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_guidance_takes_two_calls_where_one_does_not_fit(caplog):
    per_row = int(0.6 * torch.cuda.get_device_properties(0).total_memory)

    def denoiser(latents, timestep, conditioning):
        torch.empty(len(latents) * per_row, dtype=torch.uint8, device="cuda")
        return torch.where(conditioning.dropped[:, None, None, None, None], 0.0, latents)

    latents = torch.ones(1, *SHAPE[1:], device="cuda")
    conditioning = told("cuda")[:1].replace(dropped=torch.zeros(1, dtype=torch.bool, device="cuda"))
    guided = Guidance(denoiser, scale=3.0)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(guided(latents, torch.ones(1, device="cuda"), conditioning), 3 * latents)
    assert len(caplog.records) == 1
