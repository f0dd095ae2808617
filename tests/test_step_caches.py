"""Step caches in real runs: what they spare, the bound that they keep, and where they are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import tiny_training
from safetensors.torch import save_file
from torch import Tensor

from opensora.core.commands.opensora_run import main
from opensora.core.components import build
from opensora.core.config.write import write_config
from opensora.core.sampling import SamplingPipeline, load

STEPS = 20
CACHE = {"type": "step-cache", "tolerance": 0.05}
BROADCAST = {"type": "pyramid-broadcast"}
PROMPTS = ["a", "a square of size two", "b"]


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model whose answers change smoothly from step to step, as those of trained ones do."""
    model = tiny_training(Path())["model"]
    module = build("models", model, latent_channels=3, latent_size=(4, 16, 16), text_width=64, text_length=16)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    state = {key: 0.1 * torch.randn(value.shape, generator=generator) for key, value in module.state_dict().items()}
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(state, path)
    return {
        "model": {**model, "from_pretrained": str(path)},  # type: ignore[dict-item]
        "scheduler": {"type": "rflow", "num_sampling_steps": STEPS, "cfg_scale": 2.0},
        "text_encoder": {"type": "hashed-words", "width": 64, "model_max_length": 16},
        "num_frames": 4,
        "image_size": (16, 16),
        "fps": 8,
        "dtype": "fp32",
        "crf": 0,
    }


@pytest.fixture
def pipeline(values: dict[str, Any], tmp_path: Path) -> Callable[..., SamplingPipeline]:
    write_config(tmp_path / "config.py", values, "A test's config.")
    return lambda *hooks, **changes: load(tmp_path / "config.py", hooks=list(hooks), **changes)


def distances(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).flatten(1).norm(dim=1) / other.flatten(1).norm(dim=1)


def test_a_step_cache_spares_evaluations_within_its_tolerance(pipeline: Callable[..., SamplingPipeline]) -> None:
    full, cached = pipeline(), pipeline(CACHE)
    next(cached.start("another video, to calibrate on", seed=5))
    calls = count_calls(cached)
    found = cached.start(PROMPTS, seed=100).finish()
    assert (distances(found, full.start(PROMPTS, seed=100).finish()) <= CACHE["tolerance"]).all()
    assert not torch.equal(found, full.start(PROMPTS, seed=100).finish())
    assert sum(calls) <= 0.8 * STEPS * len(PROMPTS)


