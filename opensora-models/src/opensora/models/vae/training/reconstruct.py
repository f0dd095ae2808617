"""The pipeline ``sample-vae``: encode and decode a dataset, write both versions, and measure how alike they are.

samples/originals/007.mp4            what was encoded
samples/reconstructions/007.mp4      what came back
samples/image_vae/007.mp4            what came back of the image autoencoder alone, where there is one
samples/side_by_side/007.mp4         all of them
reconstructions.jsonl                PSNR, SSIM, LPIPS and losses of each clip
summary.json                         their means, and the latents' statistics
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from attrs import define, field
from torch import Tensor

from opensora.core.accelerator import Accelerator
from opensora.core.attention import use_kernel
from opensora.core.components import build, construct, load, structure_spec
from opensora.core.composing import build_accelerator, check_components, resolved_values
from opensora.core.config.structure import ComponentConfig
from opensora.core.config.write import write_config
from opensora.core.errors import ShapeError
from opensora.core.hooking import Hooks, build_hooks
from opensora.core.loading import Batch, UnreadableFiles, iter_batches
from opensora.core.orders import Place, SampleOrder, Slicing
from opensora.core.pipelines.sample_loop import SavedSample
from opensora.core.pipelines.train import clip_size, new_listing
from opensora.core.protocols import Dataset
from opensora.core.randomness import SampleKey
from opensora.core.requests import Target
from opensora.core.run_folder import (
    append_jsonl,
    held,
    logging_to,
    make_folder,
    new_run_folder,
    read_jsonl,
    write_atomically,
)
from opensora.core.video import to_uint8, write_image, write_video
from opensora.models.vae.training.measures import ChannelStatistics, Measures, Rebuilt, choose_lpips
from opensora.models.vae.training.specs import SampleVAESpec

if TYPE_CHECKING:
    from opensora.core.config.evaluate import Config

__all__ = [
    "OnePass",
    "ReconstructionRun",
    "SampleVAE",
    "build_run",
    "choose_folder",
    "default_hooks",
    "rebuild",
    "reconstruct",
    "save",
    "summarize",
]

log = logging.getLogger(__name__)
RECORDS = "reconstructions.jsonl"


class SampleVAE:
    """Reconstruct a dataset with an autoencoder, and measure how well."""

    Spec = SampleVAESpec

    def __init__(self, spec: SampleVAESpec, *, config: Config) -> None:
        """Check every component's options.

        Raises:
            ComponentError, ConfigError: A component is missing or an option is wrong.
        """
        check_components(spec, config.locations)
        build_hooks(default_hooks(spec), spec.hooks, without=spec.without_hooks)
        self.spec, self.config = spec, config

    def run(self) -> dict[str, Path]:
        """Reconstruct all clips, and return where the results are."""
        begin = time.perf_counter()
        with build_accelerator(self.spec) as accelerator, ExitStack() as stack:
            folder = accelerator.from_main(lambda: choose_folder(self.spec))
            if accelerator.is_main:
                stack.enter_context(held(folder))
                stack.enter_context(logging_to(folder / "run.log"))
                (folder / RECORDS).unlink(missing_ok=True)
                write_config(
                    folder / "config.py", resolved_values(self.spec), f"Again: opensora-run {folder}/config.py"
                )
            run = build_run(self.spec, folder, accelerator)
            try:
                run.hooks.sample_start(run=run)
                with use_kernel(load("attention", self.spec.attention)):
                    reconstruct(run)
                accelerator.barrier()
                statistics = run.statistics.over_processes(accelerator)
                if accelerator.is_main:
                    summarize(run, statistics, seconds=time.perf_counter() - begin)
            finally:
                run.hooks.sample_end(run=run)
            results = {
                "samples": folder / "samples",
                "measures": folder / RECORDS,
                "summary": folder / "summary.json",
                "contact sheet": folder / "contact-sheet.png",
            }
            return {name: path for name, path in results.items() if path.exists()}

    def dry_run(self) -> str:
        """What would be encoded and decoded. Loads and writes nothing."""
        from opensora.models.vae.training.dry_run import describe_reconstruction

        return describe_reconstruction(self.spec)


@define
class OnePass(SampleOrder):
    """The samples in the order of the dataset, once."""

    def iter_micro_batches(self, slicing: Slicing, place: Place) -> Iterator[list[SampleKey]]:
        """One process's batches; the last may be smaller."""
        size = slicing.batch_size
        for start in range(slicing.rank * size, self.num_samples, slicing.world_size * size):
            yield [SampleKey(self.seed, index) for index in range(start, min(start + size, self.num_samples))]


