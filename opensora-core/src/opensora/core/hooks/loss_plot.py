"""``loss.png`` and ``validation.png``: the curves, drawn when training ends."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from opensora.core.hookspecs import hook
from opensora.core.run_folder import read_jsonl

if TYPE_CHECKING:
    from opensora.core.pipelines.loop import LoopRun

__all__ = ["LossPlot", "LossPlotSpec"]

log = logging.getLogger(__name__)


@frozen(kw_only=True)
class LossPlotSpec:
    """Draw ``metrics.jsonl`` as ``loss.png``, and ``validation.jsonl`` as ``validation.png``; needs matplotlib."""


class LossPlot:
    """Draws the mean loss of each log record, and a running mean over about 3 % of the run."""

    Spec = LossPlotSpec

    def __init__(self, spec: LossPlotSpec) -> None:
        self.spec = spec

    @hook(trylast=True)
    def train_end(self, run: LoopRun) -> None:
        """Draw all that was logged, by earlier parts of the run too."""
        records = read_jsonl(run.folder / "metrics.jsonl") if run.accelerator.is_main else []
        records = [record for record in records if math.isfinite(float(str(record["avg_loss"])))]
        if not records:
            return
        try:
            from matplotlib.figure import Figure
        except ImportError:
            log.info("No loss plot: pip install 'opensora-core[plot]'")
            return
        steps = [float(str(record["step"])) for record in records]
        losses = [float(str(record["avg_loss"])) for record in records]  # means since the last record
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        axes.plot(steps, losses, alpha=0.3, linewidth=0.8, label="loss")
        smooth = running_mean(losses, weight=1 - 1 / max(1.0, 0.03 * len(losses)))
        axes.plot(steps, smooth, linewidth=1.5, label="running mean")
        axes.set(xlabel="step", ylabel="loss", title=run.folder.name)
        if all(loss > 0 for loss in losses):
            axes.set_yscale("log")
        axes.legend()
        axes.grid(alpha=0.3)
        figure.savefig(run.folder / "loss.png", dpi=110)
        log.info("Loss plot %s", run.folder / "loss.png")
        if validation := read_jsonl(run.folder / "validation.jsonl"):
            draw_validation(run.folder, validation, training=(steps, losses))


def draw_validation(
    folder: Path, records: Sequence[Mapping[str, Any]], *, training: tuple[list[float], list[float]]
) -> None:
    """Draw ``validation.png``: the mean beside the training loss, and each timestep's, of which the noisiest are darkest.

    Args:
        folder: Of the run.
        records: Of ``validation.jsonl``.
        training: Steps and losses of ``metrics.jsonl``.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    means, timesteps = figure.subplots(1, 2)
    steps = [record["step"] for record in records]
    means.plot(*training, alpha=0.3, linewidth=0.8, label="training loss")
    means.plot(steps, [record["loss"] for record in records], linewidth=1.5, label="validation loss")
    means.set(xlabel="step", ylabel="loss", title=folder.name)
    names = list(records[-1]["by_timestep"])
    for index, name in enumerate(names):
        color = colormaps["viridis"](1 - (index + 1) / len(names))
        values = [record["by_timestep"].get(name, math.nan) for record in records]
        timesteps.plot(steps, values, color=color, linewidth=1.2, label=f"t = {float(name):.0f}")
    timesteps.set(xlabel="step", ylabel="validation loss", title="by timestep")
    for axes in (means, timesteps):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(folder / "validation.png", dpi=110)
    log.info("Validation plot %s", folder / "validation.png")


def running_mean(values: list[float], *, weight: float) -> list[float]:
    """Exponential running mean, corrected for its start. ``weight`` is that of the past, in [0, 1)."""
    means, mean = [], 0.0
    for count, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        means.append(mean / (1 - weight**count))
    return means
