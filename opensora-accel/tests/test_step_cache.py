"""The step cache: what it spares, the tolerance that it keeps, and when it keeps out of the way."""

from __future__ import annotations

import gc
import json
import logging
import re
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from opensora.core import ConfigError, MachineError, build
from opensora.core.config.structure import ComponentConfig
from opensora.core.pipelines.train_spec import TrainSpec
from opensora.core.requests import EndlessRequests, Request

APART = [0.7 + 0.6 * ((7 * index) % 40) / 40 for index in range(200)]
"""The prompts of 200 videos."""


def cache(tolerance: float = 0.1, **options: Any) -> dict[str, Any]:
    return {"type": "step-cache", "tolerance": tolerance, **options}


def errors(found: Tensor, full: Tensor) -> Tensor:
    return (found - full).flatten(1).norm(dim=1) / full.flatten(1).norm(dim=1)


def rows_evaluated(world: Any) -> int:
    return sum(rows for rows, _ in world.network.calls)


def counted(world: Any) -> tuple[int, int]:
    counts = world.plugin("step-cache").counts
    return counts.computed, counts.reused


# ---- what it is for


@pytest.mark.parametrize("is_twice", [False, True], ids=["euler", "heun"])
@pytest.mark.parametrize("tolerance", [0.05, 0.1])
def test_evaluations_are_spared_and_the_tolerance_is_kept(toys: ModuleType, tolerance: float, is_twice: bool) -> None:
    full = toys.World.build(is_twice=is_twice).start(range(200), APART).finish()
    world = toys.World.build(cache(tolerance), is_twice=is_twice)
    found = world.start([1000, *range(200)], [1.0, *APART]).finish()[1:]  # the first is calibrated on
    assert (errors(found, full) <= tolerance).float().mean() >= 0.95
    computed, reused = counted(world)
    assert computed + reused == 201 * (59 if is_twice else 30)
    assert reused > 0.4 * computed
    assert errors(found, full).max() > 0  # it did something


def test_a_smaller_tolerance_spares_less(toys: ModuleType) -> None:
    spared = []
    for tolerance in (0.01, 0.05, 0.2):
        world = toys.World.build(cache(tolerance))
        world.start(range(50), APART[:50]).finish()
        spared.append(counted(world)[1])
    assert spared[0] < spared[1] < spared[2]


def test_what_is_counted_is_what_the_network_was_asked(toys: ModuleType) -> None:
    world = toys.World.build(cache())
    world.start(range(20)).finish()
    counts = world.plugin("step-cache").counts
    assert counts.computed + counts.calibrating == rows_evaluated(world)
    assert counts.calibrating > 2 * 30
    assert (counts.videos, counts.finished) == (20, 20)
    assert 0 < counts.errors / 20 <= counts.largest_error


def test_videos_that_are_harder_to_foresee_get_more_evaluations(toys: ModuleType) -> None:
    world = toys.World.build(cache())
    world.start([1000], [0.2]).finish()  # the means lie close together: hardly a decision
    spared = {}
    for apart in (0.2, 2.0):
        before = counted(world)[1]
        world.start(range(50), [apart] * 50).finish()
        spared[apart] = counted(world)[1] - before
    assert spared[2.0] < 0.8 * spared[0.2]


def test_without_the_hook_nothing_is_spared(toys: ModuleType) -> None:
    world = toys.World.build()
    world.start(range(3)).finish()
    assert rows_evaluated(world) == 90


# ---- each video by itself


def test_a_video_does_not_depend_on_its_batch(toys: ModuleType) -> None:
    together, alone = toys.World.build(cache()), toys.World.build(cache())
    for world in (together, alone):
        world.start([1000]).finish()
    found = together.start(range(16), APART[:16]).finish()
    each = torch.cat([alone.start([seed], [APART[seed]]).finish() for seed in range(16)])
    torch.testing.assert_close(found, each, rtol=1e-5, atol=1e-5)
    assert counted(together) == counted(alone)
    assert any(0 < rows < 16 for rows, _ in together.network.calls)  # only those that needed it were evaluated


def test_denoisings_that_take_turns_do_not_disturb_each_other(toys: ModuleType) -> None:
    world = toys.World.build(cache())
    world.start([1000]).finish()
    expected = [world.start([seed], [APART[seed]]).finish() for seed in range(4)]
    under_way = [world.start([seed], [APART[seed]]) for seed in range(4)]
    for _ in range(30):
        for denoising in under_way:
            next(denoising)
    for denoising, alone in zip(under_way, expected, strict=True):
        assert torch.equal(denoising.latents, alone)


