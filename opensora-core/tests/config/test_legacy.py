"""Configs of Open-Sora 1.0 to 1.2: keys that are something else now."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from opensora.core.config import Config
from opensora.core.config.legacy import modernize
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
    with caplog.at_level(logging.INFO, logger="opensora"):
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
        ({"plugin": "zero2", "sp_size": 2}, {"type": "zero2", "sp_size": 2}),
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
