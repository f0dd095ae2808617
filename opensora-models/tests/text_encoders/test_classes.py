"""Class numbers as prompts."""

from __future__ import annotations

import pytest
import torch

from opensora.core.errors import DataError
from opensora.core.testing import check_text_encoder
from opensora.core.text_cache import CachedTextEncoder
from opensora.models.text_encoders.classes import ClassLabels


@pytest.fixture
def encoder():
    return ClassLabels(ClassLabels.Spec(num_classes=10))


def test_prompts_become_labels(encoder):
    conditioning = encoder.encode(["0", " 9 ", "3"])
    assert torch.equal(conditioning.labels, torch.tensor([0, 9, 3]))
    assert conditioning.labels.dtype == torch.int64
    assert conditioning.text_embedding is None
    assert encoder.width is None


@pytest.mark.parametrize("prompt", ["a cat", "", "1.5", "3 4"])
def test_prompt_that_is_no_number(encoder, prompt):
    with pytest.raises(DataError, match=f'"{prompt}" is no class number. Give integers from 0 to 9'):
        encoder.encode(["1", prompt])


@pytest.mark.parametrize("prompt", ["10", "-1"])
def test_class_that_does_not_exist(encoder, prompt):
    with pytest.raises(DataError, match=f"no class {prompt}. Classes go from 0 to 9"):
        encoder.encode([prompt])


def test_a_number_is_never_cut(encoder):
    assert encoder.cut_off("1" * 5000) == ""
    report = check_text_encoder("classes", num_classes=10, prompts=["1", "2", "9"])
    assert any("cuts off" in title for title in report.passed)


def test_there_is_no_empty_prompt(encoder):
    with pytest.raises(DataError, match='"" is no class number'):
        CachedTextEncoder(encoder, capacity=100).encode([""])
