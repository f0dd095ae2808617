"""Embeddings of prompts that were encoded before."""

from __future__ import annotations

import gc
import logging
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch

from opensora.core.conditioning import Conditioning
from opensora.core.errors import ConfigError
from opensora.core.protocols import TextEncoder
from opensora.core.text_cuts import cut_off, describe_cut, max_tokens

__all__ = ["CachedTextEncoder"]

log = logging.getLogger(__name__)
_REPORTED_CUTS = 10
_SHOWN_OF_PROMPT = 40


class CachedTextEncoder:
    """A text encoder that remembers, on the CPU, what it made of each prompt. Those unused for longest are forgotten.

    New prompts are encoded one by one: what a text encoder makes of a prompt can differ in its last bits with the others of
    a batch. So an embedding is the same whether or not it was remembered, and a resumed run goes on as the unbroken one.
    Of the first prompts that don't fit the encoder it is logged what is cut.
    """

    def __init__(self, encoder: TextEncoder, *, capacity: int) -> None:
        """``capacity`` is what to remember at most, in bytes."""
        self.width, self.max_length, self.max_tokens = encoder.width, encoder.max_length, max_tokens(encoder)
        self.capacity = capacity
        self.size = 0
        self._encoder: TextEncoder | None = encoder
        self._known: OrderedDict[str, Conditioning] = OrderedDict()  # those used last stand last
        self._num_cut = 0

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """See `opensora.core.protocols.TextEncoder`; on the CPU.

        Raises:
            ConfigError: A prompt is not remembered, and the text encoder was released.
        """
        rows = {prompt: self._look_up(prompt) for prompt in dict.fromkeys(prompts)}
        return Conditioning.cat([rows[prompt] for prompt in prompts])

    def remember(self, prompts: Iterable[str]) -> bool:
        """Encode prompts ahead. False if they don't fit, which the first of them shows: embeddings are equally large."""
        unique = list(dict.fromkeys(prompts))
        return all(self._look_up(prompt).nbytes * len(unique) <= self.capacity for prompt in unique)

    def num_missing(self, prompts: Sequence[str]) -> int:
        """How many of these prompts are not remembered."""
        return len(set(prompts) - self._known.keys())

    def release(self) -> None:
        """Free the text encoder's memory. What is remembered can still be had, nothing else."""
        self._encoder = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _look_up(self, prompt: str) -> Conditioning:
        known = self._known.pop(prompt, None)
        if known is None:
            known = self._encode(prompt)
            self.size += known.nbytes
        self._known[prompt] = known
        while self.size > self.capacity:
            _, forgotten = self._known.popitem(last=False)
            self.size -= forgotten.nbytes
        return known

    def _encode(self, prompt: str) -> Conditioning:
        encoder = self._encoder
        if encoder is None:
            raise ConfigError(
                f'The text encoder was released once the prompts were encoded, and "{prompt}" is none of them. '
                "Keep it with release_text_encoder = False."
            )
        if cut := cut_off(encoder, prompt):
            self._report(prompt, cut)
        with torch.inference_mode(False), torch.no_grad():  # a preview's embeddings may serve training later
            return encoder.encode([prompt]).to("cpu")

    def _report(self, prompt: str, cut: str) -> None:
        """Warn of a prompt that is read in part, unless there were many."""
        self._num_cut += 1
        if self._num_cut <= _REPORTED_CUTS:
            start = prompt if len(prompt) <= _SHOWN_OF_PROMPT else f"{prompt[:_SHOWN_OF_PROMPT]}..."
            log.warning("%s", describe_cut(prompt, cut, max_tokens=self.max_tokens, which=f'Prompt "{start}"'))
        if self._num_cut == _REPORTED_CUTS:
            log.warning("Further prompts that are cut are not listed.")
