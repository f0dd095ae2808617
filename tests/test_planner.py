"""Plans of training steps against the steps themselves; configs that fit; searches and profiles by the real commands."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from runs import environment, losses, tiny_training, weights

from opensora.accel.planner import Planner, largest_batch, parse_bytes
from opensora.accel.search_batch_size import search
from opensora.core.commands.opensora import main as opensora
from opensora.core.commands.opensora_run import compose
from opensora.core.commands.opensora_run import main as opensora_run
from opensora.core.config.evaluate import evaluate
from opensora.core.config.structure import structure
from opensora.core.config.write import write_config
from opensora.core.errors import ConfigError
from opensora.core.machine import probe_dtype
from opensora.core.pipelines.plan import describe_costs, shares_of
from opensora.core.pipelines.step_cost import StepRehearsal, build_on_meta
from opensora.core.pipelines.train_spec import TrainSpec

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "planner.py"
TINY = {
    "model": {"type": "STDiT3", "hidden_size": 24, "depth": 2, "num_heads": 2, "patch_size": (1, 8, 8)},
    "scheduler": {"type": "rflow"},
    "dataset": {"type": "VariableVideoTextDataset", "data_path": "clips.csv"},
    "bucket_config": {"144p": {1: (1.0, 3), 4: ((0.5, 0.25), 2)}, "240p": {1: (0, None)}},
    "dtype": "fp32",
}


def load_benchmark():
    found = importlib.util.spec_from_file_location("planner_benchmark", BENCHMARK)
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    found.loader.exec_module(module)
    return module


benchmark = load_benchmark()
SMALL = {"hidden_size": 48, "depth": 2, "num_heads": 2}
CASES = [
    benchmark.Case("STDiT3", SMALL, (2, 16, 16), 2),
    benchmark.Case("STDiT3", SMALL, (2, 16, 16), 1, {"grad_checkpoint": "selective"}),
    benchmark.Case("STDiT", SMALL, (2, 16, 16), 2, {"grad_checkpoint": True}),
    benchmark.Case("DiT", {**SMALL, "hidden_size": 384, "num_heads": 6}, (1, 16, 16), 2, {**benchmark.LABELS}),
    pytest.param(benchmark.Case("PixArt", SMALL, (1, 16, 16), 2, {"dtype": "bf16"}), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_rehearsed_step_is_the_real_one(case):
    dtype = case.changes.get("dtype", "fp32")
    if problem := probe_dtype("cpu", dtype):
        pytest.skip(f"{dtype} on this CPU: {problem}")
    predicted, measured = benchmark.predict(case), benchmark.measure(case)
    assert predicted.saved == pytest.approx(measured.saved, rel=0.05)
    assert predicted.peak == pytest.approx(measured.peak, rel=0.10)
    assert predicted.flops == measured.flops > 0


@pytest.mark.parametrize("which", [False, True, pytest.param(2, marks=pytest.mark.slow)], ids=str)
def test_a_deep_network_is_told_by_a_few_of_its_blocks(which):
    model = {"type": "PixArt", "hidden_size": 48, "depth": 9, "num_heads": 2}
    values = {**TINY, "model": model, "scheduler": {"type": "iddpm"}, "bucket_config": None, "grad_checkpoint": which}
    spec, size = structure(TrainSpec, values), (1, 16, 16)
    costs = []
    for exact in (True, False):
        with StepRehearsal(spec, build_on_meta(spec, size), exact=exact) as rehearsal:
            costs.append(rehearsal.step(size, 2))
    full, told = costs
    assert told.saved == pytest.approx(full.saved, rel=0.001)
    assert told.peak == pytest.approx(full.peak, rel=0.01)
    assert told.flops == full.flops
    assert sum(told.held.values()) == pytest.approx(sum(full.held.values()), rel=0.001)


@pytest.fixture(scope="module")
def planner():
    return Planner(structure(TrainSpec, TINY), (1, 1, 1))


def test_each_bucket_in_use_has_a_row(planner):
    lines = "\n".join(describe_costs(planner.costs()))
    assert "144p x 1 " in lines
    assert "144p x 4 " in lines
    assert "240p" not in lines
    assert lines.startswith("memory ")


def test_what_takes_long_says_how_far_it_is(planner, caplog, monkeypatch):
    monkeypatch.setattr("opensora.core.pipelines.plan._SECONDS_OF_SILENCE", 1000.0)
    with caplog.at_level("INFO"):
        planner.costs()
    assert "rehearsed" not in caplog.text
    monkeypatch.setattr("opensora.core.pipelines.plan._SECONDS_OF_SILENCE", 0.0)
    with caplog.at_level("INFO"):
        planner.costs()
    assert "1 of 2 buckets are rehearsed" in caplog.text


def test_processes_that_share_weights_need_less():
    spec = structure(TrainSpec, {**TINY, "accelerator": {"type": "fsdp"}})
    alone, shared = (Planner(spec, (1, 1, 1), world_size=count).costs() for count in (1, 4))
    one, other = next(iter(alone.values())), next(iter(shared.values()))
    assert shares_of(spec, 4).optimizer == 0.25
    assert other.held["optimizer"] == pytest.approx(one.held["optimizer"] / 4, rel=0.01)
    assert other.gradients == pytest.approx(one.gradients / 4, rel=0.01)


def test_offloaded_activations_are_the_cpus():
    plain, offloaded = (
        Planner(structure(TrainSpec, {**TINY, "offload": offload}), (1, 1, 1)).costs() for offload in (False, True)
    )
    for bucket, cost in plain.items():
        assert offloaded[bucket].host > 0.5 * cost.saved
        assert offloaded[bucket].peak < cost.peak
        assert cost.host == 0


def test_the_written_config_fits_and_nothing_larger_would(tmp_path, capsys):
    write_config(tmp_path / "given.py", TINY, "Small.")
    fitted = tmp_path / "fitted.py"
    arguments = ["plan", str(tmp_path / "given.py"), "--fit", "150MiB", "--margin", "0", "--output", str(fitted)]
    assert opensora(arguments) == 0
    assert "chosen " in capsys.readouterr().out
    limit = 150 * 2**20
    spec = compose(evaluate(fitted)).spec
    assert spec.bucket_config["144p"][4][0] == (0.5, 0.25)
    assert spec.bucket_config["240p"][1] == (0, None)
    again = Planner(spec, (1, 1, 1))
    with StepRehearsal(spec, again._parts) as rehearsal:
        for bucket in again.buckets:
            assert rehearsal.step(bucket.size, bucket.batch_size).peak <= limit
            assert rehearsal.step(bucket.size, bucket.batch_size + 1).peak > limit
    assert opensora_run([str(fitted), "--dry-run"]) == 0


def test_what_fits_nowhere_is_told_with_what_would_help(tmp_path, capsys):
    write_config(tmp_path / "given.py", TINY, "Small.")
    assert opensora(["plan", str(tmp_path / "given.py"), "--fit", "1MiB"]) == 2
    message = capsys.readouterr().err
    assert "A single video of 144p x 4 needs 0." in message
    assert "fewer frames or a smaller size" in message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fit", "much"], '"much" is no amount of memory'),
        (["--nproc", "0"], "--nproc must be at least 1"),
        (["--output", "x.py"], "it needs --fit"),
    ],
)
def test_wrong_flags_are_refused(tmp_path, capsys, flags, message):
    write_config(tmp_path / "given.py", TINY, "Small.")
    assert opensora(["plan", str(tmp_path / "given.py"), *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_config_for_sampling_is_refused(tmp_path, capsys):
    values = {key: TINY[key] for key in ("model", "scheduler")} | {"prompt": "a", "image_size": (16, 16)}
    write_config(tmp_path / "sample.py", values, "Samples.")
    assert opensora(["plan", str(tmp_path / "sample.py")]) == 2
    assert "is for another pipeline" in capsys.readouterr().err


def test_grad_checkpoint_of_zero_blocks_is_refused():
    with pytest.raises(ConfigError, match="every n-th block needs n of at least 1"):
        structure(TrainSpec, {**TINY, "grad_checkpoint": 0})
    with pytest.raises(ConfigError, match="selective"):
        structure(TrainSpec, {**TINY, "grad_checkpoint": "selektive"})
    with pytest.raises(ConfigError, match="compile excludes"):
        structure(TrainSpec, {**TINY, "grad_checkpoint": "selective", "compile": True})


def test_options_that_save_memory_leave_losses_and_names_as_they_are(clips, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = {}
    options = {"none": {}, "offload": {"offload": True}, "selective": {"grad_checkpoint": "selective", "offload": True}}
    for name, changes in options.items():
        values = tiny_training(clips, max_steps=2, run_folder=name, **changes)
        write_config(tmp_path / f"{name}.py", values, "Tiny.")
        assert opensora_run([str(tmp_path / f"{name}.py")]) == 0
        found[name] = losses(tmp_path / name)
    assert found["offload"] == found["none"]
    assert found["selective"] == pytest.approx(found["none"], abs=1e-5)
    assert {frozenset(weights(tmp_path / name)) for name in options} == {frozenset(weights(tmp_path / "none"))}


def test_a_config_without_a_bucket_in_use_is_refused():
    with pytest.raises(ConfigError, match="No bucket of bucket_config"):
        Planner(structure(TrainSpec, {**TINY, "bucket_config": {"144p": {1: (0, None)}}}), (1, 1, 1))


@pytest.mark.slow
def test_compiled_blocks_are_not_asked_to_keep_single_results():
    planner = Planner(structure(TrainSpec, {**TINY, "compile": True}), (1, 1, 1))
    assert planner.fit(2**40).grad_checkpoint is False
    assert planner.fit(min(cost.peak for cost in planner.costs().values()) * 3 // 4).grad_checkpoint is True


@pytest.mark.parametrize(
    ("text", "amount"), [("24GiB", 24 * 2**30), ("80 GB", 80 * 10**9), ("1.5g", 3 * 2**29), ("512MiB", 2**29)]
)
def test_amounts_of_memory(text, amount):
    assert parse_bytes(text) == amount


@pytest.mark.parametrize("text", ["", "0GiB", "-1GiB", "24 GiBs", "1e9"])
def test_what_is_no_amount_of_memory(text):
    with pytest.raises(ConfigError, match="is no amount of memory"):
        parse_bytes(text)


@pytest.mark.parametrize("first", [1, 2, 40, 10_000])
@pytest.mark.parametrize("best", [0, 1, 2, 37, 500])
def test_the_largest_batch_is_found_on_lines_and_on_curves(first, best):
    asked = []

    def line(size: int) -> int:
        asked.append(size)
        return 1000 + 7 * size

    assert largest_batch(line, 1000 + 7 * best + 3, first=first) == best
    assert len(set(asked)) < 25
    assert largest_batch(lambda size: 1000 + size * size, 1000 + best * best, first=first) == best


def test_a_search_finds_what_fits_or_what_is_fast_enough():
    def step_time(size: int) -> float | None:
        return None if size > 13 else 0.1 * size

    assert search(step_time, 1, 40, None).batch_size == 13
    assert search(step_time, 1, 40, 0.75).batch_size == 7
    assert search(step_time, 20, 40, None).batch_size is None
    assert search(step_time, 3, 5, 10.0).batch_size == 5


SEARCHED = {
    **TINY,
    "pipeline": "search-batch-size",
    "bucket_config": {"144p": {1: (2, 1), 2: (1, 0)}},
    "warmup_steps_each": 1,
    "timed_steps": 1,
}


def test_a_search_writes_a_valid_bucket_config(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / "search.py", SEARCHED, "Search.")
    assert opensora_run([str(tmp_path / "search.py")]) == 0
    assert "144p x 1    3, " in capsys.readouterr().out
    found = evaluate(tmp_path / "bucket_config.py").values["bucket_config"]
    assert found == {"144p": {1: (1.0, 3), 2: (1.0, 1)}}
    (tmp_path / "train.py").write_text('_base_ = ["bucket_config.py", "rest.py"]\n')
    rest = {key: value for key, value in TINY.items() if key != "bucket_config"}
    write_config(tmp_path / "rest.py", rest, "The rest.")
    assert compose(evaluate(tmp_path / "train.py")).spec.bucket_config == found


LIMITED = """
import resource, sys
import torch._dynamo  # the optimizers import it when they are built: it must not count against the limit
from opensora.core.commands.opensora_run import main
import opensora.accel.search_batch_size, opensora.models, opensora.schedulers, opensora.data
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (int(sys.argv[2]) << 20),) * 2)
sys.exit(main([sys.argv[1]]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_what_does_not_fit_into_memory_counts_as_too_large(tmp_path):
    buckets = {"144p": {1: (200, 199)}}
    write_config(tmp_path / "search.py", {**SEARCHED, "bucket_config": buckets}, "Search.")
    command = [sys.executable, "-c", LIMITED, "search.py", "250"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "don't fit" in done.stderr
    (_, found) = evaluate(tmp_path / "bucket_config.py").values["bucket_config"]["144p"][1]
    assert 1 <= found < 399


def test_another_error_than_out_of_memory_is_raised(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = {**TINY["model"], "input_sq_size": 512}
    vae = {"type": "no-such-vae"}
    write_config(tmp_path / "search.py", {**SEARCHED, "model": model, "vae": vae}, "Search.")
    assert opensora_run([str(tmp_path / "search.py")]) == 2
    assert "no-such-vae" in capsys.readouterr().err
    assert not (tmp_path / "bucket_config.py").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bucket_config": {"144p": {1: (0.5, 3)}}}, "must be \\(guess, variance\\)"),
        ({"bucket_config": {"145p": {1: (5, 3)}}}, 'Did you mean "144p"'),
        ({"bucket_config": {}}, "No bucket to search"),
        ({"resolution": "240p"}, 'No bucket of resolution "240p"'),
        ({"base": ("240p", 1)}, "is no bucket"),
    ],
)
def test_wrong_searches_are_refused(tmp_path, changes, message):
    write_config(tmp_path / "search.py", {**SEARCHED, **changes}, "Search.")
    with pytest.raises(ConfigError, match=message):
        compose(evaluate(tmp_path / "search.py"))


def test_a_profile_names_the_phases_of_training(clips, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    profile = {"type": "profile", "first_step": 2, "steps": 2}
    write_config(tmp_path / "train.py", tiny_training(clips, max_steps=4, hooks=[profile], run_folder="run"), "Tiny.")
    assert opensora_run([str(tmp_path / "train.py")]) == 0
    trace = json.loads((tmp_path / "run/profile/trace.json").read_text())
    names = [event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    for phase in ("data", "vae", "text", "forward", "backward", "optimizer"):
        assert names.count(phase) == 2, phase
    table = (tmp_path / "run/profile/table.txt").read_text()
    assert table.startswith("2 steps from step 2 on")
    assert "forward" in table


def test_a_profile_of_sampling_and_one_that_comes_too_late(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    values = {key: TINY[key] for key in ("model", "dtype")} | {"prompt": "a", "image_size": (16, 16), "num_frames": 1}
    values |= {"scheduler": {"type": "rflow", "num_sampling_steps": 3}, "save_dir": "samples"}
    early, late = ({"type": "profile", "first_step": first, "steps": 2} for first in (1, 9))
    write_config(tmp_path / "sample.py", {**values, "hooks": [early]}, "Samples.")
    assert opensora_run([str(tmp_path / "sample.py")]) == 0
    assert list(tmp_path.rglob("profile/trace.json"))
    write_config(tmp_path / "late.py", {**values, "hooks": [late], "save_dir": "late"}, "Samples.")
    assert opensora_run([str(tmp_path / "late.py")]) == 0
    assert "step 9 was not reached" in caplog.text
    assert not (tmp_path / "late" / "profile").exists()
