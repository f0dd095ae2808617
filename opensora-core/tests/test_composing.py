"""What a pipeline's parts are told when they are built, and which blocks are computed twice to save memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from opensora.core.composing import build_parts, checkpoint_activations
from opensora.core.config.structure import structure
from opensora.core.pipelines.sample_spec import SampleSpec

PARTS = """
import torch
from attrs import frozen
from torch import nn
from opensora.core.conditioning import Conditioning

@frozen(kw_only=True)
class Nothing:
    pass

@frozen(kw_only=True)
class Told:
    from_pretrained: str | None = None

class Model(nn.Module):
    Spec = Told
    null_prompt = "nothing at all"
    def __init__(self, spec):
        super().__init__()
        self.source, self.null = spec.from_pretrained, None
        self.weight = nn.Parameter(torch.zeros(2))
    def take_null_text(self, conditioning):
        self.null = conditioning.text_embedding

class Plain(nn.Module):
    Spec = Nothing
    def __init__(self, spec):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

class Part(nn.Module):
    Spec = Nothing
    width, max_length, latent_channels, num_timesteps = 3, 1, 4, 1000
    def __init__(self, spec):
        super().__init__()
    def latent_size(self, size):
        return size
    def encode(self, prompts):
        return Conditioning(text_embedding=torch.tensor([[[float(len(each))] * 3] for each in prompts]))
"""


@pytest.fixture
def spec(install):
    kinds = {"vaes": "part", "text_encoders": "part", "schedulers": "part"}
    points = {f"opensora.{kind}": {name: "tiny_parts:Part"} for kind, name in kinds.items()}
    points["opensora.models"] = {"told": "tiny_parts:Model", "plain": "tiny_parts:Plain"}
    install("tiny-parts", points, {"tiny_parts.py": PARTS})

    def make(**model):
        parts = {key: {"type": "part"} for key in ("vae", "text_encoder", "scheduler")}
        return structure(SampleSpec, {"model": model, "prompt": "a", "image_size": (8, 8), **parts})

    return make


def build(spec, **options):
    return build_parts(spec, size_of=lambda: (1, 8, 8), **options).denoiser


def test_a_spec_that_asks_for_the_source_is_told_it_and_core_still_loads_it(spec, tmp_path):
    torch.save({"weight": torch.ones(2)}, tmp_path / "weights.pt")
    for name in ("told", "plain"):
        denoiser = build(spec(type=name, from_pretrained=str(tmp_path / "weights.pt")))
        assert denoiser.weight.tolist() == [1, 1]
        assert getattr(denoiser, "source", None) == (str(tmp_path / "weights.pt") if name == "told" else None)


def test_a_source_that_is_not_loaded_is_told_all_the_same(spec):
    denoiser = build(spec(type="told", from_pretrained="nowhere"), load_pretrained=False)
    assert denoiser.source == "nowhere"


def test_models_without_a_learned_null_are_given_that_of_their_prompt(spec):
    assert build(spec(type="told")).null.tolist() == [[[14.0] * 3]]
    assert build(spec(type="told"), meta=True).null is None


def test_lists_within_a_block_are_part_of_it():
    def block():
        return nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})

    model = nn.ModuleDict(
        {"stack": nn.ModuleDict({"blocks": nn.ModuleList([block(), block()])}), "head": nn.Linear(2, 2)}
    )
    assert checkpoint_activations(model) == 2
