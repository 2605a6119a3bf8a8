"""Failures of tracing, explained: what was met, in which line of the user's file, and what to write instead."""

from __future__ import annotations

import linecache
import os
import re
import traceback

import torch
from torch import fx, nn

from shoal.errors import ShoalError, first_line
from shoal.surgery.known_sizes import UntraceableError
from shoal.surgery.preparation import failure
from shoal.surgery.tracer import OWN

VALUE_METHODS = ("item", "tolist", "numpy", "__array__")
"""Methods that give the values of a tensor to Python."""
CREATORS = ("zeros", "ones", "full", "empty", "rand", "randn", "randint", "arange", "linspace", "eye", "tensor")
"""Functions of torch that make a tensor from numbers."""
CONSTANTS = (
    "need constants that depend on no image; make them in __init__ (self.register_buffer), or add zeros with F.pad"
)
FUNC = os.sep + "_functorch" + os.sep
"""Part of the place of torch.func's own files."""
WHOLE_BATCH = (
    "need operations on the whole batch [N, C, H, W]; write that function for all images at once, without torch.func"
)
TORCH = "need operations of torch on tensors, the same for all images; rewrite that line, or set it up in __init__"


def explained(error: Exception, model: nn.Module, shape: tuple[int, ...] | None, graph: fx.Graph) -> ShoalError:
    """The error to raise when the forward pass of `model` could not be traced because of `error`.

    `graph` is what was traced so far, for images of `shape` ([C, H, W]) or None.
    """
    if isinstance(error, ShoalError):
        return error
    where = _where(error) or type(model).__name__
    if isinstance(error, UntraceableError):
        return ShoalError(f"found {error.found} at {where}, which torch.fx cannot trace; {error.instead}")
    own = failure(model, torch.zeros(1, *shape, device=device_of(model))) if shape is not None else None
    if own is not None and shape is not None:
        return no_such_images(shape, own)
    for node in reversed(list(graph.nodes)):
        if node.op == "call_method" and node.target in VALUE_METHODS:
            return _values_read(node)
    found, instead = _read(error)
    return ShoalError(f"found {found} at {where}, which torch.fx cannot trace; {instead}")


def no_such_images(shape: tuple[int, ...], error: Exception) -> ShoalError:
    """The error for a model that raises `error` for images of `shape` ([C, H, W])."""
    return ShoalError(
        f"found that the model fails on images of shape {shape}: {first_line(error)}; need the "
        "input size and channels that it was built for; pass those, or correct its forward"
    )


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter of `model`; the CPU if it has none."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _values_read(node: fx.Node) -> ShoalError:
    return ShoalError(
        f"found .{node.target}() at {line_of(node)}, which torch.fx cannot trace; need values that stay tensors; leave "
        "the call out, and compute with the tensor itself"
    )


def _where(error: Exception) -> str:
    others = (*OWN, os.path.dirname(os.__file__) + os.sep + "contextlib", "<")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(others)]
    return f"{frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""


def _read(error: Exception) -> tuple[str, str]:
    """What was found and what to write instead, from an exception of PyTorch or Python."""
    text = first_line(error)
    if any(FUNC in frame.filename for frame in traceback.extract_tb(error.__traceback__)):
        return f"a call of {'torch.vmap' if text.startswith('vmap(') else 'a function of torch.func'}", WHOLE_BATCH
    call = re.match(r"(\w+)\(\)[: ]", text)
    if call and call.group(1) in CREATORS:
        return f"a call of {call.group(1)}() with sizes or values of the images", CONSTANTS
    if "not a member of this module" in text or "not installed as a submodule" in text:
        return (
            "a layer or parameter that is not part of the network",
            "need every layer with weights as an attribute of a module; make it in __init__, or use nn.ModuleList",
        )
    if isinstance(error, (TypeError, RuntimeError)) and re.search(r"\bValue(Attribute)?\b|\bProxy\b", text):
        name = f"of {call.group(1)}() " if call else ""
        shown = re.sub(r"\bValue(Attribute)?\b|\bProxy\b", "a traced value", text)
        return f"a call {name}that takes no traced values ({shown})", TORCH
    return f"{type(error).__name__} ({text})", TORCH


def check_values(graph: fx.Graph) -> None:
    """Remove reads of values that nothing uses from `graph`, in place.

    Raises ShoalError when the result depends on one, such as `x.mean().item()`, or on a tensor that forward makes from
    sizes of the images.
    """
    for node in reversed(list(graph.nodes)):
        if node.op == "call_method" and node.target in VALUE_METHODS:
            _remove(graph, node)
    for node in graph.nodes:
        if node.op == "call_method" and node.target in VALUE_METHODS:
            raise _values_read(node)
        made = getattr(node.target, "__name__", "")
        if node.op == "call_function" and made in CREATORS and node.target is getattr(torch, made):
            raise ShoalError(
                f"found a call of torch.{made}() with sizes or values of the images at {line_of(node)}; {CONSTANTS}"
            )


def _remove(graph: fx.Graph, node: fx.Node) -> None:
    """Erase `node` and the calls that only it reads, if nothing reads it."""
    if node.users or node.op not in ("call_method", "call_function"):
        return
    sources = node.all_input_nodes
    graph.erase_node(node)
    for source in sources:
        _remove(graph, source)


def line_of(node: fx.Node) -> str:
    """The user's line that made `node`, as FILE:LINE (code)."""
    if node.meta.get("line") is None:
        return str(node.name)
    file, number = node.meta["line"]
    return f"{file}:{number} ({linecache.getline(file, number).strip()})"
