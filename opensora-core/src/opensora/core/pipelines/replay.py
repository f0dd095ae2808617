"""Make a logged step of a run again: same weights, samples, noise, timesteps and masks; say what it consisted of."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs
from attrs import define, field, frozen
from attrs.validators import gt
from torch import Tensor

from opensora.core.adapters import find_record
from opensora.core.attention import use_kernel
from opensora.core.checkpoints import list_checkpoints
from opensora.core.components import load
from opensora.core.composing import build_accelerator
from opensora.core.conditioning import Conditioning
from opensora.core.config.structure import ComponentConfig
from opensora.core.errors import ConfigError
from opensora.core.loading import Batch
from opensora.core.pipelines.loop import LogWindow, make_step, read_together
from opensora.core.pipelines.train import Train, resume
from opensora.core.pipelines.train_loop import TrainRun
from opensora.core.pipelines.train_spec import TrainSpec
from opensora.core.protocols import Denoiser
from opensora.core.run_folder import make_folder, read_jsonl, write_atomically
from opensora.core.stopping import StopRequest

if TYPE_CHECKING:
    from opensora.core.config.evaluate import Config

__all__ = ["Replay", "ReplaySpec"]

log = logging.getLogger(__name__)
BYSTANDERS = {
    "checkpoints", "console", "ema", "jsonl", "loss-plot", "previews", "profile", "progress", "tensorboard", "validation",
    "wandb",
}  # fmt: skip
"""Hooks that only accompany a run: no step depends on them."""


@frozen(kw_only=True)
class ReplaySpec(TrainSpec):
    """Make one step of a training run again and report on its samples; the run stays as it is."""

    pipeline: Literal["replay"] = "replay"  # type: ignore[assignment]  # it is read from the training's config
    step: int = field(validator=gt(0))
    """Which, as metrics.jsonl counts them."""
    write_picture: bool = True
    """Also write a picture of the samples' frames, with captions and losses."""

    def default_hooks(self) -> list[ComponentConfig]:
        """Without those that only accompany a run."""
        return [each for each in super().default_hooks() if each.type not in BYSTANDERS]


class Replay(Train):
    """``opensora-run RUN_FOLDER/config.py --pipeline replay --step 123``.

    Goes from the nearest checkpoint before the step, or from the start, to the step, by the same code as training.
    """

    Spec = ReplaySpec
    spec: ReplaySpec

    def __init__(self, spec: ReplaySpec, *, config: Config) -> None:
        """See `Train`.

        Raises:
            ConfigError: There is no run folder to read from.
        """
        without = set(spec.without_hooks) | BYSTANDERS
        chosen = [each for each in spec.hooks if each.type not in without]
        super().__init__(attrs.evolve(spec, hooks=chosen, without_hooks=[]), config=config)
        self.home = Path(spec.run_folder or spec.load or (config.path.parent if config.path else "."))
        if not (self.home / "metrics.jsonl").exists():
            raise ConfigError(
                f"{self.home} is no run folder: it has no metrics.jsonl. Give that of the run: "
                "opensora-run RUN_FOLDER/config.py --pipeline replay --step N"
            )

    def run(self) -> dict[str, Path]:
        """Make the step again, and return where the report is.

        Raises:
            ConfigError: The run didn't get to that step, or was made with another number of samples a step.
        """
        logged = {int(str(record["step"])): record for record in read_jsonl(self.home / "metrics.jsonl")}
        if self.spec.step > max(logged, default=0):
            raise ConfigError(f"step is {self.spec.step}, but {self.home} got to step {max(logged, default=0)}.")
        with build_accelerator(self.spec) as accelerator:
            folder = accelerator.from_main(lambda: make_folder(self.home / "replay"))
            source = self.find_source()
            needs_base = source is None or find_record(source) is not None
            run = self.build_run(folder, accelerator, StopRequest(), load_pretrained=needs_base)
            if source:
                resume(run, source)
            with use_kernel(load("attention", self.spec.attention)):
                report = replay(run, self.spec.step, logged, picture=self.spec.write_picture)
            report = {"run": str(self.home), "from": source.name if source else "the start", **report}
            path = folder / f"step-{self.spec.step:06d}.json"
            if accelerator.is_main:
                write_atomically(path, json.dumps(report, indent=1))
                tell(report, path)
            return {"replay": path}

    def find_source(self) -> Path | None:
        """The newest checkpoint before the step; None is the start."""
        before = [path for path in list_checkpoints(self.home) if int(path.name.removeprefix("step-")) < self.spec.step]
        return before[-1] if before else None


