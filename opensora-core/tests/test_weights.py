"""Weights come from files, folders, runs and the hub; what doesn't fit or can't be trusted is refused in words."""

from __future__ import annotations

import argparse
import json
import logging
import os
import pickle
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from opensora.core import WeightsError
from opensora.core.checkpoints import Checkpoint, save_checkpoint
from opensora.core.interop import Interop
from opensora.core.weight_files import read_config
from opensora.core.weights import (
    LoadReport,
    grow_state,
    load_state,
    load_weights,
    locate_weights,
    read_weights,
    unwrap,
)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)


@pytest.fixture
def state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {key: torch.randn(value.shape, generator=generator) for key, value in Small().state_dict().items()}


def assert_loads(source: Path | str, state: dict[str, Tensor]) -> LoadReport:
    small = Small()
    report = load_weights(small, source)
    assert report.is_complete
    assert report.loaded == 4
    for key, value in small.state_dict().items():
        assert torch.equal(value, state[key]), key
    return report


# ---- files


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "old format"])
def test_a_file_of_torch_save(suffix: str, is_zip: bool, state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(state, tmp_path / f"a{suffix}", _use_new_zipfile_serialization=is_zip)
    assert_loads(tmp_path / f"a{suffix}", state)


def test_a_safetensors_file(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(state, tmp_path / "a.safetensors")
    assert_loads(tmp_path / "a.safetensors", state)
    assert_loads(str(tmp_path / "a.safetensors"), state)


def test_half_precision_files_load_into_float32(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file({key: value.bfloat16() for key, value in state.items()}, tmp_path / "a.safetensors")
    small = Small()
    load_weights(small, tmp_path / "a.safetensors")
    assert small.first.weight.dtype is torch.float32
    assert torch.equal(small.first.weight, state["first.weight"].bfloat16().float())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"lr": 1.0}},
        lambda state: {"model": {key: value + 1 for key, value in state.items()}, "ema": state},
        lambda state: {"ema": {"state_dict": state}},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}, "note": "x"},
    ],
    ids=["state_dict", "model", "ema before model", "nested", "module.", "both"],
)
def test_wrappings_are_taken_off(
    wrap: Callable[[dict[str, Tensor]], object], state: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(wrap(state), tmp_path / "a.pt")
    assert_loads(tmp_path / "a.pt", state)


def test_a_prefix_that_only_some_keys_have_is_a_name() -> None:
    assert set(unwrap({"module.a": torch.ones(1), "b": torch.ones(1)})) == {"module.a", "b"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3, "note": "x"}, "No tensors found; the file's entries are epoch, note"),
        ({}, "No tensors found"),
        ([torch.ones(1)], "holds a list, not a dict of tensors"),
        (torch.ones(1), "holds a Tensor, not a dict of tensors"),
    ],
    ids=["numbers", "nothing", "list", "tensor"],
)
def test_a_file_without_named_tensors_says_what_it_holds(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(WeightsError, match=message):
        load_weights(Small(), tmp_path / "a.pt")


# ---- files that are damaged or dangerous


class Harmful:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(Path(os.environ["HARM"])),)


