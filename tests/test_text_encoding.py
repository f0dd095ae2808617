"""Text encoders in the pipelines: where they compute, when they are let go, and that remembering changes no result."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Command, losses, tiny_training, weights

from opensora.core import ConfigError, MachineError
from opensora.core.accelerator import Single, SingleSpec
from opensora.core.commands.opensora_run import main
from opensora.core.composing import choose_text_placement
from opensora.core.config.evaluate import evaluate
from opensora.core.config.structure import ComponentConfig, structure
from opensora.core.pipelines.sample import build_run
from opensora.core.pipelines.sample_loop import SampleRun
from opensora.core.pipelines.sample_requests import choose_entries, plan_requests, read_plans
from opensora.core.pipelines.sample_spec import SampleSpec
from opensora.core.text_cache import CachedTextEncoder
from opensora.core.video import read_video
from opensora.models.text_encoders.hashed_words import HashedWords

PROMPTS = ["a square of size 2", "a wave", "a square of size 2", "red"]


class Recording(Single):
    """Notes what is placed where, and whether a text encoder is still there."""

    def __init__(self) -> None:
        super().__init__(SingleSpec(), device="cpu", dtype="fp32")
        self.placed: list[tuple[str, torch.dtype, bool]] = []

    def place(self, module: Any, **options: Any) -> Any:
        module = super().place(module, **options)
        dtype = next((each.dtype for each in (*module.parameters(), *module.buffers())), torch.float32)
        self.placed.append((type(module).__name__, dtype, has_text_encoder()))
        return module


def text_encoders() -> list[HashedWords]:
    return [each for each in gc.get_objects() if type(each) is HashedWords]


def has_text_encoder() -> bool:
    return any(all(each is not other for other in FROM_ELSEWHERE) for each in text_encoders())


FROM_ELSEWHERE: list[HashedWords] = []
"""What tests of other files left in this process."""


@pytest.fixture(autouse=True, scope="module")
def from_elsewhere() -> Iterator[None]:
    FROM_ELSEWHERE.extend(text_encoders())
    yield
    FROM_ELSEWHERE.clear()


@pytest.fixture(autouse=True)
def nothing_left() -> None:
    gc.collect()
    assert not has_text_encoder()


def sampling(**changes: object) -> dict[str, Any]:
    return {
        "model": tiny_training(Path())["model"],
        "scheduler": {"type": "rflow", "num_sampling_steps": 2, "cfg_scale": 3.0},
        "prompt": PROMPTS,
        "num_frames": 4,
        "image_size": (16, 16),
        "fps": 8,
        "dtype": "fp32",
        "crf": 0,
        **changes,
    }


def start(folder: Path, accelerator: Single | None = None, **changes: object) -> SampleRun:
    spec = structure(SampleSpec, sampling(**changes))
    requests = plan_requests(read_plans(choose_entries(spec), spec), spec, folder)
    return build_run(spec, folder, accelerator or Recording(), requests)


# ---- releasing


def test_text_encoder_is_gone_before_the_denoiser_is_placed(tmp_path: Path) -> None:
    accelerator = Recording()
    run = start(tmp_path, accelerator)
    assert [(name, there) for name, _, there in accelerator.placed] == [
        ("HashedWords", True),
        ("STDiT3", False),
        ("IdentityVAE", False),
    ]
    assert "text" in run.sampler.clock.seconds
    told = run.sampler.parts.text_encoder.encode(PROMPTS)
    assert told.text_embedding is not None
    assert torch.equal(told.text_embedding[0], told.text_embedding[2])
    with pytest.raises(ConfigError, match="release_text_encoder = False"):
        run.sampler.parts.text_encoder.encode(["another"])


def test_text_encoder_stays_if_asked_to(tmp_path: Path) -> None:
    run = start(tmp_path, release_text_encoder=False)
    assert isinstance(run.sampler.parts.text_encoder, CachedTextEncoder)
    assert len(run.sampler.parts.text_encoder.encode(["another"])) == 1


def test_text_encoder_stays_if_the_embeddings_do_not_fit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run = start(tmp_path, text_cache_gib=5000 / 2**30)  # one of 4112 bytes
    assert "The embeddings of 3 prompts don't fit text_cache_gib" in caplog.text
    assert len(run.sampler.parts.text_encoder.encode(["another"])) == 1


def test_without_a_memory_nothing_is_encoded_ahead(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run = start(tmp_path, text_cache_gib=0.0)
    assert "Encoding" not in caplog.text
    assert len(run.sampler.parts.text_encoder.encode(["another"])) == 1


OTHER_WAYS: dict[str, dict[str, Any]] = {
    "one-by-one": {"batch_size": 1},
    "kept": {"batch_size": 4, "release_text_encoder": False},
    "forgotten": {"batch_size": 4, "text_cache_gib": 1e-5},
    "no-memory": {"batch_size": 4, "text_cache_gib": 0.0},
}


def test_samples_are_the_same_however_prompts_are_encoded(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def sample(name: str, **changes: object) -> list[torch.Tensor]:
        values = sampling(
            save_dir=str(tmp_path / name), text_encoder={"type": "minilm", "model_max_length": 8}, **changes
        )
        torch.manual_seed(0)  # initial weights
        assert main([str(write(values, f"{name}.py"))]) == 0
        return [read_video(path)[0] for path in sorted((tmp_path / name).glob("*.mp4"))]

    released = sample("released", batch_size=4)
    assert len(released) == 4
    for name, changes in OTHER_WAYS.items():
        for ours, theirs in zip(sample(name, **changes), released, strict=True):
            difference = (ours.int() - theirs.int()).abs().max()
            assert difference <= (name == "no-memory"), name  # only that depends on the batch, in the last bits


# ---- placing


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("cpu", torch.bfloat16)),
        ({"dtype": "fp32"}, ("cpu", torch.float32)),
        ({"device": "cpu"}, ("cpu", torch.bfloat16)),
        ({"device": "meta"}, ("meta", torch.float32)),  # on another kind of device, what suits it
        ({"device": "meta", "dtype": "fp32"}, ("meta", torch.float32)),
    ],
    ids=str,
)
def test_text_encoder_goes_where_it_is_told(options: dict[str, str], expected: tuple[str, torch.dtype]) -> None:
    accelerator = Recording()
    accelerator.dtype = torch.bfloat16
    device, dtype = choose_text_placement(ComponentConfig("hashed-words", options), accelerator)
    assert (device.type, dtype) == expected


def test_it_computes_there(tmp_path: Path) -> None:
    accelerator = Recording()
    accelerator.dtype = torch.bfloat16
    start(tmp_path, accelerator, text_encoder={"type": "hashed-words", "dtype": "fp32"})
    assert accelerator.placed[0][:2] == ("HashedWords", torch.float32)
    assert accelerator.placed[1][:2] == ("STDiT3", torch.bfloat16)


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match='"cuda:77" can\'t be used'):
        start(tmp_path, text_encoder={"type": "hashed-words", "device": "cuda:77"})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "half"}, "text_encoder.dtype"),
        ({"device": 1}, "text_encoder.device"),
        ({"devise": "cpu"}, "text_encoder.devise is not a field of HashedWordsSpec"),
    ],
)
def test_wrong_options_are_named_with_their_line(
    options: dict[str, object], words: str, write: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(sampling(text_encoder={"type": "hashed-words", **options}))
    assert main([str(config)]) == 2
    message = capsys.readouterr().err
    assert "config.py:" in message
    assert words in message


def test_the_written_config_repeats_the_placement(write: Callable[..., Path], tmp_path: Path) -> None:
    options = {"type": "hashed-words", "device": "cpu", "dtype": "fp32"}
    assert main([str(write(sampling(text_encoder=options, prompt="a", save_dir=str(tmp_path / "samples"))))]) == 0
    written = evaluate(tmp_path / "samples" / "config.py").values["text_encoder"]
    assert options.items() <= written.items()
    assert written["model_max_length"] == 16


# ---- training


def test_training_is_the_same_with_and_without_a_memory(
    command: Command, clips: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    for name, gib in (("with", 1.0), ("without", 0.0)):
        config = write(tiny_training(clips, text_cache_gib=gib), f"{name}.py")
        done = command("opensora-run", config, "--run-folder", tmp_path / name)
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


def test_a_run_with_a_real_text_encoder_resumes_bit_for_bit(
    command: Command, clips: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    """What the unbroken run remembers, the resumed one encodes in other company."""
    text = {"type": "minilm", "model_max_length": 12}

    def train(steps: int, folder: Path, *flags: object) -> None:
        previews = {"preview_every": 2, "preview_prompts": ["a square of size 2"]}
        config = write(tiny_training(clips, text_encoder=text, max_steps=steps, **previews), f"{steps}.py")
        done = command("opensora-run", config, "--run-folder", folder, *flags)
        assert done.returncode == 0, done.stderr

    train(8, tmp_path / "whole")
    train(5, tmp_path / "broken")
    train(8, tmp_path / "broken", "--resume", True)
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    for key, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "broken")[key], tensor), key
