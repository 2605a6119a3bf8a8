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

from shoal.errors import ShoalError
from shoal.graph import Graph, Node
from shoal.reshape import RESHAPES, Shapes, arg, fix_sizes, is_tensor, operands, recorded_len, relax_view

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
    data, when a forward pass cannot be traced, and when it returns anything but logits.
    """
    if isinstance(model, fx.GraphModule) and model.meta.get(NORMAL):
        return copy.deepcopy(model)
    traced = _symbolic(copy.deepcopy(model))
    used: set[str] = set()
    for node in list(traced.graph.nodes):
        _own_relu(traced, node, used)
        _own_dropout(traced, node)
        relax_view(node)
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
        with recorded_len(model):
            graph = tracer.trace(model)
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename]
        where = f"{frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else "an unknown line"
        raise ShoalError(
            f"found a forward pass that torch.fx cannot trace at {where}: {error}; need control flow that does "
            "not depend on the data; move the branch out of forward or mark that part with torch.fx.wrap"
        ) from error
    _check_result(graph, type(model).__name__)
    return fx.GraphModule(tracer.root, graph)


def _results(node: fx.Node) -> tuple[Any, ...]:
    result = node.args[0]
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def _check_result(graph: fx.Graph, name: str) -> None:
    results = _results(next(n for n in graph.nodes if n.op == "output"))
    bad = [r for r in results if not isinstance(r, fx.Node)]
    if bad or not results:
        what = "nothing" if not bad or bad[0] is None else f"a {type(bad[0]).__name__.removeprefix('immutable_')}"
        raise ShoalError(
            f"found that forward returns {what} at {name}; need logits, or a flat tuple of them, weak to strong; "
            "return those tensors alone"
        )


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
            Shapes(traced).run(torch.zeros(1, *shape, device=device))
    except Exception as error:
        raise ShoalError(
            f"found that the model fails on images of shape {shape}: {str(error).splitlines()[0]}; need the "
            "input size and channels that it was built for"
        ) from error
    return traced


def trace(model: nn.Module, shape: tuple[int, ...]) -> Graph:
    """The `Graph` of `model` for images of `shape` ([C, H, W]).

    Unknown operations become nodes of type ``unknown``, which `cost` reports and `compile` refuses. Nodes that share
    a parameter hold one and the same tensor.
    """
    traced = shapes(model, shape)
    fix_sizes(traced)
    nodes: list[Node] = []
    weights: dict[str, Tensor] = {}
    copies: dict[Tensor, Tensor] = {}
    names: dict[fx.Node, str] = {}
    outputs: tuple[str, ...] = ()
    for fx_node in traced.graph.nodes:
        if fx_node.op == "output":
            outputs = _output_names(fx_node, names)
            continue
        if not is_tensor(fx_node):
            continue  # sizes, which `fix_sizes` has put where they are used
        op, attrs, parameters = _lower(traced, fx_node)
        if op == "identity":
            names[fx_node] = names[fx_node.args[0]]
            continue
        name = str(fx_node.target) if fx_node.op == "call_module" else fx_node.name
        # A module called twice shares its weights but is two nodes.
        name = name if name not in names.values() else fx_node.name
        names[fx_node] = name
        inputs = tuple(names[n] for n in operands(fx_node) if n in names)
        nodes.append(Node(name, op, inputs, fx_node.meta["shape"], attrs))
        copies |= {v: v.detach().clone() for v in parameters.values() if v not in copies}
        weights |= {f"{name}.{k}": copies[v] for k, v in parameters.items()}
    return Graph(tuple(nodes), weights, outputs)


def _output_names(node: fx.Node, names: dict[fx.Node, str]) -> tuple[str, ...]:
    missing = [r for r in _results(node) if r not in names]
    if missing:
        raise ShoalError(f"found a size returned at {missing[0]}; need logits; return tensors alone")
    return tuple(names[r] for r in _results(node))


def _lower(traced: fx.GraphModule, node: fx.Node) -> Lowered:
    if node.op == "placeholder":
        return "input", {}, {}
    if node.op == "call_module":
        module = traced.get_submodule(str(node.target))
        op, attrs, tensors = _lower_module(module, node)
        return op, attrs, _parameters(module) if op == "unknown" else tensors
    if node.op == "get_attr":
        value = operator.attrgetter(str(node.target))(traced)
        return (
            "unknown",
            {"target": f"attribute {node.target}"},
            _present(value=value if isinstance(value, nn.Parameter) else None),
        )
    return _lower_call(node)


def _parameters(module: nn.Module) -> dict[str, Tensor]:
    # What has no form in a Graph still has parameters to count. A key's last dot ends the node's name.
    return {name.replace(".", "_"): value for name, value in module.named_parameters()}


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
        return _lower_conv(m)
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


def _lower_conv(m: nn.Conv2d) -> Lowered:
    if m.padding_mode != "zeros":
        return _unknown(f"Conv2d with padding_mode={m.padding_mode!r}")
    padding = [0, 0] if m.padding == "valid" else m.padding
    if padding == "same":
        zeros = [d * (k - 1) for d, k in zip(m.dilation, m.kernel_size, strict=True)]
        if any(z % 2 for z in zeros):
            return _unknown(f"Conv2d with padding='same' and an even kernel {m.kernel_size}, so more zeros on one side")
        padding = [z // 2 for z in zeros]
    attrs = {"stride": _pair(m.stride), "padding": _pair(padding), "dilation": _pair(m.dilation), "groups": m.groups}
    return "conv2d", attrs, _present(weight=m.weight, bias=m.bias)


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


def _dims(dim: Any) -> set[int]:
    """Dimensions of a 4-D tensor, counted from 0."""
    dims = dim if isinstance(dim, (tuple, list)) else () if dim is None else (dim,)
    return {int(d) % 4 for d in dims}


def _lower_call(node: fx.Node) -> Lowered:
    target: Any = node.target
    name = getattr(target, "__name__", target)
    if not all(is_tensor(n) for n in operands(node)) and target not in RESHAPES:
        return _unknown(f"{name} with an argument that forward computes")
    if target in (operator.add, operator.iadd, torch.add, "add", "add_") and len(node.args) == 2:
        both = all(isinstance(a, fx.Node) for a in node.args)
        return ("add", {}, {}) if both and not node.kwargs else _unknown("add of a constant")
    if target in (torch.flatten, "flatten") and (arg(node, 1, "start_dim"), arg(node, 2, "end_dim", -1)) == (1, -1):
        return "flatten", {}, {}
    if target in RESHAPES:
        return _unknown(f"reshape to {node.args[1:]}, which is more than to flatten")
    if target in (torch.cat, torch.concat) and arg(node, 1, "dim", 0) == 1:
        return "concat", {}, {}
    if target in (F.avg_pool2d, F.max_pool2d):
        name = "avg_pool2d" if target is F.avg_pool2d else "max_pool2d"
        if len(node.args) > 4 or not set(node.kwargs) <= {"kernel_size", "stride", "padding"}:
            return _unknown(f"{name} with options beyond kernel, stride and padding")
        return _pool(name, arg(node, 1, "kernel_size"), arg(node, 2, "stride"), arg(node, 3, "padding", 0))
    if target is F.adaptive_avg_pool2d:
        return _adaptive(arg(node, 1, "output_size"), node)
    if target in (torch.mean, "mean") and _dims(arg(node, 1, "dim")) == {2, 3}:
        return "mean", {"keepdim": bool(arg(node, 2, "keepdim", False))}, {}
    if target is F.pad and arg(node, 2, "mode", "constant") == "constant" and not arg(node, 3, "value", 0):
        return "pad", {"pads": list(arg(node, 1, "pad"))}, {}
    if target is operator.getitem:
        return _subsample(node.args[1])
    return _unknown(name)


def _subsample(index: Any) -> Lowered:
    plain = slice(None, None, None)
    strided = isinstance(index, tuple) and len(index) == 4 and index[:2] == (plain, plain)
    if not strided or any(not isinstance(i, slice) or i.start or i.stop for i in index):
        return _unknown(f"indexing [{index}]")
    return "subsample", {"stride": [i.step or 1 for i in index[2:]]}, {}
