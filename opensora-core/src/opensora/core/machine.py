"""What this machine can do."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from functools import cache

__all__ = ["die_with_parent", "probe_dtype"]

_TIMEOUT_S = 120
_PR_SET_PDEATHSIG = 1
_PROBE = """
import sys
import torch
dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[sys.argv[2]]
def ones(*shape, grad=False):
    return torch.ones(shape, device=sys.argv[1], dtype=dtype, requires_grad=grad)
rows = ones(64, 128, grad=True)
torch.nn.functional.linear(rows, ones(96, 128)).sum().backward()
image = torch.nn.functional.conv2d(ones(1, 8, 16, 16), ones(8, 8, 3, 3))
assert rows.grad[0, 0].item() == 96 and image[0, 0, 0, 0].item() == 72, "wrong result"
"""


def die_with_parent() -> None:
    """Let the kernel end this process when the one that started it ends, however that ends.

    Linux only; elsewhere the lock of the run folder keeps a resumed run from starting beside it.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before we asked
        os.kill(os.getpid(), signal.SIGKILL)


@cache
def probe_dtype(device: str, dtype: str) -> str | None:
    """Try a matrix product and a convolution.

    On the CPU, half precisions are tried in another process: on some CPUs they end it with an illegal instruction.

    Args:
        device: As torch names it.
        dtype: ``fp32``, ``fp16`` or ``bf16``.

    Returns:
        What went wrong, or None if they work.
    """
    if device == "cpu" and dtype != "fp32":
        return _probe_in_subprocess(device, dtype)
    try:
        import torch

        kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
        square = torch.ones(64, 64, device=device, dtype=kind)
        return None if (square @ square)[0, 0].item() == 64 else "wrong result"
    except (RuntimeError, AssertionError, ImportError) as error:
        return _first_line(str(error)) or type(error).__name__


def _probe_in_subprocess(device: str, dtype: str) -> str | None:
    command = [sys.executable, "-c", _PROBE, device, dtype]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"no result after {_TIMEOUT_S} s"
    if done.returncode == -signal.SIGILL:
        return "kills the process (illegal instruction); setting ONEDNN_MAX_CPU_ISA=AVX512_CORE_FP16 may help"
    if done.returncode < 0:
        return f"kills the process ({signal.Signals(-done.returncode).name})"
    return None if done.returncode == 0 else _first_line(done.stderr.strip().rpartition("\n")[2])


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
