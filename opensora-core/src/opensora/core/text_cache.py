"""Embeddings of prompts that were encoded before."""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch

from opensora.core.conditioning import Conditioning
from opensora.core.errors import ConfigError
from opensora.core.protocols import TextEncoder
from opensora.core.text_cuts import cut_off, max_tokens

__all__ = ["CachedTextEncoder"]


class CachedTextEncoder:
    """A text encoder that remembers, on the CPU, what it made of each prompt. Those unused for longest are forgotten.

    New prompts are encoded one by one: what a text encoder makes of a prompt can differ in its last bits with the others of
    a batch. So an embedding is the same whether or not it was remembered, and a resumed run goes on as the unbroken one.
    """

    def __init__(self, encoder: TextEncoder, *, capacity: int) -> None:
        """``capacity`` is what to remember at most, in bytes."""
        self.width, self.max_length, self.max_tokens = encoder.width, encoder.max_length, max_tokens(encoder)
        self.capacity = capacity
        self.size = 0
        self._encoder: TextEncoder | None = encoder
        self._known: OrderedDict[str, Conditioning] = OrderedDict()  # those used last stand last
        self._cuts: dict[str, str] = {}

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

    def cut_off(self, prompt: str) -> str:
        """The end of a prompt that the encoder does not read, or ""; of a remembered prompt after `release` too.

        Raises:
            ConfigError: The prompt is not remembered, and the text encoder was released.
        """
        if prompt not in self._cuts:
            self._cuts[prompt] = cut_off(self._needed(prompt), prompt)
        return self._cuts[prompt]

    def release(self) -> None:
        """Free the text encoder's memory. What is remembered can still be had, nothing else."""
        if self._encoder is not None:
            for prompt in self._known:
                self.cut_off(prompt)
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
        encoder = self._needed(prompt)
        with torch.inference_mode(False), torch.no_grad():  # a preview's embeddings may serve training later
            return encoder.encode([prompt]).to("cpu")

    def _needed(self, prompt: str) -> TextEncoder:
        if self._encoder is None:
            raise ConfigError(
                f'The text encoder was released once the prompts were encoded, and "{prompt}" is none of them. '
                "Keep it with release_text_encoder = False."
            )
        return self._encoder
