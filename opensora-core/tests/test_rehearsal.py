"""Rehearsals count what real tensors would take, and forget what is freed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from opensora.core.rehearsal import Rehearsal, is_rehearsed, num_observers, on_host

KIB = 1024


def test_live_bytes_follow_tensors():
    with Rehearsal() as rehearsal:
        rehearsal.begin("all")
        one = torch.empty(256)
        view = one.view(16, 16)[3:]
        two = one + 1
        assert is_rehearsed(one)
        assert rehearsal.live_bytes == 2 * KIB  # a view is no memory of its own
        del one, two
        assert rehearsal.live_bytes == KIB  # which the view keeps
        del view
        assert rehearsal.live_bytes == 0
    assert rehearsal.peaks["all"].bytes == 2 * KIB


def test_categories_and_shares():
    with Rehearsal({"parameters": 0.25}) as rehearsal:
        with torch.device("meta"):
            module = nn.Linear(32, 32, bias=False)
        rehearsal.fake(module, "parameters")
        assert rehearsal.held["parameters"] == KIB
        gradient = torch.empty(32, 32)
        assert rehearsal.held["activations"] == 4 * KIB
        rehearsal.count_as("gradients", gradient)
        assert (rehearsal.held["activations"], rehearsal.held["gradients"]) == (0, 4 * KIB)
        with on_host():
            away = torch.empty(512)
        assert rehearsal.live_bytes == 5 * KIB
        assert rehearsal.held["host"] == 2 * KIB
        del away


def test_modules_are_cast_and_shared_parameters_stay_shared():
    with torch.device("meta"):
        first, second = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
    second.weight = first.weight
    with Rehearsal() as rehearsal:
        rehearsal.fake(nn.ModuleList([first, second]), "encoders", dtype=torch.bfloat16)
        assert rehearsal.held["encoders"] == 512
        assert first.weight.dtype is torch.bfloat16


def test_operations_are_counted_by_phase_with_attention_for_cpus():
    with Rehearsal() as rehearsal:
        query = torch.empty(1, 2, 8, 4, requires_grad=True)
        rehearsal.begin("forward")
        out = torch.nn.functional.scaled_dot_product_attention(query, query, query)
        rehearsal.begin("backward")
        out.sum().backward()
    assert rehearsal.flops["forward"] == 2 * (2 * 2 * 8 * 8 * 4)
    assert rehearsal.flops["backward"] == 2 * rehearsal.flops["forward"]


def test_values_are_asked_for_without_harm():
    with Rehearsal():
        assert torch.empty(()).item() == 1.0
        assert bool(torch.empty(3).isfinite().all())


def test_outside_of_rehearsals_nobody_looks_on():
    assert num_observers() == 0
    with Rehearsal() as rehearsal:
        assert num_observers() == rehearsal.num_modes > 0
    assert num_observers() == 0
    assert not is_rehearsed(torch.empty(1))
    with on_host():
        assert not is_rehearsed(torch.empty(1))


def test_an_error_inside_ends_the_rehearsal():
    with pytest.raises(ZeroDivisionError), Rehearsal():
        raise ZeroDivisionError
    assert num_observers() == 0
    assert not is_rehearsed(torch.empty(1))
