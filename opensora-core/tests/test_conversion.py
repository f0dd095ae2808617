"""``opensora convert`` with a made-up model: what it writes, and that it never writes over or half of anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opensora.core import ConfigError, WeightsError
from opensora.core.commands.opensora import main
from opensora.core.conversion import convert

Install = Callable[..., Path]

TOY = '''
import torch
from attrs import frozen
from torch import nn
from opensora.core.errors import WeightsError
from opensora.core.interop import Exported, Interop, ModelFacts

@frozen(kw_only=True)
class ToySpec:
    width: int = 3
    """Width."""
    refuses: bool = False
    """Whether it can be written."""

def facts(published, config):
    weight = published.get("a.weight", published.get("b"))
    return ModelFacts(options={"width": len(weight), "unknown": 1}, latent_channels=4, latent_size=(1, 8, 8))

def export(model):
    if model.spec.refuses:
        raise WeightsError("no such thing there")
    return Exported(tensors={"b": model.a.weight}, config={"_class_name": "Toy2D"}, extra={"a.bias": model.a.bias},
                    notes=("Mind the gap.",))

def original(model):
    return Exported(tensors=model.state_dict(), wrapper="state_dict")

class Toy(nn.Module):
    Spec = ToySpec
    interop = Interop(facts=facts, to_diffusers=export, to_original=original)
    def __init__(self, spec, *, latent_channels, latent_size):
        super().__init__()
        self.spec = spec
        self.seen = (latent_channels, latent_size)
        self.a = nn.Linear(2, spec.width)
    def adapt_state_dict(self, state):
        return {"a.weight" if key == "b" else key: value for key, value in state.items()}

class Silent(Toy):
    interop = None
'''


@pytest.fixture(autouse=True)
def _toy(install: Install) -> None:
    install("toy", {"opensora.models": {"Toy/2": "toy:Toy", "Silent/2": "toy:Silent"}}, {"toy.py": TOY})


@pytest.fixture
def state() -> dict[str, Tensor]:
    return {"a.weight": torch.randn(5, 2).bfloat16(), "a.bias": torch.randn(5)}


@pytest.fixture
def source(state: dict[str, Tensor], tmp_path: Path) -> Path:
    save_file(state, tmp_path / "source.safetensors")
    return tmp_path / "source.safetensors"


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype is value.dtype
        assert torch.equal(found[key], value)


def test_this_projects_folder_says_what_it_is(source: Path, state: dict[str, Tensor], tmp_path: Path) -> None:
    folder = convert(source, tmp_path / "own", to="opensora", model="Toy/2")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert_same(load_file(folder / "model.safetensors"), state)
    assert json.loads((folder / "config.json").read_text()) == {
        "type": "Toy/2", "options": {"width": 5, "refuses": False}, "latent_channels": 4, "latent_size": [1, 8, 8],
        "text_width": None, "text_length": None,
    }  # fmt: skip
    card = (folder / "README.md").read_text()
    assert "| parameters | 15 |" in card
    assert "| precision | bfloat16, float32 |" in card
    assert f"Converted with `opensora convert` from `{source}`" in card
    assert "That of the source's weights" in card


def test_a_folder_that_convert_wrote_needs_no_more_words(
    source: Path, state: dict[str, Tensor], tmp_path: Path
) -> None:
    convert(source, tmp_path / "own", to="opensora", model="Toy/2", latent_size=(2, 4, 4))
    file = convert(tmp_path / "own", tmp_path / "a.pt", to="original")
    assert_same(torch.load(file, weights_only=True)["state_dict"], state)
    again = convert(tmp_path / "own", tmp_path / "again", to="opensora")
    assert json.loads((again / "config.json").read_text())["latent_size"] == [2, 4, 4]


def test_another_projects_folder_keeps_what_it_has_no_place_for(
    source: Path, state: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = convert(source, tmp_path / "theirs", to="diffusers", model="Toy/2")
    assert load_file(folder / "diffusion_pytorch_model.safetensors").keys() == {"b"}
    assert load_file(folder / "opensora_extra.safetensors").keys() == {"a.bias"}
    assert json.loads((folder / "config.json").read_text()) == {"_class_name": "Toy2D"}
    assert "Mind the gap." in caplog.text
    assert "Mind the gap." in (folder / "README.md").read_text()
    assert "from diffusers import Toy2D" in (folder / "README.md").read_text()
    file = convert(folder, tmp_path / "back.pt", to="original", model="Toy/2")
    assert_same(torch.load(file, weights_only=True)["state_dict"], state)


# ---- what is there already


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_exists_is_kept_without_force(source: Path, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_text("mine")
    with pytest.raises(WeightsError, match=r"a\.pt exists\. Give another destination, or --force"):
        convert(source, tmp_path / "a.pt", to="original", model="Toy/2")
    assert (tmp_path / "a.pt").read_text() == "mine"
    convert(source, tmp_path / "a.pt", to="original", model="Toy/2", force=True)
    assert torch.load(tmp_path / "a.pt", weights_only=True).keys() == {"state_dict"}


def test_force_replaces_folders_of_weights_only(source: Path, tmp_path: Path) -> None:
    folder = convert(source, tmp_path / "own", to="opensora", model="Toy/2")
    (folder / "old.txt").touch()
    convert(source, folder, to="diffusers", model="Toy/2", force=True)
    assert "old.txt" not in entries(folder)
    assert "diffusion_pytorch_model.safetensors" in entries(folder)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").touch()
    with pytest.raises(WeightsError, match="thesis is a folder of other things, which --force does not delete"):
        convert(source, tmp_path / "thesis", to="opensora", model="Toy/2", force=True)
    assert entries(tmp_path / "thesis") == {"chapter"}


def test_a_failure_leaves_nothing_and_keeps_what_was_there(source: Path, tmp_path: Path) -> None:
    folder = convert(source, tmp_path / "own", to="opensora", model="Toy/2")
    before = entries(tmp_path)
    with pytest.raises(WeightsError, match="no such thing there"):
        convert(source, folder, to="diffusers", model="Toy/2", options={"refuses": True}, force=True)
    assert entries(tmp_path) == before
    assert "model.safetensors" in entries(folder)


def test_a_full_disk_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        Path(str(arguments[1])).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    before = entries(tmp_path)
    with pytest.raises(WeightsError, match=r"own can't be written: .*No space left on device"):
        convert(source, tmp_path / "own", to="opensora", model="Toy/2")
    assert entries(tmp_path) == before


# ---- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["a.pt", "--to", "opensora", "--model", "Toy/2"],
            "The opensora layout is a folder, and a.pt looks like a file",
        ),
        (
            ["own", "--to", "original", "--model", "Toy/2"],
            "The original layout is one file, and own should end in .pt, .pth",
        ),
        (["own", "--to", "opensora"], "does not say of which model it is: give --model"),
        (["own", "--to", "opensora", "--model", "Toy/3"], 'No model or VAE is named "Toy/3". Did you mean "Toy/2"?'),
        (["own", "--to", "opensora", "--model", "Toy/2", "wdith=3"], "wdith is not a field of ToySpec"),
        (["own", "--to", "opensora", "--model", "Toy/2", "width"], '"width" is no option. Write KEY=VALUE'),
        (["own", "--to", "opensora", "--model", "Toy/2", "width=4"], "a.weight: file has [5, 2], model has [4, 2]"),
        (["own", "--to", "opensora", "--model", "Toy/2", "--latent-size", "32"], "write frames, height and width"),
        (["own", "--to", "opensora", "--model", "Silent/2"], '"Silent/2" says nothing about other layouts'),
        (["own", "--to", "onnx", "--model", "Toy/2"], "invalid choice: 'onnx'"),
    ],
)
def test_mistakes_are_told_in_a_line(
    arguments: list[str],
    message: str,
    source: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(source.parent)
    before = entries(source.parent)
    assert main(["convert", "source.safetensors", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert entries(source.parent) == before


def test_the_command_prints_where_the_result_is(
    source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(source.parent)
    flags = ["--to", "opensora", "--latent-size", "2x16x16", "--model", "Toy/2", "width=5"]
    assert main(["convert", "source.safetensors", "deep/own", *flags]) == 0
    assert capsys.readouterr().out == "deep/own\n"
    assert json.loads(Path("deep/own/config.json").read_text())["latent_size"] == [2, 16, 16]


def test_a_layout_is_checked_in_python_too(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'"difusers" is no layout\. Did you mean "diffusers"'):
        convert(source, tmp_path / "a", to="difusers", model="Toy/2")  # type: ignore[arg-type]  # that is the test