def test_nothing_is_kept_of_a_denoising_that_is_gone(toys: ModuleType) -> None:
    world = toys.World.build(cache())
    denoising = world.start(range(4))
    for _ in range(10):
        next(denoising)
    gone = [weakref.ref(denoising), weakref.ref(denoising.conditioning), weakref.ref(denoising.state)]
    world.start([7]).finish()
    del denoising
    gc.collect()
    assert [each() for each in gone] == [None, None, None]


# ---- forks and guidance


def test_a_fork_goes_on_by_itself_with_the_error_that_it_has(toys: ModuleType) -> None:
    full = toys.World.build().start(range(50), APART[:50]).finish()
    world = toys.World.build(cache())
    world.start([1000]).finish()
    denoising = world.start(range(50), APART[:50])
    for _ in range(20):
        next(denoising)
    forks = [denoising.fork()]
    next(denoising)
    forks.append(denoising.fork())
    spared = counted(world)[1]
    ends = [each.finish() for each in (*forks, denoising)]
    assert counted(world)[1] > spared
    for end in ends:
        assert (errors(end, full) <= 0.1).float().mean() >= 0.9
    batches = world.plugin("step-cache")._batches
    assert all(sum(batches[fork].errors) > 0.5 * sum(batches[denoising].errors) for fork in forks)


def test_after_a_change_of_guidance_nothing_is_reused_that_was_not_calibrated(toys: ModuleType, caplog: Any) -> None:
    plain, world = toys.World.build(), toys.World.build(cache())
    world.start([1000]).finish()
    ends = []
    for each in (plain, world):
        denoising = each.start(range(5))
        for state in denoising:
            if state.step == 0:
                denoising.guidance_scale = 1.1
        ends.append(denoising.finish())
    assert torch.equal(*ends)
    assert "no calibration for latents 2 x 3 x 2 x 2, guidance scale 1.1, all frames generated" in caplog.text


def test_after_a_change_to_guidance_that_was_calibrated_it_goes_on(toys: ModuleType) -> None:
    world = toys.World.build(cache())
    for scale in (1.0, 1.1):
        world.start([1000], guidance_scale=scale).finish()
    denoising = world.start(range(5))
    next(denoising)
    denoising.guidance_scale = 1.1
    before, asked = counted(world)[1], len(world.network.calls)
    next(denoising), next(denoising)
    assert world.network.calls[asked:] == [(5, pytest.approx(1000 * (1 - step / 30))) for step in (1, 2)]
    denoising.finish()
    assert counted(world)[1] > before


# ---- given frames


MASKS = torch.tensor([[1.0, 1, 1], [0, 1, 1], [0, 1, 0.5]])


def test_given_frames_stay_and_what_changes_for_a_video_is_evaluated_for_that_video(toys: ModuleType) -> None:
    world = toys.World.build(cache(0.2))
    start = world.start(range(3), frame_mask=MASKS)
    found = world.start(range(3), frame_mask=MASKS).finish()
    kept = (MASKS == 0)[:, None, :, None, None].expand_as(found)
    assert torch.equal(found[kept], start.noise[kept])
    calibrations = world.plugin("step-cache")._calibrations
    assert [each.restarts for each in calibrations.values()] == [(), (), (15,)]  # the last frame joins half way
    joined = pytest.approx(1000 * (1 - 15 / 30))
    before = len(world.network.calls)
    world.start([5, 6], frame_mask=MASKS[1:]).finish()
    assert (2, joined) in world.network.calls[before:] or (1, joined) in world.network.calls[before:]


def test_a_video_with_given_frames_does_not_depend_on_the_frames_of_others(toys: ModuleType) -> None:
    world = toys.World.build(cache(0.2))
    together = world.start(range(3), frame_mask=MASKS).finish()
    for row in range(3):
        alone = world.start([row], frame_mask=MASKS[row : row + 1]).finish()
        torch.testing.assert_close(alone, together[row : row + 1], rtol=1e-5, atol=1e-5)


# ---- in the command


def request(seed: int, apart: float = 1.0, **changes: Any) -> Request:
    path = Path(f"{seed}.mp4")
    values = {"prompt": "", "text": str(apart), "size": (3, 2, 2), "fps": 8.0, "file_fps": 8.0, "frame_fps": 8.0}
    return Request(seed=seed, path=path, **{**values, **changes})


