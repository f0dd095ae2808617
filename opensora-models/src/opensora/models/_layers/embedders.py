"""What a denoiser is told, as vectors: timesteps, sizes and rates, class labels, captions.

Shapes: B batch, L text tokens, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from opensora.core.errors import ConfigError, ShapeError
from opensora.models._layers.feed_forward import FeedForward

FREQUENCIES = 256
"""Width of the sinusoid that numbers pass through."""


def sinusoid(values: Tensor, width: int, *, frequency_shift: int = 0) -> Tensor:
    """Cosines, then sines of ``values`` [...] at frequencies 1 .. 1/10000, float32 [..., width]; an odd width ends in a 0."""
    angles = values.float()[..., None] * frequencies(width // 2, shift=frequency_shift, device=values.device)
    return torch.cat([angles.cos(), angles.sin(), angles.new_zeros(*angles.shape[:-1], width % 2)], dim=-1)


def frequencies(count: int, *, shift: int = 0, device: torch.device | None = None) -> Tensor:
    """``count`` float32 frequencies from 1 down to 1/10000, the same to the last bit on every machine.

    The last stays just above 1/10000, but with ``shift`` 1 reaches it.

    A float32 ``exp`` rounds differently from CPU to CPU, and at timestep 999 the last bit moves an angle by 6e-5. So it is
    float64 (but on MPS, which has none), and the two near a rounding tie are put on the side of the reference vectors.
    """
    index = torch.arange(count, dtype=torch.float32, device=device)
    precise = torch.float32 if index.device.type == "mps" else torch.float64
    exact = (-math.log(10000) * index / (count - shift)).to(precise).exp()
    if shift:
        return exact.float()
    tied = (index / count == 13 / 128) | (index / count == 44 / 128)
    return torch.where(tied, exact * (1 + 2**-28), exact).float()


class NumberEmbedder(nn.Module):
    """Embeds a number a sample: a timestep, frame rate, height, ... Fractions are welcome."""

    def __init__(self, width: int, *, frequency_shift: int = 0) -> None:
        """``frequency_shift``: see `frequencies`."""
        super().__init__()
        self.frequency_shift = frequency_shift
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, values: Tensor) -> Tensor:
        """[...] -> [..., D]. The sinusoid is float32, whatever the weights are."""
        waves = sinusoid(values, FREQUENCIES, frequency_shift=self.frequency_shift)
        return self.mlp(waves.to(self.mlp.get_parameter("0.weight").dtype))


class LabelEmbedder(nn.Module):
    """Class labels, with a further row for "no class" if labels are ever dropped in training."""

    def __init__(self, num_classes: int, width: int, *, has_null: bool) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + has_null, width)

    def forward(self, labels: Tensor, dropped: Tensor | None) -> Tensor:
        """``labels`` [B] int64 and where to drop them [B] bool -> [B, D].

        Raises:
            ConfigError: Labels are to be dropped, but the model has no null class.
        """
        if dropped is not None:
            if self.embedding_table.num_embeddings == self.num_classes:
                raise ConfigError(
                    "This model has no null class (class_dropout_prob is 0), so labels can't be dropped and guidance can't "
                    "be used. Set scheduler.cfg_scale = 1, or train with a class_dropout_prob above 0."
                )
            labels = torch.where(dropped, self.num_classes, labels)
        return self.embedding_table(labels)


class CaptionEmbedder(nn.Module):
    """Maps a text encoder's tokens to the model's width. A dropped caption is replaced by the null caption before that."""

    y_embedding: Tensor

    def __init__(self, text_width: int, width: int, num_tokens: int) -> None:
        super().__init__()
        self.register_buffer("y_embedding", torch.randn(num_tokens, text_width) / text_width**0.5)
        self.y_proj = FeedForward(text_width, width, width)

    def forward(self, text: Tensor, dropped: Tensor | None) -> Tensor:
        """[B, L, text width] and where to drop captions [B] bool -> [B, L, D].

        Raises:
            ShapeError: The text is wider or longer than this model's captions.
        """
        num_tokens, text_width = self.y_embedding.shape
        if text.shape[-1] != text_width or text.shape[1] > num_tokens:
            raise ShapeError(
                f"The text embedding has {text.shape[1]} tokens of width {text.shape[-1]}; this model takes up to "
                f"{num_tokens} of width {text_width}. Use the text encoder that it was made for, with "
                f"text_encoder.model_max_length = {num_tokens}."
            )
        return self.y_proj(replace_dropped(text.to(self.y_embedding.dtype), self.y_embedding, dropped))

    def null(self) -> Tensor:
        """The null caption, embedded: [all tokens, D]."""
        return self.y_proj(self.y_embedding)


def replace_dropped(text: Tensor, null: Tensor, dropped: Tensor | None) -> Tensor:
    """``text`` [B, L, D], with the first L tokens of ``null`` where ``dropped`` [B]."""
    return text if dropped is None else torch.where(dropped[:, None, None], null[: text.shape[1]], text)
