"""What sampling does on the quickstart's world: grades, given frames, motion that goes on, batches, memory and time.

    python benchmarks/sampling.py [RUN_FOLDER]

RUN_FOLDER is that of `opensora-run quickstart`; without one the quickstart is run first, in a temporary folder. Real clips
that the model has never seen give the frames to start from. Prints a table of the facts, and one line of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from opensora.core.config.write import write_config
from opensora.core.sampling import SamplingPipeline, load
from opensora.core.video import write_image, write_video
from opensora.data.digits.clips import DigitClip, caption_of, captions, make_clips
from opensora.data.digits.grader import Grader

NUM_CLIPS = 80
GIVEN = 2  # frames of a clip that is to be extended


def main() -> None:
    """Measure and print."""
    with TemporaryDirectory() as temporary, quickstart(sys.argv[1:], Path(temporary)) as run_folder:
        folder = Path(temporary)
        config = folder / "config.py"
        write_config(config, sampling_config(run_folder), "The quickstart's model.")
        pipeline = load(config)
        clips = list(make_clips(NUM_CLIPS, seed=[7, 99], split="grader"))
        facts = {
            **grades(pipeline),
            **image_to_video(pipeline, clips, folder),
            **extension(pipeline, clips, folder),
            **solvers(config),
            **batches(pipeline),
            **long_videos(config, folder),
            **shares_of_time(folder),
        }
    for name, value in facts.items():
        print(f"{name:64} {value}")
    print(json.dumps(facts))


@contextmanager
def quickstart(arguments: Sequence[str], temporary: Path) -> Iterator[Path]:
    """The folder of a quickstart that was run, or is run now."""
    if arguments:
        yield Path(arguments[0])
        return
    run("quickstart", "--run-folder", temporary / "quickstart")
    yield temporary / "quickstart"


def sampling_config(run_folder: Path) -> dict[str, Any]:
    """The quickstart's config for sampling, of its own model."""
    from opensora.core.config.evaluate import evaluate

    values = evaluate(run_folder / "samples" / "config.py").values
    values["model"]["from_pretrained"] = str((run_folder / "train").resolve())
    return {**values, "num_sample": 1, "batch_size": 40}


def run(*arguments: object) -> float:
    """``opensora-run``; returns the highest resident memory of the process, in MiB."""
    script = (
        "import resource, sys; from opensora.core.commands.opensora_run import main; code = main(sys.argv[1:]);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
    )
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return int(done.stdout.split()[-1]) / 1024


def graded(videos: Sequence[np.ndarray[Any, Any]], wanted: Sequence[tuple[int, str]]) -> dict[str, float]:
    """Shares that show the digit and the direction."""
    grader = Grader()
    read = [grader.read(frames) for frames in videos]
    digits = [reading.digit == digit for reading, (digit, _) in zip(read, wanted, strict=True)]
    directions = [reading.direction == direction for reading, (_, direction) in zip(read, wanted, strict=True)]
    return {"digit": float(np.mean(digits)), "direction": float(np.mean(directions))}


def frames_of(pipeline: SamplingPipeline, prompts: Sequence[str], **settings: Any) -> list[np.ndarray[Any, Any]]:
    """The videos of prompts."""
    return [video.frames.numpy() for video in pipeline(prompts, **settings)]


def prefixed(name: str, shares: Mapping[str, float]) -> dict[str, float]:
    """Facts by name."""
    return {f"{name}: {key}": value for key, value in shares.items()}


def grades(pipeline: SamplingPipeline) -> dict[str, float]:
    """Text to video: two samples of every caption."""
    kinds = captions()
    videos = frames_of(pipeline, [caption for _, _, caption in kinds for _ in range(2)])
    return prefixed("text to video", graded(videos, [kind[:2] for kind in kinds for _ in range(2)]))


def image_to_video(pipeline: SamplingPipeline, clips: Sequence[DigitClip], folder: Path) -> dict[str, float]:
    """The first frame of real clips, animated: as captioned, without the digit in the caption, and with a wrong one."""
    facts: dict[str, float] = {}
    texts = {
        "image to video": [clip.caption for clip in clips],
        "image to video, caption without digit": [f"a handwritten moving {clip.direction}" for clip in clips],
        "image to video, caption of another digit": [
            caption_of((clip.digit + 5) % 10, clip.direction) for clip in clips
        ],
    }
    errors = []
    for name, prompts in texts.items():
        videos = []
        for index, (clip, prompt) in enumerate(zip(clips, prompts, strict=True)):
            path = folder / f"{index:03d}.png"
            write_image(path, clip.frames[0])
            videos.append(pipeline(prompt, image=str(path), seed=index).frames.numpy())
            errors.append(np.abs(videos[-1][0] / 255 - clip.frames[0] / 255).mean())
        facts |= prefixed(name, graded(videos, [(clip.digit, clip.direction) for clip in clips]))
    return {**facts, "image to video: largest difference of the first frame": float(np.max(errors))}


