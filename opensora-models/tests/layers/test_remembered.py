"""What is constant over the steps of sampling is computed once, and never used where it no longer holds."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from opensora.core.conditioning import Conditioning
from opensora.models._layers.remembered import remembered
from opensora.models.stdit3 import STDiT3


class Embedder(nn.Module):
    """Counts how often it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.calls = 0

    @remembered("layer")
    def embed(self, text: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.layer(text)


@pytest.fixture
def embedder() -> Embedder:
    return Embedder()


TEXT = torch.randn(2, 3)


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_the_same_object_is_embedded_once(embedder, without_gradients):
    with without_gradients():
        text = torch.randn(2, 3)
        first = embedder.embed(text)
        assert embedder.embed(text) is first
        assert embedder.embed(text.clone()) is not first
    assert embedder.calls == 2


def test_training_computes_each_time_and_forgets(embedder):
    with torch.no_grad():
        embedder.embed(TEXT)
    assert embedder.embed(TEXT).requires_grad
    embedder.layer.weight.data.add_(1)  # as some optimizers do, which no version counter sees
    with torch.no_grad():
        torch.testing.assert_close(embedder.embed(TEXT), embedder.layer(TEXT))
    assert embedder.calls == 3


def exchange_data(layer: nn.Linear) -> None:
    layer.weight.data = layer.weight.data + 1


CHANGES = {
    "in place": lambda layer: layer.weight.mul_(2),
    "loaded": lambda layer: layer.load_state_dict({key: value + 1 for key, value in layer.state_dict().items()}),
    "exchanged": exchange_data,
    "cast": lambda layer: layer.double(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_changed_weights_give_new_results(embedder, change):
    text = TEXT.clone()
    embedder.embed(text)
    change(embedder.layer)
    text = text.to(embedder.layer.weight.dtype)
    torch.testing.assert_close(embedder.embed(text), embedder.layer(text))


@torch.no_grad()
def test_changed_text_gives_a_new_result(embedder):
    text = TEXT.clone()
    embedder.embed(text)
    text.add_(1)
    torch.testing.assert_close(embedder.embed(text), embedder.layer(text))


@torch.no_grad()
def test_nothing_is_kept_where_something_is_put_around_the_layer(embedder):
    embedder.layer.register_forward_hook(lambda *_: None)
    embedder.embed(TEXT)
    embedder.embed(TEXT)
    assert embedder.calls == 2


@torch.no_grad()
def test_autocast_is_told_apart(embedder):
    embedder.embed(TEXT)
    with torch.autocast("cpu", torch.bfloat16):
        assert embedder.embed(TEXT).dtype is torch.bfloat16
    assert embedder.embed(TEXT).dtype is torch.float32


@torch.no_grad()
def test_the_result_goes_with_its_argument(embedder):
    text = TEXT.clone()
    result = weakref.ref(embedder.embed(text))
    assert result() is not None
    del text
    gc.collect()
    assert result() is None


@torch.no_grad()
def test_the_result_goes_with_its_module():
    embedder = Embedder()
    result = weakref.ref(embedder.embed(TEXT))
    del embedder
    gc.collect()
    assert result() is None


@torch.no_grad()
def test_results_are_neither_copied_nor_saved(embedder):
    fresh = pickle.dumps(embedder)
    keys = list(embedder.state_dict())
    embedder.embed(TEXT)
    embedder.calls = 0
    assert len(pickle.dumps(embedder)) == len(fresh)
    assert list(embedder.state_dict()) == keys
    copied = copy.deepcopy(embedder)
    copied.embed(TEXT)
    assert copied.calls == 1


# In a model: prompts of different lengths, sampled for some steps.


@pytest.fixture
def model() -> STDiT3:
    torch.manual_seed(0)
    model = STDiT3(STDiT3.Spec(hidden_size=16, depth=2, num_heads=2), latent_channels=4, text_width=6, text_length=5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def prompts(lengths: tuple[int, ...]) -> Conditioning:
    size = torch.full((len(lengths),), 32.0)
    text = torch.randn(len(lengths), 5, 6, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    return Conditioning(text_embedding=text, text_mask=mask, fps=size, height=size, width=size)


def steps(model: STDiT3, conditioning: Conditioning) -> list[torch.Tensor]:
    latents = torch.randn(len(conditioning), 4, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    return [model(latents, torch.full((len(latents),), time), conditioning) for time in (900.0, 500.0, 100.0)]


@pytest.mark.parametrize("lengths", [(3, 3), (2, 4), (0, 2), (5, 5)], ids=str)
def test_sampling_is_the_same_with_and_without(model, lengths):
    conditioning = prompts(lengths)
    expected = steps(model, conditioning)  # with gradients nothing is remembered
    with torch.inference_mode():
        found = steps(model, conditioning)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_sampling_after_a_training_step_uses_the_new_weights(model):
    conditioning = prompts((2, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.no_grad():
        before = steps(model, conditioning)[0]
    steps(model, conditioning)[0].square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        after = steps(model, conditioning)[0]
    assert not torch.allclose(before, after, atol=1e-4)
    torch.testing.assert_close(after, steps(copy.deepcopy(model), prompts((2, 4)))[0], atol=1e-6, rtol=0)


def test_text_is_projected_once_for_all_steps(model, monkeypatch):
    calls = []
    block = model.spatial_blocks[0].cross_attn
    monkeypatch.setattr(type(block.kv_linear), "forward", counted(type(block.kv_linear).forward, block, calls))
    with torch.inference_mode():
        steps(model, prompts((2, 4)))
    assert len(calls) == 1


def counted(forward, block, calls):
    def wrapper(self, x):
        if self is block.kv_linear:
            calls.append(self)
        return forward(self, x)

    return wrapper
