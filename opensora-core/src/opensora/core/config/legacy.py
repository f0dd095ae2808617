"""Keys of Open-Sora's own configs that have become something else here, and the flat files of its version 1.0."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import PurePosixPath
from typing import Any

from opensora.core.config.evaluate import Config
from opensora.core.config.structure import locate
from opensora.core.errors import ConfigError

__all__ = ["modernize", "nest_dataset"]

log = logging.getLogger(__name__)

_MODEL_KEYS = (
    "enable_flash_attn",
    "enable_flashattn",
    "enable_layernorm_kernel",
    "enable_sequence_parallelism",
    "dtype",
)
_DATASET_KEYS = ("data_path", "num_frames", "frame_interval", "image_size")
_MASK_NAMES = {
    "mask_no": "identity",
    "mask_head": "quarter_head",
    "mask_tail": "quarter_tail",
    "mask_head_tail": "quarter_head_tail",
}
_FEATURE_KEYS = {
    "vae_out_channels": "latent_channels",
    "text_encoder_output_dim": "text_width",
    "text_encoder_model_max_length": "text_length",
    "model_max_length": "text_length",
}
_EXTRACTION_KEYS = ("save_compressed_text_features", "bin_size", "start_index", "end_index", "log_time")
_PROMPT_FOLDER = "assets/texts"


def nest_dataset(config: Config) -> Config:
    """A flat training config of Open-Sora 1.0, with what it says about the data in a ``dataset``; others as they are.

    To be done before flags are applied, which know nested keys only.

    Raises:
        ConfigError: ``root`` is set, which has no counterpart.
    """
    values, locations = dict(config.values), dict(config.locations)
    if "dataset" in values or "data_path" not in values:
        return config
    if values.get("root") is not None:
        raise ConfigError(
            f"root = {values['root']!r}: paths of a table are relative to the working directory or to the table itself. "
            "Leave root out, and put the table there.",
            location=locate(locations, ("root",)),
        )
    dataset = {"type": "VideoTextDataset", **{key: values.pop(key) for key in _DATASET_KEYS if key in values}}
    for key in ("root", "use_image_transform"):
        values.pop(key, None)
    values["dataset"] = dataset
    locations |= {("dataset", key): place for key in _DATASET_KEYS if (place := locate(locations, (key,)))}
    log.warning(
        "A flat config of Open-Sora 1.0: %s moved into dataset.", ", ".join(key for key in dataset if key != "type")
    )
    return config.part(values, locations)


def modernize(config: Config) -> Config:
    """The config with older keys dropped or turned into today's, and one warning that says so.

    ``plugin`` becomes ``accelerator``; ZeRO-2 with ``sp_size=1`` gives way to the automatic choice of single or ddp, unless
    ColossalAI is installed and several processes run.

    Raises:
        ConfigError: Both ``plugin`` and ``accelerator`` are there, or one has the wrong type.
    """
    values, locations = dict(config.values), dict(config.locations)
    rules: tuple[Callable[[dict[str, Any]], list[str]], ...] = (
        _keep_qk_order,  # before the keys are gone by which it knows the version
        _drop_model_keys,
        _drop_top_keys,
        _rename_masks,
        _replace_features,
        _replace_extraction,
        _name_evaluation,
        _find_prompts,
    )
    notes = [note for rule in rules for note in rule(values)]
    if "plugin" in values or "sp_size" in values:
        place = locate(locations, ("plugin",) if "plugin" in values else ("sp_size",)) or ""
        notes.append(_replace_plugin(values, place))
        locations[("accelerator",)] = place
    if notes:
        log.warning("Keys of an older config: %s", "; ".join(notes))
    return config.part(values, locations)


def _keep_qk_order(values: dict[str, Any]) -> list[str]:
    """Configs of 1.1 don't say that its weights rotate queries and keys before they normalise them: its code did."""
    model = values.get("model")
    if not isinstance(model, dict) or "enable_flashattn" not in model or not model.get("qk_norm"):
        return []
    if not str(model.get("type")).startswith("STDiT2") or "qk_norm_legacy" in model:
        return []
    values["model"] = {**model, "qk_norm_legacy": True}
    return ["model.qk_norm_legacy=True added, which weights of 1.1 need"]


def _drop_model_keys(values: dict[str, Any]) -> list[str]:
    model = values.get("model")
    found = [key for key in _MODEL_KEYS if isinstance(model, dict) and key in model]
    if not found:
        return []
    values["model"] = {key: value for key, value in values["model"].items() if key not in found}
    names = ", ".join(f"model.{key}" for key in found)
    return [f"{names} left out (kernels are chosen by themselves, precision is dtype, spreading a step is accelerator)"]


