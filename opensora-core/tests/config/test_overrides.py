"""The command line over the file: short flags as Open-Sora has them, and any key by its path."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest

from opensora.core.commands._main import Parser
from opensora.core.config import Config, evaluate
from opensora.core.config.overrides import (
    FLAGS,
    Override,
    add_flags,
    apply_flags,
    apply_overrides,
    given_flags,
    split_overrides,
)
from opensora.core.errors import ConfigError

GOLDEN = json.loads(Path(__file__).parents[1].joinpath("goldens", "command_line.json").read_text())

FIXED = {
    "--flash-attn False --layernorm-kernel yes": "no stray keys beside model.enable_flash_attn (defect 6)",
    "--num-frames 33 --image-size 128 128 --ckpt-path c": "frames that are a number stay one (defect 5)",
    "--wandb False": "False means False (defect 2)",
    "--data-path d.csv": "an error that says what is missing (defect 4)",
}
"""Rows whose outcome is a known defect of the reference, and what happens here."""


def run(values: dict[str, Any], flags: list[str], pipeline: str) -> dict[str, Any]:
    parser = Parser(allow_abbrev=False)
    add_flags(parser, {})
    rest, overrides = split_overrides(flags, {flag.name for flag in FLAGS})
    config = apply_overrides(Config(values), overrides)
    return apply_flags(config, given_flags(parser.parse_args(rest)), pipeline).values


def golden_config(name: str, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "config.py").write_text(GOLDEN["configs"][name])
    return evaluate(tmp_path / "config.py").values


@pytest.mark.parametrize(
    "row", GOLDEN["rows"], ids=[f"{row['config']} {' '.join(row['flags'])}" for row in GOLDEN["rows"]]
)
def test_flags_change_the_keys_that_they_change_in_open_sora(row: dict[str, Any], tmp_path: Path) -> None:
    values = golden_config(row["config"], tmp_path)
    pipeline = "train" if row["training"] else "sample"
    line = " ".join(row["flags"])
    if row["flags"] == ["--unknown", "1"]:  # a usage error there; here it sets a key, which the pipeline's spec refuses
        assert run(values, row["flags"], pipeline) == {**values, "unknown": 1}
        return
    if "error" in row:
        with pytest.raises(ConfigError):
            run(values, row["flags"], pipeline)
        assert row["error"] == "usage" or line in FIXED
        return
    changed = run(values, row["flags"], pipeline)
    changed = {key: value for key, value in changed.items() if key not in values or value != values[key]}
    expected = json.loads(json.dumps(row["changed"]))
    for switch in ("--prompt-as-path", "--start-from-scratch"):
        if switch not in row["flags"]:  # defect 1: there, a switch that isn't given overrides the file with False
            expected.pop(switch[2:].replace("-", "_"), None)
    if line in FIXED:
        assert json.loads(json.dumps(changed)) != expected
        for key in ("flash_attn", "layernorm_kernel"):
            expected.pop(key, None)
        if "--num-frames" in row["flags"]:
            expected["num_frames"] = expected["dataset"]["num_frames"] = 33
        if "--wandb" in row["flags"]:
            expected.pop("wandb")  # as in the file
    assert json.loads(json.dumps(changed)) == expected


@pytest.mark.parametrize(
    ("flags", "pipeline", "message"),
    [
        ("--lr 1", "sample", '--lr is a flag for training; the pipeline "sample" has no use for it.'),
        ("--prompt a", "train", '--prompt is a flag for sampling; the pipeline "train" has no use for it.'),
        ("--prompt a", "train-vae", '--prompt is a flag for sampling; the pipeline "train-vae" has no use for it.'),
        ("--data-path d.csv", "sample", "--data-path sets dataset.data_path, but the config has no dataset."),
        ("--cfg-scale 3", "sample", "--cfg-scale sets scheduler.cfg_scale, but the config has no scheduler."),
        ("--ckpt-path a", "train", "--ckpt-path sets model.from_pretrained, but the config has no model."),
        ("--llm-refine maybe", "sample", '--llm-refine: must be yes or no (true/false, t/f, y/n, 1/0), not "maybe"'),
        ("--seed x", "sample", '--seed: must be a whole number, not "x"'),
        ("--seed 1.5", "sample", '--seed: must be a whole number, not "1.5"'),
        ("--cfg-scale x", "sample", '--cfg-scale: must be a number, not "x"'),
        ("--image-size 3", "sample", "--image-size: expected 2 arguments"),
        ("--prompt", "sample", "--prompt: expected at least one argument"),
        ("--see 3", "sample", None),
        ("--model.depth", "sample", "--model.depth needs a value."),
        ("--model.depth --seed 3", "sample", "--model.depth needs a value."),
        ("--prompt-as-pth", "sample", '--prompt-as-pth needs a value. Did you mean "--prompt-as-path"?'),
    ],
)
def test_a_flag_that_can_not_be_used_is_named(flags: str, pipeline: str, message: str | None) -> None:
    values = {"seed": 3}
    if message is None:  # no abbreviations: --see is a key
        assert run(values, flags.split(), pipeline) == {"seed": 3, "see": 3}
        return
    with pytest.raises(ConfigError) as caught:
        run(values, flags.split(), pipeline)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("text", ["yes", "True", "T", "y", "1"])
def test_what_is_true(text: str) -> None:
    assert run({}, ["--wandb", text], "train") == {"wandb": True}


@pytest.mark.parametrize("text", ["no", "FALSE", "f", "N", "0"])
def test_what_is_false(text: str) -> None:
    assert run({}, ["--wandb", text], "train") == {"wandb": False}


def test_a_switch_that_is_not_given_leaves_the_file_alone() -> None:
    assert run({"prompt_as_path": True}, [], "sample") == {"prompt_as_path": True}
    assert run({"start_from_scratch": True}, [], "train") == {"start_from_scratch": True}


def test_a_flag_wins_over_a_key_of_the_file_that_would_go_before_it() -> None:
    assert run({"image_size": (32, 32)}, ["--resolution", "240p"], "sample") == {"resolution": "240p"}
    assert run({"prompt": ["a"]}, ["--prompt-path", "p.txt"], "sample") == {"prompt_path": "p.txt"}
    both = run({}, ["--prompt-path", "p.txt", "--prompt", "b"], "sample")
    assert both == {"prompt": ["b"], "prompt_path": "p.txt"}


def test_stages_take_the_flags_of_all() -> None:
    assert run({}, ["--lr", "1", "--fps", "8"], "stages") == {"lr": 1.0, "fps": 8}


def test_every_flag_has_a_key_and_a_help() -> None:
    assert all(flag.paths and flag.help for flag in FLAGS)
    assert len({flag.name for flag in FLAGS}) == len(FLAGS)


def test_help_shows_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, {"lr": "1e-4", "scheduler.cfg_scale": "7.0"})
    parser.print_help()
    text = " ".join(capsys.readouterr().out.split())
    assert "learning rate after warm-up [1e-4]" in text
    assert "guidance: 1 is off, 7 follows the prompt closely [7.0]" in text


# ---- any key


NESTED: dict[str, Any] = {
    "model": {"type": "A", "depth": 1, "sizes": (1, {"a": 2})},
    "bucket_config": {"144p": {1: (1.0, 48), 51: (1.0, 4)}},
    "hooks": [{"type": "a"}, {"type": "b"}],
    "accelerator": None,
    "log_every": 10,
}


@pytest.mark.parametrize(
    ("arguments", "path", "value"),
    [
        (["--model.depth", "12"], ("model", "depth"), 12),
        (["--model.depth=12"], ("model", "depth"), 12),
        (["--model.depth", "-1"], ("model", "depth"), -1),
        (["--model.from_pretrained", "a/b.pt"], ("model", "from_pretrained"), "a/b.pt"),
        (["--model.name="], ("model", "name"), ""),
        (["--model.name=a=b"], ("model", "name"), "a=b"),
        (["--log_every", "5"], ("log_every",), 5),
        (["--log-every", "5"], ("log_every",), 5),
        (["--align", "5"], ("align",), 5),
        (["--model.sizes.1.a", "5"], ("model", "sizes", "1", "a"), 5),
        (["--hooks.1.type", "c"], ("hooks", "1", "type"), "c"),
        (["--bucket_config.144p.51", "(1.0, 8)"], ("bucket_config", "144p", "51"), (1.0, 8)),
        (["--accelerator.type", "ddp"], ("accelerator", "type"), "ddp"),
        (["--ema.decay", "0.9"], ("ema", "decay"), 0.9),
        (["--model", "dict(type='B')"], ("model",), {"type": "B"}),
    ],
)
def test_any_key_can_be_set(arguments: list[str], path: tuple[str, ...], value: Any) -> None:
    rest, overrides = split_overrides([*arguments, "config.py"], {"--seed"})
    assert rest == ["config.py"]
    before = json.dumps(NESTED)
    config = apply_overrides(Config(NESTED, {("model",): "c.py:1", ("model", "depth"): "c.py:2"}), overrides)
    assert json.dumps(NESTED) == before
    found: Any = config.values
    for key in path:
        found = found[int(key)] if isinstance(found, list | tuple) or (key == "51") else found[key]
    assert found == value
    assert config.locations[path] == arguments[0].partition("=")[0]


def test_setting_a_key_leaves_the_others_and_their_places() -> None:
    config = Config(
        {"a": {"b": 1, "c": (1, 2)}, "d": 3}, {("a", "b"): "f:1", ("a", "c"): "f:2", ("a", "c", "0"): "f:2"}
    )
    config = apply_overrides(config, [Override("--a.c", ("a", "c"), 5)])
    assert config.values == {"a": {"b": 1, "c": 5}, "d": 3}
    assert config.locations == {("a", "b"): "f:1", ("a", "c"): "--a.c"}


def test_a_tuple_stays_one() -> None:
    config = apply_overrides(Config({"size": (1, 2)}), [Override("--size.0", ("size", "0"), 5)])
    assert config.values == {"size": (5, 2)}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--hooks.2.type=a", "--hooks.2.type: hooks has no entry 2; it has 2, counted from 0"),
        ("--hooks.a=a", "--hooks.a: hooks has no entry a; it has 2, counted from 0"),
        ("--log_every.a=1", "--log_every.a: log_every is 10, which has no key a"),
        ("--model.depth.a.b=1", "--model.depth.a.b: model.depth is 1, which has no key a"),
    ],
)
def test_a_path_that_leads_nowhere_is_named(argument: str, message: str) -> None:
    _, overrides = split_overrides([argument], set())
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        apply_overrides(Config(NESTED), overrides)


def test_what_is_no_key_is_left_to_the_parser() -> None:
    arguments = ["config.py", "-h", "--", "--3", "- a", "--a b", "--seed", "3"]
    assert split_overrides(arguments, {"--seed"}) == (arguments, [])