def run_of(toys: ModuleType, world: Any, requests: Any) -> Any:
    def starts(batch: list[Request]) -> Any:
        return world.start(
            [each.seed for each in batch], [float(each.text) for each in batch], guidance_scale=batch[0].cfg_scale
        )

    return toys.Run(world=world, requests=requests, starts=starts)


def test_the_command_calibrates_on_the_first_request_of_each_kind(toys: ModuleType) -> None:
    world = toys.World.build(cache())
    requests = [request(seed) for seed in range(4)]
    requests += [request(seed, cfg_scale=1.2) for seed in range(4, 8)]
    run = run_of(toys, world, requests)
    world.hooks.sample_start(run=run)
    assert [each.seed for each in run.started] == [0, 4]
    assert run.sampler.clock.phases == ["calibrate", "calibrate"]
    assert len(world.plugin("step-cache")._calibrations) == 2


def test_results_do_not_depend_on_which_process_makes_them(toys: ModuleType) -> None:
    requests = [request(seed, apart) for seed, apart in zip(range(8), APART, strict=False)]
    found: dict[int, Tensor] = {}
    for rank in range(2):
        world = toys.World.build(cache())
        run = run_of(toys, world, requests)
        world.hooks.sample_start(run=run)
        for each in requests[rank::2]:
            found[each.seed] = run.starts([each]).finish()
    world = toys.World.build(cache())
    run = run_of(toys, world, requests)
    world.hooks.sample_start(run=run)
    together = run.starts(requests).finish()
    for seed, latents in found.items():
        torch.testing.assert_close(latents[0], together[seed], rtol=1e-5, atol=1e-5)


def test_a_kind_that_was_not_foreseen_is_sampled_in_full_once_the_command_runs(toys: ModuleType, caplog: Any) -> None:
    world = toys.World.build(cache())
    run = run_of(toys, world, [request(0)])
    world.hooks.sample_start(run=run)
    mask = torch.tensor([[0.0, 1, 1]])
    found = world.start([3], frame_mask=mask).finish()
    assert torch.equal(found, toys.World.build().start([3], frame_mask=mask).finish())
    assert "frame mask [0.0, 1.0, 1.0]: sampled in full" in caplog.text


def test_of_endless_requests_the_first_is_enough(toys: ModuleType) -> None:
    world = toys.World.build(cache())
    run = run_of(toys, world, EndlessRequests(request(5), stem="sample", extension=".mp4", first_index=0, count=10**6))
    world.hooks.sample_start(run=run)
    assert [each.seed for each in run.started] == [5]


def test_nothing_is_calibrated_if_all_is_there(toys: ModuleType, tmp_path: Path) -> None:
    world = toys.World.build(cache())
    world.spec = attrs.evolve(world.spec, skip_existing=True)
    there = [attrs.evolve(request(seed), path=tmp_path / f"{seed}.mp4") for seed in range(2)]
    for each in there:
        each.path.touch()
    run = run_of(toys, world, there)
    world.hooks.sample_start(run=run)
    assert run.started == []
    there[1].path.unlink()
    world.hooks.sample_start(run=run)
    assert [each.seed for each in run.started] == [0]


def test_the_report_says_what_was_computed_and_reused(toys: ModuleType) -> None:
    world = toys.World.build(cache(0.2))
    run = run_of(toys, world, [request(seed) for seed in range(10)])
    world.hooks.sample_start(run=run)
    run.starts(run.requests).finish()
    world.hooks.sample_end(run=run)
    (report,) = world.hooks.sample_report(run=run)
    facts = report["step_cache"]
    assert json.loads(json.dumps(facts)) == facts
    assert facts["tolerance"] == 0.2
    assert facts["videos"] == 10
    assert facts["evaluations_computed"] + facts["evaluations_reused"] == 300
    assert facts["evaluations_per_video"] == pytest.approx(facts["evaluations_computed"] / 10)
    assert facts["evaluations_computed"] + facts["evaluations_of_calibration"] == rows_evaluated(world)
    assert 0 < facts["expected_error"] <= facts["largest_expected_error"] <= 0.2


# ---- the calibration file


def test_a_calibration_is_kept_in_a_file_and_used_again(toys: ModuleType, tmp_path: Path, caplog: Any) -> None:
    path = tmp_path / "calibration.json"
    first = toys.World.build(cache(calibration=str(path)))
    expected = first.start(range(5), APART[:5]).finish()
    written = path.read_bytes()
    caplog.clear()
    second = toys.World.build(cache(calibration=str(path)))
    assert torch.equal(second.start(range(5), APART[:5]).finish(), expected)
    assert second.plugin("step-cache").counts.calibrating == 0
    assert counted(second) == counted(first)
    assert path.read_bytes() == written
    assert [each.name for each in tmp_path.iterdir()] == ["calibration.json"]


