"""T5's encoder (https://arxiv.org/abs/1910.10683), which PixArt and Open-Sora read their captions with."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from attrs import field, frozen
from attrs.validators import gt
from torch import Tensor, nn
from transformers import AutoTokenizer, BitsAndBytesConfig, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from opensora.core.conditioning import Conditioning
from opensora.core.errors import MachineError
from opensora.models._pretrained import expand_home, reading
from opensora.models.text_encoders._cutting import beyond
from opensora.models.text_encoders._reading import fingerprint, read_frozen
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

CLASSES: dict[str, tuple[Any, Any]] = {"t5": (T5Config, T5EncoderModel), "umt5": (UMT5Config, UMT5EncoderModel)}
"""By what a folder's config calls its model."""


@frozen(kw_only=True)
class T5EncoderSpec:
    """Options of `T5Encoder`."""

    from_pretrained: str = field(converter=expand_home)
    """Folder or hub id with encoder and tokenizer: "DeepFloyd/t5-v1_1-xxl" for the published models. Any size, of T5, T5 v1.1
    (Flan-T5 too) or UMT5."""
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
    load_in_8bit: bool = False
    """Keep the weights in 8 bits, through bitsandbytes: a quarter of float32's memory, embeddings about 1 % off."""


class T5Encoder(nn.Module):
    """Prompts to the last hidden states of all their tokens, padded ones included. Frozen, in eval mode.

    What overflows in fp16 (the feed-forward layers' second halves) stays float32 there.
    """

    Spec: ClassVar[type] = T5EncoderSpec
    memory_options: ClassVar[Sequence[str]] = ("shardformer",)

    def __init__(self, spec: T5EncoderSpec, *, meta: bool = False) -> None:
        """Reads weights and tokenizer.

        Args:
            spec: Options.
            meta: Read neither, for a look at shapes; without a folder to look into, those of T5 v1.1 XXL.

        Raises:
            WeightsError: They can't be found, downloaded or read.
            MachineError: ``load_in_8bit`` without the packages that it needs.
        """
        super().__init__()
        self.spec = spec
        if spec.load_in_8bit:
            _check_8bit()
        with reading(
            "T5 encoder",
            spec.from_pretrained,
            key="text_encoder.from_pretrained",
            local_files_only=spec.local_files_only,
            meta=meta,
        ):
            self.tokenizer: Any = None if meta else _read_tokenizer(spec)
            self.module: Any = _build_empty(spec) if meta else _read_encoder(spec)
        for name, part in self.module.named_modules():
            if name.rpartition(".")[2] in (self.module._keep_in_fp32_modules or ()):
                part.overflows_in_fp16 = True
        self.width: int | None = self.module.config.d_model
        self.max_length = spec.model_max_length
        self.requires_grad_(False).eval()

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """``text_embedding`` [B, L, D] in the encoder's dtype and ``text_mask`` [B, L] bool, on the encoder's device."""
        tokens = self.tokenizer(
            [self._prepared(prompt) for prompt in prompts],
            max_length=self.max_length,
            padding="max_length",
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.module.device)
        embedding = self.encode_tokens(tokens.input_ids, tokens.attention_mask)
        return Conditioning(text_embedding=embedding, text_mask=tokens.attention_mask.bool())

    def fingerprint(self) -> str:
        """What besides options and weights decides what a prompt becomes: the tokenizer."""
        return fingerprint(self.tokenizer)

    def cut_off(self, prompt: str) -> str:
        """The end of a prompt, cleaned, that lies beyond the length and is not read; "" if all of it is."""
        return beyond(self.tokenizer, self._prepared(prompt), max_length=self.max_length)

    def _prepared(self, prompt: str) -> str:
        return prepare_prompt(prompt, clean=self.spec.clean_text)

    @torch.no_grad()
    def encode_tokens(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, L] token numbers and mask to [B, L, D]."""
        return self.module(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def _read_tokenizer(spec: T5EncoderSpec) -> Any:
    return AutoTokenizer.from_pretrained(spec.from_pretrained, **_where(spec))


def _read_encoder(spec: T5EncoderSpec) -> Any:
    values, _ = T5Config.get_config_dict(spec.from_pretrained, **_where(spec))
    _, module_class = _classes_of(values)
    options = _where(spec)
    if spec.load_in_8bit:
        in_8_bits = BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]  # of transformers
        options |= {"quantization_config": in_8_bits, "dtype": torch.float16}
    return read_frozen(module_class, spec.from_pretrained, **options)


def _build_empty(spec: T5EncoderSpec) -> Any:
    if not Path(spec.from_pretrained).is_dir():
        return T5EncoderModel(T5Config(**T5_XXL))
    values, _ = T5Config.get_config_dict(spec.from_pretrained)
    config_class, module_class = _classes_of(values)
    return module_class(config_class.from_dict(values))


def _classes_of(values: dict[str, Any]) -> tuple[Any, Any]:
    kind = values.get("model_type", "t5")
    if kind not in CLASSES:
        raise ValueError(f'its config.json is that of a "{kind}" model.')
    return CLASSES[kind]


def _where(spec: T5EncoderSpec) -> dict[str, Any]:
    return {"cache_dir": spec.cache_dir, "local_files_only": spec.local_files_only}


def _check_8bit() -> None:
    if missing := [name for name in ("bitsandbytes", "accelerate") if find_spec(name) is None]:
        raise MachineError(
            f'text_encoder.load_in_8bit needs {" and ".join(missing)}: pip install "opensora-models[8bit]"'
        )
