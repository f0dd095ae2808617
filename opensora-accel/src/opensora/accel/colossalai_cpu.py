"""What lets ColossalAI's ZeRO run without a GPU, for tests and small trials: on a GPU nothing of this is used.

ColossalAI 0.5.0 asks its own accelerator object for streams, which the CPU's has not, and its optimizer refuses every other
device than ``cuda`` and ``npu``. The exchange of gradients itself is plain ``torch.distributed``, and works over gloo.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from colossalai.accelerator import CpuAccelerator, set_accelerator
from colossalai.zero import LowLevelZeroOptimizer

__all__ = ["StreamlessAccelerator", "ZeroOptimizerOnCPU", "use_cpu"]


class StreamlessAccelerator(CpuAccelerator):  # type: ignore[misc]  # ColossalAI has no types
    """A CPU whose streams are no streams: everything is done in its turn."""

    def device_count(self) -> int:
        """One."""
        return 1

    def synchronize(self, device: Any = None) -> None:
        """Nothing to wait for."""

    def Stream(self, device: Any = None, priority: int = 0, **options: Any) -> None:  # noqa: N802  # its name
        """None stands for the only one."""

    def current_stream(self, device: Any = None) -> None:
        """The only one."""

    def stream(self, stream_: Any) -> nullcontext[None]:
        """Work is done there anyway."""
        return nullcontext()


class ZeroOptimizerOnCPU(LowLevelZeroOptimizer):  # type: ignore[misc]  # ColossalAI has no types
    """The optimizer without its question for the device; that all parameters have one dtype is still checked."""

    def _sanity_checks(self) -> None:
        wrong = {
            str(parameter.dtype)
            for group in self.optim.param_groups
            for parameter in group["params"]
            if parameter.dtype != self._dtype
        }
        assert not wrong, f"parameters of {self._dtype} and {wrong}"


def use_cpu() -> None:
    """Make it ColossalAI's device of this process."""
    set_accelerator(StreamlessAccelerator())
