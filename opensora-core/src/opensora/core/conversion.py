"""Weights from one layout into another: this project's, the original project's, diffusers'.

Tensors are renamed, split and joined, never computed with, and keep their precision: converted there and back, a model is
the same to the last bit. A result is written under a temporary name and renamed, so it is whole or not there.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import attrs
import torch
from attrs import evolve, frozen
from torch import Tensor, nn

from opensora.core.adapters import find_record
from opensora.core.components import available, construct, load, structure_spec
from opensora.core.config.structure import ComponentConfig, unstructure
from opensora.core.errors import ConfigError, WeightsError, did_you_mean
from opensora.core.interop import Exported, Interop, ModelFacts
from opensora.core.protocols import Size
from opensora.core.weight_files import EXTRA, SUFFIXES, read_config, read_weights, unwrap
from opensora.core.weight_sources import locate_weights
from opensora.core.weights import check_config, interop_of, load_state, load_weights

__all__ = ["Layout", "convert"]

log = logging.getLogger(__name__)
Layout = Literal["opensora", "original", "diffusers"]
_KINDS = ("models", "vaes")
_OWN_KEYS = ("latent_channels", "latent_size", "text_width", "text_length")
_PICKLES = tuple(suffix for suffix in SUFFIXES if suffix in (".pt", ".pth", ".bin"))


@frozen(kw_only=True)
class _Model:
    """A source, built and loaded."""

    type: str
    options: Mapping[str, Any]
    facts: ModelFacts
    module: nn.Module
    interop: Interop
    kind: str


def convert(
    source: str | Path,
    destination: Path,
    *,
    to: Layout,
    model: str | None = None,
    options: Mapping[str, Any] | None = None,
    latent_size: Size | None = None,
    force: bool = False,
) -> Path:
    """Write the weights of ``source`` to ``destination`` in the layout ``to``.

    Args:
        source: As `locate_weights` takes it; in any layout that the model's class reads.
        destination: A folder; for "original" a file (``.pt``, ``.pth`` or ``.bin``).
        to: "opensora" (``config.json``, ``model.safetensors``), "original" (`torch.save`), or "diffusers"
            (``config.json``, ``diffusion_pytorch_model.safetensors``); folders get a model card too.
        model: Name of a model or VAE, needed unless the source is a folder that this function wrote.
        options: Fields of its ``Spec`` that neither its name nor the source tells.
        latent_size: (T, H, W) of models that have one size. None: what the source tells, else that of one 256x256 image.
        force: Replace what is at ``destination``, if that is a file or a folder of weights.

    Raises:
        WeightsError: The source can't be read or doesn't fit the model, the layout can't hold it, or the destination exists
            or can't be written.
        ComponentError, ConfigError: The model or its options are wrong.
    """
    _check_destination(destination, to, force=force)
    read = _read(source, model, options or {}, latent_size)
    exported = _export(read, to)
    for note in exported.notes:
        log.warning("Note: %s", note)
    card = _card(read, exported, str(source), to)
    _replace(destination, lambda path: _write(path, exported, card, to))
    log.info("Wrote %d tensors of %s to %s", len(exported.tensors), read.type, destination)
    return destination


def _read(source: str | Path, name: str | None, options: Mapping[str, Any], latent_size: Size | None) -> _Model:
    """Build the model that a source is of, and load it with the source's own tensors."""
    path = locate_weights(source, published=interop_of(load(*_component(name))).published if name else None)
    given, path = path, base_of(path)
    config = read_config(path)
    name = name or config.get("type")
    if not isinstance(name, str):
        raise ConfigError(f'{source} does not say of which model it is: give --model, such as --model "DiT-XL/2".')
    kind, name = _component(name)
    component = load(kind, name)
    interop = interop_of(component)
    published = unwrap(read_weights(path))
    facts = _facts(name, interop, published, config)
    if latent_size:
        facts = evolve(facts, latent_size=latent_size)
    fields = attrs.fields_dict(component.Spec)
    known = {key: value for key, value in facts.options.items() if key in fields} | dict(options)
    if kind == "vaes" and "_class_name" in config:
        known["from_pretrained"] = str(path if path.is_dir() else path.parent)  # where its config is
    spec = structure_spec(kind, ComponentConfig(type=name, options=known))
    with torch.device("meta") if kind == "vaes" else torch.device("cpu"):
        module = construct(
            component,
            spec,
            meta=True,
            latent_channels=facts.latent_channels,
            latent_size=facts.latent_size,
            text_width=facts.text_width,
            text_length=facts.text_length,
        )
    check_config(module, config, source=str(source))
    if given == path:
        load_state(module, published, source=str(source), assign=True)
    else:
        load_weights(module, given, assign=True)  # with adapters folded in
    return _Model(type=name, options=unstructure(spec), facts=facts, module=module, interop=interop, kind=kind)


def base_of(path: Path) -> Path:
    """Where the weights are that adapters belong to, which may be adapters again; of other weights, where they are."""
    record = find_record(path)
    return path if record is None else base_of(locate_weights(record.base))


def _component(name: str) -> tuple[str, str]:
    """Kind and name of a model or VAE."""
    bare = name.rpartition(":")[2]
    kinds = {kind: {one.name for one in available(kind)} for kind in _KINDS}
    for kind, names in kinds.items():
        if bare in names:
            return kind, name
    known = [one for names in kinds.values() for one in names]
    raise ConfigError(
        f'No model or VAE is named "{name}".{did_you_mean(name, known)} All: opensora plugins --kind models'
    )


