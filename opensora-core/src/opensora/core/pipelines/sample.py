"""The sampling pipeline: videos and images from prompts. The loop is in `opensora.core.pipelines.sample_loop`."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch

from opensora.core.accelerator import Accelerator
from opensora.core.blocks import compile_blocks
from opensora.core.components import build, load
from opensora.core.composing import (
    build_accelerator,
    build_parts,
    check_components,
    choose_text_placement,
    place,
    resolved_values,
    wrap,
)
from opensora.core.config.structure import ComponentConfig
from opensora.core.config.write import write_config
from opensora.core.frame_sources import open_frames
from opensora.core.hooking import Hooks, build_hooks
from opensora.core.pipelines.sample_checks import check_requests
from opensora.core.pipelines.sample_loop import SEAMS, SampleRun, sample
from opensora.core.pipelines.sample_recipes import Repeatable, made_again
from opensora.core.pipelines.sample_requests import Plan, choose_entries, plan_requests, read_plans, refine_plans
from opensora.core.pipelines.sample_spec import SampleSpec
from opensora.core.prompt_syntax import is_url, parse_rounds
from opensora.core.reference_latents import Overlap
from opensora.core.requests import Companion, EndlessRequests, Request
from opensora.core.run_folder import held, logging_to, make_folder, new_run_folder, read_jsonl, write_atomically
from opensora.core.text_cache import CachedTextEncoder
from opensora.core.video_sampler import VideoSampler
from opensora.core.watermark import Watermark

if TYPE_CHECKING:
    from opensora.core.config.evaluate import Config

__all__ = ["Sample", "build_sampler", "settle_prompter"]

log = logging.getLogger(__name__)


class Sample:
    """Sample videos or images."""

    Spec = SampleSpec

    def __init__(self, spec: SampleSpec, *, config: Config) -> None:
        """Check every component's options, and read the prompts.

        Raises:
            ComponentError, ConfigError: A component is missing, or an option or a prompt is wrong.
            DataError: The prompt file can't be used.
        """
        spec = settle_prompter(spec)
        check_components(spec, config.locations)
        build_hooks(default_hooks(spec), spec.hooks, without=spec.without_hooks)
        self.spec, self.config = spec, config
        self.plans = read_plans(choose_entries(spec), spec)
        self.requests = plan_requests(self.plans, spec, Path(spec.save_dir or "samples"))

    def run(self) -> dict[str, Path]:
        """Sample all prompts, write ``summary.json``, and return where the results are."""
        begin = time.perf_counter()
        check_files(self.spec, distinct(self.requests))
        check_requests(self.spec, distinct(self.requests))
        with build_accelerator(self.spec) as accelerator, ExitStack() as stack:
            folder, samples = accelerator.from_main(lambda: take_folders(self.spec, stack))
            planning = time.perf_counter()
            requests = self.plan(samples, accelerator)
            planned = time.perf_counter() - planning
            run = build_run(self.spec, folder, accelerator, requests)
            if self.spec.leaves_out_existing:
                run.there = accelerator.from_main(lambda: frozenset(samples.iterdir()))
            seconds = run.sampler.clock.seconds
            seconds["plan"] = planned
            seconds["load"] = time.perf_counter() - begin - sum(seconds.values())
            try:
                run.hooks.sample_start(run=run)
                sample(run)
                with run.sampler.clock.phase("wait"):
                    accelerator.wait()
            finally:
                with run.sampler.clock.phase("finish"):
                    run.hooks.sample_end(run=run)
            summarize(run, samples, seconds=time.perf_counter() - begin)
            results = {"samples": samples, "contact sheet": folder / "contact-sheet.png"}
            return {name: path for name, path in results.items() if path.exists()}

    def plan(self, samples: Path, accelerator: Accelerator) -> Sequence[Request]:
        """What will be made, in the folder ``samples``, with prompts refined if the config says so."""
        plans = self.plans
        if self.spec.prompter is not None:
            plans = accelerator.from_main(self.refine)
        requests = plan_requests(plans, self.spec, samples)
        if self.spec.repeat is None:
            return requests
        return made_again(requests, self.spec, Repeatable.of(self.spec, accelerator.device))

    def refine(self) -> list[Plan]:
        """The plans with texts as the prompter rewrites them."""
        plans = refine_plans(self.plans, build("prompters", self.spec.prompter))  # type: ignore[arg-type]  # there is one
        for before, after in zip(self.plans, plans, strict=True):
            for old, new in zip(before.rounds.texts, after.rounds.texts, strict=True):
                log.info('Refined "%s" to "%s"', old, new)
        return plans

    def dry_run(self) -> str:
        """What would be sampled, with sizes and an estimate of memory and compute. Loads and writes nothing."""
        from opensora.core.pipelines.dry_run import describe_sampling

        check_requests(self.spec, distinct(self.requests))
        return describe_sampling(self.spec, self.requests)


def settle_prompter(spec: SampleSpec) -> SampleSpec:
    """The config with ``llm_refine`` replaced by the prompter that it stands for."""
    if not spec.llm_refine:
        return spec
    return attrs.evolve(spec, llm_refine=False, prompter=ComponentConfig(type="openai", options={}))


def choose_folders(spec: SampleSpec) -> tuple[Path, Path]:
    """The run folder and the folder of the samples; ``save_dir`` is both.

    Raises:
        MachineError: They can't be written.
    """
    if spec.save_dir is not None:
        return make_folder(Path(spec.save_dir)), Path(spec.save_dir)
    folder = new_run_folder(Path(spec.outputs), spec.name or f"{spec.model.type}-samples")
    return folder, make_folder(folder / "samples")


def take_folders(spec: SampleSpec, stack: ExitStack) -> tuple[Path, Path]:
    """As `choose_folders`; other runs are kept out of them, and what is logged goes there, until ``stack`` is left.

    Raises:
        MachineError: They can't be written, or another run is in them.
    """
    folder, samples = choose_folders(spec)
    stack.enter_context(held(folder))
    stack.enter_context(logging_to(folder / "run.log"))
    write_config(folder / "config.py", resolved_values(spec), f"Again: opensora-run {folder}/config.py")
    if not spec.leaves_out_existing:
        (folder / SEAMS).unlink(missing_ok=True)  # of files that are about to be replaced
    return folder, samples


def check_files(spec: SampleSpec, requests: Iterable[Request]) -> None:
    """See that what the samples are made of can be read, before anything is loaded. Addresses are read when their turn comes.

    Raises:
        DataError: A reference or the watermark can't be read.
    """
    if isinstance(spec.watermark, str):
        Watermark.load(spec.watermark)
    sources = {source for request in requests for source in request.given.resolve(length=1)[0]}
    for source in sorted(source for source in sources if not is_url(source)):
        open_frames(source).close()


def distinct(requests: Sequence[Request]) -> Iterable[Request]:
    """All requests; of endless ones, which are all alike, the first."""
    return requests[:1] if isinstance(requests, EndlessRequests) else requests


def build_run(spec: SampleSpec, folder: Path, accelerator: Accelerator, requests: Sequence[Request]) -> SampleRun:
    """Build every part of the run and place it on the device."""
    hooks = build_hooks(default_hooks(spec), spec.hooks, without=spec.without_hooks)
    sampler = build_sampler(spec, accelerator, hooks, prompts=texts_of(distinct(requests)), keeps_encoder=False)
    return SampleRun(
        spec=spec,
        folder=folder,
        accelerator=accelerator,
        sampler=sampler,
        requests=requests,
        hooks=hooks,
        repeatable=Repeatable.of(spec, accelerator.device),
    )


def build_sampler(
    spec: SampleSpec, accelerator: Accelerator, hooks: Hooks, *, prompts: Iterable[str], keeps_encoder: bool
) -> VideoSampler:
    """The parts of a config, placed on the device, with the prompts encoded ahead.

    Args:
        spec: Names the components.
        accelerator: Where they run.
        hooks: Those that take part.
        prompts: All texts that are known to be needed.
        keeps_encoder: Whether others may be needed later, so that the text encoder must stay.
    """
    text_device, text_dtype = choose_text_placement(spec.text_encoder, accelerator)
    parts = build_parts(spec, size_of=lambda: spec.size)
    if spec.model.options.get("from_pretrained") is None:
        log.warning("model.from_pretrained is not set: %s has random weights, and makes noise.", spec.model.type)
    if spec.compile:
        log.info("Compiling of %d blocks, when they are first used", compile_blocks(parts.denoiser))
    hooks.denoiser_built(denoiser=parts.denoiser, spec=spec)
    place(parts.text_encoder, accelerator, text_device, text_dtype)
    guided = parts.scheduler.guide(accelerator.predictor(parts.denoiser.requires_grad_(False).eval()))
    sampler = VideoSampler(
        parts=parts,
        accelerator=accelerator,
        hooks=hooks,
        guided=guided,
        denoiser=wrap(guided, hooks, spec),
        kernel=load("attention", spec.attention),
        overlap=Overlap.of(spec),
        scheduler_config=spec.scheduler,
    )
    del parts  # the sampler alone holds the text encoder, so that it can be released
    with sampler.clock.phase("text"):
        encode_prompts(sampler, spec, list(prompts), keeps_encoder=keeps_encoder)
    accelerator.place(sampler.parts.denoiser)
    place(sampler.parts.vae, accelerator)
    return sampler


def encode_prompts(sampler: VideoSampler, spec: SampleSpec, prompts: Sequence[str], *, keeps_encoder: bool) -> None:
    """Encode prompts ahead, and release the text encoder, if the config says so and the memory suffices."""
    encoder = CachedTextEncoder(sampler.parts.text_encoder, capacity=int(spec.text_cache_gib * 2**30))
    sampler.parts = attrs.evolve(sampler.parts, text_encoder=encoder)
    count = len(set(prompts))
    if not count or not encoder.capacity:
        return
    log.info("Encoding %d prompt%s", count, "s" if count > 1 else "")
    if not encoder.remember(prompts):
        log.info(
            "The embeddings of %d prompts don't fit text_cache_gib = %g: the text encoder stays in memory",
            count,
            spec.text_cache_gib,
        )
    elif spec.release_text_encoder and not keeps_encoder:
        encoder.release()


def texts_of(requests: Iterable[Request]) -> list[str]:
    """All texts that are to be encoded."""
    texts: list[str] = []
    for request in requests:
        for one in (Companion(request.text, request.negative_prompt), *request.companions):
            texts += parse_rounds(one.text).texts
            texts += [] if one.negative_prompt is None else [one.negative_prompt]
    return texts


def default_hooks(spec: SampleSpec) -> list[ComponentConfig]:
    """The hooks that take part unless ``without_hooks`` says otherwise."""
    progress = [ComponentConfig(type="progress", options={"steps": spec.verbose > 1})] if spec.verbose else []
    preview = [ComponentConfig(type="sample-previews", options={"every": spec.preview})] if spec.preview else []
    return [*progress, *preview, ComponentConfig(type="contact-sheet", options={})]


def summarize(run: SampleRun, samples: Path, *, seconds: float) -> None:
    """Say, and write down, what was made, where, and where the main process's time went."""
    counts = torch.tensor([run.num_saved, run.num_skipped], dtype=torch.float64, device=run.accelerator.device)
    saved, left_out = (run.accelerator.mean(counts) * run.accelerator.world_size).round().int().tolist()
    reports = run.hooks.sample_report(run=run)
    if not run.accelerator.is_main:
        return
    phases = {name: round(value, 3) for name, value in run.sampler.clock.seconds.items()}
    summary: dict[str, Any] = {
        "samples": str(samples),
        "saved": saved,
        "left_out_existing": left_out,
        "seconds": round(seconds, 3),
        "seconds_by_phase": phases,
    }
    seams = {str(record["file"]): record["seams"] for record in read_jsonl(run.folder / SEAMS)}
    if seams:
        summary["seams"] = seams
    for report in reports:
        summary |= report
    write_atomically(run.folder / "summary.json", json.dumps(summary, indent=1))
    listed = ", ".join(f"{name} {value:.1f} s" for name, value in phases.items() if value >= 0.05)
    skipped = f" ({left_out} were there already)" if left_out else ""
    log.info("%d of %d samples%s in %s: %s", saved, len(run.requests), skipped, samples, listed)
    if seams:
        worst = max(seam["ratio"] for each in seams.values() for seam in each)  # type: ignore[attr-defined]  # of json
        log.info("Seams between rounds: the largest jump is %.1f times the usual change from frame to frame", worst)
