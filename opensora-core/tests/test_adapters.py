"""Adapters beside the layers of any network: what is trained, what a checkpoint holds, and the way back into the weights."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from opensora.core import ConfigError, WeightsError
from opensora.core.adapters import adapter_state, find_record, kept, load_adapter, load_kept, merged
from opensora.core.checkpoints import Checkpoint, save_checkpoint
from opensora.core.components import build
from opensora.core.trainable import adapt
from opensora.core.weights import load_weights

pytest.importorskip("peft")


class Network(nn.Module):
    """Two blocks, a convolution, and a name that ends like another."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn": nn.Linear(6, 6), "proj": nn.Linear(6, 6)}) for _ in range(2))
        self.proj = nn.Linear(6, 6)
        self.conv = nn.Conv1d(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block["proj"](block["attn"](x).tanh())
        return self.proj(x)


X = torch.linspace(-1, 1, 12).view(2, 6)


def save(folder: Path, module: nn.Module) -> Path:
    state = {"seed": 0, **adapter_state(module)}
    return save_checkpoint(
        folder / "checkpoints", 1, Checkpoint(tensors={"model": kept(module, module.state_dict())}, state=state)
    )


def config(source: Path | None, **options: object) -> SimpleNamespace:
    spec = SimpleNamespace(type="Network", options={"from_pretrained": source and str(source), **options})
    return SimpleNamespace(model=spec, pipeline="train", trainable=None)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A run whose checkpoint holds a network."""
    save(tmp_path / "base", Network())
    return tmp_path / "base"


def adapted(base: Path, *, trainable: list[str] | None = None, **options: object) -> nn.Module:
    module = Network()
    load_weights(module, base)
    spec = config(base)
    spec.trainable = trainable
    hooks = SimpleNamespace(denoiser_built=build("hooks", {"type": "lora", "rank": 2, **options}).denoiser_built)
    adapt(module, hooks, spec)
    return module


def learn(module: nn.Module, steps: int = 5) -> None:
    optimizer = torch.optim.AdamW([each for each in module.parameters() if each.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        module(X).square().mean().backward()
        optimizer.step()


def test_only_adapters_learn_and_at_first_they_change_nothing(base: Path) -> None:
    module = adapted(base, target_modules=[".*attn"])
    torch.testing.assert_close(module(X), Network()(X), rtol=0, atol=0)
    names = {name for name, each in module.named_parameters() if each.requires_grad}
    assert names == {f"blocks.{i}.attn.lora_{ab}.default.weight" for i in (0, 1) for ab in "AB"}
    before = {name: each.clone() for name, each in module.named_parameters() if name not in names}
    learn(module)
    assert not torch.allclose(module(X), Network()(X))
    assert all(torch.equal(each, before[name]) for name, each in module.named_parameters() if name in before)


def test_names_are_matched_as_a_whole(base: Path) -> None:
    """peft by itself takes "proj" for every layer of that name."""
    module = adapted(base, target_modules=["proj"])
    assert {name for name, each in module.named_parameters() if each.requires_grad} == {
        "proj.lora_A.default.weight",
        "proj.lora_B.default.weight",
    }


def test_a_checkpoint_holds_adapters_and_is_folded_into_its_base(base: Path, tmp_path: Path) -> None:
    module = adapted(base, target_modules=["blocks"], alpha=3.0, rslora=True)
    learn(module)
    path = save(tmp_path / "run", module)
    from safetensors.torch import load_file

    assert all(".lora_" in name for name in load_file(path / "model.safetensors"))
    plain = Network(seed=1)
    load_weights(plain, tmp_path / "run")
    assert plain.state_dict().keys() == Network().state_dict().keys()
    torch.testing.assert_close(plain(X), module(X))
    apart = Network()
    load_adapter(apart, path)
    assert torch.equal(apart(X), plain(X))


def test_what_is_trained_beside_adapters_is_kept_too(base: Path, tmp_path: Path) -> None:
    module = adapted(base, target_modules=[".*attn"], trainable=["proj", r"blocks\.0\.attn"])
    learn(module)
    save(tmp_path / "run", module)
    plain = Network(seed=1)
    load_weights(plain, tmp_path / "run")
    torch.testing.assert_close(plain(X), module(X))
    assert not torch.equal(plain.proj.weight, Network().proj.weight)
    assert not torch.allclose(plain.blocks[0]["attn"].bias, Network().blocks[0]["attn"].bias)


def test_adapters_on_adapters(base: Path, tmp_path: Path) -> None:
    first = adapted(base, target_modules=[".*attn"])
    learn(first)
    save(tmp_path / "first", first)
    second = adapted(tmp_path / "first", target_modules=["proj"])
    learn(second)
    save(tmp_path / "second", second)
    plain = Network(seed=1)
    load_weights(plain, tmp_path / "second")
    torch.testing.assert_close(plain(X), second(X))


def test_merging_and_its_end_are_inverse_bit_for_bit(base: Path) -> None:
    module = adapted(base, target_modules=["blocks"])
    learn(module)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    apart = module(X)
    with merged(module):
        assert not torch.equal(module.blocks[0]["attn"].weight, before["blocks.0.attn.base_layer.weight"])
        torch.testing.assert_close(module(X), apart)
    assert torch.equal(module(X), apart)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_peft_merges_to_the_same_weights(base: Path, tmp_path: Path) -> None:
    module = adapted(base, target_modules=["blocks"], alpha=5.0)
    learn(module)
    plain = Network()
    load_adapter(plain, save(tmp_path / "run", module))
    with merged(module):
        for index, block in enumerate(module.blocks):
            torch.testing.assert_close(block["attn"].weight, plain.blocks[index]["attn"].weight)


def test_adapters_resume(base: Path, tmp_path: Path) -> None:
    module = adapted(base)
    learn(module)
    state, saved = kept(module, module.state_dict()), adapter_state(module)["adapter"]
    again = adapted(base)
    load_kept(again, state, saved)
    assert torch.equal(again(X), module(X))


def test_what_does_not_belong_together_is_refused(base: Path, tmp_path: Path) -> None:
    module = adapted(base)
    path = save(tmp_path / "run", module)
    state, saved = kept(module, module.state_dict()), adapter_state(module)["adapter"]
    with pytest.raises(WeightsError, match=r"trained on other weights than these.*base"):
        load_adapter(Network(seed=1), path)
    with pytest.raises(WeightsError, match="has no adapters"):
        load_adapter(Network(), base)
    with pytest.raises(RuntimeError, match='no hook "lora"'):
        load_kept(Network(), state, saved)
    with pytest.raises(RuntimeError, match="it holds a whole network"):
        load_kept(adapted(base), Network().state_dict(), None)
    with pytest.raises(RuntimeError, match="the adapters differ in"):
        load_kept(adapted(base, target_modules=["proj"]), state, saved)
    with pytest.raises(RuntimeError, match="not on what"):
        load_kept(adapted(base), state, {**saved, "checksum": "0"})


def test_a_base_that_has_changed_is_noticed(base: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "run", adapted(base))
    save(base, Network(seed=2))
    with pytest.raises(WeightsError, match="other weights"):
        load_weights(Network(), path)


def test_the_checksum_is_of_values_not_of_precision(base: Path, tmp_path: Path) -> None:
    half = Network().bfloat16()
    save(tmp_path / "half", half)
    module = Network()
    load_weights(module, tmp_path / "half")
    load_adapter(half, save(tmp_path / "run", adapted(tmp_path / "half")))
    assert half.proj.weight.dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["blokcs"]}, "no linear layer is matched by"),
        ({"target_modules": ["conv"]}, "There are: proj"),
        ({"target_modules": ["("]}, "no regular expression"),
        ({"target_modules": []}, "target_modules"),
        ({"rank": 0}, "rank"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_bad_options_are_refused(base: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        adapted(base, **options)


def test_adapters_need_weights_and_training(base: Path) -> None:
    hook = build("hooks", {"type": "lora"})
    with pytest.raises(ConfigError, match="adapts trained weights"):
        hook.denoiser_built(Network(), config(None))
    with pytest.raises(ConfigError, match=r"without model\.adapter"):
        hook.denoiser_built(Network(), config(base, adapter="x"))
    spec = config(base)
    spec.pipeline = "sample"
    with pytest.raises(ConfigError, match=r"give its run folder to model\.from_pretrained"):
        hook.denoiser_built(Network(), spec)


def test_the_record_tells_what_it_belongs_to(base: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "run", adapted(base, alpha=8.0))
    record = find_record(tmp_path / "run")
    assert record == find_record(path)
    assert (record.base, record.scale) == (str(base), 4.0)
    assert find_record(base) is None
    assert find_record(tmp_path / "nowhere") is None
    assert json.loads((path / "state.json").read_text())["adapter"]["checksum"] == record.checksum
