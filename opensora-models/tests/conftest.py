"""Reference vectors: goldens/README.md says what they are and how closely they are to be met."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import frozen
from safetensors import safe_open
from torch import Tensor, nn

GOLDENS = Path(__file__).parent / "goldens"


@frozen
class Golden:
    """One file of reference vectors."""

    config: dict[str, Any]
    cases: dict[str, Any]
    about: dict[str, Any]
    state: dict[str, Tensor]
    tensors: dict[str, Tensor]
    """Everything else by its full name: ``in.<case>.<name>``, ``out.<case>.<name>``, ``grad.<case>.<name>``."""

    def inputs(self, case: str) -> dict[str, Tensor]:
        return self._under(f"in.{case}.")

    def outputs(self, case: str) -> dict[str, Tensor]:
        return self._under(f"out.{case}.")

    def grads(self, case: str) -> dict[str, Tensor]:
        return self._under(f"grad.{case}.")

    def state_of(self, case: str) -> dict[str, Tensor]:
        return {key.removeprefix(f"{case}."): value for key, value in self.state.items() if key.startswith(f"{case}.")}

    def kwargs(self, case: str) -> dict[str, Any]:
        return self.cases[case]["kwargs"]

    def _under(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """Reads a file of reference vectors by name."""

    def read(name: str) -> Golden:
        with safe_open(GOLDENS / f"{name}.safetensors", "pt") as file:
            about = json.loads(file.metadata()["golden"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a mapping
        state = {key.removeprefix("state."): tensors.pop(key) for key in list(tensors) if key.startswith("state.")}
        return Golden(config=about["config"], cases=about["cases"], about=about, state=state, tensors=tensors)

    return read


@pytest.fixture(scope="session")
def golden_json() -> Callable[[str], Any]:
    """Reads a JSON file of reference values by name."""
    return lambda name: json.loads((GOLDENS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def assert_gradients() -> Callable[[nn.Module, Tensor, Tensor, dict[str, Tensor]], None]:
    """Compares gradients of mean(output^2) with recorded ones: each within 1e-4 of its largest entry."""

    def check(model: nn.Module, latents: Tensor, output: Tensor, expected: dict[str, Tensor]) -> None:
        loss = output.square().mean()
        loss.backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        found = {"loss": loss.detach(), "input.x": latents.grad}
        found["__total_norm__"] = torch.stack([grad.norm() for grad in grads.values()]).norm()
        found |= {f"param.{name}": grad for name, grad in grads.items()}
        for name, value in expected.items():
            error = (found[name] - value).abs().max() / value.abs().max()
            assert error <= 1e-4, f"{name} is off by {error:.1e}"

    return check


@pytest.fixture(scope="session")
def assert_key_table(golden_json: Callable[[str], Any]) -> Callable[[nn.Module, str], None]:
    """Compares keys, shapes, buffers and counts of a model on the meta device with those of a published one."""

    def check(model: nn.Module, table: str) -> None:
        expected = golden_json(f"keys_{table}")
        assert {key: list(value.shape) for key, value in model.state_dict().items()} == expected["keys"]
        assert sorted(name for name, _ in model.named_buffers()) == sorted(expected["buffers"])
        assert sum(parameter.numel() for parameter in model.parameters()) == expected["parameters"]
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        assert trainable == expected["trainable_parameters"]

    return check
