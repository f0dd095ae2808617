"""Parts of a network are chosen by patterns of their names."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from opensora.core import ConfigError
from opensora.core.hooking import build_hooks
from opensora.core.trainable import adapt, match_parameters


def network() -> nn.Module:
    def block() -> nn.Module:
        return nn.ModuleDict({"attn": nn.Linear(2, 2), "mlp": nn.Linear(2, 2, bias=False)})

    return nn.ModuleDict(
        {
            "spatial_blocks": nn.ModuleList([block(), block()]),
            "temporal_blocks": nn.ModuleList([block(), block()]),
            "final": nn.Linear(2, 2),
        }
    )


def trained(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["temporal_blocks"], 6),
        (["temporal_blocks.*"], 6),
        ([r"temporal_blocks\.1"], 3),
        ([".*attn.*"], 8),
        ([".*bias", "final"], 6),
        (["final.weight"], 1),
        ([".*"], 14),
    ],
)
def test_a_pattern_means_parameters_or_what_they_are_in(patterns: list[str], expected: int) -> None:
    assert len(match_parameters(network(), patterns)) == expected


def test_only_what_is_named_is_trained() -> None:
    module = network()
    adapt(module, build_hooks([]), SimpleNamespace(trainable=["temporal_blocks.*", "final.bias"]))
    names = trained(module)
    assert "final.bias" in names
    assert len(names) == 7
    assert all(name.startswith(("temporal_blocks", "final.bias")) for name in names)


def test_without_patterns_the_model_decides() -> None:
    module = network()
    module["final"].requires_grad_(False)
    adapt(module, build_hooks([]), SimpleNamespace(trainable=None))
    assert len(trained(module)) == 12


def test_what_a_model_has_frozen_can_be_trained_all_the_same() -> None:
    module = network().requires_grad_(False)
    adapt(module, build_hooks([]), SimpleNamespace(trainable=["final"]))
    assert trained(module) == ["final.weight", "final.bias"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("temporal_blokcs", 'matched by "temporal_blokcs" as a whole. Nearest: temporal_blocks,'),
        ("temporal", "Nearest: temporal_blocks"),
        ("qqq", "There are: final, spatial_blocks, temporal_blocks"),
        ("*attn", "no regular expression"),
    ],
)
def test_a_pattern_without_a_match_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(ConfigError, match="trainable") as caught:
        match_parameters(network(), ["final", pattern])
    assert message in str(caught.value)
