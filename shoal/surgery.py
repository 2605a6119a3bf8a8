"""From a user's module to a form that can be cut: `normalise`, `replace`, `trace`.

The form is a `torch.fx.GraphModule` in which every ReLU call is a submodule of its own with one name for life.
"""

from __future__ import annotations

import copy
import operator
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from shoal.errors import ShoalError
from shoal.graph import Graph, Node

Lowered = tuple[str, dict[str, Any], dict[str, Tensor]]
"""What a module becomes in a Graph: operation, attributes, weights."""

NORMAL = "shoal_normal"
"""Set in a GraphModule's meta once every ReLU call is a submodule of its own."""


class Lowers(Protocol):
    """A module that knows its own form in a Graph; tracing does not look inside it."""

    def to_node(self) -> Lowered: ...


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return hasattr(m, "to_node") or super().is_leaf_module(m, module_qualified_name)


def normalise(model: nn.Module) -> fx.GraphModule:
    """A traced copy of `model` in which every ReLU call is a submodule with a name of its own.

    Parameter names stay those of `model`. Raises ShoalError, naming the line, when the control flow depends on
    data, and when a forward pass cannot be traced.
    """
    if isinstance(model, fx.GraphModule) and model.meta.get(NORMAL):
        return copy.deepcopy(model)
    traced = _symbolic(copy.deepcopy(model))
    used: set[str] = set()
    for node in list(traced.graph.nodes):
        _own_relu(traced, node, used)
        _own_dropout(traced, node)
    return _finish(traced)


def _finish(traced: fx.GraphModule) -> fx.GraphModule:
    traced.graph.lint()
    traced.recompile()
    traced.delete_all_unused_submodules()
    traced.meta[NORMAL] = True
    return traced


def _symbolic(model: nn.Module) -> fx.GraphModule:
    tracer = _Tracer()
    try:
        graph = tracer.trace(model)
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename]
        where = f"{frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else "an unknown line"
        raise ShoalError(
            f"found a forward pass that torch.fx cannot trace at {where}: {error}; need control flow that does "
            "not depend on the data; move the branch out of forward or mark that part with torch.fx.wrap"
        ) from error
    return fx.GraphModule(tracer.root, graph)


