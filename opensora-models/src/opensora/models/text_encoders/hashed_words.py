"""A text encoder without weights, for demonstrations and tests.

It knows nothing about language: "car" is as far from "cars" as from "sky". What it offers is a text input that needs no
download and takes no time, enough for a denoiser to learn what a small vocabulary means.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from typing import ClassVar

import torch
from attrs import field, frozen
from attrs.validators import ge, gt
from torch import Tensor, nn

from opensora.core.conditioning import Conditioning
from opensora.core.errors import ConfigError
from opensora.core.randomness import generator_for
from opensora.models._layers.positions import temporal_table

__all__ = ["HashedWords", "HashedWordsSpec"]

_logger = logging.getLogger(__name__)
_WORD = re.compile(r"\w+")
_START = ""
"""Stands in front of every prompt, so that an empty one has a token too. No word is empty."""


@frozen(kw_only=True)
class HashedWordsSpec:
    """Options of `HashedWords`."""

    width: int = field(default=64, validator=gt(0))
    """Width of the embedding; even."""
    model_max_length: int = field(default=16, validator=ge(2))
    """Tokens a prompt is cut or padded to: a start token, and its words."""

    def __attrs_post_init__(self) -> None:
        if self.width % 2:
            raise ConfigError(f"width must be even, not {self.width}.")


class HashedWords(nn.Module):
    """Each word is a fixed pseudo-random normal vector, drawn from the word's hash, plus its position."""

    Spec: ClassVar[type] = HashedWordsSpec
    positions: Tensor

    def __init__(self, spec: HashedWordsSpec) -> None:
        super().__init__()
        self.spec = spec
        self.width: int | None = spec.width
        self.max_length = spec.model_max_length
        self.register_buffer("positions", temporal_table(spec.width, spec.model_max_length), persistent=False)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """``text_embedding`` [B, L, width] and ``text_mask`` [B, L], where this module is. Case and punctuation don't count;
        words beyond the length are cut off.
        """
        words = [self._words(prompt) for prompt in prompts]
        lengths = torch.tensor([len(each) for each in words])
        embedding = torch.zeros(len(words), self.max_length, self.spec.width)
        for row, each in zip(embedding, words, strict=True):
            row[: len(each)] = torch.stack([_vector(word, self.spec.width) for word in each])
        mask = torch.arange(self.max_length) < lengths[:, None]
        return Conditioning(
            text_embedding=embedding.to(self.positions) + self.positions, text_mask=mask.to(self.positions.device)
        )

    def cut_off(self, prompt: str) -> str:
        """The end of a prompt, in lower case, from the first word on that is beyond the length; "" if all of it fits."""
        text = prompt.lower()
        beyond = next(islice(_WORD.finditer(text), self.max_length - 1, None), None)
        return text[beyond.start() :].strip() if beyond else ""

    def _words(self, prompt: str) -> list[str]:
        return [_START, *_WORD.findall(prompt.lower())][: self.max_length]


@lru_cache(maxsize=4096)
def _vector(word: str, width: int) -> Tensor:
    return torch.randn(width, generator=generator_for("hashed-words", word))
