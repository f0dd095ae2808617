"""How work is dealt out doesn't change what is learned or made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import Command, losses, tiny_training, weights

from opensora.core.config.write import write_config
from opensora.core.video import read_video

SPLITS = {
    "2 processes of 4": ({"batch_size": 4}, ["--nproc", 2]),
    "2 micro-batches of 4": ({"batch_size": 4, "accumulation_steps": 2}, []),
    "2 processes of 2 micro-batches of 2": ({"batch_size": 2, "accumulation_steps": 2}, ["--nproc", 2]),
    "2 loader workers": ({"num_workers": 2}, []),
}
MASKS = {"image_head": 0.3, "random": 0.3}
# Attention doesn't depend on the bias of its keys, so that bias's gradient is rounding noise, which Adam with its usual eps
# would blow up to whole steps. This eps is still far below any other gradient.
OPTIONS = {"mask_ratios": MASKS, "adam_eps": 1e-6}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, clips: Path, run_in: Command) -> Path:
    """One process with batch 8."""
    folder = tmp_path_factory.mktemp("whole")
    write_config(folder / "config.py", tiny_training(clips, **OPTIONS), "A test's config.")
    done = run_in(folder, "opensora-run", folder / "config.py", "--run-folder", folder / "run")
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.parametrize("split", SPLITS)
def test_training_is_the_same_however_it_is_split(
    split: str, whole: Path, command: Command, clips: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    changes, flags = SPLITS[split]
    config = write(tiny_training(clips, **OPTIONS, **changes))
    done = command("opensora-run", config, "--run-folder", tmp_path / "run", *flags)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(losses(tmp_path / "run"), losses(whole), rtol=1e-5, atol=0)
    for key, tensor in weights(whole).items():
        torch.testing.assert_close(weights(tmp_path / "run")[key], tensor, rtol=1e-5, atol=1e-5)


def sampling(model: object, **changes: object) -> dict[str, object]:
    return {
        "model": model,
        "scheduler": {"type": "rflow", "num_sampling_steps": 4, "cfg_scale": 3.0},
        "prompt": [f"a square of size {size}" for size in range(4)],
        "num_frames": 4,
        "image_size": (16, 16),
        "fps": 8,
        "dtype": "fp32",
        "crf": 0,
        **changes,
    }


def test_a_video_depends_on_its_seed_alone(
    whole: Path, command: Command, clips: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    model = {**tiny_training(clips)["model"], "from_pretrained": str(whole)}  # type: ignore[dict-item]

    def sample(name: str, *flags: object, **changes: object) -> list[torch.Tensor]:
        config = write(sampling(model, save_dir=str(tmp_path / name), **changes), f"{name}.py")
        done = command("opensora-run", config, *flags)
        assert done.returncode == 0, done.stderr
        return [read_video(path)[0] for path in sorted((tmp_path / name).glob("*.mp4"))]

    together, one_by_one = sample("together", batch_size=4), sample("one-by-one", batch_size=1)
    assert len(together) == len(one_by_one) == 4
    for ours, theirs in zip(one_by_one, together, strict=True):
        assert (ours.int() - theirs.int()).abs().max() <= 2  # the last digit of a product can move a pixel by a level
    for ours, theirs in zip(sample("two-processes", "--nproc", 2, batch_size=1), one_by_one, strict=True):
        assert torch.equal(ours, theirs)
    (alone,) = sample("alone", prompt="a square of size 2", seed=1024 + 2)
    assert torch.equal(alone, one_by_one[2])
    assert not torch.equal(together[2], sample("other-seed", prompt="a square of size 2", seed=7)[0])