@pytest.mark.parametrize(
    "write",
    [
        torch.save,
        lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
        lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2)),
        lambda value, path: path.write_bytes(pickle.dumps(value)),
    ],
    ids=["zip", "old format", "pickle", "newest pickle"],
)
def test_code_in_a_pickle_is_never_run(
    write: Callable[[object, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harm = tmp_path / "harm"
    monkeypatch.setenv("HARM", str(harm))
    write({"first.weight": torch.ones(4, 3), "x": Harmful()}, tmp_path / "a.pt")
    with pytest.raises(WeightsError, match=r"a\.pt (holds more than tensors \([\w.]+\).*could run code|can't be read)"):
        load_weights(Small(), tmp_path / "a.pt")
    assert not harm.exists()


def test_a_file_that_needs_code_comes_with_a_line_that_converts_it(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"state_dict": state, "args": argparse.Namespace(lr=1)}, tmp_path / "a.pt")
    with pytest.raises(WeightsError) as caught:
        load_weights(Small(), tmp_path / "a.pt")
    message = str(caught.value)
    assert "a.pt holds more than tensors (argparse.Namespace)" in message
    assert "\x1b" not in message
    line = (
        message[message.index("python -c") :].replace("FILE", "a.pt", 1).replace("NEW.safetensors", "new.safetensors")
    )
    program = [sys.executable, *shlex.split(line)[1:]]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_loads(tmp_path / "new.safetensors", state)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def other(path: Path) -> None:
    path.write_text("<html>404 Not Found</html>")


@pytest.mark.parametrize("spoil", [cut, empty, other, Path.unlink], ids=["cut short", "empty", "a web page", "missing"])
@pytest.mark.parametrize("kind", ["safetensors", "zip", "old format"])
def test_damaged_files_say_so(
    spoil: Callable[[Path], None], kind: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.pt")
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    spoil(path)
    with pytest.raises(WeightsError, match=rf"{re.escape(str(path))} can't be read.*Download it again"):
        read_weights(path)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    with pytest.raises(WeightsError, match=r"a\.gguf is no weights file: it should end in \.safetensors"):
        load_weights(Small(), tmp_path / "a.gguf")


# ---- folders


@pytest.mark.parametrize("name", ["model.safetensors", "diffusion_pytorch_model.safetensors", "anything.safetensors"])
def test_a_folder_with_one_file(name: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file(state, tmp_path / name)
    assert_loads(tmp_path, state)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "STDiT-16x256x256.pth"])
def test_a_folder_with_one_old_file(name: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(state, tmp_path / name)
    assert_loads(tmp_path, state)


def test_a_folder_with_several_files_asks_for_one(state: dict[str, Tensor], tmp_path: Path) -> None:
    for name in ("b.safetensors", "a.safetensors"):
        save_file(state, tmp_path / name)
    with pytest.raises(WeightsError, match=r"There are a\.safetensors, b\.safetensors: name one"):
        load_weights(Small(), tmp_path)


@pytest.fixture
def sharded(state: dict[str, Tensor], tmp_path: Path) -> Path:
    """A folder of two shards with an index."""
    names = {key: f"model-0000{1 + key.startswith('second')}-of-00002.safetensors" for key in state}
    for name in set(names.values()):
        save_file({key: state[key] for key in state if names[key] == name}, tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return tmp_path


def test_a_folder_of_shards(sharded: Path, state: dict[str, Tensor]) -> None:
    assert_loads(sharded, state)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"lacks 1 of 2 shards: model-00002-of-00002\.safetensors"):
        load_weights(Small(), sharded)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index_is_named(text: str, sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(WeightsError, match=r"model\.safetensors\.index\.json is no index of shards"):
        load_weights(Small(), sharded)


def test_open_soras_training_checkpoints(state: dict[str, Tensor], tmp_path: Path) -> None:
    folder = tmp_path / "epoch0-global_step9" / "model"
    folder.mkdir(parents=True)
    keys = {key: f"pytorch_model-{index:05d}.bin" for index, key in enumerate(state)}
    for key, name in keys.items():
        torch.save({key: state[key]}, folder / name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": keys}))
    assert_loads(folder.parent, state)


@pytest.mark.parametrize(
    "entries", [[], ["manifest.json"], ["config.json", "README.md"]], ids=["empty", "manifest", "other"]
)
def test_a_folder_without_weights_says_what_was_looked_for(entries: list[str], tmp_path: Path) -> None:
    for entry in entries:
        (tmp_path / entry).write_text("{}")
    with pytest.raises(WeightsError, match=r"holds no weights: looked for .*model\.safetensors.* and checkpoints/"):
        load_weights(Small(), tmp_path)


# ---- runs


@pytest.fixture
def run(state: dict[str, Tensor], tmp_path: Path) -> Path:
    """A run folder with two checkpoints; the newer one's averaged weights are ``state``."""
    noise = {key: value + 1 for key, value in state.items()}
    save_checkpoint(tmp_path / "checkpoints", 5, Checkpoint(tensors={"model": noise}))
    save_checkpoint(tmp_path / "checkpoints", 10, Checkpoint(tensors={"model": noise, "ema": state}))
    return tmp_path


def test_a_run_gives_its_newest_averaged_weights(run: Path, state: dict[str, Tensor]) -> None:
    assert_loads(run, state)
    assert_loads(run / "checkpoints", state)
    assert_loads(run / "checkpoints" / "step-000010", state)


def test_a_run_without_averages_gives_its_weights(run: Path, state: dict[str, Tensor]) -> None:
    assert_loads(run / "checkpoints" / "step-000005", {key: value + 1 for key, value in state.items()})


def test_a_run_without_a_whole_checkpoint_says_so(run: Path) -> None:
    for path in (run / "checkpoints").glob("step-*/manifest.json"):
        path.unlink()
    with pytest.raises(WeightsError, match="has no whole one"):
        load_weights(Small(), run)


# ---- the hub


def test_the_hub_out_of_reach_is_a_clear_error() -> None:
    program = "from opensora.core.weights import locate_weights; locate_weights('some-org/some-model')"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert 'WeightsError: "some-org/some-model" is no local path, and the hub has not given it' in done.stderr
    assert "Check the id and the network" in done.stderr


def test_a_local_folder_goes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert locate_weights("org/name") == Path("org/name")


# ---- what fits


def test_a_misfit_is_reported_in_full_and_changes_nothing(state: dict[str, Tensor], tmp_path: Path) -> None:
    changed = {
        "first.weight": state["first.weight"],
        "first.bias": torch.zeros(5),
        "second.weight": state["second.weight"],
        "third.weight": torch.zeros(1),
    }
    save_file(changed, tmp_path / "a.safetensors")
    small = Small()
    before = {key: value.clone() for key, value in small.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load_weights(small, tmp_path / "a.safetensors")
    message = str(caught.value)
    assert "These weights don't fit Small" in message
    assert "1 missing: second.bias" in message
    assert "1 unexpected: third.weight" in message
    assert "1 of another shape: first.bias: file has [5], model has [4]" in message
    assert all(torch.equal(value, before[key]) for key, value in small.state_dict().items())


def test_missing_and_unexpected_keys_can_be_accepted(
    state: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file({"first.weight": state["first.weight"], "third.weight": torch.zeros(1)}, tmp_path / "a.safetensors")
    small = Small()
    with pytest.raises(WeightsError, match=r"set model\.partial=True"):
        load_weights(small, tmp_path / "a.safetensors")
    bias = small.first.bias.clone()
    with caplog.at_level(logging.INFO, "opensora"):
        report = load_weights(small, tmp_path / "a.safetensors", partial=True)
    assert torch.equal(small.first.weight, state["first.weight"])
    assert torch.equal(small.first.bias, bias)
    assert (report.loaded, report.unexpected) == (1, ["third.weight"])
    assert report.missing == ["first.bias", "second.weight", "second.bias"]
    assert "3 missing" in caplog.text


@pytest.mark.parametrize("content", [{"third.weight": torch.zeros(1)}, {"first.weight": torch.zeros(9, 9)}])
def test_partial_accepts_neither_nothing_nor_other_shapes(content: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(content, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match="don't fit") as caught:
        load_weights(Small(), tmp_path / "a.safetensors", partial=True)
    assert "model.partial" not in str(caught.value)


def test_a_model_may_adapt_published_weights(state: dict[str, Tensor], tmp_path: Path) -> None:
    class Adapting(Small):
        def adapt_state_dict(self, published: dict[str, Tensor]) -> dict[str, Tensor]:
            adapted = {key.replace("old_", ""): value for key, value in published.items() if key != "table"}
            adapted["second.bias"] = adapted["second.bias"].flatten()
            return adapted

    published = {key.replace("first", "old_first"): value for key, value in state.items()} | {"table": torch.ones(2)}
    published["second.bias"] = published["second.bias"][None]
    save_file(published, tmp_path / "a.safetensors")
    model = Adapting()
    report = load_weights(model, tmp_path / "a.safetensors")
    assert report.is_complete
    assert sorted(report.adapted) == ["first.bias", "first.weight", "second.bias"]
    assert torch.equal(model.second.bias, state["second.bias"])


def test_the_files_own_precision_can_be_kept(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file({key: value.bfloat16() for key, value in state.items()}, tmp_path / "a.safetensors")
    small = Small()
    load_weights(small, tmp_path / "a.safetensors", assign=True)
    assert small.first.weight.dtype is torch.bfloat16
    assert small.first.weight.requires_grad


# ---- what a class says about other projects' weights


class Image(Small):
    """Takes files of models that lack its second layer."""

    interop = Interop(
        new_parts=r"^second\.",
        published={"known.pt": ""},
        diagnose=lambda module, state: "This looks like a cat." if "cat" in state else "",
        compare=lambda module, config: [f"colour is {config['colour']} there"] if config else [],
    )


def test_parts_that_image_models_lack_keep_their_initial_values(state: dict[str, Tensor]) -> None:
    image = Image()
    bias = image.second.bias.clone()
    report = load_state(image, {key: state[key] for key in ("first.weight", "first.bias")}, source="a")
    assert report.is_complete
    assert report.started == ["second.weight", "second.bias"]
    assert torch.equal(image.second.bias, bias)


def test_parts_that_a_file_has_in_part_are_missing(state: dict[str, Tensor]) -> None:
    with pytest.raises(WeightsError, match=r"1 missing: second\.bias"):
        load_state(Image(), {key: state[key] for key in ("first.weight", "first.bias", "second.weight")}, source="a")


def test_a_class_says_what_a_file_looks_like(state: dict[str, Tensor]) -> None:
    with pytest.raises(WeightsError, match="This looks like a cat"):
        load_state(Image(), {"cat": torch.zeros(1)}, source="a")
    with pytest.raises(WeightsError, match="Is it another model's file"):
        load_state(Image(), {"dog": torch.zeros(1)}, source="a")


def test_a_published_name_is_looked_up_for_a_class(
    state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match=r"Put the file at pretrained_models/known\.pt"):
        load_weights(Image(), "known.pt")
    (tmp_path / "pretrained_models").mkdir()
    torch.save(state, tmp_path / "pretrained_models" / "known.pt")
    assert load_weights(Image(), "known.pt").is_complete


def test_differences_of_the_config_are_told(
    state: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"colour": "red"}')
    load_weights(Image(), tmp_path)
    assert "its config and this model differ: colour is red there" in caplog.text


@pytest.mark.parametrize(("text", "message"), [("{", "can't be read"), ("[]", "holds a list, not an object")])
def test_a_damaged_config_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(WeightsError, match=f"config.json {message}"):
        read_config(tmp_path)


def test_tensors_without_a_place_lie_beside_the_others(state: dict[str, Tensor], tmp_path: Path) -> None:
    rest = {"second.bias": state.pop("second.bias")}
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    save_file(rest, tmp_path / "opensora_extra.safetensors")
    assert_loads(tmp_path, state | rest)


# ---- growing


@pytest.mark.parametrize(("case", "result"), [("vec", "out"), ("mat", "out"), ("conv", "out_wanted")])
def test_reference_growth(case: str, result: str) -> None:
    golden = load_file(Path(__file__).parent / "goldens" / "net2net.safetensors")
    student = golden[f"{case}.student"]
    before = student.clone()
    grown = grow_state({"a": student, "b": torch.ones(1)}, {"a": golden[f"{case}.teacher"]})
    assert torch.equal(grown["a"], golden[f"{case}.{result}"])
    assert torch.equal(student, before)
    assert torch.equal(grown["b"], torch.ones(1))


@pytest.mark.parametrize("shape", [(3, 4), (5,), (4, 4, 1)])
def test_a_tensor_does_not_shrink_or_change_its_axes(shape: tuple[int, ...]) -> None:
    with pytest.raises(WeightsError, match=rf"a can't grow from {re.escape(str(list(shape)))} to \[2, 4\]"):
        grow_state({"a": torch.zeros(2, 4)}, {"a": torch.zeros(shape)})


def test_a_model_grows_from_a_narrower_one(state: dict[str, Tensor], tmp_path: Path) -> None:
    narrow = {"first.weight": state["first.weight"][:2], "first.bias": state["first.bias"][:2]}
    save_file(narrow, tmp_path / "a.safetensors")
    small = Small()
    before = {key: value.clone() for key, value in small.state_dict().items()}
    with pytest.raises(WeightsError, match="2 of another shape"):
        load_weights(small, tmp_path / "a.safetensors")
    report = load_weights(small, tmp_path / "a.safetensors", grow=True)
    assert report.grown == ["first.weight", "first.bias", "second.weight", "second.bias"]
    assert torch.equal(small.first.weight[:2], narrow["first.weight"])
    assert torch.equal(small.first.weight[2:], before["first.weight"][2:])
    assert torch.equal(small.second.weight, before["second.weight"])


def test_a_model_does_not_grow_from_a_deeper_one(state: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(state | {"third.weight": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=r"1 unexpected: third\.weight"):
        load_weights(Small(), tmp_path / "a.safetensors", grow=True)


def test_a_long_report_stays_readable() -> None:
    report = LoadReport(source="a.pt", loaded=0, missing=[f"key{index}" for index in range(20)])
    assert str(report).splitlines()[1].endswith("key7, and 12 more")
