"""Kernels of other packages: how they are called, and what happens where they can't be."""

from __future__ import annotations

import logging
import re
import sys
from types import ModuleType

import pytest
import torch
from attrs import evolve
from torch.testing import assert_close

from opensora.accel.attention_kernels import FLASH, XFORMERS, flash, xformers
from opensora.core import components
from opensora.core.attention import attention, sdpa, use_kernel

GENERATOR = torch.Generator().manual_seed(0)
QUERY, KEY, VALUE = (torch.randn(2, 3, length, 8, generator=GENERATOR) for length in (5, 7, 7))
MASK = torch.tensor([[True] * 7, [True, False, True, False, False, False, False]])[:, None, None]


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    """As flash-attn's: [batch, length, heads, width]."""
    assert q.shape == (2, 5, 3, 8)
    assert k.shape == v.shape == (2, 7, 3, 8)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (softmax_scale or q.shape[-1] ** -0.5)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
    """As xformers'."""
    assert attn_bias is None
    return flash_attn_func(query, key, value, p, scale)


@pytest.fixture
def here(monkeypatch, request):
    """The two kernels, of packages that stand in for the real ones on the CPU, and how often they were called."""
    calls = []

    def install(module, function):
        stand_in = ModuleType(module)
        setattr(stand_in, function.__name__, lambda *inputs: calls.append(module) or function(*inputs))
        monkeypatch.setitem(sys.modules, module, stand_in)
        return module

    name = re.sub(r"\W", "_", request.node.name)  # a module is looked up once
    modules = [
        install(f"flash_{name}", flash_attn_func),
        install(f"xformers_{name}", memory_efficient_attention),
    ]
    kernels = [
        evolve(each, module=module, devices=frozenset({"cpu"}), dtypes=each.dtypes | {torch.float32})
        for each, module in zip((FLASH, XFORMERS), modules, strict=True)
    ]
    return kernels, calls


@pytest.mark.parametrize("index", [0, 1], ids=["flash", "xformers"])
def test_the_package_is_called_in_its_own_layout(here, index):
    kernels, calls = here
    with use_kernel(kernels[index]):
        assert_close(attention(QUERY, KEY, VALUE), sdpa(QUERY, KEY, VALUE))
    assert len(calls) == 1


@pytest.mark.parametrize("index", [0, 1], ids=["flash", "xformers"])
def test_a_mask_is_kept_to(here, index):
    kernels, calls = here
    with use_kernel(kernels[index]):
        assert_close(attention(QUERY, KEY, VALUE, MASK), sdpa(QUERY, KEY, VALUE, MASK))
    assert calls == []


def test_under_autocast_the_package_gets_its_dtype(here):
    kernels, calls = here
    only_half = evolve(kernels[0], dtypes=frozenset({torch.bfloat16}))
    with use_kernel(only_half), torch.autocast("cpu", torch.bfloat16):
        assert attention(QUERY, KEY, VALUE).dtype is torch.bfloat16
    assert len(calls) == 1


@pytest.mark.parametrize("kernel", [flash, xformers])
def test_on_the_cpu_sdpa_serves_and_it_is_said_once(kernel, caplog):
    caplog.set_level(logging.WARNING, "opensora")
    for each in (FLASH, XFORMERS):
        each._reported.clear()
    with use_kernel(kernel):
        for _ in range(3):
            assert torch.equal(attention(QUERY, KEY, VALUE), sdpa(QUERY, KEY, VALUE))
    assert [record.getMessage() for record in caplog.records] == [
        f'attention "{kernel.__name__}" is computed by "sdpa" here: it doesn\'t run on cpu.'
    ]


@pytest.mark.parametrize(
    ("change", "dtype", "problem"),
    [
        ({}, torch.float64, "doesn't compute in float64, only in bfloat16 or float16"),
        ({"max_width": 4}, torch.float16, "heads have 8 channels, and it takes at most 4"),
        ({"module": "no_such_package"}, torch.float16, r"no_such_package is not installed .*opensora-accel\[flash\]"),
        ({}, torch.float16, None),
    ],
)
def test_each_hindrance_has_its_words(here, change, dtype, problem):
    kernel = evolve(here[0][0], dtypes=FLASH.dtypes, **change)
    found = kernel.problem(QUERY.to(dtype))
    if problem is None:
        assert found is None
    else:
        assert re.search(problem, found), found


@pytest.mark.parametrize("name", ["flash", "xformers"])
def test_they_are_chosen_by_name(name):
    assert components.load("attention", name).__name__ == name


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [FLASH, XFORMERS], ids=["flash", "xformers"])
@pytest.mark.parametrize("length", [64, 77, 1000])
def test_on_a_gpu_the_package_gives_what_sdpa_gives(kernel, length):
    inputs = [torch.randn(2, 4, length, 72, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    assert kernel.problem(inputs[0]) is None
    ours, theirs = kernel(*inputs), sdpa(*inputs)
    assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    for mine, other in zip(*(torch.autograd.grad(each.sum(), inputs) for each in (ours, theirs)), strict=True):
        assert_close(mine, other, rtol=2e-2, atol=2e-2)
