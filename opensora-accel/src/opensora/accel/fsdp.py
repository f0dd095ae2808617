"""Fully sharded data parallelism: weights, gradients, averages and optimizer state are spread over the processes.

Each process holds a slice of every parameter. The whole of a block is put together for its forward and backward pass, and
let go after; gradients are averaged and dealt out in one exchange. What is computed is what one process would compute.

Sources: Rajbhandari et al., ZeRO, https://arxiv.org/abs/1910.02054; Zhao et al., PyTorch FSDP,
https://arxiv.org/abs/2304.11277; torch's ``fully_shard``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any, Self, TypeVar, cast

import torch
import torch.distributed as dist
from attrs import field, frozen
from attrs.validators import ge
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from opensora.accel.processes import VERY_LONG, Processes, ProcessesSpec
from opensora.core.accelerator import DtypeName, cast_module
from opensora.core.blocks import iter_blocks
from opensora.core.errors import ConfigError, MachineError
from opensora.core.sharding import own_part
from opensora.core.shares import Shares

__all__ = ["FSDP", "FSDPSpec"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@frozen(kw_only=True)
class FSDPSpec(ProcessesSpec):
    """Options of `FSDP`."""

    reshard_after_forward: bool = True
    """Let go of a block's whole weights after its forward pass, and put them together again for backward: the least memory.
    False keeps them in between: one exchange less a block, and memory for all weights."""
    replicas: int = field(default=1, validator=ge(1))
    """Groups of processes, each with a whole copy dealt out among its own; gradients are averaged over all. As many as there
    are machines keeps the exchange of weights within each. The number of processes must be a multiple; 1 is one group."""
    offload: bool = False
    """Keep weights, gradients and optimizer state in the CPU's memory, and bring a block to the GPU when its turn comes; the
    optimizer steps on the CPU. Slow; for models that fit no other way. Has not been run on a GPU yet."""


class FSDP(Processes):
    """Each process holds a share of everything that is trained."""

    Spec = FSDPSpec
    shards_state = True
    _mesh: DeviceMesh

    def __init__(self, spec: FSDPSpec, *, device: str | None = None, dtype: DtypeName = "auto") -> None:
        """See `Processes`.

        Raises:
            ConfigError: The number of processes is no multiple of ``replicas``.
            MachineError: This torch has no ``fully_shard``; see `Processes`.
        """
        _fsdp()
        super().__init__(spec, device=device, dtype=dtype)
        if self.world_size % spec.replicas or (self.world_size // spec.replicas) % spec.sp_size:
            raise ConfigError(
                f"accelerator.replicas is {spec.replicas}, but {self.world_size} processes can't be put into so many groups"
                f"{f' of a multiple of sp_size = {spec.sp_size}' if spec.sp_size > 1 else ''}. Start a multiple of it."
            )
        self._prepared: list[Any] = []
        self._awaited: list[nn.Module] = []
        """Networks that will be sampled from, once they are placed."""

    @classmethod
    def shares(cls, spec: Any, world_size: int) -> Shares:
        """As `Accelerator.shares`: of all that is trained."""
        own = spec.replicas / world_size
        return Shares(parameters=own, gradients=own, optimizer=own, activations=1 / spec.sp_size, gathers_blocks=True)

    @property
    def share_size(self) -> int:
        """As `Accelerator.share_size`: all processes that hold a part of one copy."""
        return self.world_size // int(self.spec.replicas)

    def __enter__(self) -> Self:
        """See `Processes.__enter__`."""
        super().__enter__()
        self.saving_group = dist.new_group(backend="gloo", timeout=VERY_LONG)
        if self.spec.replicas == 1:
            self._mesh = init_device_mesh(self.device.type, (self.world_size,), mesh_dim_names=("shard",))
        else:
            shape = (self.spec.replicas, self.share_size)
            self._mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))
        return self

    def _let_go(self) -> None:
        self._prepared.clear()
        self._awaited.clear()

    # ---- running networks

    def prepare(self, module: nn.Module) -> Callable[..., Any]:
        """As `Accelerator.prepare`. The module's parameters become torch's DTensors; all start from the main process's.

        Raises:
            ConfigError: See `share_sequence`.
        """
        self.share_sequence(module)  # before anything is put around its blocks
        for parameter in module.parameters():
            _broadcast(parameter.detach())
        self._shard(module, self.dtype)
        return self._autocast(module)

    def place(
        self, module: ModuleT, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> ModuleT:
        """As `Accelerator.place`; what `predictor` was given is dealt out here."""
        if not any(module is awaited for awaited in self._awaited):
            return super().place(module, device=device, dtype=dtype)
        self._awaited = [awaited for awaited in self._awaited if awaited is not module]
        self._shard(cast_module(module, torch.device("cpu"), dtype or self.dtype), None)
        return module

    def predictor(self, network: Callable[..., Any]) -> Callable[..., Any]:
        """As `Accelerator.predictor`. All processes of a share call it together, with the same inputs.

        Raises:
            ConfigError: ``network`` is no module, but something of it: then nothing puts its weights together.
        """
        if not isinstance(network, nn.Module):
            raise ConfigError(
                'accelerator "fsdp" can run whole networks only, and this pipeline needs a part of one (a discriminator\'s '
                'judgement, say). Use accelerator = dict(type="ddp").'
            )
        if not any(network is prepared for prepared in self._prepared):
            self._awaited.append(network)
        self.share_sequence(network)
        run = self._autocast(network)

        def call(*inputs: Any) -> Any:
            # Weights that are put together in inference mode could not be trained on afterwards.
            with torch.inference_mode(False), torch.no_grad():
                output = run(*inputs)
            cast("Any", network).reshard()  # the outermost keeps its weights for a backward pass that does not come
            return output

        return call

    def _shard(self, module: nn.Module, dtype: torch.dtype | None) -> None:
        """Deal a module out, block by block, so that no device ever holds all of it.

        Args:
            module: On the CPU.
            dtype: What to compute in; None: as it is.
        """
        fsdp = _fsdp()
        # Inputs are left to autocast, which casts what it must: a timestep would be rounded here.
        policy: dict[str, Any] = {"cast_forward_inputs": False}
        if dtype is not None:
            policy |= {"param_dtype": dtype, "reduce_dtype": torch.float32}
        options: dict[str, Any] = {"mesh": self._mesh}
        if self.spec.offload:
            options["offload_policy"] = fsdp.CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
        if whole := _kept_whole(module, fsdp):
            options["ignored_params"] = whole
            for parameter in whole:
                parameter.data = parameter.data.to(self.device)
        for block in iter_blocks(module):
            block.register_forward_hook(_own)
            fsdp.fully_shard(
                block,
                reshard_after_forward=self.spec.reshard_after_forward,
                mp_policy=fsdp.MixedPrecisionPolicy(**policy),
                **options,
            )
        module.register_forward_hook(_own)
        fsdp.fully_shard(
            module,
            reshard_after_forward=False,  # backward begins with what forward ends with
            mp_policy=fsdp.MixedPrecisionPolicy(**policy, output_dtype=torch.float32),  # blocks must not cast theirs
            **options,
        )
        self._prepared.append(module)

    # ---- one optimizer step

    @contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        """As `Accelerator.micro_step`. Until the last, each process keeps whole gradients, in float32."""
        for module in self._prepared:
            module.set_requires_gradient_sync(last)
            module.set_is_last_backward(last)
        yield

    def update(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], *, grad_clip: float
    ) -> float:
        """As `Accelerator.update`."""
        loose = [each.grad for each in parameters if each.grad is not None and own_part(each.grad) is each.grad]
        if loose:
            together = self.mean(torch.cat([gradient.flatten() for gradient in loose]))
            for gradient, mean in zip(loose, torch.split(together, [each.numel() for each in loose]), strict=True):
                gradient.copy_(mean.view_as(gradient))
        return super().update(optimizer, parameters, grad_clip=grad_clip)

    def _clip(self, parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
        """As torch's ``clip_grad_norm_``, over the slices of all processes."""
        gradients = [each.grad for each in parameters if each.grad is not None]
        parts = [own_part(gradient) for gradient in gradients]
        if not parts:
            return torch.zeros((), device=self.device)
        home = parts[0].device
        squares = torch.stack([norm.to(home) for norm in torch._foreach_norm(parts)]).square()
        is_slice = torch.tensor([part is not whole for part, whole in zip(parts, gradients, strict=True)]).to(home)
        total = (squares * is_slice).sum()
        dist.all_reduce(total, group=self._mesh.get_group("shard"))
        norm = (total + (squares * ~is_slice).sum()).sqrt()
        shrink = (limit / (norm + 1e-6)).clamp(max=1.0)
        for device in {part.device for part in parts}:  # two, if slices are offloaded and single numbers are not
            torch._foreach_mul_([part for part in parts if part.device == device], shrink.to(device))
        return norm