def _drop_top_keys(values: dict[str, Any]) -> list[str]:
    if values.get("batch_size", 1) is None:  # buckets have their own
        del values["batch_size"]
    if "num_bucket_build_workers" not in values:
        return []
    del values["num_bucket_build_workers"]
    return ["num_bucket_build_workers left out (buckets are computed in columns, without workers)"]


def _rename_masks(values: dict[str, Any]) -> list[str]:
    ratios = values.get("mask_ratios")
    if not isinstance(ratios, dict):
        return []
    names = {old: _MASK_NAMES.get(old, old.removeprefix("mask_")) for old in ratios if str(old).startswith("mask_")}
    if not names:
        return []
    values["mask_ratios"] = {names.get(name, name): share for name, share in ratios.items()}
    return [f"mask_ratios: {', '.join(f'{old} is {new}' for old, new in names.items())} now"]


def _replace_features(values: dict[str, Any]) -> list[str]:
    """Training from features: sizes that were top-level keys are options of the dataset.

    Raises:
        ConfigError: Features are to be loaded, but of a dataset that has none.
    """
    loads = [key for key in ("load_video_features", "load_text_features") if values.pop(key, False)]
    dataset = values.get("dataset")
    if not isinstance(dataset, dict) or dataset.get("type") not in ("BatchFeatureDataset", "FeatureDataset"):
        if loads:
            raise ConfigError(
                f"{loads[0]}: features are kept by features = dict(folder=...), which finds or computes them, whatever the "
                'dataset; files of features are read by dataset = dict(type="FeatureDataset", ...). Leave the key out.'
            )
        return []
    moved = {}
    for old, new in _FEATURE_KEYS.items():
        if old in values:
            moved[new] = values.pop(old)
    values["dataset"] = {**moved, **dataset}
    notes = [f"{', '.join(moved)} moved into dataset"] if moved else []
    return notes + ([f"{', '.join(loads)} left out (the dataset has features)"] if loads else [])


def _replace_extraction(values: dict[str, Any]) -> list[str]:
    """What Open-Sora's script for extraction reads, as features of the pipeline of that name."""
    if "save_text_features" not in values and "bin_size" not in values:
        return []
    dropped = [key for key in _EXTRACTION_KEYS if key in values]
    for key in dropped:
        del values[key]
    folder, text = values.pop("save_dir", None) or "features", values.pop("save_text_features", True)
    values.setdefault("features", {"folder": folder, "text": bool(text)})
    values.setdefault("pipeline", "extract")
    notes = [f'save_dir, save_text_features turned into features=dict(folder="{folder}", ...)']
    return notes + ([f"{', '.join(dropped)} left out (each clip has files of its own)"] if dropped else [])


def _name_evaluation(values: dict[str, Any]) -> list[str]:
    """Open-Sora's configs don't say which script is to read them; this key does."""
    if "num_eval_timesteps" in values:
        values.setdefault("pipeline", "eval-loss")
    return []


def _find_prompts(values: dict[str, Any]) -> list[str]:
    """Prompt files of Open-Sora's repository, where they aren't at hand, are those that ship with the configs."""
    from opensora.core.config.names import find_text

    path = values.get("prompt_path")
    if not isinstance(path, str) or not str(PurePosixPath(path).parent).endswith(_PROMPT_FOLDER):
        return []
    shipped = f"prompts/{PurePosixPath(path).name}"
    if find_text(path) is not None or find_text(shipped) is None:
        return []
    values["prompt_path"] = shipped
    return [f"prompt_path {path} is not here, {shipped} (a list of our own) is used"]


def _replace_plugin(values: dict[str, Any], place: str) -> str:
    plugin, sp_size = values.pop("plugin", "zero2"), values.pop("sp_size", 1)
    if not isinstance(plugin, str):
        raise ConfigError(f"plugin must be the name of an accelerator, not {plugin!r}.", location=place)
    if type(sp_size) is not int:
        raise ConfigError(f"sp_size must be a number, not {sp_size!r}.", location=place)
    if values.get("accelerator") is not None:
        raise ConfigError("Both plugin and accelerator are given. Keep accelerator.", location=place)
    if plugin == "zero2" and sp_size == 1:
        if find_spec("colossalai") is None or int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return 'plugin="zero2" left out (accelerator is single, or ddp with several processes)'
        values["accelerator"] = {"type": "zero2"}
        return 'plugin turned into accelerator=dict(type="zero2")'
    if plugin == "zero2":  # Open-Sora 1.2 refuses this pair, which one of its own files has
        plugin = "zero2-seq"
    values["accelerator"] = {"type": plugin, **({"sp_size": sp_size} if sp_size != 1 else {})}
    return f'plugin turned into accelerator=dict(type="{plugin}")'
