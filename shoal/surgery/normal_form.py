"""The normal form of a module, which the rest of shoal can edit, and edits that keep it.

It is a `torch.fx.GraphModule` in which every ReLU call is a submodule of its own, with a name that later edits keep.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from shoal.errors import ShoalError
from shoal.surgery.constants import settle_created
from shoal.surgery.explanation import check_values, explained
from shoal.surgery.idioms import flatten_squeezed, settle_in_place
from shoal.surgery.preparation import forget_hooks, output_to_stderr, prepared, unwrapped
from shoal.surgery.results import check_results, choose
from shoal.surgery.sizes import arg, operands, recorded_builtins, relax_view
from shoal.surgery.tracer import Tracer, calls_recorded, rename_keywords

NORMAL = "shoal_normal"
"""Set in a GraphModule's meta once every ReLU call is a submodule of its own."""


def normalise(model: nn.Module, shape: tuple[int, ...] | None = None, output: int | None = None) -> fx.GraphModule:
    """A traced copy of `model` in float32 in which every ReLU call is a submodule with a name of its own.

    The forward pass is traced in eval mode, so code that runs only in training, such as an auxiliary head, is left
    out. Dropout and batch norms still follow train() and eval(). Parameter names stay those of `model`, except that
    wrappers such as `nn.DataParallel` are taken off, weights of weight norm, spectral norm and pruning become one
    parameter, and Python keywords get an underscore. `shape` ([C, H, W]) is needed if forward decides something by the
    size of the images; the result is then for that size. Raises ShoalError when the forward pass cannot be traced (with
    the line, for example where control flow depends on data), when a hook changes values, and when forward returns
    anything other than a tensor or a flat tuple of tensors. With `output`, only that output of forward (from 0) is
    kept, and the others may be anything.
    """
    _check_kind(model)
    _check_shape(shape)
    if isinstance(model, fx.GraphModule) and model.meta.get(NORMAL):
        traced = copy.deepcopy(model)
        return traced if output is None else _cut(traced, output)
    traced = _symbolic(model, shape, output)
    settle_in_place(traced)
    used: set[str] = set()
    for node in list(traced.graph.nodes):
        _own_relu(traced, node, used)
        _own_dropout(traced, node, used)
        _own_batch_norm(traced, node)
        relax_view(node)
    if output is not None:
        traced.graph.eliminate_dead_code()
    return _finish(traced)


def _cut(traced: fx.GraphModule, output: int) -> fx.GraphModule:
    choose(traced.graph, output, "the network")
    traced.graph.eliminate_dead_code()
    return _finish(traced)


def _check_kind(model: Any) -> None:
    if isinstance(model, type):
        raise ShoalError(f"found the class {model.__name__}; need a network; call it: {model.__name__}() makes one")
    if not isinstance(model, nn.Module):
        raise ShoalError(f"found a {type(model).__name__}; need a torch.nn.Module; pass the network itself")


def _check_shape(shape: Any) -> None:
    sizes = shape if isinstance(shape, (tuple, list)) else ()
    if shape is not None and not (len(sizes) == 3 and all(isinstance(n, int) and n > 0 for n in sizes)):
        raise ShoalError(
            f"found {shape!r} as the shape of an image; need three numbers above 0: channels, height, width; pass "
            "(3, 32, 32), say, without the number of images"
        )


def _finish(traced: fx.GraphModule) -> fx.GraphModule:
    traced.graph.lint()
    traced.recompile()
    traced.delete_all_unused_submodules()
    traced.meta[NORMAL] = True
    return traced


def _symbolic(model: nn.Module, shape: tuple[int, ...] | None, output: int | None) -> fx.GraphModule:
    modes = {name: module.training for name, module in unwrapped(model).named_modules()}
    tracer, root = Tracer(shape), prepared(model)
    try:
        with recorded_builtins(root), calls_recorded(root, tracer), output_to_stderr():
            graph = tracer.trace(root)
    except Exception as error:
        raise explained(error, model, shape, tracer.graph) from error
    if output is not None:
        choose(graph, output, type(root).__name__)
    check_results(graph, type(root).__name__)
    settle_created(root, graph)
    check_values(graph)
    forget_hooks(root)
    rename_keywords(root, graph)
    flatten_squeezed(graph, tracer.sizes)
    traced = fx.GraphModule(root, graph)
    for name, module in traced.named_modules():
        module.training = modes.get(name, modes[""])
    return traced


CLAMPS = ("clamp", "clamp_", "clamp_min", "clamp_min_", torch.clamp, torch.clamp_, torch.clamp_min, torch.clamp_min_)
THRESHOLDS: tuple[Any, ...] = (F.threshold, torch.threshold)
DROPOUTS: dict[Any, type[nn.Module]] = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
    F.dropout3d: nn.Dropout3d,
    torch.dropout: nn.Dropout,
    F.alpha_dropout: nn.AlphaDropout,
    F.feature_alpha_dropout: nn.FeatureAlphaDropout,
}