def _broadcast(tensor: Tensor) -> None:
    """Give it the main process's values; what it is exchanged through must be contiguous."""
    values = tensor.contiguous()
    dist.broadcast(values, src=0)
    if values is not tensor:
        tensor.copy_(values)


def _own(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Give views memory of their own: one that is changed in place would lose torch's hook for the backward pass."""
    return output.clone() if isinstance(output, Tensor) and output._is_view() else output


def _kept_whole(module: nn.Module, fsdp: Any) -> set[nn.Parameter]:
    """Parameters that are not dealt out: single numbers, which have no slices; frozen tables, whose precision counts."""
    if (
        "ignored_params" not in signature(fsdp.fully_shard).parameters
    ):  # torch 2.6 lacks it, and says no to single numbers
        return set()
    return {each for each in module.parameters() if each.dim() == 0 or (each.dim() == 1 and not each.requires_grad)}


def _fsdp() -> Any:
    """The module of torch that has ``fully_shard``.

    Raises:
        MachineError: It hasn't.
    """
    from torch.distributed import fsdp

    if not hasattr(fsdp, "fully_shard"):
        raise MachineError(
            f'accelerator "fsdp" needs torch 2.6 or newer; this is {torch.__version__}. '
            'Install a newer one (pip install "torch>=2.6"), or use accelerator = dict(type="ddp").'
        )
    return fsdp
