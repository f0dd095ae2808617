"""What is done to blocks from outside changes memory and time, and neither results nor names."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from opensora.core.blocks import checkpoint_activations, compile_blocks, iter_blocks, offloading


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Network(nn.Module):
    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x).square().mean()


INPUT = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def train_once(network: Network) -> tuple[float, list[Tensor]]:
    loss = network(INPUT.clone().requires_grad_())
    loss.backward()
    return loss.item(), [each.grad for each in network.parameters()]


def saved_bytes(network: Network) -> int:
    sizes = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor._base if tensor._base is not None else tensor, nn.Parameter):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = network(INPUT.clone().requires_grad_())
    del loss
    return sum(sizes.values())


@pytest.mark.parametrize(
    ("which", "count", "calls"),
    [(False, 0, [1, 1, 1, 1]), (True, 4, [2] * 4), (1, 4, [2] * 4), (3, 2, [2, 1, 1, 2]), ("selective", 4, [2] * 4)],
)
def test_results_stay_equal_and_the_chosen_blocks_compute_again(which, count, calls):
    expected = train_once(Network())
    network = Network()
    assert checkpoint_activations(network, which) == count
    loss, gradients = train_once(network)
    assert loss == expected[0]
    for found, wanted in zip(gradients, expected[1], strict=True):
        assert torch.equal(found, wanted)
    assert [block.calls for block in network.blocks] == calls
    assert network.state_dict().keys() == Network().state_dict().keys()


def test_more_checkpointed_blocks_save_less():
    sizes = []
    for which in (False, 2, True):
        network = Network()
        checkpoint_activations(network, which)
        sizes.append(saved_bytes(network))
    assert sizes[0] > sizes[1] > sizes[2] > 0


def test_selective_checkpointing_keeps_the_products():
    class Counter(torch.utils._python_dispatch.TorchDispatchMode):
        products = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.products += func.overloadpacket in (torch.ops.aten.addmm, torch.ops.aten.mm)
            return func(*args, **(kwargs or {}))

    counts = {}
    for which in (False, "selective", True):
        network = Network()
        checkpoint_activations(network, which)
        with Counter() as counter:
            train_once(network)
        counts[which] = counter.products
    assert counts[False] == counts["selective"] < counts[True]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_offloaded_activations_give_the_same_gradients(checkpointed):
    expected = train_once(Network())
    network = Network()
    checkpoint_activations(network, checkpointed)
    with offloading(torch.device("cpu")):
        loss = network(INPUT.clone().requires_grad_())
    loss.backward()
    assert loss.item() == expected[0]
    for parameter, wanted in zip(network.parameters(), expected[1], strict=True):
        assert torch.equal(parameter.grad, wanted)


def test_offloading_copies_activations_and_leaves_parameters_where_they_are():
    network = nn.Linear(8, 8)
    x = torch.randn(2, 8, requires_grad=True)
    with offloading(torch.device("cpu")):
        y = network(x).exp()
    (unpacked,) = {id(y.grad_fn._saved_result)}
    assert y.grad_fn._saved_result.data_ptr() != y.data_ptr()
    product = y.grad_fn.next_functions[0][0]
    pointers = {product._saved_mat1.data_ptr(), product._saved_mat2.data_ptr()}
    assert network.weight.data_ptr() in pointers
    assert x.data_ptr() not in pointers
    assert unpacked


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("which", [False, True])
def test_compiled_blocks_agree_and_keep_their_names(which):
    torch.compiler.reset()
    expected = train_once(Network(depth=1))
    network = Network(depth=1)
    assert compile_blocks(network) == 1
    checkpoint_activations(network, which)
    loss, gradients = train_once(network)
    assert loss == pytest.approx(expected[0], abs=1e-6)
    for found, wanted in zip(gradients, expected[1], strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    assert network.state_dict().keys() == Network(depth=1).state_dict().keys()


def test_blocks_are_found_in_order_and_lists_within_them_are_theirs():
    inner = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(1, 1)])})
    network = nn.ModuleDict({"stack": nn.ModuleList([inner, nn.Identity()]), "more": nn.ModuleList([nn.ReLU()])})
    assert [type(block) for block in iter_blocks(network)] == [nn.ModuleDict, nn.Identity, nn.ReLU]