def extension(pipeline: SamplingPipeline, clips: Sequence[DigitClip], folder: Path) -> dict[str, float]:
    """The first two frames of real clips, extended with and without a caption; graded on the new frames alone."""
    facts: dict[str, float] = {}
    for name, prompts in (
        ("extension, new frames", [clip.caption for clip in clips]),
        ("extension without caption, new frames", ["" for _ in clips]),
    ):
        videos = []
        for index, (clip, prompt) in enumerate(zip(clips, prompts, strict=True)):
            path = folder / f"{index:03d}.mp4"
            write_video(path, clip.frames[:GIVEN], 8, crf=0)
            video = pipeline(prompt, extend=str(path), seed=index)
            videos.append(video.frames.numpy()[GIVEN:])
        facts |= prefixed(name, graded(videos, [(clip.digit, clip.direction) for clip in clips]))
    return facts


def solvers(config: Path) -> dict[str, float]:
    """Euler with 20 steps against second-order solvers with 10, on 160 samples each."""
    kinds = captions()
    facts: dict[str, float] = {}
    for solver, steps, shift in (("euler", 20, 1.0), ("euler", 10, 1.0), ("dpm++2m", 10, 1.0), ("unipc", 10, 2.0)):
        options = {"solver": solver, "num_sampling_steps": steps, "sampling_shift": shift}
        pipeline = load(config, scheduler=options)
        videos = frames_of(pipeline, [caption for _, _, caption in kinds for _ in range(4)])
        wanted = [kind[:2] for kind in kinds for _ in range(4)]
        facts |= prefixed(f"rflow, {solver}, {steps} steps", graded(videos, wanted))
    return facts


def batches(pipeline: SamplingPipeline) -> dict[str, float]:
    """Eight videos together and one by one: the largest difference of their latents."""
    prompts = [caption for _, _, caption in captions()[:8]]
    together = pipeline.start(prompts).finish()
    alone = [pipeline.start(prompt, seed=pipeline.spec.seed + index).finish() for index, prompt in enumerate(prompts)]
    return {"batch of 8 against 8 of 1: largest difference": float((together - torch.cat(alone)).abs().max())}


def long_videos(config: Path, folder: Path) -> dict[str, float]:
    """The peak memory of 20 rounds over that of 5. At 128 x 128, where frames weigh something; one step suffices."""
    flags = ("--prompt", "a handwritten one moving up", "--image-size", 128, 128, "--num-sampling-steps", 1)
    peaks = {loop: run(config, *flags, "--loop", loop, "--save-dir", folder / f"long{loop}") for loop in (5, 20)}
    seams = json.loads((folder / "long5" / "summary.json").read_text())["seams"]["sample_0000.mp4"]
    return {
        "5 rounds: peak memory in MiB": round(peaks[5]),
        "20 rounds / 5 rounds: peak memory": round(peaks[20] / peaks[5], 3),
        "5 rounds: seams measured": len(seams),
    }


def shares_of_time(folder: Path) -> dict[str, float]:
    """Where a run's time goes: a STDiT3 of 25 million parameters with a narrow video autoencoder, four videos."""
    config = folder / "mid.py"
    config.write_text(
        '"""A model of a size that takes a while."""\n'
        'model = dict(type="STDiT3", hidden_size=384, depth=6, num_heads=6, patch_size=(1, 2, 2))\n'
        'scheduler = dict(type="rflow", num_sampling_steps=10, cfg_scale=4.0)\n'
        "num_frames = 8\nimage_size = (64, 64)\nfps = 8\n"
    )
    run(config, "--prompt", "a", "b", "c", "d", "--batch-size", 2, "--save-dir", folder / "mid")
    summary = json.loads((folder / "mid" / "summary.json").read_text())
    seconds = summary["seconds_by_phase"]
    working = sum(seconds[name] for name in ("text", "denoise", "decode"))
    return {
        "time after loading in denoiser, VAE and text encoder": round(
            working / (summary["seconds"] - seconds["load"]), 3
        ),
        "phases / wall time": round(sum(seconds.values()) / summary["seconds"], 3),
    }


if __name__ == "__main__":
    main()
