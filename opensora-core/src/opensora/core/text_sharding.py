"""A text encoder of which each process holds a part: several gigabytes that need not lie in every GPU's memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from opensora.core.accelerator import Accelerator
from opensora.core.conditioning import Conditioning
from opensora.core.errors import ConfigError
from opensora.core.pipelines.train_spec import TrainSpec
from opensora.core.protocols import TextEncoder
from opensora.core.text_cache import CachedTextEncoder

__all__ = ["SharedTextEncoder", "check_sharing", "share_weights"]


class SharedTextEncoder:
    """Lets all processes run a sharded text encoder equally often, however many prompts each of them has yet to encode."""

    def __init__(self, encoder: TextEncoder, *, sharded: TextEncoder, accelerator: Accelerator) -> None:
        """Around a sharded text encoder.

        Args:
            encoder: What is asked: ``sharded`` itself, or a memory around it.
            sharded: See `share_weights`.
            accelerator: Whose processes share it.
        """
        self.width, self.max_length = encoder.width, encoder.max_length
        self._encoder, self._sharded, self._accelerator = encoder, sharded, accelerator

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """See `opensora.core.protocols.TextEncoder`. All processes must call it together, each with prompts of its own."""
        if not isinstance(self._encoder, CachedTextEncoder):
            return self._encoder.encode(prompts)
        missing = self._encoder.num_missing(prompts)
        rounds = self._accelerator.highest(missing)  # the memory encodes one by one
        found = self._encoder.encode(prompts)
        for _ in range(rounds - missing):
            self._sharded.encode([""])
        return found


def check_sharing(spec: TrainSpec) -> None:
    """Raise where processes would not always encode together.

    Raises:
        ConfigError: Something besides training steps needs the text encoder, or it is to be elsewhere than on the device.
    """
    hooks = [each.type for each in (*spec.default_hooks(), *spec.hooks) if each.type not in spec.without_hooks]
    alone = [f"the hook {name}" for name in hooks if name in ("previews", "validation")]
    alone += ["features"] if spec.features else []
    if alone:
        raise ConfigError(
            f"text_encoder.shard needs all processes to encode together, and {alone[0]} encodes in one alone. Leave one out."
        )
    if spec.text_encoder.options.get("device"):
        raise ConfigError(
            "text_encoder.shard spreads weights over the devices of the run. Leave text_encoder.device out."
        )


def share_weights(encoder: TextEncoder, accelerator: Accelerator, dtype: torch.dtype) -> None:
    """Cast a text encoder and spread the weights of each network in it over all processes.

    Args:
        encoder: On the CPU, whole.
        accelerator: Whose processes share it.
        dtype: As `Accelerator.place`.

    Raises:
        ConfigError: It has weights that can't be divided: those in 8 bits.
        MachineError: This torch can't do it.
    """
    if not isinstance(encoder, nn.Module):
        return  # no weights
    if any(not parameter.is_floating_point() for parameter in encoder.parameters()):
        raise ConfigError("text_encoder.shard can't divide weights in 8 bits. Leave load_in_8bit or shard out.")
    for network in encoder.children():
        accelerator.spread(network, dtype=dtype)
