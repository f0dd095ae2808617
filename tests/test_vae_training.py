"""Training and measuring autoencoders, with the real commands on real files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import Command, losses, weights
from safetensors.torch import load_file

from opensora.core.video import read_video

DISCRIMINATOR = {"type": "NLayerDiscriminator", "ndf": 4, "n_layers": 1}
ADVERSARIAL = {"discriminator": DISCRIMINATOR, "discriminator_start": 2, "lecam_loss_weight": 0.1}


@pytest.fixture(scope="module")
def image_vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a small image autoencoder with random weights."""
    from diffusers import AutoencoderKL

    folder = tmp_path_factory.mktemp("image-vae")
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tiny(clips: Path, image_vae: str) -> Callable[..., dict[str, object]]:
    """A config of stage 3 that trains for a few seconds; changes go on top."""

    def make(pipeline: str = "train-vae", **changes: object) -> dict[str, object]:
        model = {
            "type": "VideoAutoencoderPipeline",
            "cal_loss": True,
            "vae_2d": {"type": "VideoAutoencoderKL", "from_pretrained": image_vae},
            "vae_temporal": {"type": "VAE_Temporal_SD", "filters": 4, "num_res_blocks": 1, "num_groups": 2},
        }
        dataset = {"type": "VideoTextDataset", "data_path": str(clips), "num_frames": 4, "image_size": (16, 16)}
        common = {"pipeline": pipeline, "model": model, "dataset": dataset, "dtype": "fp32", "num_workers": 0}
        training = {
            "perceptual_loss_weight": 0.0,
            "use_real_rec_loss": True,
            "mixed_strategy": "mixed_video_random",
            "lr": 1e-3,
            "grad_clip": 1.0,
            "batch_size": 4,
            "max_steps": 6,
            "without_hooks": ["tensorboard", "loss-plot"],
        }
        return {**common, **(training if pipeline == "train-vae" else {}), **changes}

    return make


def run(command: Command, *arguments: object) -> None:
    done = command("opensora-run", *arguments)
    assert done.returncode == 0, done.stderr


def records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tensors(folder: Path, stem: str) -> dict[str, torch.Tensor]:
    return load_file(max((folder / "checkpoints").glob("step-*")) / f"{stem}.safetensors")


def test_a_resumed_run_is_the_unbroken_one(
    tiny: Callable[..., dict[str, object]], command: Command, write: Callable[..., Path], tmp_path: Path
) -> None:
    options = {**ADVERSARIAL, "gradient_penalty_loss_weight": 0.1, "learn_logvar": True, "ema_decay": 0.9}
    config = write(tiny(**options))
    run(command, config, "--run-folder", tmp_path / "whole")
    run(command, write(tiny(**options, max_steps=3), "half.py"), "--run-folder", tmp_path / "half")
    run(command, config, "--load", tmp_path / "half")
    for stem in ("model", "ema", "discriminator"):
        whole, half = (tensors(tmp_path / name, stem) for name in ("whole", "half"))
        assert all(torch.equal(half[key], tensor) for key, tensor in whole.items()), stem
    timed = ("steps_per_second",)
    whole, half = (
        [{key: value for key, value in record.items() if key not in timed} for record in records(tmp_path / name)]
        for name in ("whole", "half")
    )
    assert whole == half
    assert {"nll_loss", "kl_loss", "adversarial_loss", "disc_loss"} <= set(whole[-1])


