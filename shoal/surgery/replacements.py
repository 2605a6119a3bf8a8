"""Code that changes what layers compute from outside their class: replaced methods and hooks of all modules.

A method that was replaced on one layer is accepted if it is a function of that layer alone, such as
``layer.forward = types.MethodType(function, layer)``. A function that holds layers or parameters is refused, because a
copy of the network would go on to use those of the original.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from shoal.errors import ShoalError

CALLS = ("_call_impl", "_wrapped_call_impl", "_slow_forward")
"""Methods through which PyTorch calls every module; the tracer does not see what replaces them."""


def check_methods(module: nn.Module, name: str) -> None:
    """Raise ShoalError if a method of `module`, called `name`, was replaced by a function that holds layers."""
    for method, replacement in replaced_methods(module).items():
        if method in CALLS or _holds_layers(replacement, module):
            what = "which tracing leaves out" if method in CALLS else "a function that holds layers or parameters"
            called = getattr(replacement, "__qualname__", type(replacement).__qualname__)
            raise ShoalError(
                f"found {method} of {name} replaced by {called}, {what}; need layers that compute what their class "
                f"says; write a class whose forward does the same, and use it in the network"
            )


def replaced_methods(module: nn.Module) -> dict[str, Callable[..., Any]]:
    """The methods that compute and were replaced on `module` itself, not in its class, by name."""
    others = vars(nn.Module).keys() - {"forward", *CALLS}  # such as train and state_dict
    return {
        name: value
        for name, value in vars(module).items()
        if callable(value)
        and name not in others
        and not getattr(value, "shoal_call", False)
        and isinstance(inspect.getattr_static(type(module), name, None), FunctionType)
    }


def _holds_layers(function: Any, module: nn.Module) -> bool:
    """Whether `function`, or a function that it holds, holds a parameter or layers with weights other than `module`."""
    seen, waiting = {id(module)}, [function]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if (isinstance(value, Tensor) and value.requires_grad) or (isinstance(value, nn.Module) and value.state_dict()):
            return True
        # Bound to the layer itself, a method is copied with it; held by a function, it stays that of the original.
        if isinstance(value, MethodType) and value is not function and value.__self__ is module:
            return True
        waiting += _contents(value)
    return False


def _contents(value: Any) -> Iterator[Any]:
    if isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, MethodType):
        yield from (value.__func__, value.__self__)
    elif isinstance(value, (tuple, list)):
        yield from value
    elif isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, FunctionType):
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()
        yield from (cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell))
        named = (value.__globals__[name] for name in value.__code__.co_names if name in value.__globals__)
        yield from (held for held in named if isinstance(held, (nn.Module, Tensor)))


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a variable that was never set
        return False


def check_global_hooks() -> None:
    """Raise ShoalError while there are forward hooks of all modules, which change every network or could."""
    places = torch.nn.modules.module
    for kind, hooks in (
        ("hook", places._global_forward_hooks),
        ("pre-hook", places._global_forward_pre_hooks),
    ):
        for hook in hooks.values():
            called = getattr(hook, "__qualname__", type(hook).__qualname__)
            add = f"register_module_forward_{kind.replace('-', '_')}"
            raise ShoalError(
                f"found a forward {kind} of all modules ({called}, by {add}) at every layer; need layers that compute "
                "what their class says; remove it with the handle that the registration returned, and write what it "
                "does in forward"
            )
