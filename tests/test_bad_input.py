"""What users get wrong: one clear line, exit code 2, no traceback, and nothing lost or left behind."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import Command, command_line, environment, losses, tiny_training

from opensora.core.commands.opensora_run import main

Values = dict[str, object]
Case = Callable[[Values, Path], None]


@pytest.fixture
def refused(
    clips: Path,
    write: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., str]:
    """Runs a config in this process, checks that it was refused in good order, and returns the message."""

    def refused(values: Values, *flags: object, may_leave_run: bool = False) -> str:
        monkeypatch.chdir(tmp_path)
        code = main([str(write(values)), *map(str, flags)])
        captured = capsys.readouterr()
        assert code == 2, captured.err
        assert "Traceback" not in captured.err
        assert may_leave_run or not (tmp_path / "outputs").exists(), "a run folder was left behind"
        return captured.err

    return refused


def changed(values: Values, key: str, **options: object) -> Values:
    return {**values, key: {**values[key], **options}}  # type: ignore[dict-item]


def test_unknown_key_names_file_line_and_nearest(refused: Callable[..., str], clips: Path) -> None:
    message = refused(changed(tiny_training(clips), "model", depht=3))
    assert "config.py:" in message
    assert 'model.depht is not a field of STDiT3Spec. Did you mean "depth"?' in message


def test_wrong_type_names_key_and_both_types(refused: Callable[..., str], clips: Path) -> None:
    message = refused(tiny_training(clips, batch_size="many"))
    assert "batch_size" in message
    assert '"many"' in message


def test_value_out_of_range_says_the_range(refused: Callable[..., str], clips: Path) -> None:
    assert "lr" in refused(tiny_training(clips, lr=-1.0))


def test_unknown_component_names_the_nearest(refused: Callable[..., str], clips: Path) -> None:
    assert '"STDiT3-XL/2"' in refused(tiny_training(clips, model={"type": "STDiT3-XL2"}))


def test_too_few_data_for_a_step_say_what_to_change(refused: Callable[..., str], clips: Path) -> None:
    message = refused(tiny_training(clips, batch_size=100, epochs=1), may_leave_run=True)
    assert "batch_size" in message


def test_missing_csv_column_names_those_there_are(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("path,caption\nclip.mp4,a clip\n")
    message = refused(tiny_training(tmp_path / "bad.csv"), may_leave_run=True)
    assert "text" in message
    assert "caption" in message


def test_missing_table_is_named(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "nowhere.csv" in refused(tiny_training(tmp_path / "nowhere.csv"), may_leave_run=True)


def test_size_that_the_patch_does_not_divide(refused: Callable[..., str], clips: Path) -> None:
    model = {"type": "DiT", "hidden_size": 32, "depth": 1, "num_heads": 2, "patch_size": (1, 4, 4)}
    values = tiny_training(clips, model=model, text_encoder={"type": "hashed-words", "model_max_length": 1})
    message = refused(changed(values, "dataset", image_size=(18, 18)), may_leave_run=True)
    assert "18" in message


@pytest.fixture
def sampling(clips: Path) -> Values:
    return {
        "model": tiny_training(clips)["model"],
        "scheduler": {"type": "rflow", "num_sampling_steps": 2},
        "num_frames": 4,
        "image_size": (16, 16),
        "dtype": "fp32",
    }


def test_no_prompt(refused: Callable[..., str], sampling: Values) -> None:
    assert "--prompt" in refused(sampling)


def test_empty_prompt_file(refused: Callable[..., str], sampling: Values, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n")
    assert "prompts.txt is empty" in refused(sampling, "--prompt-path", "prompts.txt")


def test_output_folder_that_can_not_be_written(refused: Callable[..., str], sampling: Values, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    message = refused(sampling, "--prompt", "a", "--save-dir", tmp_path / "file" / "samples")
    assert "Can't write" in message


def test_weights_of_another_model(refused: Callable[..., str], sampling: Values, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"encoder.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    message = refused(sampling, "--prompt", "a", "--ckpt-path", "other.safetensors", may_leave_run=True)
    assert "don't fit STDiT3" in message
    assert "encoder.weight" in message


class Harmful:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("harmed",)


def test_pickle_that_needs_code_is_not_run(refused: Callable[..., str], sampling: Values, tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(pickle.dumps({"weight": Harmful()}))
    message = refused(sampling, "--prompt", "a", "--ckpt-path", "weights.pt", may_leave_run=True)
    assert "could run code" in message or "can't be read" in message
    assert not (tmp_path / "harmed").exists()


def test_config_that_calls_something_is_not_run(command: Command, tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text('import os\nos.mkdir("harmed")\n')
    done = command("opensora-run", "evil.py")
    assert done.returncode == 2
    assert "evil.py:1" in done.stderr
    assert "--trust-config" in done.stderr
    assert not (tmp_path / "harmed").exists()


def bad_files(folder: Path, good: Path) -> dict[str, str]:
    """Files of every unusable kind, and what the message must say of each."""
    whole = good.read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    (folder / "text.mp4").write_text("this is no video")
    (folder / "empty.mp4").write_bytes(b"")
    return {"missing.mp4": "missing", "truncated.mp4": "truncated", "text.mp4": "text", "empty.mp4": "empty"}


def test_unreadable_clips_are_skipped_counted_and_listed(
    command: Command, clips: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    good = clips.with_name("clip_00.mp4")
    bad = bad_files(tmp_path, good)
    rows = [f"{clips.with_name(f'clip_{index:02d}.mp4')},a square" for index in range(20)]
    (tmp_path / "mixed.csv").write_text("\n".join(["path,text", *rows, *[f"{tmp_path / name},bad" for name in bad]]))
    config = write(tiny_training(tmp_path / "mixed.csv", max_unreadable=0.2, max_steps=9))
    done = command("opensora-run", config, "--run-folder", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    listed = (tmp_path / "run" / "skipped.jsonl").read_text()
    assert len(listed.splitlines()) == len(bad)
    assert all(name in listed for name in bad)
    assert len(losses(tmp_path / "run")) == 9

    strict = write(tiny_training(tmp_path / "mixed.csv", max_unreadable=0.05, max_steps=9), "strict.py")
    done = command("opensora-run", strict, "--run-folder", tmp_path / "strict")
    assert done.returncode == 2
    assert "max_unreadable" in done.stderr


def test_all_clips_unreadable_stops_at_once(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "none.csv").write_text("path,text\n" + "gone.mp4,a clip\n" * 8)
    assert "gone.mp4" in refused(tiny_training(tmp_path / "none.csv", max_unreadable=1.0), may_leave_run=True)


def test_a_process_without_readable_clips_goes_on_with_the_others(
    command: Command, clips: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [f"{clips.with_name(f'clip_{index:02d}.mp4')},a square" for index in range(12)]
    (tmp_path / "mixed.csv").write_text("\n".join(["path,text", *rows, *["gone.mp4,bad"] * 4]))
    config = write(tiny_training(tmp_path / "mixed.csv", batch_size=1, max_unreadable=1.0, max_steps=16))
    done = command("opensora-run", config, "--run-folder", tmp_path / "run", "--nproc", 2)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "run" / "skipped.jsonl").read_text().splitlines()) == 4


def test_loss_that_stays_infinite_stops_with_the_last_good_checkpoint(
    refused: Callable[..., str], clips: Path, tmp_path: Path
) -> None:
    values = tiny_training(clips, max_left_out=3, max_steps=40, ckpt_every=1, lr=1e36, grad_clip=0.0)
    message = refused(values, "--run-folder", tmp_path / "run")
    assert "3 steps in a row" in message
    assert "Last good checkpoint" in message


def test_full_disk_ends_the_run_and_keeps_the_last_checkpoint(
    command: Command, clips: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    config = write(tiny_training(clips, max_steps=4, ckpt_every=2, ema_decay=0))
    done = command("opensora-run", config, "--run-folder", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    more = write(tiny_training(clips, max_steps=8, ckpt_every=2, ema_decay=0), "more.py")
    arguments = command_line("opensora-run", more, "--load", tmp_path / "run")
    limited = ["bash", "-c", 'ulimit -f 40; exec "$@"', "limited", *arguments]  # 40 KiB: less than the weights
    done = subprocess.run(limited, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "can't be written" in done.stderr
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == kept


def test_port_in_use(command: Command, clips: Path, write: Callable[..., Path]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = command("opensora-run", write(tiny_training(clips)), "--nproc", 2, "--port", port)
    assert done.returncode == 2
    assert str(port) in done.stderr
    assert "in use" in done.stderr


def test_half_precision_that_kills_the_process_is_refused(
    command: Command, clips: Path, write: Callable[..., Path]
) -> None:
    import sys

    probe = subprocess.run(
        [sys.executable, "-c", "from opensora.core.machine import probe_dtype; print(probe_dtype('cpu', 'bf16'))"],
        capture_output=True, text=True, check=True, env={**environment(), "ONEDNN_MAX_CPU_ISA": ""},
    )  # fmt: skip
    done = command(
        "opensora-run", write(tiny_training(clips, max_steps=2)), "--dtype", "bf16",
        env={**environment(), "ONEDNN_MAX_CPU_ISA": ""},
    )  # fmt: skip
    if probe.stdout.strip() == "None":
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 2
        assert "--dtype fp32" in done.stderr