def test_another_kind_of_video_is_calibrated_and_added(toys: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    toys.World.build(cache(calibration=str(path))).start([0]).finish()
    for hook, options in [(cache(0.05), {}), (cache(), {"num_sampling_steps": 20})]:
        world = toys.World.build({**hook, "calibration": str(path)}, **options)
        world.start([0]).finish()
        assert world.plugin("step-cache").counts.calibrating > 0
    world = toys.World.build(cache(calibration=str(path)))
    world.start([0]).finish()
    assert world.plugin("step-cache").counts.calibrating == 0
    assert len(json.loads(path.read_text())["entries"]) == 3


def test_only_the_main_process_writes_the_file(toys: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    world = toys.World.build(cache(calibration=str(path)))
    run = run_of(toys, world, [request(0)])
    run.accelerator.rank = 1
    world.hooks.sample_start(run=run)
    assert world.plugin("step-cache").counts.calibrating > 0
    assert not path.exists()


def test_a_calibration_of_another_model_is_refused(toys: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    toys.World.build(cache(calibration=str(path))).start([0]).finish()
    with pytest.raises(
        ConfigError, match=r"of another model: toy with 144 parameters \(\w{16}\). This is toy with 144"
    ):
        toys.World.build(cache(calibration=str(path)), network=toys.Mixture(seed=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "no JSON, or cut off"),
        (lambda text: "", "no JSON, or cut off"),
        (lambda text: "[1, 2]", 'no "format"'),
        (lambda text: text.replace("step-cache 1", "step-cache 7"), 'no "format"'),
        (lambda text: text.replace('"timesteps": [', '"timesteps": [\n "noon",', 1), "timesteps"),
        (lambda text: text.replace('"timesteps": [', '"timesteps": [\n 1000.0,', 1), "of one size"),
        (lambda text: text.replace('"products"', '"product"'), "product"),
    ],
    ids=["cut", "empty", "other json", "other version", "no number", "too long", "misspelt"],
)
def test_a_file_that_is_no_calibration_is_refused(toys: ModuleType, tmp_path: Path, change: Any, message: str) -> None:
    path = tmp_path / "calibration.json"
    toys.World.build(cache(calibration=str(path))).start([0]).finish()
    path.write_text(change(path.read_text()))
    with pytest.raises(ConfigError, match=message) as caught:
        build("hooks", cache(calibration=str(path)))
    assert str(path) in str(caught.value)
    assert "Delete it" in str(caught.value)


def test_a_calibration_file_in_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"The folder of the calibration file .* does not exist"):
        build("hooks", cache(calibration=str(tmp_path / "missing" / "calibration.json")))
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ConfigError, match="can't be read"):
        build("hooks", cache(calibration=str(tmp_path / "folder.json")))


