"""Low-rank adapters: what a checkpoint holds of an adapted network, and adapters folded into the weights they were made for.

An adapted layer computes ``W x + scale B A x``, where only A and B are trained (LoRA, https://arxiv.org/abs/2106.09685). Its
checkpoint holds what is trained and no more, and in ``state.json`` a `Record`: which weights it belongs to, with a checksum.
So it is small, and can't be joined to the wrong weights unnoticed. Reading one needs no peft, which only the hook ``lora``
uses.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch
from attrs import frozen
from torch import Tensor, nn

from opensora.core.checkpoints import find_checkpoint
from opensora.core.errors import CheckpointError, WeightsError
from opensora.core.feature_cache import hash_tensor
from opensora.core.weight_files import read_weights

__all__ = [
    "Record",
    "adapter_state",
    "checksum",
    "find_record",
    "kept",
    "load_adapter",
    "load_kept",
    "mark",
    "merged",
    "record_of",
]

log = logging.getLogger(__name__)
_MARK = "_opensora_adapter"
_DOWN = re.compile(r"(?P<layer>.+)\.lora_A\.default\.weight")


@frozen(kw_only=True)
class Record:
    """What adapters belong to."""

    base: str
    """What ``model.from_pretrained`` was: an absolute path, a published name or a hub id."""
    checksum: str
    """Of the base's weights; see `checksum`."""
    scale: float
    """Factor of the product of both matrices."""
    partial: bool = False
    """As ``model.partial`` was for the base."""
    grow: bool = False
    """As ``model.grow`` was for the base."""

    @property
    def is_gone(self) -> bool:
        """Whether the base was a file or folder that is no longer there."""
        return Path(self.base).is_absolute() and not Path(self.base).exists()


# ---- while training


def mark(module: nn.Module, record: Record) -> None:
    """Say that a network has adapters, so that checkpoints hold what is trained alone."""
    setattr(module, _MARK, record)


def record_of(module: nn.Module) -> Record | None:
    """What `mark` said; None of a network without adapters."""
    record: Record | None = getattr(module, _MARK, None)
    return record


def adapter_state(module: nn.Module) -> dict[str, Any]:
    """What a checkpoint's ``state.json`` says about adapters: nothing, where there are none."""
    record = record_of(module)
    return {"adapter": attrs.asdict(record)} if record else {}


def kept(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a network's state dict that a checkpoint holds: all of it or, with adapters, what is trained."""
    if record_of(module) is None:
        return dict(state)
    trained = _trained(module)
    return {name: tensor for name, tensor in state.items() if name in trained}


def load_kept(module: nn.Module, state: Mapping[str, Tensor], saved: Mapping[str, Any] | None) -> None:
    """Take back what `kept` returned.

    Args:
        saved: The `Record` that was saved with it, if it is of adapters.

    Raises:
        RuntimeError: It is of another network, or of adapters of other layers or to other weights.
    """
    record = record_of(module)
    if record is None:
        if layers := _layers(state):
            raise RuntimeError(f'it holds adapters of {len(layers)} layers, and this config has no hook "lora"')
        module.load_state_dict(state)
        return
    if saved is None:
        raise RuntimeError(
            'it holds a whole network, and this config has the hook "lora": give it to model.from_pretrained'
        )
    if saved["checksum"] != record.checksum:
        raise RuntimeError(f"its adapters were trained on {saved['base']} as that was, not on what {record.base} holds")
    if (own := _trained(module)) != state.keys():
        differing = sorted(own ^ state.keys())
        raise RuntimeError(f"the adapters differ in {', '.join(differing[:4])} ({len(differing)} names in all)")
    module.load_state_dict(state, strict=False)


def _trained(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


@contextmanager
def merged(module: nn.Module) -> Iterator[None]:
    """Fold the adapters into the weights for the length of the block: forward then costs what it does without adapters.

    Afterwards the weights have the bits that they had before. Nothing is to be trained inside.
    """
    from peft.tuners.lora import LoraLayer  # the module has adapters, so peft is there

    layers: list[Any] = [layer for layer in module.modules() if isinstance(layer, LoraLayer)]
    weights = [layer.get_base_layer().weight for layer in layers]
    before = [weight.detach().clone() for weight in weights]
    try:
        for layer in layers:
            layer.merge()
        yield
    finally:
        for layer, weight, bits in zip(layers, weights, before, strict=True):
            if layer.merged:
                layer.unmerge()
            with torch.no_grad():
                weight.copy_(bits)  # subtracting the product again leaves rounding


def checksum(module: nn.Module) -> str:
    """Of a network's parameters as float32: the same on any device and, of the same values, in any precision."""
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in sorted(module.named_parameters()):
        digest.update(name.encode() + hash_tensor(parameter.float()))
    return digest.hexdigest()


# ---- afterwards


def find_record(path: Path) -> Record | None:
    """What the adapters of a checkpoint, or of a run's newest, belong to; None where there are no adapters."""
    if not path.is_dir():
        return None
    try:
        state: dict[str, Any] = json.loads((find_checkpoint(path) / "state.json").read_text(encoding="utf-8"))
    except (CheckpointError, OSError, ValueError):
        return None  # no checkpoint of this project, so some other kind of weights
    known = attrs.fields_dict(Record)
    record = state.get("adapter")
    return Record(**{key: value for key, value in record.items() if key in known}) if record else None


def load_adapter(module: nn.Module, path: Path) -> None:
    """Fold the adapters of a checkpoint, averaged ones where it has them, into a network that holds their base's weights.

    Args:
        module: Changed as a whole or not at all.
        path: Checkpoint or run folder.

    Raises:
        WeightsError: There are no adapters, or they belong to other weights.
    """
    record = find_record(path)
    if record is None:
        raise WeightsError(f"{path} has no adapters: give a run folder or checkpoint of a training with the hook lora.")
    own = module.state_dict()
    if (found := checksum(module)) != record.checksum:
        raise WeightsError(
            f"{path} was trained on other weights than these: on {record.base}, checksum {record.checksum}, not {found}. "
            f'Give its base and the adapters apart: model = dict(from_pretrained=..., adapter="{path}").'
        )
    tensors = read_weights(path)
    changed = {
        name.replace(".base_layer.", "."): tensor for name, tensor in tensors.items() if ".lora_" not in name
    }  # trained as a whole, beside the adapters
    layers = _layers(tensors)
    for layer, (down, up) in layers.items():
        weight = changed.get(f"{layer}.weight", own[f"{layer}.weight"])
        changed[f"{layer}.weight"] = (weight.float() + record.scale * (up.float() @ down.float())).to(weight.dtype)
    module.load_state_dict(changed, strict=False)
    log.info("Adapters of %d layers, from %s, folded into the weights", len(layers), path)


def _layers(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A [rank, in] and B [out, rank] of each adapted layer."""
    found = {}
    for name, down in tensors.items():
        if match := _DOWN.fullmatch(name):
            found[match["layer"]] = (down, tensors[f"{match['layer']}.lora_B.default.weight"])
    return found
