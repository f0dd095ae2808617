"""Class labels in place of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from attrs import field, frozen
from attrs.validators import gt
from torch import nn

from opensora.core.conditioning import Conditioning
from opensora.core.errors import DataError

__all__ = ["ClassLabels", "ClassLabelsSpec"]


@frozen(kw_only=True)
class ClassLabelsSpec:
    """Options of `ClassLabels`."""

    num_classes: int = field(validator=gt(0))
    """Classes are numbered from 0 to this minus 1."""


class ClassLabels(nn.Module):
    """Reads prompts as class numbers."""

    Spec: ClassVar[type] = ClassLabelsSpec
    width: int | None = None
    max_length = 1

    def __init__(self, spec: ClassLabelsSpec) -> None:
        super().__init__()
        self.spec = spec

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """``labels`` [B] int64, on the CPU.

        Raises:
            DataError: A prompt is no integer, or there is no such class.
        """
        return Conditioning(labels=torch.tensor([self._label(prompt) for prompt in prompts], dtype=torch.int64))

    def cut_off(self, prompt: str) -> str:
        """Nothing: a number is read as a whole."""
        return ""

    def _label(self, prompt: str) -> int:
        last = self.spec.num_classes - 1
        try:
            label = int(prompt)
        except ValueError:
            raise DataError(f'The prompt "{prompt}" is no class number. Give integers from 0 to {last}.') from None
        if not 0 <= label <= last:
            raise DataError(f"There is no class {label}. Classes go from 0 to {last} (text_encoder.num_classes).")
        return label
