"""What the frozen encoders take in a training step: rehearsed with few samples and frames, as each one more adds the same."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn

from opensora.core.composing import Parts
from opensora.core.protocols import Size
from opensora.core.rehearsal import Rehearsal

__all__ = ["EncoderCosts", "Spent", "ValuelessDraws"]


@frozen
class Spent:
    """By one encoder, for one batch."""

    bytes: int
    """At most, above the weights."""
    flops: int


class EncoderCosts:
    """Weights and work of the video autoencoder and the text encoder. What was rehearsed once is remembered."""

    def __init__(self, parts: Parts, dtype: torch.dtype, *, counts_text: bool = True) -> None:
        """Nothing is rehearsed yet.

        Args:
            parts: On the meta device.
            dtype: Of their weights in the run.
            counts_text: Whether the text encoder is on the device.
        """
        self._vae, self._text = parts.vae, parts.text_encoder
        self._counts_text = counts_text
        self._rehearsal = Rehearsal()
        self._known: dict[tuple[int, ...], Spent] = {}
        with self._rehearsal:
            for part in (self._vae, *([self._text] if counts_text else [])):
                if isinstance(part, nn.Module):
                    self._rehearsal.fake(part, "encoders", dtype=dtype)
        self.weights: int = self._rehearsal.held["encoders"]
        """Bytes."""

    def video(self, size: Size, batch_size: int) -> Spent:
        """Of encoding ``batch_size`` videos of (T, H, W).

        Raises:
            ShapeError: The autoencoder can't do this size.
        """
        options: Any = getattr(self._vae, "spec", None)
        frames, height, width = size
        chunk = getattr(options, "micro_frame_size", None) or 0  # frames that are encoded apart from others
        at_once = getattr(options, "micro_batch_size", None) or 0  # frames, of all samples
        samples = math.ceil(at_once / frames) or 1
        return _along(
            frames, chunk, lambda t: _along(batch_size, samples, lambda b: self._run_video((t, height, width), b))
        )

    def text(self, batch_size: int) -> Spent:
        """Of encoding prompts of full length, from tokens on; nothing where the encoder has no ``encode_tokens``."""
        return _along(batch_size, 1, self._run_text)

    def _run_video(self, size: Size, batch_size: int) -> Spent:
        vae = self._vae
        if not isinstance(vae, nn.Module):  # a stand-in, where latents are read
            return Spent(0, 0)
        encode: Any = vae.encode
        return self._run(
            (batch_size, *size), lambda: encode(torch.empty(batch_size, 3, *size), draws=ValuelessDraws(batch_size))
        )

    def _run_text(self, batch_size: int) -> Spent:
        encoder: Any = self._text
        if not (self._counts_text and hasattr(encoder, "encode_tokens")):
            return Spent(0, 0)
        length = getattr(encoder, "max_tokens", encoder.max_length)
        named = inspect.signature(encoder.encode_tokens).parameters

        def encode() -> Tensor:
            tokens = torch.empty(batch_size, length, dtype=torch.int64)
            given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
            result: Tensor = encoder.encode_tokens(**{name: value for name, value in given.items() if name in named})
            return result

        return self._run((batch_size,), encode)

    @torch.no_grad()
    def _run(self, key: tuple[int, ...], encode: Callable[[], Tensor]) -> Spent:
        if key not in self._known:
            with self._rehearsal as rehearsal:
                rehearsal.reset()
                before = rehearsal.live_bytes
                rehearsal.begin("encoder")
                encode()
            self._known[key] = Spent(rehearsal.peaks["encoder"].bytes - before, rehearsal.flops["encoder"])
        return self._known[key]


def _along(count: int, period: int, cost: Callable[[int], Spent]) -> Spent:
    """The cost of ``count``, on the line through two smaller ones where there are many periods; 0 is no period."""
    short = 2 * period + count % period if period else count
    if count <= short + period:
        return cost(count)
    one, other = cost(short), cost(short + period)
    factor = (count - short) / period
    return Spent(
        round(one.bytes + factor * (other.bytes - one.bytes)), round(one.flops + factor * (other.flops - one.flops))
    )


@frozen
class ValuelessDraws:
    """Random numbers that have shapes alone, for rehearsals."""

    batch_size: int

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        """See `Draws.normal`."""
        return torch.empty(self.batch_size, *shape)

    def uniform(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """See `Draws.uniform`."""
        return torch.empty(self.batch_size, *shape)

    def integers(self, name: str, high: int, shape: Sequence[int] = ()) -> Tensor:
        """See `Draws.integers`."""
        return torch.empty(self.batch_size, *shape, dtype=torch.int64)
