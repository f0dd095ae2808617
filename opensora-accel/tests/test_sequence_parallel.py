"""What is dealt out to whom, and denoisers that can't be dealt out. What comes of it is tested across packages."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from opensora.accel.sequence_parallel import parallelize_sequence, share_sizes
from opensora.core import ConfigError, SequencePlan, ShapeError
from opensora.core.attention import attention


class Group:
    """As many processes, of which only one is there."""

    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return 0


class Attention(nn.Module):
    """Among all tokens."""

    def __init__(self, num_heads: int = 2) -> None:
        super().__init__()
        self.num_heads = num_heads

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        heads = x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return attention(heads, heads, heads, mask).transpose(1, 2).flatten(2)


class Masked(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, torch.ones(1, 1, x.shape[1], x.shape[1], dtype=torch.bool))


class ByItself(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return (x @ x.transpose(1, 2)).softmax(-1) @ x


class Block(nn.Module):
    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(x)


class Denoiser(nn.Module):
    """A block, and no head."""

    def __init__(self, plan: SequencePlan | None, attn: nn.Module | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(attn or Attention())])
        if plan is not None:
            self.sequence_plan = plan

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x)


FULL = SequencePlan(full=("blocks.*.attn",), head=None)


@pytest.mark.parametrize(
    ("total", "size", "expected"), [(6, 2, [3, 3]), (5, 2, [3, 2]), (5, 4, [2, 1, 1, 1]), (1, 2, [1, 0])]
)
def test_shares_differ_by_one_at_most(total, size, expected):
    assert share_sizes(total, size) == expected


def test_one_process_has_nothing_to_share():
    parallelize_sequence(Denoiser(None), Group(1))


@pytest.mark.parametrize(
    ("denoiser", "message"),
    [
        (Denoiser(None), r"sp_size is 4, but Denoiser has no sequence_plan.*Use sp_size = 1"),
        (Denoiser(SequencePlan(full=("blocks.*.attention",), head=None)), r'"blocks\.\*\.attention" fits no module'),
        (Denoiser(SequencePlan(blocks=("blocks.0",), head=None)), "blocks.0 must be lists of blocks"),
        (Denoiser(FULL), r"blocks\.0\.attn has 2 heads.*2 at most"),
    ],
    ids=["no plan", "wrong name", "no list", "too few heads"],
)
def test_a_denoiser_that_does_not_fit_is_refused(denoiser, message):
    with pytest.raises(ConfigError, match=message):
        parallelize_sequence(denoiser, Group(4))


@pytest.mark.parametrize(
    ("attn", "message"),
    [(Masked(), "has a mask"), (ByItself(), r"blocks\.0\.attn doesn't attend through opensora\.core\.attention")],
    ids=["mask", "another way"],
)
def test_attention_that_can_not_be_dealt_out_is_refused_when_it_is_called(attn, message):
    denoiser = Denoiser(FULL, attn)
    group = Group(2)
    parallelize_sequence(denoiser, group)
    with pytest.raises(ConfigError, match=message):
        denoiser(torch.randn(1, 6, 4))


def test_fewer_tokens_than_processes_are_refused():
    denoiser = Denoiser(FULL)
    group = Group(2)
    parallelize_sequence(denoiser, group)
    with pytest.raises(ShapeError, match="1 tokens can't be dealt out to 2 processes"):
        denoiser(torch.randn(1, 1, 4))


def test_attention_that_the_plan_does_not_describe_is_refused():
    """Here it sees tokens that are not a share: those of a transposed axis."""

    class Transposed(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.attn(x.transpose(1, 2)).transpose(1, 2)

    denoiser, group = Denoiser(SequencePlan(spatial=("blocks.*.attn",), head=None)), Group(2)
    denoiser.blocks[0] = Transposed(Attention())
    parallelize_sequence(denoiser, group)
    with pytest.raises(ShapeError, match="got 4 of 10 tokens"):
        denoiser(torch.randn(1, 10, 4))
