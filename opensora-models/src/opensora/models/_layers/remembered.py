"""Work that is the same at every sampling step, done once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, ref

import attrs
import torch
from attrs import frozen
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)
Argument = TypeVar("Argument")
Result = TypeVar("Result")
Method = Callable[[Module, Argument], Result]


def remembered(*weights: str) -> Callable[[Method[Module, Argument, Result]], Method[Module, Argument, Result]]:
    """Let a method of one argument, a tensor or `Conditioning`, give its last result again for the same object.

    That is done only while gradients are off and nothing is traced, and only if the weights are as they were: a training
    step, loading or exchanging weights, moving or casting them make it compute anew. One result a module is kept, outside
    the module, so that it is never saved or copied, and is freed with the argument.

    Args:
        weights: Names of the layers that the result depends on. They must be plain ones: where something is put around them,
            such as an adapter or a hook, nothing is kept.
    """

    def decorate(method: Method[Module, Argument, Result]) -> Method[Module, Argument, Result]:
        kept: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()

        @functools.wraps(method)
        def wrapper(self: Module, argument: Argument) -> Result:
            if torch.compiler.is_compiling():
                return method(self, argument)
            if torch.is_grad_enabled():  # training may change weights in ways that no version counter sees
                kept.pop(self, None)
                return method(self, argument)
            state = _state(self, weights, argument)
            last = kept.get(self)
            if last is not None and last.argument() is argument and state is not None and last.state == state:
                return last.result
            result = method(self, argument)
            if state is not None:
                kept[self] = _Kept(argument=_reference(argument, kept, self), state=state, result=result)
            return result

        return wrapper

    return decorate


@frozen(kw_only=True, eq=False)
class _Kept:
    argument: ref[Any]
    state: tuple[object, ...]
    result: Any


def _reference(argument: Any, kept: WeakKeyDictionary[nn.Module, _Kept], module: nn.Module) -> ref[Any]:
    """A weak reference that takes the result along when the argument goes."""
    owner = ref(module)

    def forget(dead: ref[Any]) -> None:
        module = owner()
        if module is not None and (last := kept.get(module)) is not None and last.argument is dead:
            del kept[module]

    return ref(argument, forget)


def _state(module: nn.Module, weights: tuple[str, ...], argument: object) -> tuple[object, ...] | None:
    """What tells whether a result still holds; None if that can't be told."""
    layers = [layer for name in weights for layer in module.get_submodule(name).modules()]
    given = list(_tensors(argument))
    owned = [tensor for layer in layers for tensor in (*layer._parameters.values(), *layer._buffers.values())]
    held = [tensor for tensor in owned if tensor is not None]
    if not (all(map(_is_plain, layers)) and all(type(tensor) in (Tensor, nn.Parameter) for tensor in (*given, *held))):
        return None
    if any(tensor.is_inference() for tensor in held):  # they don't count their changes
        return None
    device = given[0].device.type if given else "cpu"
    if device == "meta":
        return None
    cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    versions = [0 if tensor.is_inference() else tensor._version for tensor in given]
    return (cast, *versions, *((tensor.data_ptr(), tensor._version, tensor.dtype, tensor.device) for tensor in held))


def _tensors(argument: Any) -> Iterator[Tensor]:
    if isinstance(argument, Tensor):
        yield argument
    else:
        values = (getattr(argument, field.name) for field in attrs.fields(type(argument)))
        yield from (value for value in values if isinstance(value, Tensor))


def _is_plain(layer: nn.Module) -> bool:
    package = type(layer).__module__.partition(".")[0]
    return package in ("torch", "opensora") and not layer._forward_hooks and not layer._forward_pre_hooks
