"""ZeRO stage 2 through ColossalAI: gradients and optimizer state are spread over all processes, weights are whole in each.

Sources: Rajbhandari et al., ZeRO, https://arxiv.org/abs/1910.02054; ColossalAI's booster, https://github.com/hpcaitech/ColossalAI
(``LowLevelZeroPlugin``). The plugin runs in its fp32 mode, since weights that are trained stay float32 here, and autocast
chooses the precision of products.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, Self

import torch
import torch.distributed as dist
from attrs import field, frozen
from attrs.validators import ge, gt
from torch import Tensor, nn

from opensora.accel.processes import Processes, ProcessesSpec
from opensora.core.accelerator import DtypeName
from opensora.core.errors import ConfigError, MachineError
from opensora.core.shares import Shares

__all__ = ["Zero2", "Zero2Seq", "Zero2SeqSpec", "Zero2Spec"]


@frozen(kw_only=True)
class Zero2Spec(ProcessesSpec):
    """Options of `Zero2`."""

    bucket_size: int = field(default=12 * 2**20, validator=gt(0))
    """Elements of gradients that are exchanged at once: fewer need less memory, more make fewer exchanges."""


@frozen(kw_only=True)
class Zero2SeqSpec(Zero2Spec):
    """Options of `Zero2Seq`."""

    sp_size: int = field(default=2, validator=ge(2))
    """Processes that share each sample, its tokens dealt out among them; the number of processes must be a multiple."""


class Zero2(Processes):
    """Each process holds all weights, and its share of their gradients, float32 copies and optimizer state.

    The optimizer must treat each number by itself, as AdamW and SGD do: what it is shown are slices of flattened parameters.
    """

    Spec: type = Zero2Spec
    builds_together = True

    def __init__(self, spec: Zero2Spec, *, device: str | None = None, dtype: DtypeName = "auto") -> None:
        """See `Processes`.

        Raises:
            MachineError: ColossalAI is not installed; see `Processes`.
        """
        if find_spec("colossalai") is None:
            sharing = f", sp_size={spec.sp_size}" if spec.sp_size > 1 else ""
            raise MachineError(
                'This accelerator needs ColossalAI, which is not installed. Use accelerator = dict(type="fsdp"'
                f"{sharing}), which spreads as much and the weights too; or install it: pip install "
                '"opensora-accel[colossalai]", or with a newer torch than it asks for as docs/accelerators.md says.'
            )
        super().__init__(spec, device=device, dtype=dtype)
        self._module: nn.Module | None = None
        self._optimizer: ZeroOptimizer | None = None

    @classmethod
    def shares(cls, spec: Any, world_size: int) -> Shares:
        """As `Accelerator.shares`; averaged weights are whole in each process, which this neglects."""
        return Shares(gradients=1 / world_size, optimizer=1 / world_size, activations=1 / spec.sp_size)

    def __enter__(self) -> Self:
        """See `Processes.__enter__`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of packages that would make other parts of it faster
            import colossalai.booster.plugin  # noqa: F401  # here, where its warnings are kept quiet
        if self.device.type == "cpu":
            from opensora.accel.colossalai_cpu import use_cpu

            use_cpu()
        return super().__enter__()

    def _let_go(self) -> None:
        self._module = self._optimizer = None

    # ---- running networks

    def prepare(self, module: nn.Module) -> Callable[..., Any]:
        """As `Accelerator.prepare`, for one network. All processes get the main one's weights.

        Raises:
            ConfigError: It is the second; see `share_sequence`.
        """
        if self._module is not None:
            raise ConfigError(
                "ColossalAI's ZeRO-2 can train one network here, and this pipeline trains two (a discriminator beside an "
                'autoencoder, say). Use accelerator = dict(type="ddp").'
            )
        self.share_sequence(module)
        self._module = module.to(self.device)
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), src=0)
        return self._autocast(module)

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """As `Accelerator.prepare_optimizer`: its parameters become slices of the module's."""
        from colossalai.booster import Booster

        assert self._module is not None  # prepared first
        plugin = self._plugin()
        _, zero, *_ = Booster(plugin=plugin).boost(self._module, self._wrap(optimizer, plugin))
        self._optimizer = ZeroOptimizer(zero, self._module)
        return self._optimizer  # type: ignore[return-value]  # has all that is used of an optimizer

    def _plugin(self) -> Any:
        from colossalai.booster.plugin import LowLevelZeroPlugin

        plugin = LowLevelZeroPlugin(stage=2, precision="fp32", overlap_communication=self.device.type == "cuda")
        plugin.zero_optim_kwargs["reduce_bucket_size"] = self.spec.bucket_size  # its own argument counts in millions
        return plugin

    def _wrap(self, optimizer: torch.optim.Optimizer, plugin: Any) -> Any:
        """On a GPU the plugin wraps the optimizer itself; on the CPU it would refuse to."""
        if self.device.type == "cuda":
            return optimizer
        from opensora.accel.colossalai_cpu import ZeroOptimizerOnCPU

        return ZeroOptimizerOnCPU(optimizer, **plugin.zero_optim_kwargs)

    # ---- one optimizer step

    def backward(self, loss: Tensor) -> None:
        """As `Accelerator.backward`. Gradients are averaged and dealt out at once, in each micro-step, as stage 2 must."""
        self._own_optimizer().zero.backward(self._scaler.scale(loss))

    def update(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], *, grad_clip: float
    ) -> float:
        """As `Accelerator.update`."""
        slices = self._own_optimizer().slices()
        if (
            self._scaler.is_enabled()
        ):  # it looks at this process's slices alone, and all must come to the same conclusion
            overflows = any(not each.grad.isfinite().all() for each in slices if each.grad is not None)
            if self.highest(int(overflows)):
                slices[0].grad = torch.full_like(slices[0], torch.inf)  # without a slice there is nothing to step
        return super().update(optimizer, slices, grad_clip=grad_clip)

    def _own_optimizer(self) -> ZeroOptimizer:
        assert self._optimizer is not None  # made before the first step
        return self._optimizer

    def _clip(self, parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
        """As torch's ``clip_grad_norm_``, over the slices of all processes."""
        gradients = [each.grad for each in parameters if each.grad is not None]
        total = torch.zeros((), device=self.device)
        if gradients:
            total += torch.stack(torch._foreach_norm(gradients)).square().sum()
        dist.all_reduce(total)
        norm = total.sqrt()
        if gradients:
            torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
        return norm


class Zero2Seq(Zero2):
    """`Zero2` with sequence parallelism: ``sp_size`` processes share each sample."""

    Spec = Zero2SeqSpec


class ZeroOptimizer:
    """What the loop holds: it steps this process's slices, and its state is that of the whole parameters."""

    def __init__(self, zero: Any, module: nn.Module) -> None:
        """Around ColossalAI's optimizer of the parameters of a module."""
        self.zero, self.module = zero, module
        self._parameters = [each for group in zero._working_param_groups.values() for each in group]

    @property
    def optim(self) -> torch.optim.Optimizer:
        """Torch's, over slices."""
        return self.zero.optim  # type: ignore[no-any-return]  # ColossalAI has no types

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Options, and slices."""
        return self.optim.param_groups

    def slices(self) -> list[nn.Parameter]:
        """This process's part of each parameter that has got a gradient, with its part of that, which `step` will use."""
        slices = []
        own = self.zero.get_working_to_master_map()
        for parameter in self._parameters:
            gradient = self.zero.get_working_grad_by_param_id(id(parameter))
            if gradient is not None:
                own[id(parameter)].grad = gradient
                slices.append(own[id(parameter)])
        return slices

    def step(self) -> None:
        """Step the slices and exchange the new weights."""
        self.zero.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, those that are kept apart included."""
        self.zero.zero_grad(set_to_none)
        for group in self.param_groups:
            for each in group["params"]:
                each.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The whole state in the main process, on the CPU; all must ask for it together."""
        return self.zero.state_dict(only_on_master=True)  # type: ignore[no-any-return]  # ColossalAI has no types

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take one's slices of a whole state, and of the module's weights."""
        self.zero.update_master_params(self.module)
        self.zero.load_state_dict(state)
