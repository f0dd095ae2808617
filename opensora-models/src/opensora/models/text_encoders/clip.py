"""CLIP's text encoder (https://arxiv.org/abs/2103.00020): one vector a prompt, for DiT and Latte with text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from attrs import field, frozen
from attrs.validators import gt
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

from opensora.core.conditioning import Conditioning
from opensora.core.errors import ConfigError
from opensora.models._pretrained import expand_home, reading
from opensora.models.text_encoders._cutting import beyond
from opensora.models.text_encoders._reading import fingerprint, read_frozen

__all__ = ["CLIPEncoder", "CLIPEncoderSpec"]

VIT_BASE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
}
"""The text half of CLIP ViT-B/32 and B/16."""


@frozen(kw_only=True)
class CLIPEncoderSpec:
    """Options of `CLIPEncoder`."""

    from_pretrained: str = field(default="openai/clip-vit-base-patch32", converter=expand_home)
    """Folder or hub id with encoder and tokenizer; a whole CLIP or its text half."""
    model_max_length: int = field(default=77, validator=gt(0))
    """Tokens a prompt is cut or padded to; at most those that the encoder has positions for, which is 77 in all published."""
    cache_dir: str | None = None
    """Where downloads are kept. None: the hub's own cache."""
    local_files_only: bool = False
    """Never download."""


class CLIPEncoder(nn.Module):
    """Prompts to the hidden state of their end token, after the last norm and before any projection. Frozen, in eval mode."""

    Spec: ClassVar[type] = CLIPEncoderSpec
    max_length = 1

    def __init__(self, spec: CLIPEncoderSpec, *, meta: bool = False) -> None:
        """Reads weights and tokenizer.

        Args:
            spec: Options.
            meta: Read neither, for a look at shapes; without a folder to look into, those of ViT-B/32's text half.

        Raises:
            WeightsError: They can't be found, downloaded or read.
            ConfigError: ``model_max_length`` is more than the encoder has positions for.
        """
        super().__init__()
        self.spec = spec
        with reading(
            "CLIP text encoder",
            spec.from_pretrained,
            key="text_encoder.from_pretrained",
            local_files_only=spec.local_files_only,
            meta=meta,
        ):
            where = {"cache_dir": spec.cache_dir, "local_files_only": spec.local_files_only}
            self.tokenizer: Any = None if meta else AutoTokenizer.from_pretrained(spec.from_pretrained, **where)
            self.module = _build_empty(spec) if meta else read_frozen(CLIPTextModel, spec.from_pretrained, **where)
        positions = self.module.config.max_position_embeddings
        if spec.model_max_length > positions:
            raise ConfigError(
                f"model_max_length is {spec.model_max_length}, but this encoder has positions for {positions} tokens."
            )
        self.width: int | None = self.module.config.hidden_size
        self.max_tokens = spec.model_max_length
        self.requires_grad_(False).eval()

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """``text_embedding`` [B, 1, D] in the encoder's dtype, on its device. Prompts are not cleaned."""
        tokens = self.tokenizer(
            list(prompts),
            max_length=self.spec.model_max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        ).to(self.module.device)
        return Conditioning(text_embedding=self.encode_tokens(tokens.input_ids)[:, None])

    def fingerprint(self) -> str:
        """What besides options and weights decides what a prompt becomes: the tokenizer."""
        return fingerprint(self.tokenizer)

    def cut_off(self, prompt: str) -> str:
        """The end of a prompt that lies beyond the length and is not read; "" if all of it is."""
        return beyond(self.tokenizer, prompt, max_length=self.max_tokens)

    @torch.no_grad()
    def encode_tokens(self, input_ids: Tensor) -> Tensor:
        """[B, L] token numbers to [B, D].

        The end token has the largest number of all. Padding has the same one, so that the first counts; and since tokens
        only look back, what pads them needs no mask.
        """
        hidden = self.module(input_ids=input_ids).last_hidden_state  # [B, L, D]
        return hidden[torch.arange(len(hidden), device=hidden.device), input_ids.argmax(dim=1)]


def _build_empty(spec: CLIPEncoderSpec) -> CLIPTextModel:
    folder = Path(spec.from_pretrained)
    config = CLIPTextConfig.from_pretrained(folder) if folder.is_dir() else CLIPTextConfig(**VIT_BASE)
    return CLIPTextModel(config)