@define(kw_only=True, eq=False)
class ReconstructionRun:
    """Everything that a run consists of. Hooks get it, like one that samples."""

    spec: SampleVAESpec
    folder: Path
    accelerator: Accelerator
    vae: Any
    dataset: Dataset
    order: OnePass
    unreadable: UnreadableFiles
    measures: Measures
    no_lpips: str
    """Why there is no LPIPS; empty if there is."""
    hooks: Hooks
    requests: Sequence[Target]
    """The files that show original and reconstruction beside each other."""
    statistics: ChannelStatistics = field(factory=ChannelStatistics)

    def iter_batches(self) -> Iterator[Batch]:
        """This process's share of the clips."""
        slicing = Slicing(
            batch_size=self.spec.batch_size, world_size=self.accelerator.world_size, rank=self.accelerator.rank
        )
        return iter_batches(self.dataset, self.order, slicing, num_workers=self.spec.num_workers)


def choose_folder(spec: SampleVAESpec) -> Path:
    """The run folder.

    Raises:
        MachineError: It can't be written.
    """
    if spec.save_dir is not None:
        return make_folder(Path(spec.save_dir))
    return new_run_folder(Path(spec.outputs), spec.name or f"{spec.model.type}-reconstructions")


def build_run(spec: SampleVAESpec, folder: Path, accelerator: Accelerator) -> ReconstructionRun:
    """Build every part of the run and place it on the device."""
    dataset: Dataset = build("datasets", spec.dataset, needs_text=False)
    size = clip_size(dataset, spec.seed)
    torch.manual_seed(spec.seed)  # parts without weights are random, but the same in all processes
    vae = construct(load("vaes", spec.model.type), structure_spec("vaes", spec.model))
    vae.latent_size(size)  # refuses what is too small
    accelerator.place(vae.requires_grad_(False).eval())
    lpips, no_lpips = choose_lpips(spec.perceptual_weights, size)
    if no_lpips and accelerator.is_main:
        log.warning("LPIPS is left out: %s", no_lpips)
    count = min(len(dataset), spec.num_samples or len(dataset))
    extension = ".png" if size[0] == 1 else ".mp4"
    files = [folder / "samples" / "side_by_side" / f"{index:03d}{extension}" for index in range(count)]
    return ReconstructionRun(
        spec=spec,
        folder=folder,
        accelerator=accelerator,
        vae=vae,
        dataset=dataset,
        order=OnePass(count, spec.seed),
        unreadable=UnreadableFiles(new_listing(folder, accelerator), len(dataset), spec.max_unreadable),
        measures=Measures.of(spec, None if lpips is None else lpips.to(accelerator.device)),
        no_lpips=no_lpips,
        hooks=build_hooks(default_hooks(spec), spec.hooks, without=spec.without_hooks),
        requests=[Target(prompt=file.stem, path=file) for file in files],
    )


def default_hooks(spec: SampleVAESpec) -> list[ComponentConfig]:
    """The hooks that take part unless ``without_hooks`` says otherwise."""
    progress = [ComponentConfig(type="progress", options={})] if spec.verbose else []
    return [*progress, ComponentConfig(type="contact-sheet", options={})]


@torch.inference_mode()
def reconstruct(run: ReconstructionRun) -> None:
    """Encode, decode, measure and write this process's share, batch by batch."""
    for number, batch in enumerate(run.iter_batches(), start=1):
        run.unreadable.record(batch)
        if not len(batch):
            continue
        video = batch.video.to(run.accelerator.device)
        rebuilt = rebuild(run, video, batch)
        if rebuilt.video.shape != video.shape:
            height, width = rebuilt.video.shape[3:]
            raise ShapeError(
                f"Of {video.shape[3]}x{video.shape[4]} pixels {height}x{width} come back, so they can't be compared. "
                f"Set dataset.image_size=({height}, {width})."
            )
        run.statistics.add(rebuilt.latents)
        for row, measured in enumerate(run.measures.of_each(video, rebuilt)):
            save(run, batch, row, video, rebuilt, measured)
        if number % run.spec.log_stats_every == 0 and run.accelerator.is_main:
            log.info("%d clips of this process. %s", run.measures.count, run.measures)
            if run.spec.cal_stats:
                log.info("Latents: %s", run.statistics)


