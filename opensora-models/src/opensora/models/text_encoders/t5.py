"""T5's encoder (https://arxiv.org/abs/1910.10683), which PixArt and Open-Sora read their captions with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from attrs import field, frozen
from attrs.validators import gt
from torch import Tensor, nn
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from opensora.core.conditioning import Conditioning
from opensora.models._pretrained import reading
from opensora.models.text_encoders.cleaning import prepare_prompt

__all__ = ["T5Encoder", "T5EncoderSpec"]

T5_XXL: dict[str, Any] = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
"""T5 v1.1 XXL, the encoder of the published models."""


@frozen(kw_only=True)
class T5EncoderSpec:
    """Options of `T5Encoder`."""

    from_pretrained: str
    """Folder or hub id with encoder and tokenizer: "DeepFloyd/t5-v1_1-xxl" for the published models."""
    model_max_length: int = field(default=120, validator=gt(0))
    """Tokens a prompt is cut or padded to: 120 for Open-Sora 1.0 and PixArt, 200 for 1.1, 300 for 1.2 and PixArt-Sigma."""
    cache_dir: str | None = None
    """Where downloads are kept. None: the hub's own cache."""
    local_files_only: bool = False
    """Never download."""
    shardformer: bool = False
    """Accepted for configs of Open-Sora, where it chooses other kernels for the same numbers. It changes nothing here."""
    clean_text: bool = True
    """Clean prompts as the captions of the published models' training data were. False: lower case only."""


class T5Encoder(nn.Module):
    """Prompts to the last hidden states of all their tokens, padded ones included. Frozen, in eval mode."""

    Spec: ClassVar[type] = T5EncoderSpec

    def __init__(self, spec: T5EncoderSpec, *, meta: bool = False) -> None:
        """Reads weights and tokenizer.

        Args:
            spec: Options.
            meta: Read neither, for a look at shapes; without a folder to look into, those of T5 v1.1 XXL.

        Raises:
            WeightsError: They can't be found, downloaded or read.
        """
        super().__init__()
        self.spec = spec
        with reading(
            "T5 encoder",
            spec.from_pretrained,
            key="text_encoder.from_pretrained",
            local_files_only=spec.local_files_only,
        ):
            self.tokenizer: Any = None if meta else _read_tokenizer(spec)
            self.module = _build_empty(spec) if meta else _read_encoder(spec)
        self.width: int | None = self.module.config.d_model
        self.max_length = spec.model_max_length
        self.requires_grad_(False).eval()

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """``text_embedding`` [B, L, D] in the encoder's dtype and ``text_mask`` [B, L] bool, on the encoder's device."""
        tokens = self.tokenizer(
            [prepare_prompt(prompt, clean=self.spec.clean_text) for prompt in prompts],
            max_length=self.max_length,
            padding="max_length",
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.module.device)
        embedding = self.encode_tokens(tokens.input_ids, tokens.attention_mask)
        return Conditioning(text_embedding=embedding, text_mask=tokens.attention_mask.bool())

    @torch.no_grad()
    def encode_tokens(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, L] token numbers and mask to [B, L, D]."""
        return self.module(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def _read_tokenizer(spec: T5EncoderSpec) -> Any:
    return AutoTokenizer.from_pretrained(
        spec.from_pretrained, cache_dir=spec.cache_dir, local_files_only=spec.local_files_only
    )


def _read_encoder(spec: T5EncoderSpec) -> T5EncoderModel:
    return T5EncoderModel.from_pretrained(
        spec.from_pretrained,
        cache_dir=spec.cache_dir,
        local_files_only=spec.local_files_only,
        dtype=torch.float32,
    )


def _build_empty(spec: T5EncoderSpec) -> T5EncoderModel:
    folder = Path(spec.from_pretrained)
    return T5EncoderModel(T5Config.from_pretrained(folder) if folder.is_dir() else T5Config(**T5_XXL))
