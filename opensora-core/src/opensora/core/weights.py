"""Reading other people's weights into a model, and saying what became of them.

A source is a local file (``.safetensors``; ``.pt``, ``.pth``, ``.bin`` without code), a folder (one file, or shards with an
index), a run folder or checkpoint of this project (its averaged weights, where it has them), a published file known by name,
or something on the Hugging Face hub (see `locate_weights`). A model class may define ``adapt_state_dict(self, state)``, which
turns published keys and shapes into its own, and ``interop`` (see `opensora.core.interop`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import evolve, field, frozen
from torch import Tensor, nn

from opensora.core.adapters import find_record, load_adapter
from opensora.core.errors import WeightsError
from opensora.core.interop import Interop
from opensora.core.weight_files import read_config, read_weights, unwrap
from opensora.core.weight_sources import locate_weights

__all__ = [
    "LoadReport",
    "check_config",
    "grow_state",
    "interop_of",
    "load_state",
    "load_weights",
    "locate_weights",
    "read_weights",
    "unwrap",
]

log = logging.getLogger(__name__)


@frozen(kw_only=True)
class LoadReport:
    """What a model took from a file."""

    source: str
    loaded: int
    adapted: list[str] = field(factory=list)
    """Keys whose name or shape was changed to fit."""
    started: list[str] = field(factory=list)
    """Keys of parts that image models don't have: they keep the initial values, which leave the first frame unchanged."""
    grown: list[str] = field(factory=list)
    """Keys that are larger than the file's: it fills their leading corner, the rest keeps its initial values."""
    missing: list[str] = field(factory=list)
    """Keys of the model that the file lacks: they keep their initial values."""
    unexpected: list[str] = field(factory=list)
    """Keys of the file that the model doesn't have."""
    misshapen: list[str] = field(factory=list)
    """``key: file has ..., model has ...``."""

    @property
    def is_complete(self) -> bool:
        """Every key of the model was loaded (or starts a new part), and every key of the file was used."""
        return not (self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        """One line a kind, keys shortened to eight."""
        lines = [f"{self.source}: {self.loaded} tensors loaded, {len(self.adapted)} of them adapted"]
        for title, keys in (
            ("of new parts, at their initial values", self.started),
            ("grown", self.grown),
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("of another shape", self.misshapen),
        ):
            if keys:
                rest = f", and {len(keys) - 8} more" if len(keys) > 8 else ""
                lines.append(f"  {len(keys)} {title}: {', '.join(keys[:8])}{rest}")
        return "\n".join(lines)


def load_weights(
    module: nn.Module, source: str | Path, *, partial: bool = False, grow: bool = False, assign: bool = False
) -> LoadReport:
    """Load weights into ``module`` and report. Adapters (see `opensora.core.adapters`) are folded into those of their base.

    Args:
        module: Changed as a whole or not at all; where a base's adapters don't fit, it holds the base.
        source: See `locate_weights`.
        partial: Accept missing keys (they keep their initial values) and unexpected ones. Shapes must fit all the same.
        grow: The file is of a model with fewer blocks or narrower layers: see `grow_state`.
        assign: Take the file's tensors in place of the module's own, so in the file's precision.

    Raises:
        WeightsError: The source can't be read, or does not fit, or has nothing that fits; the module is then unchanged.
    """
    path = locate_weights(source, published=interop_of(type(module)).published)
    if (record := find_record(path)) is not None:
        if record.is_gone:
            raise WeightsError(
                f"{source} holds adapters, and the weights that they belong to are not at {record.base} any more: give both, "
                f'model = dict(from_pretrained=..., adapter="{source}").'
            )
        report = load_weights(module, record.base, partial=record.partial, grow=record.grow, assign=assign)
        load_adapter(module, path)
        return report
    check_config(module, read_config(path), source=str(source))
    return load_state(module, unwrap(read_weights(path)), source=str(source), partial=partial, grow=grow, assign=assign)


def check_config(module: nn.Module, config: Mapping[str, Any], *, source: str) -> None:
    """Warn where the config beside the weights and a model differ in what tensors don't tell.

    Raises:
        WeightsError: The config is that of something else.
    """
    interop = interop_of(type(module))
    for difference in interop.compare(module, config) if interop.compare else ():
        log.warning("%s: its config and this model differ: %s", source, difference)


def load_state(
    module: nn.Module,
    published: dict[str, Tensor],
    *,
    source: str,
    partial: bool = False,
    grow: bool = False,
    assign: bool = False,
) -> LoadReport:
    """Load tensors that have been read and unwrapped; see `load_weights`. ``source`` is what messages call them."""
    interop = interop_of(type(module))
    adapt = getattr(module, "adapt_state_dict", None)
    state: dict[str, Tensor] = adapt(published) if adapt else published
    own = module.state_dict()
    report = _compare(source, published, state, own, new_parts=interop.new_parts)
    if grow:
        state, report = _grow(state, own, report)
    if report.misshapen or not report.loaded or not (partial or report.is_complete):
        hint = (
            "" if report.misshapen or not report.loaded else " To load what fits all the same, set model.partial=True."
        )
        why = (interop.diagnose and interop.diagnose(module, published)) or "Is it another model's file?"
        raise WeightsError(f"These weights don't fit {type(module).__name__}:\n{report}\n{why}{hint}")
    module.load_state_dict(state, strict=False, assign=assign)
    log.info("Weights: %s", report)
    return report


def interop_of(component: object) -> Interop:
    """What a class says about other projects' weights; nothing, if it says nothing."""
    interop: Interop = getattr(component, "interop", None) or Interop()
    return interop


def grow_state(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor of ``student`` with the smaller one of ``teacher`` as its leading corner, whatever the number of axes.

    New blocks and channels keep the student's values. So a deeper model whose blocks start as the identity (DiT, Latte)
    computes what the smaller one does; a wider one, whose layer norms run over more channels, has a start to train on from.

    Raises:
        WeightsError: A tensor has another number of axes, or the student's is the smaller along one.
    """
    grown = dict(student)
    for key in student.keys() & teacher.keys():
        mine, given = student[key], teacher[key]
        if mine.dim() != given.dim() or any(a < b for a, b in zip(mine.shape, given.shape, strict=True)):
            raise WeightsError(
                f"{key} can't grow from {list(given.shape)} to {list(mine.shape)}: every axis must be at least as long."
            )
        corner = tuple(slice(length) for length in given.shape)
        grown[key] = mine.clone()
        grown[key][corner] = given.to(mine.dtype)
    return grown


def _compare(
    source: str,
    published: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    *,
    new_parts: str,
) -> LoadReport:
    new = [key for key in own if new_parts and re.search(new_parts, key)]
    started = [] if any(key in state for key in new) else new
    loaded = [
        key
        for key, tensor in state.items()
        if key in own
        and own[key].shape == tensor.shape
        and own[key].data_ptr() != tensor.data_ptr()  # not its own tables
    ]
    return LoadReport(
        source=source,
        loaded=len(loaded),
        adapted=[key for key in loaded if key not in published or published[key].shape != state[key].shape],
        started=started,
        missing=[key for key in own if key not in state and key not in started],
        unexpected=[key for key in state if key not in own],
        misshapen=[
            f"{key}: file has {list(tensor.shape)}, model has {list(own[key].shape)}"
            for key, tensor in state.items()
            if key in own and own[key].shape != tensor.shape
        ],
    )


def _grow(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], report: LoadReport
) -> tuple[dict[str, Tensor], LoadReport]:
    """The whole state after growing, and a report in which what grew, or is new, is neither misshapen nor missing."""
    larger = [key for key in own if key in state and own[key].shape != state[key].shape]
    grown = grow_state(own, {key: state[key] for key in own.keys() & state.keys()})
    # Keys of the file that the model lacks (fewer blocks than the file's) remain unexpected.
    loaded = report.loaded + len(larger)
    return grown, evolve(report, loaded=loaded, grown=[*larger, *report.missing], missing=[], misshapen=[])
