"""``opensora convert``: its arguments, and what they mean."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from opensora.core.errors import ConfigError

__all__ = ["add_arguments", "run"]

_EPILOG = """\
layouts:
  opensora   a folder of config.json and model.safetensors, for model.from_pretrained
  original   a file of torch.save (.pt, .pth) with the keys of the project that the model comes from
  diffusers  a folder of config.json and diffusion_pytorch_model.safetensors, for from_pretrained of diffusers

Which of them SRC is in is found out. Tensors keep their bits. model.from_pretrained takes all three, too.

examples:
  opensora convert PixArt-XL-2-512x512.pth pixart --model PixArt-XL/2 --to diffusers --latent-size 1x64x64
  opensora convert facebook/DiT-XL-2-256/transformer DiT.pt --model DiT-XL/2 --to original
  opensora convert outputs/003-DiT mine --model DiT condition=label_10 num_heads=6 --to opensora
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of ``opensora convert``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("source", metavar="SRC", help="file, folder, run folder, published name or hub id")
    parser.add_argument("destination", metavar="DST", help="folder to write; for --to original, a .pt or .pth file")
    parser.add_argument("--to", required=True, choices=["opensora", "original", "diffusers"], help="layout of DST")
    parser.add_argument(
        "--model",
        nargs="+",
        metavar=("TYPE", "KEY=VALUE"),
        help="model or VAE, as in configs, and what SRC doesn't tell of its options (needed unless convert wrote SRC)",
    )
    parser.add_argument(
        "--latent-size", metavar="TxHxW", help="of models that have one size (what SRC tells, else 1x32x32)"
    )
    parser.add_argument("--force", action="store_true", help="replace DST")


def run(options: argparse.Namespace) -> int:
    """Convert, and print where the result is."""
    from opensora.core.conversion import convert

    model, *settings = options.model or [None]
    written = convert(
        options.source,
        Path(options.destination),
        to=options.to,
        model=model,
        options=dict(_setting(text) for text in settings),
        latent_size=_size(options.latent_size),
        force=options.force,
    )
    print(written)
    return 0


def _setting(text: str) -> tuple[str, Any]:
    from opensora.core.config.evaluate import evaluate_literal

    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise ConfigError(f'"{text}" is no option. Write KEY=VALUE, such as num_heads=6.')
    return key, evaluate_literal(value)


def _size(text: str | None) -> tuple[int, int, int] | None:
    if text is None:
        return None
    if not (found := re.fullmatch(r"(\d+)[x,](\d+)[x,](\d+)", text)):
        raise ConfigError(f'--latent-size is "{text}"; write frames, height and width, such as 1x32x32.')
    frames, height, width = map(int, found.groups())
    return frames, height, width