def _is_relu(traced: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(traced.get_submodule(str(node.target))) is nn.ReLU
    functions = (F.relu, F.relu_, torch.relu, torch.relu_)
    return (node.op == "call_function" and node.target in functions) or (
        node.op == "call_method" and node.target in ("relu", "relu_")
    )


def _scope(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return next(reversed(stack.values()))[0] if stack else ""


def free_name(traced: nn.Module, wanted: str) -> str:
    """`wanted`, or the first of `wanted_2`, `wanted_3`, ... that no submodule bears yet."""
    taken = {name for name, _ in traced.named_modules()}
    name, count = wanted, 1
    while name in taken:
        count += 1
        name = f"{wanted}_{count}"
    return name


def _own_relu(traced: fx.GraphModule, node: fx.Node, used: set[str]) -> None:
    if not _is_relu(traced, node):
        return
    path = str(node.target) if node.op == "call_module" else f"{_scope(node)}.relu".lstrip(".")
    if node.op != "call_module" or path in used:
        path = free_name(traced, path)
    # A fresh module: in-place ones would overwrite what taps and branches still read.
    traced.add_submodule(path, nn.ReLU())
    used.add(path)
    node.op, node.target, node.args, node.kwargs = "call_module", path, (node.args[0],), {}


def _own_dropout(traced: fx.GraphModule, node: fx.Node) -> None:
    # A functional dropout froze `self.training` while tracing; a module follows train() and eval().
    if node.op != "call_function" or node.target is not F.dropout:
        return
    p = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
    path = free_name(traced, f"{_scope(node)}.dropout".lstrip("."))
    traced.add_submodule(path, nn.Dropout(float(p)))  # type: ignore[arg-type]
    node.op, node.target, node.args, node.kwargs = "call_module", path, (node.args[0],), {}


def replace(model: nn.Module, modules: Mapping[str, nn.Module]) -> fx.GraphModule:
    """A copy of `model` with the named submodules exchanged; `model` is left as it is.

    Raises ShoalError when a name is not a submodule.
    """
    traced = normalise(model)
    names = dict(traced.named_modules())
    for name, module in modules.items():
        if name not in names:
            raise ShoalError(f"found no submodule {name!r}; need one of those in the traced model")
        traced.add_submodule(name, module)
    return _finish(traced)


def edit(model: nn.Module, change: Callable[[fx.GraphModule], None]) -> fx.GraphModule:
    """A copy of `model` after `change` rewired its fx graph; dead nodes and submodules are dropped."""
    traced = normalise(model)
    change(traced)
    traced.graph.eliminate_dead_code()
    return _finish(traced)


def module_calls(traced: fx.GraphModule) -> dict[str, fx.Node]:
    """For each submodule name, the node that calls it."""
    return {str(node.target): node for node in traced.graph.nodes if node.op == "call_module"}


def shapes(model: nn.Module, shape: tuple[int, ...]) -> fx.GraphModule:
    """A normalised copy in eval mode whose nodes carry `meta["shape"]`, without batch, for images of `shape`."""
    traced = normalise(model).eval()
    device = next((p.device for p in traced.parameters()), torch.device("cpu"))
    try:
        with torch.no_grad():
            ShapeProp(traced).propagate(torch.zeros(1, *shape, device=device))
    except Exception as error:
        raise ShoalError(
            f"found that the model fails on images of shape {shape}: {str(error).splitlines()[0]}; need the "
            "input size and channels that it was built for"
        ) from error
    for node in traced.graph.nodes:
        meta = node.meta.get("tensor_meta")
        node.meta["shape"] = tuple(meta.shape[1:]) if hasattr(meta, "shape") else ()
    return traced


def trace(model: nn.Module, shape: tuple[int, ...]) -> Graph:
    """The `Graph` of `model` for images of `shape` ([C, H, W]).

    Unknown operations become nodes of type ``unknown``, which `cost` reports and `compile` refuses.
    """
    traced = shapes(model, shape)
    nodes: list[Node] = []
    weights: dict[str, Tensor] = {}
    names: dict[fx.Node, str] = {}
    outputs: tuple[str, ...] = ()
    for fx_node in traced.graph.nodes:
        if fx_node.op == "output":
            outputs = _output_names(fx_node, names)
            continue
        op, attrs, parameters = _lower(traced, fx_node)
        if op == "identity":
            names[fx_node] = names[fx_node.args[0]]
            continue
        name = str(fx_node.target) if fx_node.op == "call_module" else fx_node.name
        # A module called twice shares its weights but is two nodes.
        name = name if name not in names.values() else fx_node.name
        names[fx_node] = name
        inputs = tuple(names[n] for n in _operands(fx_node))
        nodes.append(Node(name, op, inputs, fx_node.meta["shape"], attrs))
        weights |= {f"{name}.{k}": v.detach().clone() for k, v in parameters.items()}
    return Graph(tuple(nodes), weights, outputs)


def _operands(node: fx.Node) -> list[fx.Node]:
    """Every node that is an argument, in order and as often as it occurs (`all_input_nodes` drops repetitions)."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def _output_names(node: fx.Node, names: dict[fx.Node, str]) -> tuple[str, ...]:
    result = node.args[0]
    results = result if isinstance(result, (tuple, list)) else (result,)
    return tuple(names[r] for r in results if isinstance(r, fx.Node))


def _lower(traced: fx.GraphModule, node: fx.Node) -> Lowered:
    if node.op == "placeholder":
        return "input", {}, {}
    if node.op == "call_module":
        return _lower_module(traced.get_submodule(str(node.target)), node)
    return _lower_call(node)


def _pair(value: Any) -> list[int]:
    return [int(v) for v in value] if isinstance(value, (tuple, list)) else [int(value)] * 2


def _unknown(what: object) -> Lowered:
    return "unknown", {"target": str(what)}, {}


def _present(**tensors: Tensor | None) -> dict[str, Tensor]:
    return {k: v for k, v in tensors.items() if v is not None}


def _lower_module(m: nn.Module, node: fx.Node) -> Lowered:
    if hasattr(m, "to_node"):
        return cast(Lowers, m).to_node()
    if isinstance(m, nn.Conv2d):
        if isinstance(m.padding, str) or m.padding_mode != "zeros":
            return _unknown(f"Conv2d with padding {m.padding!r} {m.padding_mode}")
        attrs = {k: _pair(getattr(m, k)) for k in ("stride", "padding", "dilation")} | {"groups": m.groups}
        return "conv2d", attrs, _present(weight=m.weight, bias=m.bias)
    if isinstance(m, nn.BatchNorm2d) and m.track_running_stats:
        tensors = _present(weight=m.weight, bias=m.bias, mean=m.running_mean, var=m.running_var)
        return "batch_norm", {"eps": m.eps}, tensors
    if isinstance(m, nn.Linear):
        return "linear", {}, _present(weight=m.weight, bias=m.bias)
    if isinstance(m, (nn.AvgPool2d, nn.MaxPool2d)):
        odd = [k for k in ("ceil_mode", "divisor_override", "return_indices") if getattr(m, k, None)]
        if odd or getattr(m, "dilation", 1) not in (1, (1, 1)):
            return _unknown(f"{type(m).__name__} with {', '.join(odd) or 'dilation'}")
        return _pool("avg_pool2d" if isinstance(m, nn.AvgPool2d) else "max_pool2d", m.kernel_size, m.stride, m.padding)
    if isinstance(m, nn.AdaptiveAvgPool2d):
        return _adaptive(m.output_size, node)
    if type(m) is nn.ReLU:
        return "relu", {}, {}
    if isinstance(m, nn.Flatten) and (m.start_dim, m.end_dim) == (1, -1):
        return "flatten", {}, {}
    if isinstance(m, (nn.Identity, nn.Dropout, nn.Dropout2d)):
        return "identity", {}, {}
    return _unknown(type(m).__name__)


def _pool(op: str, kernel: Any, stride: Any, padding: Any) -> Lowered:
    attrs = {"kernel": _pair(kernel), "stride": _pair(stride if stride is not None else kernel)}
    if op == "max_pool2d":
        return op, attrs | {"padding": _pair(padding)}, {}
    return (op, attrs, {}) if _pair(padding) == [0, 0] else _unknown(f"{op} with padding {padding}")


def _adaptive(size: Any, node: fx.Node) -> Lowered:
    height, width = node.all_input_nodes[0].meta["shape"][-2:]
    rows, columns = _pair(size) if size is not None else (height, width)
    if (rows, columns) == (1, 1):
        return "mean", {"keepdim": True}, {}
    if height % rows or width % columns:
        return _unknown(f"adaptive average pool {height}x{width} -> {rows}x{columns}")
    kernel = [height // rows, width // columns]
    if kernel == [1, 1]:
        return "identity", {}, {}
    return "avg_pool2d", {"kernel": kernel, "stride": kernel}, {}


def _arg(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _dims(dim: Any) -> set[int]:
    """Dimensions of a 4-D tensor, counted from 0."""
    dims = dim if isinstance(dim, (tuple, list)) else () if dim is None else (dim,)
    return {int(d) % 4 for d in dims}


def _lower_call(node: fx.Node) -> Lowered:
    target: Any = node.target
    if target in (operator.add, operator.iadd, torch.add, "add", "add_") and len(node.args) == 2:
        both = all(isinstance(a, fx.Node) for a in node.args)
        return ("add", {}, {}) if both and not node.kwargs else _unknown("add of a constant")
    if target in (torch.flatten, "flatten") and (_arg(node, 1, "start_dim"), _arg(node, 2, "end_dim", -1)) == (1, -1):
        return "flatten", {}, {}
    if target in ("view", "reshape", torch.reshape) and len(node.meta["shape"]) == 1:
        return "flatten", {}, {}
    if target in (torch.cat, torch.concat) and _arg(node, 1, "dim", 0) == 1:
        return "concat", {}, {}
    if target in (F.avg_pool2d, F.max_pool2d):
        name = "avg_pool2d" if target is F.avg_pool2d else "max_pool2d"
        if len(node.args) > 4 or not set(node.kwargs) <= {"kernel_size", "stride", "padding"}:
            return _unknown(f"{name} with options beyond kernel, stride and padding")
        return _pool(name, _arg(node, 1, "kernel_size"), _arg(node, 2, "stride"), _arg(node, 3, "padding", 0))
    if target is F.adaptive_avg_pool2d:
        return _adaptive(_arg(node, 1, "output_size"), node)
    if target in (torch.mean, "mean") and _dims(_arg(node, 1, "dim")) == {2, 3}:
        return "mean", {"keepdim": bool(_arg(node, 2, "keepdim", False))}, {}
    if target is F.pad and _arg(node, 2, "mode", "constant") == "constant" and not _arg(node, 3, "value", 0):
        return "pad", {"pads": list(_arg(node, 1, "pad"))}, {}
    if target is operator.getitem:
        return _subsample(node.args[1])
    return _unknown(getattr(target, "__name__", target))


def _subsample(index: Any) -> Lowered:
    plain = slice(None, None, None)
    strided = isinstance(index, tuple) and len(index) == 4 and index[:2] == (plain, plain)
    if not strided or any(not isinstance(i, slice) or i.start or i.stop for i in index):
        return _unknown(f"indexing [{index}]")
    return "subsample", {"stride": [i.step or 1 for i in index[2:]]}, {}
