"""Reading text encoders through transformers, without its remarks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.utils import logging


def read_frozen(module_class: Any, source: str, **options: Any) -> Any:
    """``module_class.from_pretrained``, in float32 unless told otherwise, frozen and in eval mode.

    Weights of other parts (CLIP's image half, T5's decoder) may be there. Those of the encoder must be.

    Raises:
        ValueError: Some are missing; to be translated by `reading`, as what transformers itself raises.
    """
    options.setdefault("dtype", torch.float32)
    with _silence():
        module, report = module_class.from_pretrained(source, output_loading_info=True, **options)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{len(missing)} of its weights are missing, such as {missing[0]}.")
    return module.requires_grad_(False).eval()


def fingerprint(tokenizer: Any) -> str:
    """What a tokenizer makes of text depends on this alone: its words, rules and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return f"{type(tokenizer).__name__} {tokenizer.special_tokens_map} {rules}"


@contextmanager
def _silence() -> Iterator[None]:
    """Without transformers' progress bar, and its table of the weights that it doesn't need."""
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # of transformers
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # of transformers
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]  # of transformers
