"""Which dtypes a device computes, found out without dying of the answer."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from opensora.core.machine import probe_dtype


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing is remembered from other tests, nor for them."""
    probe_dtype.cache_clear()
    yield
    probe_dtype.cache_clear()


def ends_with(monkeypatch: pytest.MonkeyPatch, returncode: int, stderr: str = "") -> list[Any]:
    """Stands in for a CPU on which the probe's process ends so."""
    calls: list[Any] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_fp32_works_on_the_cpu() -> None:
    assert probe_dtype("cpu", "fp32") is None


def test_half_precision_on_the_cpu_is_tried_in_another_process_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = ends_with(monkeypatch, 0)
    assert probe_dtype("cpu", "bf16") is None
    assert probe_dtype("cpu", "bf16") is None
    assert len(calls) == 1
    assert probe_dtype("cpu", "fp32") is None
    assert len(calls) == 1


def test_the_probe_itself_has_an_answer_here() -> None:
    assert probe_dtype("cpu", "bf16") is None or "kills" in str(probe_dtype("cpu", "bf16"))


@pytest.mark.parametrize(
    ("returncode", "stderr", "problem"),
    [
        (
            -signal.SIGILL,
            "",
            "kills the process (illegal instruction); setting ONEDNN_MAX_CPU_ISA=AVX512_CORE_FP16 may help",
        ),
        (-signal.SIGSEGV, "", "kills the process (SIGSEGV)"),
        (1, "Traceback\n  ...\nRuntimeError: not implemented for 'Half'\n", "RuntimeError: not implemented for 'Half'"),
    ],
)
def test_how_the_probe_ends_is_said(
    monkeypatch: pytest.MonkeyPatch, returncode: int, stderr: str, problem: str
) -> None:
    ends_with(monkeypatch, returncode, stderr)
    assert probe_dtype("cpu", "bf16") == problem


def test_a_probe_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], *, timeout: float, **_: Any) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    assert probe_dtype("cpu", "fp16") == "no result after 120 s"


def test_a_device_that_is_not_there_is_a_problem_and_no_exception() -> None:
    assert probe_dtype("cuda:99", "bf16")
