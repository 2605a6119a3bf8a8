"""The tracer of forward passes: `torch.fx`'s, with an answer to what it leaves open in users' code."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import keyword
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from shoal.errors import ShoalError
from shoal.surgery.known_sizes import VALUES, KnownSizes, UntraceableError, Value
from shoal.surgery.preparation import after_hooks, before_hooks
from shoal.surgery.replacements import replaced_methods

OWN = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(__file__) + os.sep)
"""Folders whose frames are not the user's."""
TEXT = (
    "values of a tensor that become text (print, f-string, log)",
    "need forward without such output; remove that line, or print from outside the network",
)
LAYERS = (nn.Conv2d, nn.Linear, nn.modules.batchnorm._BatchNorm)
"""Layers that users derive classes from, to change their options only."""


class Tracer(fx.Tracer):
    """Traces a prepared module (`preparation.prepared`) for images of `shape` ([C, H, W]), or of any shape if None.

    Arguments of forward after the first keep their defaults. A layer without weights that is made inside forward
    becomes a submodule. Sizes are answered (`known_sizes`). Every node has ``meta["line"]``, the user's (file, line).
    """

    def __init__(self, shape: tuple[int, ...] | None) -> None:
        # Functions of `math` are recorded only if sizes cannot be answered.
        recorded: Any = (math,) if shape is None else ()
        super().__init__(autowrap_modules=recorded)
        self.shape = shape
        self.measuring = False
        self.sizes: KnownSizes | None = None

    # ------------------------------------------------------------ what is traced

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """The forward pass as a function of the images alone, and the images."""
        root, self.sizes = self.root, KnownSizes(self.root, self.graph, self.shape)
        # A forward that was replaced on the instance counts, as it does in PyTorch.
        forward = root.forward if "forward" in vars(root) else root_fn.__get__(root)
        images = self.create_proxy("placeholder", _images_name(forward), (), {})
        return (lambda x: _result(self._with_hooks(root, forward, (x,), {}), type(root).__name__)), [images]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether calls of `m` are one node."""
        if replaced_methods(m):
            return False
        return hasattr(m, "to_node") or _only_options(m) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Record a call of `m`, with its hooks."""
        if self.measuring:
            return forward(*args, **kwargs)
        self._place(m)
        if not self.is_leaf_module(m, self.path_of_module(m)):
            return super().call_module(m, forward, args, kwargs)  # runs the hooks
        record = super().call_module
        return self._with_hooks(m, lambda *a, **k: record(m, forward, a, k), args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A traced value for a parameter that forward reads."""
        return attr_val if self.measuring else super().getattr(attr, attr_val, parameter_proxy_cache)

    def _with_hooks(self, m: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        with self._leaving_no_trace():
            before_hooks(m, args, kwargs)
        result = call(*args, **kwargs)
        with self._leaving_no_trace():
            after_hooks(m, args, kwargs, result)
        return result

    @contextlib.contextmanager
    def _leaving_no_trace(self) -> Iterator[None]:
        # A hook that only records makes nodes that nothing reads. One that works in place does not pass this by:
        # its node stays.
        before = set(self.graph.nodes)
        yield
        for node in reversed([n for n in self.graph.nodes if n not in before]):
            if not node.users and not str(getattr(node.target, "__name__", node.target)).endswith("_"):
                self.graph.erase_node(node)

    def _place(self, m: nn.Module) -> None:
        """Make `m` a submodule if it was made inside forward."""
        paths: dict[nn.Module, str] = self.submodule_paths  # type: ignore[assignment]
        if m in paths:
            return
        kind = type(m).__name__
        if isinstance(m, torch.jit.ScriptModule):
            raise UntraceableError(
                "a scripted module (torch.jit) made inside forward", "need the Python module; leave out torch.jit"
            )
        if next(itertools.chain(m.parameters(), m.buffers()), None) is not None:
            raise UntraceableError(
                f"a call of nn.{kind} that is no submodule of the network",
                "need every layer with weights in the network, so that it is trained and saved; make it in __init__ "
                "and keep it as an attribute or in an nn.ModuleList, not in a list or inside forward",
            )
        if any(isinstance(child, nn.modules.dropout._DropoutNd) and child.training for child in m.modules()):
            raise UntraceableError(
                f"nn.{kind} made inside forward, which drops values in inference too",
                "need dropout that follows eval(); make it in __init__",
            )
        taken = {name for name, _ in self.root.named_modules()}
        wanted = f"{self.scope.module_path}.{kind.lower()}".lstrip(".")
        path = next(n for n in (wanted, *(f"{wanted}_{i}" for i in range(2, len(taken) + 3))) if n not in taken)
        parent, _, name = path.rpartition(".")
        self.root.get_submodule(parent).add_module(name, m)
        paths |= {child: f"{path}.{inner}".rstrip(".") for inner, child in m.named_modules()}

    # ------------------------------------------------------------ what Python asks

    def create_arg(self, a: Any) -> Any:
        """An argument of a node; NumPy's numbers become Python's."""
        return super().create_arg(a.item() if isinstance(a, np.generic) else a)

    def proxy(self, node: fx.Node) -> Value:
        """The traced value that `node` gives."""
        return Value(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """A node that knows the user's line."""
        node = super().create_node(*args, **kwargs)
        node.meta["line"] = _users_line()
        return node

    def to_bool(self, obj: fx.Proxy) -> bool:
        """What `if` sees."""
        return bool(self.answer(obj.node, "a decision (if, while, and, or, assert)"))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """What `for` and `*` see: sizes, but not the rows of a tensor."""
        found = self.measured(obj.node)
        if isinstance(found, (tuple, list)):
            return iter([obj[i] for i in range(len(found))])  # type: ignore[index]
        raise UntraceableError(
            "a loop over a tensor (for, *x, list(x), tuple assignment)",
            "need a fixed number of steps; use chunk, split or indexing with fixed numbers",
        )

    def answer(self, node: fx.Node, what: str) -> Any:
        """The value of `node`, when Python needs it. Raises UntraceableError when it is not a known size."""
        assert self.sizes is not None
        with self._measure(what):
            return self.sizes.answer(node, what)

    def text(self, node: fx.Node) -> Any:
        """What `print` and f-strings show of the value of `node`; that of a size for one image."""
        try:
            found = self.measured(node)
        except UntraceableError:  # .item()
            raise UntraceableError(*TEXT) from None
        if isinstance(found, Tensor):
            raise UntraceableError(*TEXT)
        return repr(node) if found is None else found

    def measured(self, node: fx.Node) -> Any:
        """The value of `node` for one image, as a tensor without data if it is one; None if the shape is not given."""
        if self.shape is None or self.sizes is None:
            return None
        with self._measure("a use"):
            return self.sizes.for_batches(node)[0]

    @contextlib.contextmanager
    def _measure(self, what: str) -> Iterator[None]:
        self.measuring = True
        try:
            yield
        except (UntraceableError, ShoalError):
            raise
        except Exception as error:
            raise UntraceableError(f"{what} by the values of a tensor", VALUES) from error
        finally:
            self.measuring = False


def _only_options(m: nn.Module) -> bool:
    """Whether the class of `m` is derived from a layer of torch and changes no method that computes."""
    own = list(itertools.takewhile(lambda c: not c.__module__.startswith("torch.nn."), type(m).__mro__))
    harmless = {"__init__", "__module__", "__doc__", "__qualname__", "extra_repr", "__repr__", "reset_parameters"}
    changed = {name for c in own for name, value in vars(c).items() if callable(value) or isinstance(value, property)}
    return isinstance(m, LAYERS) and changed <= harmless and not list(m.children())


def _result(found: Any, name: str) -> Any:
    """What forward returned, with a named tuple as a tuple. Raises ShoalError for an object that holds tensors."""
    if isinstance(found, (fx.Proxy, tuple, list, dict, int, float, type(None))):
        return tuple(found) if isinstance(found, tuple) else found
    raise ShoalError(
        f"found that forward returns a {type(found).__name__} at {name}; need logits, or a flat tuple of them, from "
        "weak to strong; return only those tensors"
    )


def _images_name(forward: Callable[..., Any]) -> str:
    known = inspect.signature(forward).parameters.values()
    needed = [p.name for p in known if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    by_name = [p.name for p in known if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    first = next((p.name for p in known if p.kind is not p.VAR_KEYWORD), None)
    if len(needed) > 1 or by_name or first is None:
        listed = ", ".join(needed) or "none"
        raise UntraceableError(
            f"a forward that needs the arguments {listed}",
            "need one argument, the images; give the others defaults, or wrap the network in a module that passes them",
        )
    return first


def _users_line() -> tuple[str, int] | None:
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(OWN):
        frame = frame.f_back  # type: ignore[assignment]
    return (frame.f_code.co_filename, frame.f_lineno) if frame is not None else None


@contextlib.contextmanager
def calls_recorded(root: nn.Module, tracer: Tracer) -> Iterator[None]:
    """While tracing, make `self.conv.forward(x)` mean `self.conv(x)` for the layers that are one node."""
    layers = [m for name, m in root.named_modules() if name and tracer.is_leaf_module(m, name)]
    for layer in layers:
        layer.forward = _call(layer, tracer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _call(layer: nn.Module, tracer: Tracer) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return type(layer).forward(layer, *args, **kwargs) if tracer.measuring else layer(*args, **kwargs)

    call.shoal_call = True  # type: ignore[attr-defined]
    return call


def rename_keywords(root: nn.Module, graph: fx.Graph) -> None:
    """Append an underscore to names of submodules and tensors that are Python keywords, in place.

    The code that `torch.fx` generates could not name them.
    """
    for module in list(root.modules()):
        for table in (module._modules, module._parameters, module._buffers):
            held: dict[str, Any] = table
            for name in [n for n in held if keyword.iskeyword(n)]:
                renamed = {f"{k}_" if k == name else k: v for k, v in held.items()}
                held.clear()
                held.update(renamed)
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = ".".join(f"{p}_" if keyword.iskeyword(p) else p for p in str(node.target).split("."))
