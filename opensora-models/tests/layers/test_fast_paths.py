"""Faster ways to the same numbers and derivatives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from opensora.models._layers.attention import CrossAttention, attended_text
from opensora.models._layers.feed_forward import FeedForward
from opensora.models._layers.linear import SMALLEST, Linear
from opensora.models._layers.modulation import modulated_norm

IN, OUT = 384, 512
assert IN * OUT >= SMALLEST


@pytest.fixture
def layer() -> Linear:
    torch.manual_seed(0)
    return Linear(IN, OUT)


INPUTS = {
    "tokens": lambda: torch.randn(2, 7, IN),
    "rows": lambda: torch.randn(7, IN),
    "transposed": lambda: torch.randn(2, 5, 3, IN).transpose(1, 2),
    "empty": lambda: torch.randn(0, 3, IN),
    "one row": lambda: torch.randn(IN),
}


@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
def test_linear_is_that_of_torch(layer, make):
    x = make().requires_grad_()
    found, expected = layer(x), F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=0)
    upstream = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, [x, *layer.parameters()], upstream)
    for one, other in zip(torch.autograd.grad(found, [x, *layer.parameters()], upstream), wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_frozen_weights_get_no_gradient(layer):
    layer.requires_grad_(False)
    x = torch.randn(2, IN, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, IN), atol=1e-4, rtol=0)
    assert layer.weight.grad is None


def test_linear_obeys_casts_transforms_and_counters(layer):
    x = torch.randn(2, 3, IN)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
    assert layer.to("meta")(x.to("meta")).is_meta
    layer = Linear(IN, OUT, bias=False)
    mapped = torch.func.vmap(layer)(x)
    torch.testing.assert_close(mapped, layer(x), atol=1e-5, rtol=0)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 6 * IN * OUT


SHAPES = {
    "tokens": ((2, 5, 8), (2, 1, 8)),
    "frames": ((2, 3, 5, 8), (2, 3, 1, 8)),
    "shared": ((2, 3, 5, 8), (1, 1, 1, 8)),
}


@pytest.mark.parametrize(("shape", "vector"), SHAPES.values(), ids=SHAPES)
def test_modulated_norm_and_its_derivatives(shape, vector):
    x, shift, scale = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in (shape, vector, vector))
    expected = F.layer_norm(x, (8,), eps=1e-6) * (1 + scale) + shift
    torch.testing.assert_close(modulated_norm(x, shift, scale), expected)
    with torch.no_grad():
        torch.testing.assert_close(modulated_norm(x, shift, scale), expected)
    assert torch.autograd.gradcheck(modulated_norm, (x, shift, scale))


@pytest.mark.parametrize("width", [4, 384])
def test_feed_forward_in_sampling_is_that_of_training(width):
    torch.manual_seed(0)
    layer = FeedForward(width, 2 * width, width)
    x = torch.randn(3, width)
    before = x.clone()
    with torch.no_grad():
        found = layer(x)
    torch.testing.assert_close(found, layer(x), atol=1e-5, rtol=0)
    assert torch.equal(x, before)


def test_feed_forward_calls_what_is_put_around_its_layers():
    layer = FeedForward(384, 512, 384)
    seen = []
    layer.fc1.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    with torch.no_grad():
        layer(torch.randn(3, 384))
    assert seen == [(3, 512)]


MASKS = {
    "equally long": [[1, 1, 0, 0], [1, 1, 0, 0]],
    "of different lengths": [[1, 0, 0, 0], [1, 1, 1, 0]],
    "with a gap": [[1, 0, 1, 0], [0, 1, 0, 0]],
    "one without a token": [[0, 0, 0, 0], [1, 1, 0, 0]],
    "full": [[1, 1, 1, 1], [1, 1, 1, 1]],
}


@pytest.mark.parametrize("rows", MASKS.values(), ids=MASKS)
def test_padding_is_cut_off_without_a_trace(rows):
    torch.manual_seed(0)
    attend, x, text = CrossAttention(8, 2), torch.randn(2, 3, 8), torch.randn(2, 4, 8)
    mask = torch.tensor(rows).bool()
    whole = (mask | ~mask.any(1, keepdim=True))[:, None, None]
    torch.testing.assert_close(attend(x, *attended_text(text, mask)), attend(x, text, whole), atol=1e-6, rtol=0)


def test_prompts_of_one_length_need_no_mask():
    text, mask = attended_text(torch.randn(2, 4, 8), torch.tensor([[1, 1, 0, 0]] * 2).bool())
    assert text.shape == (2, 2, 8)
    assert mask is None


def test_text_without_a_mask_is_left_alone():
    text = torch.randn(2, 4, 8)
    assert attended_text(text, None) == (text, None)
    assert attended_text(text.to("meta"), torch.ones(2, 4, device="meta"))[0].shape == (2, 4, 8)
    assert attended_text(text[:0], torch.ones(0, 4))[0].shape == (0, 4, 8)