def rebuild(run: ReconstructionRun, video: Tensor, batch: Batch) -> Rebuilt:
    """What the autoencoder makes of videos [B, 3, T, H, W]; of all that it is made of, where it can tell."""
    draws = batch.draws(run.accelerator.device) if run.spec.sample_posterior else None
    num_frames = video.shape[2]
    if not hasattr(run.vae, "reconstruct"):
        latents = run.vae.encode(video, draws=draws)
        return Rebuilt(video=run.vae.decode(latents, num_frames=num_frames).float(), latents=latents.float())
    result = run.vae.reconstruct(video, draws=draws)
    return Rebuilt(
        video=result.x_rec.float(),
        latents=result.z.float(),
        posterior=result.posterior,
        image_latents=result.x_z.float(),
        rebuilt_image_latents=result.x_z_rec.float(),
        of_image_vae=run.vae.spatial_vae.decode(result.x_z, num_frames=num_frames).float(),
    )


def save(
    run: ReconstructionRun, batch: Batch, row: int, video: Tensor, rebuilt: Rebuilt, measured: dict[str, float]
) -> None:
    """Write the files and the record of one clip."""
    index, fps = batch.keys[row].index, batch.conditioning.fps
    request = run.requests[index]
    versions = {"originals": video[row], "reconstructions": rebuilt.video[row]}
    if rebuilt.of_image_vae is not None:
        versions["image_vae"] = rebuilt.of_image_vae[row]
    frames = {name: to_uint8(each.cpu()) for name, each in versions.items()}
    beside = torch.cat(list(frames.values()), dim=2)
    if run.spec.save_videos:
        for name, each in {**frames, "side_by_side": beside}.items():
            path = run.folder / "samples" / name / request.path.name
            if len(each) == 1:
                write_image(path, each[0])
            else:
                write_video(path, each, 24.0 if fps is None else float(fps[row]), crf=run.spec.crf)
    record = {"index": index, "path": batch.paths[row], "num_frames": len(beside), **measured}
    append_jsonl(run.folder / RECORDS, record)
    run.hooks.sample_saved(run=run, sample=SavedSample(request=request))


def summarize(run: ReconstructionRun, statistics: ChannelStatistics, *, seconds: float) -> None:
    """Say, and write down, how alike originals and reconstructions are over all processes' clips."""
    records = sorted(read_jsonl(run.folder / RECORDS), key=lambda record: int(str(record["index"])))
    write_atomically(run.folder / RECORDS, "".join(json.dumps(record) + "\n" for record in records))
    names = [name for name in records[0] if name not in ("index", "path", "num_frames")] if records else []
    columns = {name: torch.tensor([float(str(each[name])) for each in records], dtype=torch.float64) for name in names}
    means = {name: {"mean": float(each.mean()), "std": float(each.std(correction=0))} for name, each in columns.items()}
    summary: dict[str, Any] = {
        "samples": len(records),
        "left_out": run.order.num_samples - len(records),
        "equal": int((columns["psnr"] >= 100).sum()) if records else 0,
        "measures": means,
        "without": {"lpips": run.no_lpips} if run.no_lpips else {},
        "seconds": round(seconds, 3),
    }
    if run.spec.cal_stats:
        summary["latents"] = statistics.as_dict()
        log.info("Latents: %s", statistics)
    write_atomically(run.folder / "summary.json", json.dumps(summary, indent=1))
    listed = ", ".join(f"{name} {each['mean']:.4f}" for name, each in means.items())
    log.info("%d of %d clips in %.1f s: %s", len(records), run.order.num_samples, seconds, listed)
    psnrs = {int(str(record["index"])): float(str(record["psnr"])) for record in records}
    run.requests = [
        Target(prompt=f"{each.prompt}: PSNR {psnrs[index]:.2f} dB", path=each.path)
        for index, each in enumerate(run.requests)
        if index in psnrs
    ]