def test_a_calibration_that_can_not_be_written_ends_with_a_message(
    toys: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = toys.World.build(cache(calibration=str(tmp_path / "calibration.json")))

    def full(self: Path, *arguments: object, **named: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(MachineError, match="No space left on device"):
        world.start([0]).finish()
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


# ---- where it can't serve


@pytest.mark.parametrize("tolerance", [0, -0.1, 1, float("nan")])
def test_a_tolerance_that_is_none_is_refused(tolerance: float) -> None:
    with pytest.raises(ConfigError, match="tolerance"):
        build("hooks", cache(tolerance))


def test_an_unknown_option_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match='Did you mean "tolerance"'):
        build("hooks", {"type": "step-cache", "tolerence": 0.1})


def test_a_scheduler_that_adds_noise_is_refused_with_the_reason(toys: ModuleType) -> None:
    with pytest.raises(ConfigError, match=r"step-cache.*toy-flow.*adds fresh noise.*rflow with solver") as caught:
        toys.World.build(cache(), eta=1.0)
    assert "ddim_eta = 0" in str(caught.value)
    world = toys.World.build(cache())
    noisy = world.start([0], scheduler=toys.Flow(toys.FlowSpec(eta=0.5)))
    with pytest.raises(ConfigError, match="adds fresh noise"):
        next(noisy)


def test_training_and_a_second_cache_are_refused(toys: ModuleType) -> None:
    plugin = build("hooks", cache())
    toy = ComponentConfig("toy")
    with pytest.raises(ConfigError, match="training has none"):
        plugin.denoiser_built(toys.Mixture(), TrainSpec(model=toy, scheduler=toy, dataset=toy))
    with pytest.raises(ConfigError, match='"step-cache" and "pyramid-broadcast" can\'t take part in one run'):
        toys.World.build(cache(), {"type": "pyramid-broadcast"})


@pytest.mark.parametrize(
    ("steps", "tolerance", "message"),
    [
        (2, 0.1, "2 evaluations only, and the first 2 are always made"),
        (1, 0.1, "1 evaluations only"),
        (30, 1e-6, r"tolerance of 1e-06; it would have to be [\d.e-]+ at least"),
    ],
)
def test_if_nothing_can_be_reused_that_is_said_and_all_is_evaluated(
    toys: ModuleType, caplog: Any, steps: int, tolerance: float, message: str
) -> None:
    world = toys.World.build(cache(tolerance), num_sampling_steps=steps)
    found = world.start(range(3)).finish()
    assert torch.equal(found, toys.World.build(num_sampling_steps=steps).start(range(3)).finish())
    (record,) = [each for each in caplog.records if each.levelno == logging.WARNING]
    assert re.search(message, record.getMessage())
    assert counted(world) == (3 * steps, 0)


def test_other_timesteps_than_calibrated_are_sampled_in_full(toys: ModuleType, caplog: Any) -> None:
    class Shifted(toys.Flow):
        """Of the same options, but its timesteps depend on the conditions."""

        def sample(self, denoiser: Any, noise: Tensor, conditioning: Any, **named: Any) -> Any:
            shift = 1.0 if conditioning.fps is None else 0.9
            return super().sample(lambda x, t, told: denoiser(x, t * shift, told), noise, conditioning, **named)

    world = toys.World.build(cache())
    world.scheduler = Shifted(world.scheduler.spec)
    world.start([0]).finish()
    told = toys.told([1.0, 1.0]).replace(fps=torch.ones(2))
    before = counted(world)
    world.start([1, 2], conditioning=told).finish()
    assert counted(world) == (before[0] + 60, before[1])
    assert caplog.text.count("unlike when it was calibrated") == 1


def test_a_scheduler_whose_timesteps_depend_on_the_noise_is_refused(toys: ModuleType) -> None:
    class Restless(toys.Flow):
        def sample(self, denoiser: Any, noise: Tensor, conditioning: Any, **named: Any) -> Any:
            shift = noise.mean().item()
            return super().sample(lambda x, t, told: denoiser(x, t + shift, told), noise, conditioning, **named)

    world = toys.World.build(cache())
    world.scheduler = Restless(world.scheduler.spec)
    with pytest.raises(ConfigError, match="at other timesteps from video to video"):
        world.start([0]).finish()


def test_a_denoiser_that_is_called_outside_of_denoising_is_evaluated(toys: ModuleType) -> None:
    world = toys.World.build(cache())
    denoising = world.start(range(2))
    answer = world.denoiser(denoising.noise, torch.full((2,), 500.0), denoising.conditioning)
    assert torch.equal(answer, world.guided(denoising.noise, torch.full((2,), 500.0), denoising.conditioning))


def test_what_is_perfectly_foreseen_is_reused_and_right(toys: ModuleType) -> None:
    class Straight(toys.Mixture):
        def forward(self, latents: Tensor, timestep: Tensor, conditioning: Any) -> Tensor:
            super().forward(latents, timestep, conditioning)
            return torch.cat([torch.ones_like(latents)] * 2, dim=1)

    world = toys.World.build(cache(), network=Straight())
    found = world.start(range(3)).finish()
    torch.testing.assert_close(found, world.start(range(3)).noise + 1, rtol=1e-4, atol=1e-4)
    assert counted(world)[1] == 3 * 21  # all but the first two, and one of four after that


def test_a_denoiser_that_breaks_down_is_never_foreseen(toys: ModuleType, caplog: Any) -> None:
    class Broken(toys.Mixture):
        def forward(self, latents: Tensor, timestep: Tensor, conditioning: Any) -> Tensor:
            return super().forward(latents, timestep, conditioning) * (torch.nan if timestep.max() < 500 else 1)

    world = toys.World.build(cache(), network=Broken())
    world.start(range(3)).finish()
    assert counted(world) == (90, 0)
    assert "not finite" in caplog.text
