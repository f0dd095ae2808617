"""The sampling pipeline: videos and images from prompts. The loop is in `opensora.core.pipelines.sample_loop`."""

from __future__ import annotations

import json
import logging
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import torch

from opensora.core.accelerator import Accelerator
from opensora.core.attention import use_kernel
from opensora.core.components import load
from opensora.core.composing import (
    build_accelerator,
    build_parts,
    check_components,
    choose_text_placement,
    place,
    resolved_values,
    wrap,
)
from opensora.core.config.names import find_text
from opensora.core.config.structure import ComponentConfig
from opensora.core.config.write import write_config
from opensora.core.errors import ConfigError
from opensora.core.hooking import build_hooks
from opensora.core.pipelines.sample_loop import SampleRun, sample
from opensora.core.pipelines.sample_spec import SampleSpec
from opensora.core.prompts import Request, plan_requests, read_prompts
from opensora.core.run_folder import held, logging_to, make_folder, new_run_folder, write_atomically
from opensora.core.text_cache import CachedTextEncoder

if TYPE_CHECKING:
    from opensora.core.config.evaluate import Config

__all__ = ["Sample"]

log = logging.getLogger(__name__)


class Sample:
    """Sample videos or images."""

    Spec = SampleSpec

    def __init__(self, spec: SampleSpec, *, config: Config) -> None:
        """Check every component's options, and read the prompts.

        Raises:
            ComponentError, ConfigError: A component is missing or an option is wrong.
            DataError: The prompt file can't be used.
        """
        check_components(spec, config.locations)
        build_hooks(default_hooks(spec), spec.hooks, without=spec.without_hooks)
        self.spec, self.config = spec, config
        self.prompts = choose_prompts(spec)

    def run(self) -> dict[str, Path]:
        """Sample all prompts, write ``summary.json``, and return where the results are."""
        begin = time.perf_counter()
        if unbuilt := self.spec.unbuilt(self.prompts):
            raise ConfigError(f"{' and '.join(unbuilt)}: not built yet. Text to video and text to image are.")
        with build_accelerator(self.spec) as accelerator, ExitStack() as stack:
            folder, samples = accelerator.from_main(lambda: choose_folders(self.spec))
            if accelerator.is_main:
                stack.enter_context(held(folder))
                stack.enter_context(logging_to(folder / "run.log"))
                write_config(
                    folder / "config.py", resolved_values(self.spec), f"Again: opensora-run {folder}/config.py"
                )
            run = build_run(self.spec, folder, accelerator, self.plan(samples))
            run.seconds = {"load": time.perf_counter() - begin - sum(run.seconds.values()), **run.seconds}
            try:
                run.hooks.sample_start(run=run)
                with use_kernel(load("attention", self.spec.attention)):
                    sample(run)
                accelerator.barrier()
            finally:
                run.hooks.sample_end(run=run)
            summarize(run, samples, seconds=time.perf_counter() - begin)
            results = {"samples": samples, "contact sheet": folder / "contact-sheet.png"}
            return {name: path for name, path in results.items() if path.exists()}

    def plan(self, samples: Path) -> list[Request]:
        """What will be made, in the folder ``samples``."""
        spec = self.spec
        return plan_requests(
            self.prompts,
            samples,
            extension=".png" if spec.size[0] == 1 else ".mp4",
            seed=spec.seed,
            first_index=spec.start_index or 0,
            num_sample=spec.num_sample,
            sample_name=spec.sample_name,
            prompt_as_path=spec.prompt_as_path,
            aes=spec.aes,
            flow=spec.flow,
            camera_motion=spec.camera_motion,
        )

    def dry_run(self) -> str:
        """What would be sampled, with sizes and an estimate of memory and compute. Loads and writes nothing."""
        from opensora.core.pipelines.dry_run import describe_sampling

        return describe_sampling(self.spec, self.prompts)


def choose_prompts(spec: SampleSpec) -> list[str]:
    """The prompts of the config, or of its prompt file, cut to ``start_index`` and ``end_index``.

    Raises:
        ConfigError: There is none.
        DataError: The prompt file can't be used.
    """
    if spec.prompt is not None:
        prompts = [spec.prompt] if isinstance(spec.prompt, str) else list(spec.prompt)
        source = "prompt"
    elif spec.prompt_path is not None:
        path = find_text(spec.prompt_path) or Path(spec.prompt_path)
        prompts, source = read_prompts(path), spec.prompt_path
    else:
        raise ConfigError('There is no prompt. Give --prompt "a wave" or --prompt-path prompts.txt.')
    chosen = prompts[spec.start_index : spec.end_index]
    if not chosen:
        raise ConfigError(
            f"No prompt is left: {source} has {len(prompts)}, start_index is {spec.start_index}, end_index {spec.end_index}."
        )
    return chosen


