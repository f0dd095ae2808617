"""Low-rank adapters (LoRA, Hu et al., https://arxiv.org/abs/2106.09685), through peft."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import field, frozen
from attrs.validators import and_, ge, gt, lt, min_len, optional

from opensora.core.errors import ConfigError, MachineError
from opensora.core.hookspecs import hook

if TYPE_CHECKING:
    from torch import nn

    from opensora.core.pipelines.sample_spec import SampleSpec
    from opensora.core.pipelines.train_spec import TrainSpec

__all__ = ["LoRA", "LoRASpec"]

log = logging.getLogger(__name__)


@frozen(kw_only=True)
class LoRASpec:
    """Train small adapters beside linear layers, instead of the model's own weights; needs model.from_pretrained and peft."""

    rank: int = field(default=16, validator=gt(0))
    """Of the adapters' matrices: 4 to 64 are usual. Size and what can be learned grow with it."""
    alpha: float | None = field(default=None, validator=optional(gt(0)))
    """The adapters' output is multiplied by alpha / rank; None: alpha is the rank, so the factor is 1."""
    target_modules: list[str] = field(factory=lambda: [".*attn.*"], validator=min_len(1))
    """Regular expressions; each must match a linear layer's name as a whole, or that of a module whose linear layers are
    meant."""
    dropout: float = field(default=0.0, validator=and_(ge(0), lt(1)))
    """Share of the adapters' inputs that is dropped while training."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead: steadier at high ranks (https://arxiv.org/abs/2312.03732)."""


class LoRA:
    """Puts adapters beside linear layers. Only they have gradients, averages and optimizer state."""

    Spec = LoRASpec

    def __init__(self, spec: LoRASpec) -> None:
        self.spec = spec

    @hook
    def denoiser_built(self, denoiser: nn.Module, spec: TrainSpec | SampleSpec) -> None:
        """Freeze the model and add the adapters, which at first change nothing.

        Raises:
            ConfigError: It isn't trained, there are no weights to adapt, or a pattern matches no linear layer.
            MachineError: peft is missing.
        """
        from opensora.core.adapters import Record, checksum, mark

        source = spec.model.options.get("from_pretrained")
        if spec.pipeline == "sample":
            raise ConfigError(
                "The hook lora is for training. To sample, give its run folder to model.from_pretrained: adapters are found."
            )
        if source is None or spec.model.options.get("adapter"):
            raise ConfigError(
                "The hook lora adapts trained weights: give them as model.from_pretrained, without model.adapter. "
                "Adapters on adapters: from_pretrained takes the run folder of the first."
            )
        layers = find_layers(denoiser, self.spec.target_modules)
        is_meta = next(denoiser.parameters()).is_meta
        base = "" if is_meta else checksum(denoiser)
        scale = self._inject(denoiser, layers)
        here = Path(source).expanduser()
        mark(
            denoiser,
            Record(
                base=str(here.resolve()) if here.exists() else str(source),
                checksum=base,
                scale=scale,
                partial=bool(spec.model.options.get("partial", False)),
                grow=bool(spec.model.options.get("grow", False)),
            ),
        )
        log.info("LoRA of rank %d beside %d linear layers of %s", self.spec.rank, len(layers), source)

    def _inject(self, denoiser: nn.Module, layers: list[str]) -> float:
        """Put adapters beside the layers, freeze all else, and return the factor of the adapters' output."""
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise MachineError("The hook lora needs peft: pip install 'opensora-core[peft]'") from error
        spec = self.spec
        alpha: Any = spec.rank if spec.alpha is None else spec.alpha
        config = LoraConfig(
            r=spec.rank,
            lora_alpha=alpha,
            lora_dropout=spec.dropout,
            use_rslora=spec.rslora,
            target_modules="|".join(map(re.escape, layers)),  # peft takes the ends of names too, unless it is a pattern
        )
        inject_adapter_in_model(config, denoiser)
        for name, parameter in denoiser.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        return float(alpha) / (spec.rank**0.5 if spec.rslora else spec.rank)


def find_layers(denoiser: nn.Module, patterns: list[str]) -> list[str]:
    """Names of the linear layers that the patterns match, or that are in modules that they match.

    Raises:
        ConfigError: A pattern is no regular expression, or matches no linear layer.
    """
    from torch import nn

    from opensora.core.trainable import compile_patterns, matches, no_match

    linear = [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)]
    found: dict[str, None] = {}
    for text, pattern in zip(patterns, compile_patterns(patterns, key="lora.target_modules"), strict=True):
        matched = [name for name in linear if matches(pattern, name)]
        if not matched:
            raise no_match("lora.target_modules", text, linear, "linear layer")
        found |= dict.fromkeys(matched)
    return list(found)
