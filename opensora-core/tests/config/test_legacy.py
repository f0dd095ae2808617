"""Configs of Open-Sora 1.0 to 1.2: keys that are something else now."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from opensora.core.config import Config
from opensora.core.config.legacy import modernize, nest_dataset
from opensora.core.errors import ConfigError


def test_kernel_switches_of_models_are_left_out_with_one_note(caplog: pytest.LogCaptureFixture) -> None:
    model = {
        "type": "STDiT3-XL/2",
        "enable_flash_attn": True,
        "enable_flashattn": True,
        "enable_layernorm_kernel": True,
        "enable_sequence_parallelism": False,
        "dtype": "bf16",
        "depth": 3,
    }
    with caplog.at_level(logging.WARNING, logger="opensora"):
        config = modernize(Config({"model": model, "plugin": "zero2", "sp_size": 1}))
    assert config.values == {"model": {"type": "STDiT3-XL/2", "depth": 3}}
    assert "enable_flash_attn" in model
    (record,) = caplog.records
    assert record.getMessage() == (
        "Keys of an older config: model.enable_flash_attn, model.enable_flashattn, model.enable_layernorm_kernel, "
        "model.enable_sequence_parallelism, model.dtype left out (kernels are chosen by themselves, precision is dtype, "
        'spreading a step is accelerator); plugin="zero2" left out (accelerator is single, or ddp with several processes)'
    )


@pytest.mark.parametrize(
    ("values", "accelerator"),
    [
        ({"plugin": "zero2"}, None),
        ({"sp_size": 1}, None),
        ({"plugin": "zero2", "sp_size": 1, "accelerator": None}, None),
        ({"plugin": "zero2", "sp_size": 2}, {"type": "zero2-seq", "sp_size": 2}),
        ({"plugin": "zero2-seq", "sp_size": 2}, {"type": "zero2-seq", "sp_size": 2}),
        ({"plugin": "fsdp"}, {"type": "fsdp"}),
    ],
)
def test_a_plugin_becomes_an_accelerator(values: dict[str, Any], accelerator: object) -> None:
    modern = modernize(Config(values, {("plugin",): "c.py:3"}))
    assert modern.values.pop("accelerator", None) == accelerator
    assert modern.values == {}
    if "plugin" in values:
        assert modern.locations[("accelerator",)] == "c.py:3"


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("is_installed", [True, False])
def test_zero2_is_kept_where_several_processes_have_colossalai(
    is_installed: bool, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opensora.core.config.legacy.find_spec", lambda name: object() if is_installed else None)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    modern = modernize(Config({"plugin": "zero2", "sp_size": 1}))
    assert modern.values == ({"accelerator": {"type": "zero2"}} if is_installed and processes == 2 else {})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"plugin": "fsdp", "accelerator": {"type": "ddp"}}, "^c.py:3: Both plugin and accelerator are given"),
        ({"plugin": 3}, "^c.py:3: plugin must be the name of an accelerator, not 3"),
        ({"plugin": "zero2", "sp_size": "2"}, "^c.py:3: sp_size must be a number, not '2'"),
    ],
)
def test_a_plugin_that_makes_no_sense_is_an_error(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        modernize(Config(values, {("plugin",): "c.py:3"}))


def test_a_config_of_today_is_not_touched(caplog: pytest.LogCaptureFixture) -> None:
    values = {"model": {"type": "A", "depth": 3}, "accelerator": {"type": "ddp"}, "dtype": "bf16"}
    assert modernize(Config(values)).values == values
    assert modernize(Config({"model": None})).values == {"model": None}
    assert not caplog.records


def test_a_flat_config_gets_a_dataset(caplog: pytest.LogCaptureFixture) -> None:
    flat = {"num_frames": 16, "frame_interval": 3, "image_size": (256, 256), "data_path": "clips.csv", "root": None}
    config = nest_dataset(Config({**flat, "use_image_transform": False, "lr": 1e-4}, {("data_path",): "c.py:7"}))
    dataset = {key: value for key, value in flat.items() if key != "root"}
    assert config.values == {"lr": 1e-4, "dataset": {"type": "VideoTextDataset", **dataset}}
    assert config.locations[("dataset", "data_path")] == "c.py:7"
    assert "moved into dataset" in caplog.text


@pytest.mark.parametrize(
    "values", [{"prompt": "a wave", "num_frames": 16}, {"dataset": {"type": "X"}, "data_path": "a"}]
)
def test_other_configs_are_left_as_they_are(values: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    assert nest_dataset(Config(values)).values == values
    assert not caplog.records


def test_a_root_is_refused_with_its_place() -> None:
    with pytest.raises(ConfigError, match=r"^c.py:2: root = '/data': paths of a table"):
        nest_dataset(Config({"data_path": "clips.csv", "root": "/data"}, {("root",): "c.py:2"}))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"mask_no": 0.5, "mask_quarter_head": 0.5}, {"identity": 0.5, "quarter_head": 0.5}),
        (
            {"identity": 0.7, "mask_head": 0.1, "mask_head_tail": 0.2},
            {"identity": 0.7, "quarter_head": 0.1, "quarter_head_tail": 0.2},
        ),
        ({"identity": 1.0}, {"identity": 1.0}),
    ],
)
def test_masks_have_new_names(old: dict[str, float], new: dict[str, float]) -> None:
    assert modernize(Config({"mask_ratios": old})).values == {"mask_ratios": new}


@pytest.mark.parametrize(
    ("model", "is_added"),
    [
        ({"type": "STDiT2-XL/2", "qk_norm": True, "enable_flashattn": True}, True),
        ({"type": "STDiT2-XL/2", "qk_norm": True, "enable_flash_attn": True}, False),
        ({"type": "STDiT2-XL/2", "qk_norm": True, "qk_norm_legacy": False, "enable_flashattn": True}, False),
        ({"type": "STDiT2-XL/2", "enable_flashattn": True}, False),
        ({"type": "STDiT-XL/2", "qk_norm": True, "enable_flashattn": True}, False),
    ],
)
def test_configs_of_1_1_keep_the_order_of_its_code(model: dict[str, Any], is_added: bool) -> None:
    assert modernize(Config({"model": model})).values["model"].get("qk_norm_legacy", False) is is_added


def test_keys_without_use_are_left_out() -> None:
    assert modernize(Config({"num_bucket_build_workers": 16, "batch_size": None, "lr": 1.0})).values == {"lr": 1.0}


def test_prompts_on_disk_go_before_those_that_ship(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        modernize(Config({"prompt_path": "./assets/texts/mine.txt"})).values["prompt_path"] == "./assets/texts/mine.txt"
    )
    (tmp_path / "assets/texts").mkdir(parents=True)
    (tmp_path / "assets/texts/t2v_samples.txt").write_text("a wave")
    kept = modernize(Config({"prompt_path": "./assets/texts/t2v_samples.txt"}))
    assert kept.values["prompt_path"] == "./assets/texts/t2v_samples.txt"


@pytest.mark.parametrize("kind", ["BatchFeatureDataset", "FeatureDataset"])
def test_sizes_of_features_move_into_their_dataset(kind: str) -> None:
    old = {"vae_out_channels": 8, "text_encoder_output_dim": 1152, "model_max_length": 200}
    values = modernize(
        Config({"dataset": {"type": kind, "text_length": 100}, "load_video_features": True, **old})
    ).values
    assert values == {"dataset": {"type": kind, "latent_channels": 8, "text_width": 1152, "text_length": 100}}


@pytest.mark.parametrize("key", ["load_video_features", "load_text_features"])
def test_features_of_a_dataset_that_has_none_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}: features are kept by features = dict\(folder=...\)"):
        modernize(Config({"dataset": {"type": "VariableVideoTextDataset"}, key: True}))
    assert modernize(Config({"dataset": {"type": "VariableVideoTextDataset"}, key: False})).values == {
        "dataset": {"type": "VariableVideoTextDataset"}
    }


def test_an_extraction_is_a_pipeline() -> None:
    old = {"save_dir": "kept", "save_text_features": False, "bin_size": 250, "start_index": 3, "log_time": False}
    assert modernize(Config({"dataset": {"type": "x"}, **old})).values == {
        "dataset": {"type": "x"},
        "pipeline": "extract",
        "features": {"folder": "kept", "text": False},
    }
