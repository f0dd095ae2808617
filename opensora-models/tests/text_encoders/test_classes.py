"""Class numbers as prompts."""

from __future__ import annotations

import pytest
import torch

from opensora.core.errors import DataError
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
