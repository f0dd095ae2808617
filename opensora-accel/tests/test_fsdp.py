"""What can be seen of the accelerator ``fsdp`` in one process: what it deals out, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed.fsdp
from torch import nn
from torch.testing import assert_close

from opensora.accel import FSDP, FSDPSpec
from opensora.core.accelerator import Single, SingleSpec
from opensora.core.errors import ConfigError, MachineError


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.table = nn.Parameter(torch.ones(width), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.layer(x).tanh() * self.table)[:, :]  # a view


class Network(nn.Module):
    """Blocks, a single number, and an output that is a view."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(7) for _ in range(2))
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return (x * self.scale).T

    def judge(self, x: torch.Tensor) -> torch.Tensor:
        return self(x)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, free_port) -> pytest.MonkeyPatch:
    """This process, as if torchrun had started it."""
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    return monkeypatch


@pytest.fixture
def fsdp(environment: pytest.MonkeyPatch) -> Iterator[FSDP]:
    with FSDP(FSDPSpec(timeout_s=60), device="cpu", dtype="fp32") as accelerator:
        yield accelerator


def steps(accelerator: Single | FSDP, network: Network, *, micro_batches: int = 1) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of a few steps."""
    run = accelerator.prepare(network)
    parameters = [each for each in network.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.01, fused=True)
    losses, norms = [], []
    for step in range(4):
        inputs = torch.randn(6, 7, generator=torch.Generator().manual_seed(step))
        total = 0.0
        for index, part in enumerate(inputs.chunk(micro_batches)):
            with accelerator.micro_step(last=index == micro_batches - 1):
                loss = (run(part) - part.T).square().mean() / micro_batches
                accelerator.backward(loss)
            total += loss.item()
        losses.append(total)
        norms.append(accelerator.update(optimizer, parameters, grad_clip=0.05))
    return losses, norms


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_trains_as_a_plain_network_does(fsdp: FSDP, micro_batches: int) -> None:
    """Single numbers and frozen tables, which are not dealt out, among the parameters; gradients clipped."""
    plain, sharded = Network(), Network()
    expected = steps(Single(SingleSpec(), device="cpu"), plain, micro_batches=micro_batches)
    assert_close(steps(fsdp, sharded, micro_batches=micro_batches), expected, rtol=1e-6, atol=1e-6)
    for name, parameter in sharded.named_parameters():
        own = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        assert_close(own, dict(plain.named_parameters())[name], rtol=1e-6, atol=1e-6)
    assert hasattr(sharded.blocks[0].layer.weight, "to_local")
    assert not hasattr(sharded.scale, "to_local")
    assert type(sharded.blocks[1]).__name__ == "FSDPBlock"


def test_samples_between_steps_leave_training_as_it_is(fsdp: FSDP) -> None:
    expected = steps(Single(SingleSpec(), device="cpu"), Network())
    network = Network()
    predict = fsdp.predictor(network)
    prepared = steps_with_samples(fsdp, network, predict)
    assert_close(prepared, expected, rtol=1e-6, atol=1e-6)


def steps_with_samples(accelerator: FSDP, network: Network, predict) -> tuple[list[float], list[float]]:
    with torch.inference_mode():
        sample = torch.ones(2, 7)

    update = accelerator.update

    def update_and_sample(*arguments, **keywords) -> float:
        norm = update(*arguments, **keywords)
        with torch.inference_mode():
            assert not predict(sample).requires_grad
        assert hasattr(network.blocks[0].layer.weight, "to_local")
        return norm

    accelerator.update = update_and_sample  # type: ignore[method-assign]
    return steps(accelerator, network)


def test_a_network_to_sample_from_is_dealt_out_when_it_is_placed(fsdp: FSDP) -> None:
    network = Network().requires_grad_(False).eval()
    expected = network(torch.ones(2, 7))
    predict = fsdp.predictor(network)
    assert fsdp.place(network) is network
    assert hasattr(network.blocks[0].layer.weight, "to_local")
    with torch.inference_mode():
        assert_close(predict(torch.ones(2, 7)), expected)
    other = nn.Linear(2, 2)
    assert not hasattr(fsdp.place(other).weight, "to_local")


def test_a_part_of_a_network_is_refused(fsdp: FSDP) -> None:
    with pytest.raises(ConfigError, match=r'whole networks only.*type="ddp"'):
        fsdp.predictor(Network().judge)


def test_torch_without_it_is_told(environment: pytest.MonkeyPatch) -> None:
    environment.delattr(torch.distributed.fsdp, "fully_shard")
    with pytest.raises(MachineError, match=r"needs torch 2.6 or newer; this is 2\..*ddp"):
        FSDP(FSDPSpec(), device="cpu")


@pytest.mark.parametrize("options", [{"replicas": 3}, {"replicas": 2, "sp_size": 2}], ids=str)
def test_groups_that_do_not_come_out_even_are_refused(environment: pytest.MonkeyPatch, options: dict[str, int]) -> None:
    environment.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"accelerator.replicas is \d, but 2 processes can't be put"):
        FSDP(FSDPSpec(**options), device="cpu")


def test_processes_with_parts_of_one_copy_sample_together(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("WORLD_SIZE", "8")
    environment.setenv("RANK", "6")
    accelerator = FSDP(FSDPSpec(replicas=2), device="cpu")
    assert (accelerator.share_size, accelerator.sampling_rank, accelerator.sampling_world_size) == (4, 1, 2)
    assert (accelerator.writes_samples, accelerator.joins_main) == (False, False)
    assert (accelerator.data_rank, accelerator.data_world_size) == (6, 8)