@pytest.mark.parametrize(
    "split",
    [
        {"batch_size": 2, "accumulation_steps": 2},
        pytest.param({"batch_size": 2, "--nproc": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_training_is_the_same_however_it_is_split(
    split: dict[str, int],
    tiny: Callable[..., dict[str, object]],
    command: Command,
    write: Callable[..., Path],
    tmp_path: Path,
) -> None:
    flags = ["--nproc", split["--nproc"]] if "--nproc" in split else []
    changes = {key: value for key, value in split.items() if not key.startswith("--")}
    run(command, write(tiny(adam_eps=1e-6)), "--run-folder", tmp_path / "whole")
    run(command, write(tiny(adam_eps=1e-6, **changes), "split.py"), "--run-folder", tmp_path / "split", *flags)
    torch.testing.assert_close(losses(tmp_path / "split"), losses(tmp_path / "whole"), rtol=1e-4, atol=0)
    for key, tensor in weights(tmp_path / "whole").items():
        torch.testing.assert_close(weights(tmp_path / "split")[key], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_processes_train_against_a_discriminator(
    tiny: Callable[..., dict[str, object]], command: Command, write: Callable[..., Path], tmp_path: Path
) -> None:
    run(command, write(tiny(**ADVERSARIAL, batch_size=2)), "--run-folder", tmp_path / "run", "--nproc", 2)
    assert "adversarial_loss" in records(tmp_path / "run")[-1]


@pytest.mark.slow
def test_the_three_stages_follow_one_another(
    tiny: Callable[..., dict[str, object]], command: Command, write: Callable[..., Path], tmp_path: Path
) -> None:
    mixed = {"mixed_strategy": "mixed_video_image", "mixed_image_ratio": 0.5}
    latents = {"use_real_rec_loss": False, "use_z_rec_loss": True, **mixed}
    frozen = {**tiny()["model"], "freeze_vae_2d": True}  # type: ignore[dict-item]
    stages = [
        tiny(**latents, model=frozen, use_image_identity_loss=True, grad_checkpoint=True),
        tiny(**latents),
        tiny(**ADVERSARIAL),
    ]
    for number, stage in enumerate(stages):
        before = ["--ckpt-path", tmp_path / str(number - 1)] if number else []
        before += ["--discriminator.use_pretrained", False] if number == 2 else []
        run(command, write(stage, f"stage{number}.py"), "--run-folder", tmp_path / str(number), *before)
    first, second, third = (weights(tmp_path / str(number)) for number in range(3))
    spatial = [key for key in first if key.startswith("spatial_vae.")]
    changed = [
        {key for key in spatial if not torch.equal(one[key], other[key])}
        for one, other in ((first, second), (second, third))
    ]
    assert changed[0] == {
        key for key in spatial if key.startswith(("spatial_vae.module.encoder", "spatial_vae.module.quant"))
    }
    assert changed[1] == set(spatial)
    assert "image_identity_loss" in {name for record in records(tmp_path / "0") for name in record}


def test_a_run_repeats_from_its_own_config(
    tiny: Callable[..., dict[str, object]], command: Command, write: Callable[..., Path], tmp_path: Path
) -> None:
    run(command, write(tiny(**ADVERSARIAL)), "--run-folder", tmp_path / "run", "--lr", 2e-3)
    run(command, tmp_path / "run" / "config.py", "--run-folder", tmp_path / "again")
    assert losses(tmp_path / "run") == losses(tmp_path / "again")


def test_dry_runs_say_what_would_be_done(
    tiny: Callable[..., dict[str, object]], command: Command, write: Callable[..., Path], tmp_path: Path
) -> None:
    done = command("opensora-run", write(tiny(**ADVERSARIAL)), "--dry-run")
    assert done.returncode == 0, done.stderr
    for words in (
        "latents 4 x 1 x 8 x 8",
        "losses: pixels, KL x 1e-06, adversarial",
        "NLayerDiscriminator",
        "6 of 4 samples",
    ):
        assert words in done.stdout
    done = command("opensora-run", write(tiny("sample-vae", num_samples=5), "sample.py"), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "samples      5" in done.stdout
    assert not (tmp_path / "outputs").exists()


def test_a_dataset_is_reconstructed_and_measured(
    tiny: Callable[..., dict[str, object]], command: Command, write: Callable[..., Path], tmp_path: Path
) -> None:
    config = write(tiny("sample-vae", num_samples=5, batch_size=2, cal_stats=True))
    done = command("opensora-run", config, "--save-dir", tmp_path / "one")
    assert done.returncode == 0, done.stderr
    assert "LPIPS is left out: there are no weights" in done.stderr
    run(command, config, "--save-dir", tmp_path / "two", "--nproc", 2)
    names = [f"{index:03d}.mp4" for index in range(5)]
    for kind in ("originals", "reconstructions", "image_vae", "side_by_side"):
        assert sorted(path.name for path in (tmp_path / "one" / "samples" / kind).iterdir()) == names
    beside, _ = read_video(tmp_path / "one" / "samples" / "side_by_side" / "000.mp4")
    assert beside.shape == (4, 16, 48, 3)
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two"))
    assert one["samples"] == two["samples"] == 5
    assert one["latents"]["numbers_a_channel"] == 5 * 8 * 8
    for name, measured in one["measures"].items():
        assert two["measures"][name]["mean"] == pytest.approx(measured["mean"], rel=1e-4), name
    torch.testing.assert_close(one["latents"]["std"], two["latents"]["std"], rtol=1e-4, atol=1e-6)
    assert (tmp_path / "one" / "contact-sheet.png").exists()


def test_no_autoencoder_at_all_is_measured_as_perfect(
    tiny: Callable[..., dict[str, object]], command: Command, write: Callable[..., Path], tmp_path: Path
) -> None:
    run(command, write(tiny("sample-vae", model={"type": "identity"}, num_samples=2)), "--save-dir", tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["measures"]["psnr"] == {"mean": 100.0, "std": 0.0}
    assert summary["measures"]["ssim"]["mean"] == pytest.approx(1)
    assert summary["equal"] == 2


def test_mistakes_are_told_before_training(
    tiny: Callable[..., dict[str, object]], command: Command, write: Callable[..., Path], tmp_path: Path
) -> None:
    cases = {
        "no LPIPS weights": (tiny(perceptual_loss_weight=0.1, perceptual_weights=str(tmp_path)), "perceptual_weights"),
        "too large a discriminator": (tiny(discriminator={"type": "NLayerDiscriminator"}), "at least 24x24"),
        "no autoencoder": (tiny(model={"type": "identity"}), "can't be trained here"),
    }
    for name, (values, words) in cases.items():
        done = command("opensora-run", write(values), "--run-folder", tmp_path / name)
        assert done.returncode == 2, done.stderr
        assert words in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / name / "checkpoints").exists()


@pytest.mark.slow
def test_autoencoder_that_is_dealt_out_learns_as_in_one_process(
    command: Command, write: Callable[..., Path], tiny: Callable[..., dict[str, object]], tmp_path: Path
) -> None:
    from opensora.core.checkpoints import find_checkpoint, read_checkpoint

    run(command, write(tiny(adam_eps=1e-6)), "--run-folder", tmp_path / "one")
    dealt = write(tiny(adam_eps=1e-6, batch_size=2, accelerator={"type": "fsdp"}), "dealt.py")
    run(command, dealt, "--run-folder", tmp_path / "two", "--nproc", 2)
    for one, two in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    ours, theirs = (read_checkpoint(find_checkpoint(tmp_path / name)).tensors["model"] for name in ("one", "two"))
    assert find_checkpoint(tmp_path / "two").joinpath(".metadata").exists()
    for key, tensor in ours.items():
        torch.testing.assert_close(theirs[key], tensor, rtol=1e-3, atol=1e-4)
    against = write(tiny(**ADVERSARIAL, batch_size=2, accelerator={"type": "fsdp"}), "against.py")
    done = command("opensora-run", against, "--run-folder", tmp_path / "against", "--nproc", 2)
    assert done.returncode == 2
    assert 'Use accelerator = dict(type="ddp")' in done.stderr
