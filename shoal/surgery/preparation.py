"""What is done to a copy of a user's module before it is traced or compared with its trace.

Wrappers (`nn.DataParallel`, `torch.compile`) are taken off and numbers become float32. For tracing, weights that are
computed from others (weight norm, spectral norm, pruning) become plain parameters, and hooks are watched.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook
from torch.nn.utils.weight_norm import WeightNorm

from shoal.errors import ShoalError, first_line
from shoal.surgery.replacements import check_global_hooks, check_methods

WRAPPERS: dict[Any, str] = {
    nn.DataParallel: "module",
    nn.parallel.DistributedDataParallel: "module",
    OptimizedModule: "_orig_mod",
}
"""Modules that only call another one -> the name of that one."""


def unwrapped(model: nn.Module) -> nn.Module:
    """`model` itself, or the module inside `nn.DataParallel`, its distributed form and `torch.compile`."""
    name = next((name for kind, name in WRAPPERS.items() if isinstance(model, kind)), None)
    return model if name is None else unwrapped(getattr(model, name))


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` in float32 and without wrappers, which computes the same.

    Raises ShoalError for a module that cannot be copied, one with scripted parts, one with lazy layers that were never
    called, and one whose methods were replaced by functions that hold layers, which a copy would share. Also raises it
    while there are hooks of all modules.
    """
    inner = unwrapped(model)
    check_global_hooks()
    _check_parts(inner)
    # Tensors that were computed with gradients cannot be copied; modules keep such as attributes.
    kept = [v for m in inner.modules() for v in vars(m).values() if isinstance(v, Tensor) and v.grad_fn is not None]
    try:
        copied = copy.deepcopy(inner, {id(v): v.detach().clone() for v in kept})
    except Exception as error:
        raise ShoalError(
            f"found that {type(inner).__name__} cannot be copied ({first_line(error)}); need a module that "
            "copy.deepcopy copies; keep locks, files and computed tensors out of its attributes"
        ) from error
    for module in list(copied.modules()):
        for name, child in module.named_children():
            if unwrapped(child) is not child:
                setattr(module, name, unwrapped(child))
    if any(t.is_floating_point() and t.dtype != torch.float32 for t in (*copied.parameters(), *copied.buffers())):
        copied.float()
    return copied


def _check_parts(model: nn.Module) -> None:
    for name, module in model.named_modules():
        where = name or type(model).__name__
        if isinstance(module, torch.jit.ScriptModule):
            raise ShoalError(
                f"found a scripted module (torch.jit) at {where}; need the Python module, whose layers can be seen; "
                "use the network as it was before torch.jit.script or torch.jit.trace"
            )
        if unwrapped(module) is module:
            check_methods(module, where)
        if any(nn.parameter.is_lazy(t) for t in (*module._parameters.values(), *module._buffers.values())):
            raise ShoalError(
                f"found a lazy layer without weights at {where}; need weights of known shape; call the network once "
                "on an image before you pass it on"
            )


def prepared(model: nn.Module) -> nn.Module:
    """A plain copy of `model` for tracing, in eval mode, with effective weights as parameters and hooks watched.

    Raises ShoalError as `plain_copy` does.
    """
    copied = plain_copy(model).eval()
    for name, module in copied.named_modules():
        _settle_weights(module)
        _watch(module, name or type(copied).__name__)
    return copied


def _settle_weights(module: nn.Module) -> None:
    """Replace weights that are computed from others by their current values, in place."""
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)
            _forget_loading(module)
        elif isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)
    if parametrize.is_parametrized(module):
        # The class is made for one module, and its copy shares it; removal changes the class.
        kind = type(module)
        own = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
        module.__class__ = type(kind.__name__, kind.__bases__, own)
        for name in list(module.parametrizations):  # type: ignore[arg-type]
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def _forget_loading(module: nn.Module) -> None:
    # remove_spectral_norm does not find this hook, which asks for tensors that are gone.
    for key, held in list(module._load_state_dict_pre_hooks.items()):
        if isinstance(getattr(held, "hook", held), SpectralNormLoadStateDictPreHook):
            del module._load_state_dict_pre_hooks[key]


def _watch(module: nn.Module, name: str) -> None:
    """Make each hook of `module` raise ShoalError when it changes what the module reads or returns."""
    # A module that shares its class with another may occur under two names, but has one dictionary of hooks.
    for kind, hooks in (("hook", module._forward_hooks), ("pre-hook", module._forward_pre_hooks)):
        for key, hook in list(hooks.items()):
            hooks[key] = functools.partial(_watched, hook, f"a forward {kind} on {name}")
    module._backward_hooks.clear()
    module._backward_pre_hooks.clear()


def _watched(hook: Callable[..., Any], what: str, *args: Any, **kwargs: Any) -> None:
    called = getattr(hook, "__qualname__", type(hook).__qualname__)
    try:
        result = hook(*args, **kwargs)
    except ShoalError:
        raise  # of the same hook, called while sizes are measured
    except Exception as error:
        raise ShoalError(
            f"found {what} that cannot be traced ({called}: {first_line(error)}); need layers without hooks; "
            "remove it with the handle that register_forward_hook returned, or write what it does in forward"
        ) from error
    if result is not None:
        raise ShoalError(
            f"found {what} that changes values ({called}); need layers that compute what their class says; "
            "write what the hook does in forward, or remove it"
        )


def failure(model: nn.Module, images: Tensor) -> Exception | None:
    """What `model` itself raises for `images` [N, C, H, W] in eval mode, or None if it returns."""
    try:
        with torch.no_grad(), output_to_stderr():
            plain_copy(model).eval()(images)
    except Exception as error:
        return error
    return None


def output_to_stderr() -> contextlib.AbstractContextManager[Any]:
    """Send what a user's forward prints to standard error, since standard output may be read by a program."""
    return contextlib.redirect_stdout(sys.stderr)


def forget_hooks(model: nn.Module) -> None:
    """Remove all forward hooks, in place; tracing has found that they change nothing."""
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()


def before_hooks(module: nn.Module, args: Any, kwargs: Any) -> None:
    """Call the pre-hooks of `module` as a call with these arguments would."""
    for key, hook in list(module._forward_pre_hooks.items()):
        hook(module, args, kwargs) if key in module._forward_pre_hooks_with_kwargs else hook(module, args)


def after_hooks(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
    """Call the forward hooks of `module` as a call with these arguments and this result would."""
    for key, hook in list(module._forward_hooks.items()):
        if key in module._forward_hooks_with_kwargs:
            hook(module, args, kwargs, result)
        else:
            hook(module, args, result)
