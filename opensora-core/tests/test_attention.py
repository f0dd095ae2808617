"""One function attends for all models; which kernel does it is chosen from outside."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from opensora.core import components
from opensora.core.attention import attention, current_kernel, sdpa, use_kernel

GENERATOR = torch.Generator().manual_seed(0)
QUERY, KEY, VALUE = (torch.randn(2, 3, length, 8, generator=GENERATOR) for length in (5, 7, 7))


def nothing(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    return torch.zeros_like(query)


def by_hand(mask: Tensor | None = None) -> Tensor:
    scores = QUERY @ KEY.transpose(-1, -2) / 8**0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ VALUE


def test_attention_is_softmax_of_scaled_products() -> None:
    torch.testing.assert_close(attention(QUERY, KEY, VALUE), by_hand())


@pytest.mark.parametrize("shape", [(2, 1, 1, 7), (2, 3, 5, 7), (1, 1, 5, 7)], ids=str)
def test_a_mask_says_where_to_attend(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[..., 0] = True
    torch.testing.assert_close(attention(QUERY, KEY, VALUE, mask), by_hand(mask))
    changed = VALUE.clone()
    changed[..., -1, :] += 1
    mask[..., -1] = False
    assert torch.equal(attention(QUERY, KEY, VALUE, mask), attention(QUERY, KEY, changed, mask))


def test_a_chosen_kernel_serves_inside_its_block_only() -> None:
    with use_kernel(nothing):
        assert not attention(QUERY, KEY, VALUE).any()
        with use_kernel(sdpa):
            torch.testing.assert_close(attention(QUERY, KEY, VALUE), by_hand())
        assert not attention(QUERY, KEY, VALUE).any()
    torch.testing.assert_close(attention(QUERY, KEY, VALUE), by_hand())


def test_a_kernel_may_stand_around_the_one_before() -> None:
    with use_kernel(nothing):
        inner = current_kernel()
        with use_kernel(lambda query, key, value, mask=None: inner(query, key, value, mask) + 1):
            assert (attention(QUERY, KEY, VALUE) == 1).all()


def test_a_kernel_goes_when_its_block_fails() -> None:
    with pytest.raises(ValueError, match="stop"), use_kernel(nothing):
        raise ValueError("stop")
    assert attention(QUERY, KEY, VALUE).any()


def test_a_chosen_kernel_serves_in_other_threads_too() -> None:
    """Backward recomputes checkpointed blocks in threads of autograd."""
    outputs: list[Tensor] = []
    with use_kernel(nothing):
        thread = threading.Thread(target=lambda: outputs.append(attention(QUERY, KEY, VALUE)))
        thread.start()
        thread.join()
    assert not outputs[0].any()


def test_the_default_kernel_is_a_component() -> None:
    assert components.load("attention", "sdpa") is sdpa
