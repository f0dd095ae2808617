"""ZeRO-2 through ColossalAI: what each process holds, what is refused. Whole runs: tests/test_colossalai.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from opensora.accel import colossalai
from opensora.accel.colossalai import Zero2, Zero2SeqSpec, Zero2Spec
from opensora.core.errors import MachineError

sys.path.insert(0, str(Path(__file__).parent / "workers"))
from problem import Small, step_data  # lies beside the scripts that torchrun starts


@pytest.fixture(scope="module")
def results(torchrun, tmp_path_factory):
    """What each of two processes saw."""
    folder = tmp_path_factory.mktemp("zero2")
    done = torchrun("zero2.py", folder)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.colossalai
def test_a_step_on_two_processes_is_that_of_one(results):
    torch.manual_seed(0)  # the main process's
    denoiser = Small()
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=0.01)
    for rank in (0, 1):
        (denoiser(*step_data(rank)).square().mean() / 2).backward()
    norm = torch.nn.utils.get_total_norm([each.grad for each in denoiser.parameters()])
    optimizer.step()
    for result in results:
        assert result["step"]["norm"] == pytest.approx(norm.item(), rel=1e-6)
        for name, expected in denoiser.state_dict().items():
            assert_close(result["step"]["weights"][name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.colossalai
def test_gradients_and_state_are_dealt_out(results):
    whole = {name: each.numel() for name, each in Small().named_parameters()}
    halves = {name: (size + 1) // 2 for name, size in whole.items()}  # padded: one parameter is a single number
    for result in results:
        assert result["step"]["whole gradients"] == []
        assert result["step"]["gradients"] == halves
        assert sorted(result["step"]["states"]) == sorted(halves.values())
        assert sorted(result["step"]["changed"]) == sorted(whole)


@pytest.mark.colossalai
def test_a_step_that_is_infinite_in_one_process_is_left_out_in_all(results):
    for result in results:
        assert torch.tensor(result["infinite in one process"]["norm"]).isnan()
        assert result["infinite in one process"]["changed"] == []


@pytest.mark.colossalai
def test_a_second_network_is_refused(results):
    assert "can train one network" in results[0]["second network"]


def test_without_colossalai_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(colossalai, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r"needs ColossalAI.*fsdp.*opensora-accel\[colossalai\]"):
        Zero2(Zero2Spec(), device="cpu")


def test_zero2_seq_shares_each_sample():
    assert Zero2SeqSpec().sp_size == 2
    with pytest.raises(ValueError, match="sp_size"):
        Zero2SeqSpec(sp_size=1)


def test_plans_know_what_is_dealt_out():
    shares = Zero2.shares(Zero2Spec(), 8)
    assert (shares.parameters, shares.gradients, shares.optimizer) == (1.0, 1 / 8, 1 / 8)
