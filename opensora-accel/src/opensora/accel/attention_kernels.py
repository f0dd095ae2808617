"""Attention by other packages' kernels: ``attention = "flash"`` and ``attention = "xformers"``.

Torch's own, ``sdpa``, chooses among kernels of the same kind, so that these pay off where their package is ahead of it:
measure before you choose one. What they can't compute is computed by ``sdpa``: attention under a mask (to the words of
captions of different lengths, a small part of the work), and all of it where the package, the device or the dtype doesn't
allow theirs, which is logged once.

Sources: Dao, FlashAttention-2, https://arxiv.org/abs/2307.08691; https://github.com/facebookresearch/xformers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from attrs import field, frozen
from torch import Tensor

from opensora.core.attention import sdpa

__all__ = ["FLASH", "XFORMERS", "PackageKernel", "flash", "xformers"]

log = logging.getLogger(__name__)


@frozen(kw_only=True)
class PackageKernel:
    """A function of another package that attends, and where it can be used."""

    name: str
    """In configs."""
    module: str
    function: str
    """Called with query [B, N, H, D], key and value [B, L, H, D]; returns [B, N, H, D]."""
    install: str
    dtypes: frozenset[torch.dtype]
    devices: frozenset[str] = frozenset({"cuda"})
    capability: tuple[int, int] = (0, 0)
    """Of NVIDIA's GPUs, at least."""
    max_width: int = 256
    """D at most."""
    _reported: set[str] = field(factory=set, init=False, eq=False)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `opensora.core.attention.attention`."""
        if mask is not None:
            return sdpa(query, key, value, mask)
        query, key, value = _as_autocast(query, key, value)
        if problem := self.problem(query):
            if problem not in self._reported:
                self._reported.add(problem)
                log.warning('attention "%s" is computed by "sdpa" here: %s.', self.name, problem)
            return sdpa(query, key, value)
        attend = _load(self.module, self.function)
        assert attend is not None  # it would be the problem
        result: Tensor = attend(*(each.transpose(1, 2) for each in (query, key, value)))
        return result.transpose(1, 2)

    def problem(self, query: Tensor) -> str | None:
        """Why queries such as this one can't be used, or None."""
        if query.device.type not in self.devices:
            return f"it doesn't run on {query.device.type}"
        if query.dtype not in self.dtypes:
            wanted = " or ".join(sorted(str(each).removeprefix("torch.") for each in self.dtypes))
            return f"it doesn't compute in {str(query.dtype).removeprefix('torch.')}, only in {wanted} (dtype)"
        if query.shape[-1] > self.max_width:
            return f"heads have {query.shape[-1]} channels, and it takes at most {self.max_width}"
        if query.device.type == "cuda" and (has := torch.cuda.get_device_capability(query.device)) < self.capability:
            return f"this GPU has compute capability {'{}.{}'.format(*has)}, and it needs {'{}.{}'.format(*self.capability)}"
        if _load(self.module, self.function) is None:
            return f"{self.module} is not installed or can't be imported ({self.install})"
        return None


FLASH = PackageKernel(
    name="flash",
    module="flash_attn",
    function="flash_attn_func",
    install='pip install "opensora-accel[flash]"',
    dtypes=frozenset({torch.float16, torch.bfloat16}),
    capability=(8, 0),
)
XFORMERS = PackageKernel(
    name="xformers",
    module="xformers.ops",
    function="memory_efficient_attention",
    install='pip install "opensora-accel[xformers]"',
    dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32}),
    capability=(7, 0),
)


def flash(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention by flash-attn. See `PackageKernel` and `opensora.core.attention.attention`."""
    return FLASH(query, key, value, mask)


def xformers(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention by xformers. See `PackageKernel` and `opensora.core.attention.attention`."""
    return XFORMERS(query, key, value, mask)


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In the dtype that torch's own attention would be given: autocast doesn't know other packages' functions."""
    kind = tensors[0].device.type
    if torch.is_autocast_enabled(kind):
        return tuple(each.to(torch.get_autocast_dtype(kind)) for each in tensors)
    return tensors


@cache
def _load(module: str, function: str) -> Callable[..., Any] | None:
    """The function, or None if the package isn't there or is broken: built for another torch, say."""
    try:
        found: Callable[..., Any] = getattr(import_module(module), function)
        return found
    except (ImportError, OSError, AttributeError) as error:
        log.info("%s: %s", module, error)
        return None