def _is_relu(traced: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        layer = traced.get_submodule(str(node.target))
        return type(layer) is nn.ReLU or (type(layer) is nn.Threshold and (layer.threshold, layer.value) == (0, 0))
    functions = (F.relu, F.relu_, torch.relu, torch.relu_)
    named = (node.op == "call_function" and node.target in functions) or (
        node.op == "call_method" and node.target in ("relu", "relu_")
    )
    if node.op == "call_function" and node.target in THRESHOLDS:
        return (arg(node, 1, "threshold"), arg(node, 2, "value")) == (0, 0)
    return named or (node.op.startswith("call") and node.target in CLAMPS and _bounds(node) == (0, None))


def _bounds(node: fx.Node) -> tuple[Any, Any]:
    return arg(node, 1, "min"), arg(node, 2, "max")


def _scope(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return next(reversed(stack.values()))[0] if stack else ""


def free_name(traced: nn.Module, wanted: str) -> str:
    """`wanted`, or the first of `wanted_2`, `wanted_3`, ... that is not the name of a submodule."""
    taken = {name for name, _ in traced.named_modules()}
    name, count = wanted, 1
    while name in taken:
        count += 1
        name = f"{wanted}_{count}"
    return name


def _own_relu(traced: fx.GraphModule, node: fx.Node, used: set[str]) -> None:
    if _is_relu(traced, node):
        # A new module, since an in-place ReLU would overwrite a value that taps and branches still read.
        own_module(traced, node, nn.ReLU(), "relu", used)


def own_module(traced: fx.GraphModule, node: fx.Node, module: nn.Module, kind: str, used: set[str]) -> None:
    """Turn `node` into a call of `module` on its first argument, in place.

    The new submodule takes the name of the module that `node` called before. If `node` called a function, or that name
    is in `used`, a free name is made; for a function it is the enclosing module's path plus `kind`. The name is added
    to `used`.
    """
    path = str(node.target) if node.op == "call_module" else f"{_scope(node)}.{kind}".lstrip(".")
    if node.op != "call_module" or path in used:
        path = free_name(traced, path)
    traced.add_submodule(path, module.train(traced.training))
    used.add(path)
    value = operands(node)[0]
    node.op, node.target, node.args, node.kwargs = "call_module", path, (value,), {}


def _own_dropout(traced: fx.GraphModule, node: fx.Node, used: set[str]) -> None:
    # Tracing fixed the value of `self.training` in a functional dropout; a module follows train() and eval().
    if node.op == "call_function" and node.target in DROPOUTS:
        p = float(arg(node, 1, "p", 0.5))
        own_module(traced, node, DROPOUTS[node.target](p), "dropout", used)


def _own_batch_norm(traced: fx.GraphModule, node: fx.Node) -> None:
    """Turn a functional batch norm whose tensors all belong to one module into a call of an `nn.BatchNorm2d`, in place.

    Tracing fixed its `training` argument; a module follows train() and eval(). timm's BatchNormAct2d needs this.
    """
    named = BATCH_NORM_OPTIONS if node.op == "call_function" and node.target is F.batch_norm else ()
    options: dict[str, Any] = {k: arg(node, i, k) for i, k in enumerate(named, start=1)}
    paths = [getattr(options.get(k), "target", None) for k in BATCH_NORM_OPTIONS[:4]]
    owner = str(paths[0]).rpartition(".")[0]
    if not owner or paths != [f"{owner}.{k}" for k in BATCH_NORM_OPTIONS[:4]]:
        return
    held = traced.get_submodule(owner)
    norm = nn.BatchNorm2d(len(held.running_mean), options["eps"] or 1e-5, options["momentum"])  # type: ignore[arg-type]
    for key in BATCH_NORM_OPTIONS[:4]:
        setattr(norm, key, getattr(held, key))
    for name, child in held.named_children():
        norm.add_module(name, child)
    traced.add_submodule(owner, norm.train(traced.training))
    value, read = operands(node)[0], [n for n in operands(node) if n.op == "get_attr"]
    node.op, node.target, node.args, node.kwargs = "call_module", owner, (value,), {}
    for attribute in read:
        if not attribute.users:
            traced.graph.erase_node(attribute)


BATCH_NORM_OPTIONS = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


def replace(model: nn.Module, modules: Mapping[str, nn.Module]) -> fx.GraphModule:
    """A normalised copy of `model` with the named submodules replaced.

    Raises ShoalError when a name is not that of a submodule.
    """
    traced = normalise(model)
    names = dict(traced.named_modules())
    for name, module in modules.items():
        if name not in names:
            raise ShoalError(f"found no submodule {name!r}; need one of those in the traced model")
        traced.add_submodule(name, module)
    return _finish(traced)


def edit(
    model: nn.Module, change: Callable[[fx.GraphModule], None], shape: tuple[int, ...] | None = None
) -> fx.GraphModule:
    """A normalised copy of `model` whose fx graph `change` edited in place; unused nodes and submodules are removed.

    `shape` is that of `normalise`.
    """
    traced = normalise(model, shape)
    change(traced)
    traced.graph.eliminate_dead_code()
    return _finish(traced)


def drop_unread(model: nn.Module) -> fx.GraphModule:
    """A copy of `model` without the parts that do not affect its logits, such as adapters that only losses read."""
    return edit(model, lambda traced: None)


def module_calls(traced: fx.GraphModule) -> dict[str, fx.Node]:
    """The node that calls each submodule, by the submodule's name."""
    return {str(node.target): node for node in traced.graph.nodes if node.op == "call_module"}