def _facts(name: str, interop: Interop, published: Mapping[str, Tensor], config: Mapping[str, Any]) -> ModelFacts:
    if config.get("type") is not None and "latent_channels" in config:  # written here
        size = config.get("latent_size")
        own = {key: config.get(key) for key in _OWN_KEYS} | {"latent_size": tuple(size) if size else None}
        return ModelFacts(options=config.get("options", {}), **own)
    if interop.facts is None:
        raise WeightsError(f'"{name}" says nothing about other layouts, so its weights can\'t be converted.')
    return interop.facts(published, config)


def _export(model: _Model, to: Layout) -> Exported:
    interop = model.interop
    if to == "opensora" and model.kind == "models":
        facts = {"latent_channels": model.facts.latent_channels, "latent_size": model.facts.latent_size}
        facts |= {"text_width": model.facts.text_width, "text_length": model.facts.text_length}
        return Exported(
            tensors=model.module.state_dict(), config={"type": model.type, "options": model.options, **facts}
        )
    if to == "original" and interop.to_original:
        return interop.to_original(model.module)
    if to == "diffusers" and interop.to_diffusers:
        return interop.to_diffusers(model.module)
    offers = [*(["opensora"] if model.kind == "models" else [])]
    offers += [
        name for name, export in (("original", interop.to_original), ("diffusers", interop.to_diffusers)) if export
    ]
    raise WeightsError(f'{model.type} has no layout "{to}"; it has {", ".join(offers) or "none"}.')


def _check_destination(path: Path, to: Layout, *, force: bool) -> None:
    if to not in get_args(Layout):
        raise ConfigError(f'"{to}" is no layout.{did_you_mean(to, get_args(Layout))}')
    if to == "original" and path.suffix not in _PICKLES:
        raise ConfigError(f"The original layout is one file, and {path} should end in {', '.join(_PICKLES)}.")
    if to != "original" and path.suffix in SUFFIXES:
        raise ConfigError(f"The {to} layout is a folder, and {path} looks like a file.")
    if not path.exists() and not path.is_symlink():
        return
    if not force:
        raise WeightsError(f"{path} exists. Give another destination, or --force to replace it.")
    if path.is_dir() and any(path.iterdir()) and not (path / "config.json").is_file():
        raise WeightsError(
            f"{path} is a folder of other things, which --force does not delete. Give another destination."
        )


def _write(path: Path, exported: Exported, card: str, to: Layout) -> None:
    from safetensors.torch import save_file

    if to == "original":
        tensors = _apart(exported.tensors)
        torch.save({exported.wrapper: tensors} if exported.wrapper else tensors, path)
        return
    path.mkdir()
    name = "model" if to == "opensora" else "diffusion_pytorch_model"
    save_file(_apart(exported.tensors), path / f"{name}.safetensors", {"format": "pt"})
    if exported.extra:
        save_file(_apart(exported.extra), path / EXTRA, {"format": "pt"})
    (path / "config.json").write_text(json.dumps(exported.config, indent=2) + "\n", encoding="utf-8")
    (path / "README.md").write_text(card, encoding="utf-8")


def _replace(destination: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` make a file or folder under a temporary name, then give it its own. What was there goes last."""
    from safetensors import SafetensorError

    temporary = destination.with_name(f".{destination.name}.{os.getpid()}")
    former = destination.with_name(f".{destination.name}.{os.getpid()}.former")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        if destination.exists() or destination.is_symlink():
            destination.rename(former)
        temporary.rename(destination)
        _discard(former)
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save's own
        raise WeightsError(f"{destination} can't be written: {error}") from error
    finally:
        _discard(temporary)


def _discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each in memory of its own, and in no more than it needs, as files of tensors want it."""
    apart: dict[str, Tensor] = {}
    taken: set[int] = set()
    for key, value in tensors.items():
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        is_whole = storage.data_ptr() not in taken and storage.nbytes() == tensor.nbytes
        apart[key] = tensor if is_whole else tensor.clone()
        taken.add(storage.data_ptr())
    return apart


def _card(model: _Model, exported: Exported, source: str, to: Layout) -> str:
    """A model card, as the hub shows it."""
    facts, parameters = model.facts, sum(parameter.numel() for parameter in model.module.parameters())
    rows = {
        "architecture": model.type,
        "parameters": f"{parameters:,}",
        "latent channels": facts.latent_channels,
        "latent size": "x".join(map(str, facts.latent_size)) if facts.latent_size else "any",
        "text": f"{facts.text_length} tokens of width {facts.text_width}" if facts.text_width else "none",
        "precision": ", ".join(sorted({str(one.dtype).removeprefix("torch.") for one in exported.tensors.values()})),
        "source": source,
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    if to == "diffusers":
        name = exported.config.get("_class_name", "Model")
        use = f"from diffusers import {name}\n\nmodel = {name}.from_pretrained(FOLDER)"
    else:
        use = f'model = dict(type="{model.type}", from_pretrained=FOLDER)'
    notes = "".join(f"\n{note}\n" for note in exported.notes)
    return f"""---
library_name: {to}
license: other
license_name: as-the-source
---

# {model.type}

Converted with `opensora convert` from `{source}`. The tensors are the source's, bit for bit.

| | |
| --- | --- |
{table}

```python
{use}
```
{notes}
## License

That of the source's weights.
"""