@define
class Recorder:
    """A denoiser that remembers which timesteps and masks it was called with, by micro-batch."""

    run: TrainRun
    denoiser: Denoiser
    calls: dict[int, tuple[Tensor, Conditioning]] = field(factory=dict)

    def __call__(self, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """Remember, and call."""
        self.calls.setdefault(len(self.run.sample_losses), (timestep.detach(), conditioning))  # losses of those before
        return self.denoiser(latents, timestep, conditioning)


def replay(
    run: TrainRun, step: int, logged: Mapping[int, Mapping[str, Any]], *, picture: bool = False
) -> dict[str, Any]:
    """Make steps up to ``step`` and report on that one.

    Args:
        run: Somewhere before it.
        logged: The records of ``metrics.jsonl`` by step.
        picture: Also write what its samples show.

    Raises:
        ConfigError: Steps hold another number of samples than those of the run did.
    """
    window, batches, departed, begin = LogWindow(run), run.iter_batches(), None, run.counters.step
    run.predict = recorder = Recorder(run, run.predict)
    while run.counters.step < step:
        recorder.calls.clear()
        micro_batches = read_together(run, batches)
        update = make_step(run, micro_batches)
        record, there = window.add(update) or {}, logged.get(update.step, {})
        check_samples(run, there)
        if departed is None and "loss" in record and "loss" in there and not _is_same(record["loss"], there["loss"]):
            departed = update.step
        run.hooks.step_end(run=run, update=update)
        log.info("Step %d of %d", update.step - begin, step - begin)
    if picture:
        write_picture(run, micro_batches, step)
    return {
        "step": step,
        "loss": record.get("loss", run.accelerator.mean(update.loss).item()),
        "logged_loss": there.get("loss"),
        "first_step_with_another_loss": departed,
        "grad_norm": update.grad_norm,
        "logged_grad_norm": there.get("grad_norm"),
        "lr": update.lr,
        "is_left_out": update.is_left_out,
        "samples": gather_samples(run, micro_batches, recorder),
    }


def check_samples(run: TrainRun, logged: Mapping[str, Any]) -> None:
    """Raise if the run had seen another number of samples by now."""
    seen = run.counters.place.samples
    if (was := logged.get("samples", seen)) != seen:
        raise ConfigError(
            f"After step {run.counters.step} the run had seen {was} samples, this one {seen}. "
            "Start with the same --nproc and batch_size as the run."
        )


def gather_samples(run: TrainRun, batches: list[Batch], recorder: Recorder) -> list[dict[str, Any]]:
    """Facts of each sample of the step, those of all processes."""
    own = [
        {"process": run.accelerator.data_rank, "micro_batch": index, **facts}
        for index, batch in enumerate(batches)
        for facts in iter_facts(batch, run.sample_losses[index], *recorder.calls[index])
    ]
    shares = dict(run.accelerator.gather((run.accelerator.data_rank, own)))  # those that share samples have the same
    return [sample for rank in sorted(shares) for sample in shares[rank]]


def iter_facts(batch: Batch, losses: Tensor, timestep: Tensor, conditioning: Conditioning) -> Iterator[dict[str, Any]]:
    """Facts of the samples of a micro-batch, and which could not be read."""
    masks, dropped = conditioning.frame_mask, conditioning.dropped
    for index, key in enumerate(batch.keys):
        yield {
            "path": batch.paths[index],
            "row": key.index,
            "epoch": key.epoch,
            "caption": batch.texts[index],
            "is_caption_dropped": bool(dropped[index]) if dropped is not None else False,
            "timestep": timestep[index].item(),
            "frame_mask": masks[index].int().tolist() if masks is not None else None,
            "loss": losses[index].item(),
        }
    for key, reason in batch.failed:
        yield {"row": key.index, "epoch": key.epoch, "unreadable": reason}


def write_picture(run: TrainRun, batches: list[Batch], step: int) -> None:
    """``step-000123.png``, or one for each process; not of clips whose features were read in place of them."""
    from opensora.core.contact_sheet import write_contact_sheet
    from opensora.core.video_writing import to_uint8

    rows = [
        (f"row {key.index}, loss {loss:.4f}: {text}", to_uint8(video).numpy())
        for batch, losses in zip(batches, run.sample_losses, strict=True)
        if len(batch.video) == len(batch)
        for key, text, video, loss in zip(batch.keys, batch.texts, batch.video, losses.tolist(), strict=False)
    ]
    if rows and run.accelerator.lists_clips:
        share = f"-process-{run.accelerator.data_rank}" if run.accelerator.data_world_size > 1 else ""
        write_contact_sheet(run.folder / f"step-{step:06d}{share}.png", rows, title=f"Step {step}")


def tell(report: Mapping[str, Any], path: Path) -> None:
    """Say what came out, worst samples first."""
    known = [sample for sample in report["samples"] if "loss" in sample]
    worst = sorted(known, key=lambda sample: -math.inf if math.isnan(sample["loss"]) else -sample["loss"])[:5]
    lines = [
        f"  loss {one['loss']:.6g} at timestep {one['timestep']:.4g}: {one['path']} (row {one['row']})" for one in worst
    ]
    log.info("Step %d: loss %.9g; its samples of highest loss:\n%s", report["step"], report["loss"], "\n".join(lines))
    if report["logged_loss"] is None:
        log.info("The run logged no loss at this step (log_every). Report: %s", path)
    elif _is_same(report["loss"], report["logged_loss"]):
        log.info("It is the logged loss, bit for bit. Report: %s", path)
    else:
        log.warning(
            "The logged loss is %.9g. The first step whose loss differs is %s, after %s. Another machine, dtype, number of "
            "processes or config than the run's explains it, and weights that came from elsewhere (load). Report: %s",
            report["logged_loss"], report["first_step_with_another_loss"], report["from"], path,
        )  # fmt: skip


def _is_same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))
