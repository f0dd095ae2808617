"""One process on one device: clipping, steps that are left out, devices and dtypes that are there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from opensora.core import CheckpointError, Conditioning, MachineError
from opensora.core.accelerator import Accelerator, Single, SingleSpec, choose_device, choose_dtype
from opensora.core.machine import probe_dtype


@pytest.fixture
def single() -> Single:
    return Single(SingleSpec(), device="cpu", dtype="fp32")


def step(accelerator: Single, gradient: list[float], *, grad_clip: float) -> tuple[float, list[float]]:
    """The norm, and how far an SGD step of rate 1 moved two weights."""
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    with accelerator.micro_step(last=True):
        accelerator.backward((weight * torch.tensor(gradient)).sum())
    norm = accelerator.update(optimizer, [weight], grad_clip=grad_clip)
    assert weight.grad is None
    return norm, weight.tolist()


@pytest.mark.parametrize(
    ("grad_clip", "expected"),
    [(0.0, [-3.0, -4.0]), (1.0, [-0.6, -0.8]), (5.0, [-3.0, -4.0]), (100.0, [-3.0, -4.0])],
)
def test_gradients_are_clipped_to_the_global_norm(single: Single, grad_clip: float, expected: list[float]) -> None:
    norm, moved = step(single, [3.0, 4.0], grad_clip=grad_clip)
    assert norm == pytest.approx(5.0)
    assert moved == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
def test_a_step_without_finite_gradients_is_left_out(single: Single, bad: float, grad_clip: float) -> None:
    norm, moved = step(single, [3.0, bad], grad_clip=grad_clip)
    assert norm != norm
    assert moved == [0.0, 0.0]


def test_gradients_of_micro_batches_add_up(single: Single) -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for index in range(2):
        with single.micro_step(last=index == 1):
            single.backward((weight * torch.tensor([1.0, 2.0])).sum() / 2)
    single.update(optimizer, [weight], grad_clip=0.0)
    assert weight.tolist() == [-1.0, -2.0]


def test_in_fp32_the_prepared_denoiser_is_the_denoiser(single: Single) -> None:
    layer = nn.Linear(3, 3)

    def denoiser(latents: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        assert not torch.is_autocast_enabled("cpu")
        return layer(latents) + timestep[:, None]

    class Module(nn.Module):
        forward = staticmethod(denoiser)

    latents, timestep = torch.randn(2, 3), torch.ones(2)
    for call in (single.prepare(Module()), single.predictor(Module())):
        assert torch.equal(call(latents, timestep, Conditioning()), denoiser(latents, timestep, Conditioning()))


def test_modules_are_placed_in_the_accelerators_dtype(single: Single) -> None:
    assert next(single.place(nn.Linear(2, 2).double()).parameters()).dtype is torch.float32


def test_modules_are_placed_where_and_as_they_are_asked_for(single: Single) -> None:
    layer = single.place(nn.Linear(2, 2), device=torch.device("meta"), dtype=torch.bfloat16)
    assert (layer.weight.device.type, layer.weight.dtype) == ("meta", torch.bfloat16)


def test_what_overflows_in_fp16_stays_float32_there_and_keeps_every_bit(single: Single) -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    module[1].overflows_in_fp16 = module[2].overflows_in_fp16 = True
    module[2].register_buffer("numbers", torch.arange(3))
    before = module[2].weight.clone()
    single.place(module, dtype=torch.float16)
    assert module[0].weight.dtype is torch.float16
    assert module[1].running_mean.dtype is torch.float32
    assert module[2].numbers.dtype is torch.int64
    assert torch.equal(module[2].weight, before)
    single.place(module, dtype=torch.bfloat16)
    assert module[2].weight.dtype is torch.bfloat16


def test_shared_weights_stay_shared(single: Single) -> None:
    module = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    module[1].weight = module[0].weight  # type: ignore[assignment]  # a parameter
    module[1].overflows_in_fp16 = True
    single.place(module, dtype=torch.float16)
    assert module[0].weight is module[1].weight
    assert module[0].weight.dtype is torch.float32
    assert module[0].bias.dtype is torch.float16


def test_alone_among_processes(single: Single) -> None:
    with single as entered:
        assert entered is single
        assert single.is_main
        assert (single.rank, single.world_size) == (0, 1)
        assert single.mean(torch.tensor(3.0)) == 3
        assert single.highest(3) == 3
        assert single.broadcast({"a": 1}) == {"a": 1}
        assert single.from_main(lambda: "found") == "found"
        assert single.scaler_state() == {}
        single.load_scaler_state({"scale": 2.0})


def test_an_error_of_the_main_process_alone_is_raised(single: Single) -> None:
    def fail() -> str:
        raise CheckpointError("There is no checkpoint.")

    with pytest.raises(CheckpointError, match=r"There is no checkpoint\."):
        single.from_main(fail)
    with pytest.raises(ZeroDivisionError):
        single.from_main(lambda: 1 / 0)


def test_other_processes_take_what_the_main_one_found() -> None:
    class Other(Accelerator):
        rank, said = 1, None

        def broadcast(self, value: object) -> object:
            assert value is None
            return self.said

    other = Other(SingleSpec(), device="cpu", dtype="fp32")
    other.said = "outputs/003"
    assert other.from_main(lambda: pytest.fail("only the main process looks")) == "outputs/003"
    other.said = CheckpointError("There is no checkpoint.")
    with pytest.raises(CheckpointError):
        other.from_main(lambda: pytest.fail("only the main process looks"))


def test_the_default_is_fp32_on_a_cpu() -> None:
    assert choose_dtype("auto", torch.device("cpu")) is torch.float32
    assert choose_dtype("fp32", torch.device("cpu")) is torch.float32
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "", "cpu:x"])
def test_a_device_that_is_not_there_is_refused_with_its_name(name: str) -> None:
    with pytest.raises(MachineError, match=rf'Device "{name}" can\'t be used: .+ opensora doctor'):
        choose_device(name)


def test_a_dtype_is_tried_before_it_is_used() -> None:
    """What works differs between machines; either way it is known before training starts."""
    if probe_dtype("cpu", "bf16") is None:
        assert choose_dtype("bf16", torch.device("cpu")) is torch.bfloat16
    else:
        with pytest.raises(MachineError, match=r'dtype "bf16" does not work on cpu here: .+ Use --dtype fp32'):
            choose_dtype("bf16", torch.device("cpu"))
