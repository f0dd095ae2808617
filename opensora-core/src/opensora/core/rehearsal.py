"""Rehearsals: a step is run with tensors that have shapes and no memory, and what it would take is counted.

Networks take the same paths as in the real step: those that have a faster way for plain execution ask `num_observers`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Self
from weakref import ref

import torch
from attrs import frozen
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Moment", "Rehearsal", "is_rehearsed", "num_observers", "on_host"]

_aten = torch.ops.aten
_prim_device = torch.ops.prim.device.default
_CPU = torch.device("cpu")
_HOST = "host"
_running: list[Rehearsal] = []


def is_rehearsed(tensor: Tensor) -> bool:
    """Whether a tensor has no values, since it is part of a rehearsal."""
    return isinstance(tensor, FakeTensor)


def num_observers() -> int:
    """How many of torch's dispatch modes only look on, so that they must not change what networks do; 0 in real runs."""
    return _running[-1].num_modes if _running else 0


@contextmanager
def on_host() -> Iterator[None]:
    """What is allocated inside lies in the CPU's memory, not in the device's; without effect in real runs."""
    if not _running:
        yield
        return
    with _running[-1].counting_as(_HOST):
        yield


@frozen(kw_only=True)
class Moment:
    """When a phase of the step needs most memory."""

    bytes: int
    """Over all categories, but "host": the CPU's memory."""
    held: Mapping[str, int]
    """Bytes by category."""


class Rehearsal(TorchDispatchMode):  # type: ignore[no-untyped-call]  # of torch
    """Counts live bytes of tensors by category, their peak in each phase, and floating-point operations.

    Inside it, tensors are fake: `fake` makes them, and factory functions too. Asked for a value, a tensor says 1.
    """

    def __init__(self, shares: Mapping[str, float] | None = None) -> None:
        """``shares``: of what category this process holds which part, where it is not all; see `Accelerator.shares`."""
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self.shares = dict(shares or {})
        self.held: Counter[str] = Counter()
        self.peaks: dict[str, Moment] = {}
        self.flops: Counter[str] = Counter()
        self.num_modes = 0
        self._phase = "setting up"
        self._category = "activations"
        self._storages: dict[int, _Storage] = {}
        self._formulas = _flop_formulas()
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Begin."""
        self._stack.enter_context(self._fakes)
        super().__enter__()  # type: ignore[no-untyped-call]  # of torch
        self.num_modes = torch._C._len_torch_dispatch_stack()
        _running.append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        """End."""
        _running.remove(self)
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # of torch
        self._stack.close()

    def fake(self, module: nn.Module, category: str, *, dtype: torch.dtype | None = None) -> None:
        """Give a module that was built on the meta device fake tensors on the CPU.

        Args:
            category: What they count as.
            dtype: Of those that are floating-point numbers; None leaves theirs.
        """
        made: dict[int, Tensor] = {}  # what is shared stays shared

        def convert(tensor: Tensor) -> Tensor:
            if id(tensor) not in made:
                kind = dtype if dtype and tensor.is_floating_point() else tensor.dtype
                empty = torch.empty(tensor.shape, dtype=kind, device="cpu")
                is_parameter = isinstance(tensor, nn.Parameter)
                made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
            return made[id(tensor)]

        kept = [*module.parameters(), *module.buffers()]  # so that their ids stay their own
        tables: list[Any] = [table for each in module.modules() for table in (each._parameters, each._buffers)]
        with self.counting_as(category):
            for table in tables:
                table.update({name: convert(tensor) for name, tensor in table.items() if tensor is not None})
        del kept

    @contextmanager
    def counting_as(self, category: str) -> Iterator[None]:
        """What is allocated inside is of this category."""
        before, self._category = self._category, category
        try:
            yield
        finally:
            self._category = before

    def begin(self, phase: str) -> None:
        """From now on operations and the peak count for this part of the step."""
        self._phase = phase
        self.peaks[phase] = self._moment()

    def count_as(self, category: str, *tensors: Tensor | None) -> None:
        """From now on these are of this category."""
        for tensor in tensors:
            if tensor is not None and (storage := self._storages.get(tensor.untyped_storage()._cdata)) is not None:
                self.held[storage.category] -= storage.bytes
                storage.category, storage.bytes = category, self._share(category, storage.full_bytes)
                self.held[category] += storage.bytes

    def reset(self) -> None:
        """Forget peaks and operations; what is alive stays."""
        self.peaks.clear()
        self.flops.clear()

    @property
    def live_bytes(self) -> int:
        """Of this moment, on the device."""
        return sum(self.held.values()) - self.held[_HOST]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation without memory, and count it."""
        kwargs = kwargs or {}
        if func is _prim_device:
            return _CPU
        if func is _aten._local_scalar_dense.default:
            return _plausible(args[0])
        out = func(*args, **kwargs)
        if (formula := self._formulas.get(func.overloadpacket)) is not None:
            self.flops[self._phase] += formula(*args, **kwargs, out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._storages.get(key)
        if known is not None and known.is_alive():
            return
        size = storage.nbytes()
        noted = _Storage(storage, self._category, size, self._share(self._category, size), self._storages, self.held)
        self._storages[key] = noted
        self.held[noted.category] += noted.bytes
        if self.live_bytes > (self.peaks[self._phase].bytes if self._phase in self.peaks else 0):
            self.peaks[self._phase] = self._moment()

    def _moment(self) -> Moment:
        held = {name: amount for name, amount in self.held.items() if amount and name != _HOST}
        return Moment(bytes=sum(held.values()), held=held)

    def _share(self, category: str, size: int) -> int:
        return round(size * self.shares.get(category, 1.0))


class _Storage:
    """A piece of memory, until it is freed."""

    def __init__(
        self,
        storage: torch.UntypedStorage,
        category: str,
        full_bytes: int,
        own_bytes: int,
        storages: dict[int, _Storage],
        held: Counter[str],
    ) -> None:
        self.category, self.full_bytes, self.bytes = category, full_bytes, own_bytes
        key = storage._cdata

        def free(_: object) -> None:
            held[self.category] -= self.bytes
            if storages.get(key) is self:
                del storages[key]

        self._reference = ref(storage, free)

    def is_alive(self) -> bool:
        return self._reference() is not None


def _plausible(tensor: Tensor) -> bool | int | float:
    """What a tensor without values says: gradients are finite, and norms 1."""
    if tensor.dtype is torch.bool:
        return True
    return 1.0 if tensor.is_floating_point() else 1


def _flop_formulas() -> dict[Any, Callable[..., int]]:
    """Torch's own counts, and those of the kernels for CPUs that it leaves out: what the same work costs elsewhere."""
    from torch.utils import flop_counter

    count: Any = flop_counter.sdpa_flop_count
    formulas: dict[Any, Callable[..., int]] = dict(flop_counter.FlopCounterMode(display=False).flop_registry)

    def attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
        return int(count(query.shape, key.shape, value.shape))

    def attention_backward(_: Tensor, query: Tensor, key: Tensor, value: Tensor, *__: Any, **___: Any) -> int:
        return 2 * int(count(query.shape, key.shape, value.shape))

    def linear(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
        return 2 * x.numel() * weight.shape[0]

    formulas[_aten._scaled_dot_product_flash_attention_for_cpu] = attention
    formulas[_aten._scaled_dot_product_flash_attention_for_cpu_backward] = attention_backward
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        formulas[torch.ops.mkldnn._linear_pointwise] = linear
    return formulas
