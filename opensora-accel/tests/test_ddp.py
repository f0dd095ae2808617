"""Two real processes against one, and what goes wrong on the way to them."""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from opensora.accel import DDP, DDPSpec
from opensora.core.accelerator import Single, SingleSpec
from opensora.core.errors import MachineError

sys.path.insert(0, str(Path(__file__).parent / "workers"))
from problem import SAMPLES, STEPS, train  # lies beside the scripts that torchrun starts

TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(scope="module")
def results(torchrun, tmp_path_factory):
    """What each of two processes saw."""
    folder = tmp_path_factory.mktemp("agree")
    done = torchrun("agree.py", folder)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone():
    """The same training in one process."""
    return train(Single(SingleSpec(), device="cpu"), micro_batches=[[slice(0, SAMPLES)]] * STEPS)


@pytest.fixture
def environment(monkeypatch):
    """This process, as if torchrun had started it."""
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.mark.parametrize("way", ["trained", "trained with accumulation"])
def test_two_processes_train_as_one_does(results, alone, way):
    for result in results:
        for name, expected in alone.items():
            assert_close(result[way][name], expected, rtol=1e-6, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
    for name in alone:
        assert torch.equal(results[0][way][name], results[1][way][name])


def test_each_process_knows_its_place(results):
    assert [result["place"] for result in results] == [(0, 2, True, "cpu"), (1, 2, False, "cpu")]


def test_gradients_are_exchanged_in_the_last_micro_step_alone(results):
    first, second = (result["gradients"] for result in results)
    assert not torch.isclose(first["kept back"], second["kept back"]).all()
    assert torch.equal(first["exchanged"], second["exchanged"])
    assert_close(first["exchanged"], first["kept back"] + second["kept back"])  # twice each, halved


def test_highest_mean_and_broadcast(results):
    for result in results:
        assert result["highest"] == [0, 1, 2]
        assert result["mean"].tolist() == [0.5, 11.0]
        assert result["broadcast"] == results[0]["broadcast"]
    assert results[0]["broadcast"]["folder"].name == "0"


def test_main_goes_first(results):
    assert [result["from main"] for result in results] == [0, 0]
    assert [result["error of main"] for result in results] == ["rank 0 failed"] * 2


def test_an_unused_parameter_is_named(results):
    for result in results:
        assert "did not use rate" in result["unused"]
        assert "find_unused_parameters=True" in result["unused"]


def test_work_of_unequal_length_is_waited_for(torchrun):
    done = torchrun("unequal.py")
    assert done.returncode == 0, done.stderr


def test_one_process_that_fails_ends_the_run(torchrun):
    start = time.monotonic()
    done = torchrun("fail.py")
    assert done.returncode != 0
    assert "process 1 gives up" in done.stderr
    assert time.monotonic() - start < 50  # sooner than the timeout


def test_without_torchrun_the_error_says_how_to_start(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(MachineError, match=r"found no RANK, .*opensora-run --nproc N"):
        DDP(DDPSpec(), device="cpu")


def test_a_rank_that_is_no_number_is_refused(environment):
    environment.setenv("RANK", "first")
    with pytest.raises(MachineError, match="'first'"):
        DDP(DDPSpec(), device="cpu")


def test_a_port_in_use_is_a_clear_error(environment):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        environment.setenv("MASTER_PORT", str(port))
        with pytest.raises(MachineError, match=rf"Port {port} on 127.0.0.1 is in use.*MASTER_PORT"):
            DDP(DDPSpec(timeout_s=20), device="cpu").__enter__()


def test_one_gpu_for_all_processes_is_refused(environment):
    with pytest.raises(MachineError, match="CUDA_VISIBLE_DEVICES=1"):
        DDP(DDPSpec(), device="cuda:1")


def test_a_timeout_must_be_positive():
    with pytest.raises(ValueError, match="timeout_s"):
        DDPSpec(timeout_s=0)
