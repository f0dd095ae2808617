"""What ``opensora doctor`` finds out about this machine."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

from opensora.core.machine import probe_dtype

__all__ = ["examine", "report"]

_PACKAGES = ("opensora-core", "opensora-models", "opensora-schedulers", "opensora-data", "opensora-accel")
_LIBRARIES = ("attrs", "cattrs", "pluggy", "numpy", "safetensors", "huggingface-hub", "av", "transformers", "diffusers")
_OPTIONAL = {
    "flash-attn": "attention kernels on NVIDIA GPUs",
    "xformers": "attention kernels on NVIDIA GPUs",
    "tensorboard": "loss curves in the browser",
    "matplotlib": "plots of the loss",
    "deepspeed": "ZeRO",
    "colossalai": "ZeRO and sequence parallelism",
    "peft": "LoRA",
}
_INSTALL = {"flash-attn": "pip install flash-attn --no-build-isolation"}
_DTYPES = ("fp32", "fp16", "bf16")


def examine() -> dict[str, Any]:
    """Everything, as plain dicts; takes some seconds, since it tries the dtypes."""
    torch_version, problem, devices = _torch()
    return {
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": {"version": torch_version, "problem": problem},
        "packages": {name: _version(name) for name in _PACKAGES},
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "devices": devices,
        "optional": {
            name: {"version": _version(name), "for": use, "install": _install_line(name)}
            for name, use in _OPTIONAL.items()
        },
    }


def report(findings: dict[str, Any]) -> str:
    """The findings for people to read."""
    torch = findings["torch"]
    lines = [f"Python {findings['python']}", f"torch {torch['problem'] or torch['version']}"]
    for title in ("packages", "libraries"):
        lines += ["", f"{title}:"]
        lines += [f"  {name} {version or f'- {_install_line(name)}'}" for name, version in findings[title].items()]
    lines += ["", "devices:"]
    for device in findings["devices"]:
        lines.append(f"  {device['name']} ({device['device']}): {device['memory_bytes'] / 2**30:.1f} GiB")
        lines += [f"    {dtype} {problem or 'works'}" for dtype, problem in device["dtypes"].items()]
    lines += ["", "optional:"]
    for name, found in findings["optional"].items():
        lines.append(f"  {name} {found['version'] or '- ' + found['install']}  ({found['for']})")
    return "\n".join(lines)


def _torch() -> tuple[str | None, str | None, list[dict[str, Any]]]:
    """The version of torch, what is wrong with it, and the devices that it has."""
    try:
        import torch
    except Exception as error:  # a broken installation can fail in any way, and saying so is our job
        version = _version("torch")
        problem = f"{version or 'is not installed'}: {type(error).__name__}: {error}"
        return version, problem, []
    devices = [_device("cpu", f"{_cpu_name()}, {os.cpu_count()} cores", _memory_bytes())]
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        devices.append(_device(f"cuda:{index}", found.name, found.total_memory))
    return torch.__version__, None, devices


def _device(device: str, name: str, memory_bytes: int) -> dict[str, Any]:
    dtypes = {dtype: probe_dtype(device, dtype) for dtype in _DTYPES}
    return {"device": device, "name": name, "memory_bytes": memory_bytes, "dtypes": dtypes}


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or an architecture that has no such line
        return platform.processor() or platform.machine()


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # a system without sysconf
        return 0


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _install_line(name: str) -> str:
    return _INSTALL.get(name, f"pip install {name}")