def count_calls(pipeline: SamplingPipeline) -> list[int]:
    """Rows of each call of the guided denoiser from now on."""
    rows: list[int] = []
    denoiser = pipeline.sampler.guided.denoiser  # type: ignore[attr-defined]  # of guidance

    def counting(latents: Tensor, timestep: Tensor, conditioning: Any) -> Tensor:
        rows.append(len(latents) // 2)
        return denoiser(latents, timestep, conditioning)

    pipeline.sampler.guided.denoiser = counting  # type: ignore[attr-defined]
    return rows


def test_a_cached_video_does_not_depend_on_its_batch(pipeline: Callable[..., SamplingPipeline]) -> None:
    cached = pipeline(CACHE)
    next(cached.start("another video, to calibrate on", seed=5))
    together = cached.start(PROMPTS, seed=100).finish()
    for index, prompt in enumerate(PROMPTS):
        alone = cached.start(prompt, seed=100 + index).finish()
        torch.testing.assert_close(alone[0], together[index], rtol=1e-5, atol=1e-5)


def test_forks_and_changes_of_guidance_are_no_worse(pipeline: Callable[..., SamplingPipeline]) -> None:
    full, cached = pipeline(), pipeline(CACHE)
    ways = []
    for each in (full, cached):
        denoising = each.start("a", seed=3)
        for _ in range(STEPS // 2):
            next(denoising)
        fork = denoising.fork(guidance_scale=4.0)
        next(fork), next(denoising)  # in turns
        ways.append((denoising.finish(), fork.finish()))
    for expected, found in zip(*ways, strict=True):
        assert distances(found, expected).max() <= CACHE["tolerance"]


def test_a_calibration_is_kept_in_a_file(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    hooks = [{**CACHE, "calibration": "kept.json"}]
    write_config(tmp_path / "config.py", {**values, "prompt": PROMPTS, "hooks": hooks}, "A test's config.")
    reports = []
    for name in ("first", "second"):
        assert main(["config.py", "--save-dir", name]) == 0
        reports.append(json.loads((tmp_path / name / "summary.json").read_text())["step_cache"])
    for index in range(len(PROMPTS)):
        name = f"sample_{index:04d}.mp4"
        assert main(["--from", f"first/{name}", "--save-dir", "again"]) == 0
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
    assert [report["evaluations_of_calibration"] > 0 for report in reports] == [True, False]
    assert {key: value for key, value in reports[0].items() if key != "evaluations_of_calibration"} == {
        key: value for key, value in reports[1].items() if key != "evaluations_of_calibration"
    }

    (tmp_path / "kept.json").write_text((tmp_path / "kept.json").read_text()[:100])
    assert main(["config.py", "--save-dir", "third"]) == 2
    assert "kept.json" in capsys.readouterr().err


def test_a_calibration_of_another_model_is_refused(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    hooks = [{**CACHE, "calibration": "kept.json"}]
    write_config(tmp_path / "config.py", {**values, "prompt": "a", "hooks": hooks}, "A test's config.")
    assert main(["config.py", "--save-dir", "first"]) == 0
    assert main(["config.py", "--save-dir", "other", "--model.from_pretrained", "None", "--model.depth", "2"]) == 2
    assert "kept.json" in capsys.readouterr().err


def test_pyramid_broadcast_uses_attention_again(values: dict[str, Any], tmp_path: Path) -> None:
    values = {**values, "prompt": "a"}
    write_config(tmp_path / "full.py", {**values, "save_dir": str(tmp_path / "full")}, "In full.")
    write_config(
        tmp_path / "pab.py", {**values, "hooks": [BROADCAST], "save_dir": str(tmp_path / "pab")}, "With broadcast."
    )
    for name in ("full", "pab"):
        assert main([str(tmp_path / f"{name}.py")]) == 0
    report = json.loads((tmp_path / "pab" / "summary.json").read_text())["pyramid_broadcast"]
    computed, reused = report["attention_computed"], report["attention_reused"]
    assert reused["cross"] > reused["temporal"] > reused["spatial"] > 0 or reused["cross"] / computed["cross"] > (
        reused["spatial"] / computed["spatial"]
    )
    assert computed["spatial"] + reused["spatial"] == computed["temporal"] + reused["temporal"] == STEPS


def test_pyramid_broadcast_changes_nothing_outside_its_window(pipeline: Callable[..., SamplingPipeline]) -> None:
    full = pipeline().start("a").finish()
    assert torch.equal(pipeline({**BROADCAST, "window": (0.01, 0.02)}).start("a").finish(), full)
    wide = pipeline({**BROADCAST, "window": (0.0, 1.0)})
    assert not torch.equal(wide.start("a").finish(), full)
    assert list(wide.sampler.parts.denoiser.state_dict()) == list(pipeline().sampler.parts.denoiser.state_dict())


@pytest.mark.parametrize("hook", [CACHE, BROADCAST], ids=["step-cache", "pyramid-broadcast"])
@pytest.mark.parametrize(
    "scheduler", [{"solver": "euler-ancestral"}, {"solver": "dpm++2m-sde"}], ids=["ancestral", "sde"]
)
def test_samplers_with_noise_are_refused(
    hook: dict[str, Any],
    scheduler: dict[str, Any],
    values: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changed = {**values, "prompt": "a", "hooks": [hook], "scheduler": {**values["scheduler"], **scheduler}}
    write_config(tmp_path / "config.py", {**changed, "save_dir": str(tmp_path / "samples")}, "A test's config.")
    assert main([str(tmp_path / "config.py")]) == 2
    error = capsys.readouterr().err
    assert hook["type"] in error
    assert "noise" in error


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ({**CACHE, "tolerance": 0}, "tolerance"),
        ({**CACHE, "tolerence": 0.1}, 'Did you mean "tolerance"'),
        ({**BROADCAST, "window": (0.9, 0.1)}, "window"),
        ({**BROADCAST, "spatial_every": 1, "temporal_every": 1, "cross_every": 1}, "Nothing would be reused"),
    ],
    ids=["tolerance", "name", "window", "nothing"],
)
def test_wrong_options_are_refused(
    hook: dict[str, Any], message: str, values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(tmp_path / "config.py", {**values, "prompt": "a", "hooks": [hook]}, "A test's config.")
    assert main([str(tmp_path / "config.py"), "--save-dir", str(tmp_path / "samples")]) == 2
    assert message in capsys.readouterr().err


def test_a_model_without_such_attention_is_refused_by_broadcast(
    tmp_path: Path, values: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    model = {
        "type": "DiT",
        "hidden_size": 32,
        "depth": 1,
        "num_heads": 2,
        "patch_size": (1, 4, 4),
        "condition": "label_4",
    }
    text = {"type": "classes", "num_classes": 4}
    changed = {**values, "model": model, "text_encoder": text, "prompt": "1", "hooks": [BROADCAST]}
    write_config(tmp_path / "config.py", changed, "A test's config.")
    assert main([str(tmp_path / "config.py"), "--save-dir", str(tmp_path / "samples")]) == 2
    assert "pyramid-broadcast" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["STDiT", "STDiT2", "STDiT3", "LatteT2V"])
def test_pyramid_broadcast_finds_the_attention_of_the_whole_family(
    values: dict[str, Any], tmp_path: Path, name: str
) -> None:
    model = {"type": name, "hidden_size": 48, "depth": 2, "num_heads": 2, "patch_size": (1, 4, 4), "pred_sigma": False}
    write_config(tmp_path / "config.py", {**values, "model": model}, "A test's config.")
    sampling = load(tmp_path / "config.py", hooks=[{**BROADCAST, "window": (0.0, 1.0)}])
    sampling.start("a").finish()
    (hook,) = (each.plugin for each in sampling.sampler.hooks.denoising_step.get_hookimpls())
    per_step = {axis: hook.computed[axis] + hook.reused[axis] for axis in hook.computed}
    crossed = 4 if name == "STDiT3" else 2  # its temporal blocks attend to the text too
    assert per_step == {"spatial": 2 * STEPS, "temporal": 2 * STEPS, "cross": crossed * STEPS}
    assert hook.reused["cross"] > hook.reused["spatial"] > 0
