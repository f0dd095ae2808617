"""What decoding and encoding a video takes: with its length, and with tiles.

    python benchmarks/vae_memory.py

Each figure is the highest resident memory of a process of its own over what it held before the call, with weights loaded.
The video autoencoder of Open-Sora 1.2 is taken with its default options, at a fraction of its width and with random weights;
its input and output are streamed, as `opensora.models.vae.video_vae.VideoAutoencoderPipeline.iter_decode` has it. Tiles are
measured on one large image, with the difference that they make.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor

from opensora.core import components

CHUNK = 17
HEIGHT, WIDTH = 192, 256
LEVELS = {
    "block_out_channels": (32, 64, 64, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 8,
}
TEMPORAL = {"filters": 32, "num_res_blocks": 2, "num_groups": 8}


def build(folder: Path, **options: Any) -> Any:
    """The autoencoder of 1.2, narrow."""
    parts = {
        "vae_2d": {"type": "VideoAutoencoderKL", "from_pretrained": str(folder)},
        "vae_temporal": {"type": "VAE_Temporal_SD", **TEMPORAL},
    }
    torch.manual_seed(0)
    return components.build("vaes", {"type": "OpenSoraVAE_V1_2", **parts, **options})


def save_image_vae(folder: Path) -> None:
    """One with random weights, as diffusers writes it."""
    from diffusers import AutoencoderKL

    network: Any = AutoencoderKL(**LEVELS)  # type: ignore[no-untyped-call]  # diffusers has no types
    network.save_pretrained(folder)


def memory_bytes() -> int:
    """What this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


class Peak:
    """The most memory held inside, over what was held at the start, in MiB."""

    def __enter__(self) -> Peak:
        self.start = self.highest = memory_bytes()
        self.stop = Event()
        self.watch = Thread(target=self._watch)
        self.watch.start()
        return self

    def _watch(self) -> None:
        while not self.stop.wait(0.001):
            self.highest = max(self.highest, memory_bytes())

    def __exit__(self, *error: object) -> None:
        self.stop.set()
        self.watch.join()

    @property
    def mib(self) -> float:
        """The result."""
        return (self.highest - self.start) / 2**20


def pieces(num_frames: int) -> Iterator[Tensor]:
    """A video as a reader gives it, a few frames at a time."""
    for start in range(0, num_frames, 8):
        yield torch.rand(1, 3, min(8, num_frames - start), HEIGHT, WIDTH) * 2 - 1


@torch.no_grad()
def measure(what: str, num_frames: int, folder: Path) -> float:
    """Peak MiB of one of the calls below, over that of the loaded process."""
    tiled = what.endswith("-tiled")
    vae = build(folder, tile_size=128 if tiled else None)
    if what.startswith("image"):
        latents = torch.randn(1, 4, 1, 96, 128)
        with Peak() as peak:
            vae.decode(latents, num_frames=1)
        return peak.mib
    latents = torch.randn(1, 4, *vae.latent_size((num_frames, HEIGHT, WIDTH)))
    vae.decode(latents[:, :, :1], num_frames=1)  # libraries allocate at their first call
    with Peak() as peak:
        if what == "decode":
            seen = sum(piece.shape[2] for piece in vae.iter_decode(latents, num_frames=num_frames))
        else:
            seen = sum(piece.shape[2] for piece in vae.iter_encode(pieces(num_frames)))
    assert seen == (latents.shape[2] if what == "encode" else num_frames)
    return peak.mib


@torch.no_grad()
def tile_difference(folder: Path) -> dict[str, float]:
    """Largest difference that tiles of 128 make in a decoded and an encoded image, over the largest entry."""
    whole, tiled = build(folder), build(folder, tile_size=128)
    latents, image = torch.randn(1, 4, 1, 64, 64), torch.rand(1, 3, 1, 512, 512) * 2 - 1
    pairs = {
        "decode": [vae.decode(latents, num_frames=1) for vae in (whole, tiled)],
        "encode": [vae.encode(image) for vae in (whole, tiled)],
    }
    return {name: float((b - a).abs().max() / a.abs().max()) for name, (a, b) in pairs.items()}


def apart(what: str, num_frames: int, folder: Path) -> float:
    """`measure`, in a process of its own."""
    command = [sys.executable, __file__, "--measure", what, "--num-frames", str(num_frames), "--folder", str(folder)]
    # glibc keeps freed blocks of less than 32 MiB for later, which scatters the figures; this gives them back.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout)


def report() -> dict[str, float]:
    """Print the table."""
    found: dict[str, float] = {}
    with TemporaryDirectory() as name:
        folder = Path(name)
        save_image_vae(folder)
        for what in ("decode", "encode"):
            for times in (1, 4):
                num_frames = 2 * CHUNK * times
                found[f"{what} {times}x"] = peak = apart(what, num_frames, folder)
                print(f"{what:14} {num_frames:4} frames of {HEIGHT}x{WIDTH}: {peak:7.0f} MiB")
            found[what] = found[f"{what} 4x"] / found[f"{what} 1x"]
            print(f"{what:14} 4x the frames takes {found[what]:.3f} times the memory")
        for what in ("image", "image-tiled"):
            found[what] = apart(what, 1, folder)
            print(f"{what:14} of 768x1024, decoded: {found[what]:7.0f} MiB")
        for what, difference in tile_difference(folder).items():
            print(f"tiles of 128 change {what}d images by at most {difference:.1e} of the largest entry")
    return found


def main() -> None:
    """Measure everything, or in a process of its own one thing."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--measure", choices=["decode", "encode", "image", "image-tiled"])
    parser.add_argument("--num-frames", type=int)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.measure:
        print(measure(args.measure, args.num_frames, args.folder))
    else:
        print(json.dumps(report()))


if __name__ == "__main__":
    main()