def choose_folders(spec: SampleSpec) -> tuple[Path, Path]:
    """The run folder and the folder of the samples; ``save_dir`` is both.

    Raises:
        MachineError: They can't be written.
    """
    if spec.save_dir is not None:
        return make_folder(Path(spec.save_dir)), Path(spec.save_dir)
    folder = new_run_folder(Path(spec.outputs), spec.name or f"{spec.model.type}-samples")
    return folder, make_folder(folder / "samples")


def build_run(spec: SampleSpec, folder: Path, accelerator: Accelerator, requests: list[Request]) -> SampleRun:
    """Build every part of the run and place it on the device."""
    hooks = build_hooks(default_hooks(spec), spec.hooks, without=spec.without_hooks)
    text_device, text_dtype = choose_text_placement(spec.text_encoder, accelerator)
    parts = build_parts(spec, size_of=lambda: spec.size)
    if spec.model.options.get("from_pretrained") is None:
        log.warning("model.from_pretrained is not set: %s has random weights, and makes noise.", spec.model.type)
    hooks.denoiser_built(denoiser=parts.denoiser, spec=spec)
    place(parts.text_encoder, accelerator, text_device, text_dtype)
    run = SampleRun(
        spec=spec,
        folder=folder,
        accelerator=accelerator,
        parts=parts,
        predict=wrap(accelerator.predictor(parts.denoiser.requires_grad_(False).eval()), hooks, spec),
        requests=requests,
        hooks=hooks,
    )
    del parts  # the run alone holds the text encoder, so that it can be released
    if spec.text_cache_gib:
        with run.phase("text"):
            encode_prompts(run)
    accelerator.place(run.parts.denoiser)
    place(run.parts.vae, accelerator)
    return run


def encode_prompts(run: SampleRun) -> None:
    """Encode this process's prompts ahead, and release the text encoder, if the config says so and the memory suffices."""
    encoder = CachedTextEncoder(run.parts.text_encoder, capacity=int(run.spec.text_cache_gib * 2**30))
    texts = [request.text for requests in run.iter_batches() for request in requests]
    run.parts = attrs.evolve(run.parts, text_encoder=encoder)
    log.info("Encoding %d prompts", len(set(texts)))
    if not encoder.remember(texts):
        log.info(
            "The embeddings of %d prompts don't fit text_cache_gib = %g: the text encoder stays in memory",
            len(set(texts)),
            run.spec.text_cache_gib,
        )
    elif run.spec.release_text_encoder:
        encoder.release()


def default_hooks(spec: SampleSpec) -> list[ComponentConfig]:
    """The hooks that take part unless ``without_hooks`` says otherwise."""
    progress = [ComponentConfig(type="progress", options={"steps": spec.verbose > 1})] if spec.verbose else []
    return [*progress, ComponentConfig(type="contact-sheet", options={})]


def summarize(run: SampleRun, samples: Path, *, seconds: float) -> None:
    """Say, and write down, what was made, where, and where the main process's time went."""
    counts = torch.tensor([run.num_saved, run.num_skipped], dtype=torch.float64, device=run.accelerator.device)
    saved, left_out = (run.accelerator.mean(counts) * run.accelerator.world_size).round().int().tolist()
    if not run.accelerator.is_main:
        return
    phases = {name: round(value, 3) for name, value in run.seconds.items()}
    summary = {
        "samples": str(samples),
        "saved": saved,
        "left_out_existing": left_out,
        "seconds": round(seconds, 3),
        "seconds_by_phase": phases,
    }
    write_atomically(run.folder / "summary.json", json.dumps(summary, indent=1))
    listed = ", ".join(f"{name} {value:.1f} s" for name, value in phases.items())
    skipped = f" ({left_out} were there already)" if left_out else ""
    log.info("%d of %d samples%s in %s: %s", saved, len(run.requests), skipped, samples, listed)
