"""Sequence parallelism: the tokens of each sample are dealt out among the processes of a group, for training and sampling.

A denoiser is changed from outside, by what its `SequencePlan` says. Each process works on its own tokens from the first
block to the last, and what looks at several tokens is surrounded by an exchange, in which every process gives a part of what
it has to every other:

- attention within frames: from all frames of some positions to all positions of some frames, and back. Two exchanges of the
  tokens for a block that attends in space and one that attends along time, which needs none
  (Zhao et al., DSP, https://arxiv.org/abs/2403.10266);
- attention among all tokens: from all heads of some tokens to all tokens of some heads, of query, key and value, and back
  (Jacobs et al., DeepSpeed-Ulysses, https://arxiv.org/abs/2309.14509).

Shares may differ by one (5 tokens among 2 processes are 3 and 2), so that there is no padding and no mask.

Gradients: all processes of a group compute the same loss of the gathered output, and each has the part of a parameter's
gradient that goes through its own tokens, so that the gradient is the sum over the group. `gather` hands back its own share
times the group's size: then the mean over the group is that sum, and the mean over all processes, which data parallelism
takes, is right for every parameter. Those in front of the blocks get their part in the same way, without an exchange; those
behind the gathering get all of it in every process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import partial
from inspect import signature
from typing import Any
from weakref import WeakSet, ref

import torch
import torch.distributed as dist
import torch.nn.functional as F
from attrs import define, field
from torch import Tensor, nn

from opensora.core.attention import current_kernel, use_kernel
from opensora.core.errors import ConfigError, ShapeError
from opensora.core.sequence import SequencePlan

__all__ = ["exchange", "gather", "parallelize_sequence", "share_sizes"]

_parallel: WeakSet[nn.Module] = WeakSet()


def parallelize_sequence(denoiser: nn.Module, group: dist.ProcessGroup) -> None:
    """Let the processes of ``group`` share the tokens of each sample; all must call the denoiser with the same inputs.

    The gradients that they get are to be averaged over all processes. Parameters and their names stay as they are. To be
    called before the denoiser is wrapped in anything; a second call does nothing.

    Raises:
        ConfigError: The denoiser has no `SequencePlan`, or one that does not fit, or fewer heads than there are processes.
    """
    if group.size() == 1 or denoiser in _parallel:
        return
    plan = getattr(denoiser, "sequence_plan", None)
    if not isinstance(plan, SequencePlan):
        raise ConfigError(
            f"accelerator.sp_size is {group.size()}, but {type(denoiser).__name__} has no sequence_plan, which would say how "
            "its tokens can be dealt out. Use sp_size = 1 with it."
        )
    sharing = _Sharing(ref(group))
    spatial, full = ([*_matches(denoiser, patterns)] for patterns in (plan.spatial, plan.full))
    for name, module in full:
        if isinstance(heads := getattr(module, "num_heads", None), int):
            _check_heads(name, heads, group.size())
    _surround_blocks(denoiser, plan, sharing)
    for _, module in spatial:
        module.forward = partial(sharing.attend_within_frames, module.forward)
    for name, module in full:
        module.forward = partial(sharing.attend_to_all, name, module.forward)
    _parallel.add(denoiser)


def _surround_blocks(denoiser: nn.Module, plan: SequencePlan, sharing: _Sharing) -> None:
    """Deal out tokens before the first block, and gather them behind the head."""
    lists = [denoiser.get_submodule(name) for name in plan.blocks]
    blocks = [block for each in lists if isinstance(each, nn.ModuleList) for block in each]
    if not blocks or not all(isinstance(each, nn.ModuleList) for each in lists):
        raise ConfigError(f"{type(denoiser).__name__}.sequence_plan: {', '.join(plan.blocks)} must be lists of blocks.")
    blocks[0].register_forward_pre_hook(sharing.begin, with_kwargs=True)
    if plan.alongside:
        for block in blocks:
            block.register_forward_pre_hook(partial(sharing.cut, dict(plan.alongside)), with_kwargs=True)
    last = blocks[-1] if plan.head is None else denoiser.get_submodule(plan.head)
    last.register_forward_hook(sharing.end)


def _matches(denoiser: nn.Module, patterns: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
    for pattern in patterns:
        found = [(name, each) for name, each in denoiser.named_modules() if fnmatchcase(name, pattern)]
        if not found:
            raise ConfigError(f'{type(denoiser).__name__}.sequence_plan: "{pattern}" fits no module.')
        yield from found


def _check_heads(name: str, heads: int, size: int) -> None:
    if heads < size:
        raise ConfigError(
            f"accelerator.sp_size is {size}, but {name} has {heads} heads, and each process needs one: sp_size can be "
            f"{heads} at most, and is best a divisor of it."
        )


@define(eq=False)
class _Sharing:
    """What a group does with the tokens of a denoiser."""

    _group: ref[dist.ProcessGroup]
    """Not held on to: its threads must end before the process does."""
    tokens: int = 0
    """Of the forward pass under way, in all processes together."""
    _known: set[str] = field(factory=set)
    """Modules that were seen to attend through core."""

    @property
    def group(self) -> dist.ProcessGroup:
        """The processes."""
        group = self._group()
        assert group is not None  # it lives as long as they are joined
        return group

    # ---- from the first block to the last

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # of torch
    def begin(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Before the first block."""
        tokens, *others = args
        self.tokens = tokens.shape[-2]
        if self.tokens < self.group.size():
            raise ShapeError(
                f"{self.tokens} tokens can't be dealt out to {self.group.size()} processes. Lower accelerator.sp_size."
            )
        return (self._own(tokens, -2), *others), kwargs

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # of torch
    def cut(
        self, axes: dict[str, int], block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Before each block: of what goes alongside its tokens, take its own part."""
        names = list(signature(type(block).forward).parameters)[1:]
        named = dict(zip(names, args, strict=False)) | kwargs
        for name, axis in axes.items():
            if named.get(name) is not None:
                named[name] = self._own(named[name], axis)
        return tuple(named.pop(name) for name in names[: len(args)]), named

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # of torch
    def end(self, layer: nn.Module, args: tuple[Any, ...], tokens: Tensor) -> Tensor:
        """Behind the head."""
        return gather(tokens, self.group, total=self.tokens)

    def _own(self, tokens: Tensor, axis: int) -> Tensor:
        sizes = share_sizes(tokens.shape[axis], self.group.size())
        own = torch.split(tokens, sizes, dim=axis)[self.group.rank()]
        return own.contiguous()  # a view would keep all of them in memory

    # ---- attention

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # of torch
    def attend_within_frames(self, forward: Callable[..., Tensor], x: Tensor, *others: Any, **named: Any) -> Tensor:
        """``forward`` of own tokens [..., N', D], with sequences dealt out in their place: [..., N, D], fewer of them."""
        self._check(x.shape[-2])
        *batch, _, _ = x.shape
        rows = x.reshape(-1, *x.shape[-2:])  # [R, N', D]
        mine = exchange(rows, self.group, deal=0, join=1, total=self.tokens)  # [R', N, D]
        # With fewer sequences than processes, some get one of zeros: not every kernel takes none. It is padding, so that the
        # way back goes through the exchange in all processes.
        given = mine if len(mine) else F.pad(mine, (0, 0, 0, 0, 0, 1))
        out = forward(given.reshape(*[1] * (len(batch) - 1), *given.shape), *others, **named)
        out = out.reshape(-1, *out.shape[-2:])[: len(mine)]
        back = exchange(out, self.group, deal=1, join=0, total=len(rows))  # [R, N', D]
        return back.reshape(*batch, *back.shape[1:])

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # of torch
    def attend_to_all(self, name: str, forward: Callable[..., Tensor], *inputs: Any, **named: Any) -> Tensor:
        """``forward`` of own tokens, with heads dealt out in their place while the kernel runs."""
        kernel = current_kernel()

        def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
            heads, length = query.shape[1:3]
            if mask is not None or key.shape[2] != length:
                raise ConfigError(
                    f"{name} has a mask or fewer keys than queries, so that its heads can't be dealt out. Use sp_size = 1."
                )
            self._check(length)
            _check_heads(name, heads, self.group.size())
            self._known.add(name)
            stacked = torch.stack([query, key, value])  # [3, B, H, N', D/H]
            query, key, value = exchange(stacked, self.group, deal=2, join=3, total=self.tokens).unbind()
            out = kernel(query, key, value, None)  # [B, H', N, D/H]
            return exchange(out, self.group, deal=2, join=1, total=heads)  # [B, H, N', D/H]

        with use_kernel(attend):
            out = forward(*inputs, **named)
        if name not in self._known:
            raise ConfigError(
                f"{name} doesn't attend through opensora.core.attention.attention, so that its heads can't be dealt out. "
                "Call that, or use sp_size = 1."
            )
        return out

    def _check(self, length: int) -> None:
        if length != share_sizes(self.tokens, self.group.size())[self.group.rank()]:
            raise ShapeError(
                f"Attention got {length} of {self.tokens} tokens, which is not this process's share. With activation "
                "checkpointing, backward must come before the next forward pass; else the sequence_plan doesn't fit."
            )


def share_sizes(total: int, size: int) -> list[int]:
    """How many of ``total`` each of ``size`` processes has: the first have one more if they don't divide."""
    each, more = divmod(total, size)
    return [each + (rank < more) for rank in range(size)]


def exchange(x: Tensor, group: dist.ProcessGroup, *, deal: int, join: int, total: int) -> Tensor:
    """Deal out axis ``deal``, which is whole, and get the whole of axis ``join``, of which each process has a share.

    Args:
        x: Alike in all processes of the group, but for its share of axis ``join``.
        group: All of it must call.
        deal: An axis, not negative.
        join: Another.
        total: Length of axis ``join`` in all processes together.
    """
    exchanged: Tensor = _Exchange.apply(x, group, deal, join, total)  # type: ignore[no-untyped-call]  # of torch
    return exchanged


class _Exchange(torch.autograd.Function):
    """On the way back gradients take the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, deal: int, join: int, total: int) -> Tensor:
        ctx.way_back = group, join, deal, x.shape[deal]
        return _all_to_all(x, group, deal, join, total)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _all_to_all(grad, *ctx.way_back), None, None, None, None


def _all_to_all(x: Tensor, group: dist.ProcessGroup, deal: int, join: int, total: int) -> Tensor:
    dealt, joined = share_sizes(x.shape[deal], group.size()), share_sizes(total, group.size())
    parts = torch.split(x, dealt, dim=deal)
    sent = x.new_empty(x.numel())
    sizes = [part.numel() for part in parts]
    for buffer, part in zip(torch.split(sent, sizes), parts, strict=True):
        buffer.view(part.shape).copy_(part)
    shapes = [[*x.shape] for _ in joined]
    for shape, each in zip(shapes, joined, strict=True):
        shape[deal], shape[join] = dealt[group.rank()], each
    received_sizes = [math.prod(shape) for shape in shapes]
    received = x.new_empty(sum(received_sizes))
    dist.all_to_all_single(received, sent, received_sizes, sizes, group=group)
    received_parts = zip(torch.split(received, received_sizes), shapes, strict=True)
    return torch.cat([buffer.view(shape) for buffer, shape in received_parts], dim=join)


def gather(x: Tensor, group: dist.ProcessGroup, *, total: int) -> Tensor:
    """All shares [..., N', D] of ``total`` tokens: [..., N, D]. What this does to gradients: see the module's docstring."""
    gathered: Tensor = _Gather.apply(x, group, total)  # type: ignore[no-untyped-call]  # of torch
    return gathered


class _Gather(torch.autograd.Function):
    """On the way back each process takes its share of the gradient, which all have; it is scaled up for the mean to come."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, total: int) -> Tensor:
        ctx.group, sizes = group, share_sizes(total, group.size())
        ctx.sizes = sizes
        padded = F.pad(x, (0, 0, 0, sizes[0] - x.shape[-2])).contiguous()  # by one row at most: they must be alike
        shares = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(shares, padded, group=group)
        return torch.cat([share.narrow(-2, 0, size) for share, size in zip(shares, sizes, strict=True)], dim=-2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return torch.split(grad, ctx.sizes, dim=-2)[ctx.group.rank()] * ctx.group.size(), None, None
