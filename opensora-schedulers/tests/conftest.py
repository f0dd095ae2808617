"""The reference vectors, the function that stands for a network in them, and a replay of their random numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from opensora.core.conditioning import Conditioning

GOLDENS = Path(__file__).parent / "goldens"


class ReplayedDraws:
    """Draws that were recorded, by name; a draw without a record is an error."""

    def __init__(self, records: Mapping[str, Tensor]) -> None:
        self.records = records

    def normal(self, name: str, shape: Sequence[int]) -> Tensor:
        record = self.records[name]
        assert record.shape[1:] == torch.Size(shape)
        return record

    def uniform(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        return self.normal(name, shape)

    def integers(self, name: str, high: int, shape: Sequence[int] = ()) -> Tensor:
        return self.normal(name, shape)


class ToyDenoiser:
    """A smooth function of everything a denoiser is told, and a record of what it was called with.

    Args:
        null_embedding: [B, L, D], what stands for a dropped text.
        learn_sigma: Return variance values too.
    """

    def __init__(self, null_embedding: Tensor | None = None, *, learn_sigma: bool = True) -> None:
        self.null_embedding = null_embedding
        self.learn_sigma = learn_sigma
        self.calls: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def __call__(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        self.calls.append((latents, timestep, conditioning.frame_mask))
        assert len(conditioning) == len(latents) == len(timestep)
        s = (timestep / 1000).view(-1, 1, 1, 1, 1)
        channels = latents.shape[1]
        u = (torch.arange(channels) + 1).view(1, -1, 1, 1, 1) / channels
        m = self.text_means(conditioning).view(-1, 1, 1, 1, 1)
        out = (0.2 + 0.75 * s) * latents + 0.15 * (6 * s).sin() * u + 0.4 * (1 - s) * m
        if conditioning.frame_mask is not None:
            out = out + 0.05 * (1 - conditioning.frame_mask.float())[:, None, :, None, None]
        if not self.learn_sigma:
            return out
        return torch.cat([out, 0.5 * (3 * s).cos() + 0.3 * latents.tanh() + 0.2 * m - 0.1 * u], dim=1)

    def text_means(self, conditioning: Conditioning) -> Tensor:
        means = conditioning.text_embedding.mean(dim=(1, 2))
        if conditioning.dropped is None:
            return means
        null = self.null_embedding.mean(dim=(1, 2))
        return torch.where(conditioning.dropped, null.repeat(len(means) // len(null)), means)


class Goldens:
    """Reads ``tests/goldens``."""

    def json(self, name: str) -> object:
        return json.loads((GOLDENS / f"{name}.json").read_text())

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(GOLDENS / f"{name}.safetensors")

    def case(self, name: str, case: str) -> dict[str, Tensor]:
        return {
            key.removeprefix(f"{case}."): tensor
            for key, tensor in self.tensors(name).items()
            if key.startswith(f"{case}.")
        }


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``@pytest.mark.goldens(<file>)`` runs a test with ``case`` for each of the file's cases."""
    marker = metafunc.definition.get_closest_marker("goldens")
    if marker is not None:
        cases = json.loads((GOLDENS / "index.json").read_text())[marker.args[0]]["cases"]
        metafunc.parametrize("case", cases, ids=[case.get("name", str(case)) for case in cases])


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "goldens(file): run for each case of a file of reference vectors")


@pytest.fixture
def goldens() -> Goldens:
    return Goldens()


@pytest.fixture
def replay() -> type[ReplayedDraws]:
    return ReplayedDraws


@pytest.fixture
def toy() -> type[ToyDenoiser]:
    return ToyDenoiser
