"""Conversion of each node of a traced forward pass to operations of a `Graph`."""

from __future__ import annotations

import operator
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from shoal.graph.graph import Chain, Lowered, unknown
from shoal.surgery.arithmetic import ARITHMETIC, is_absorbed, lower_arithmetic
from shoal.surgery.idioms import FLATTENS, MEANS
from shoal.surgery.indexing import DIVIDING, SELECTIONS, is_dividing, is_index, lower_index, take
from shoal.surgery.pooling import AVG_OPTIONS, MAX_OPTIONS, adaptive_pool, avg_pool, max_pool, pair
from shoal.surgery.sizes import RESHAPES, arg, is_tensor, operands

MAX_POOLS = (F.max_pool2d, torch.max_pool2d)
ADAPTIVE = {F.adaptive_avg_pool2d: "avg_pool2d", F.adaptive_max_pool2d: "max_pool2d"}
IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout)
COPIES = ("contiguous", "clone", torch.clone, "detach")
CASTS = ("float", "double", "half", "to", "type", "type_as")
RELU6_MODULES, RELU6_FUNCTIONS = (nn.ReLU6, nn.Hardtanh), (F.relu6, F.hardtanh, F.hardtanh_, torch.clamp, "clamp")


class Lowers(Protocol):
    """A module with a `to_node` method, which gives its `Graph` operation; tracing treats it as one call."""

    def to_node(self) -> Lowered: ...


def lower(traced: fx.GraphModule, node: fx.Node) -> Chain:
    """The chain of `Graph` operations that `node` becomes, each reading the result of the previous one.

    A node that computes nothing becomes one ``identity``; one without a `Graph` operation becomes ``unknown``. Needs
    the shapes that `sizes.Shapes` records.
    """
    if node.op == "placeholder":
        return (("input", {}, {}),)
    if node.op == "call_module":
        module = traced.get_submodule(str(node.target))
        chain = _lower_module(module, node)
        return tuple((op, attrs, _parameters(module) if op == "unknown" else own) for op, attrs, own in chain)
    if node.op == "get_attr":
        used = is_absorbed(traced, node) or is_index(traced, node)
        return (("identity", {}, {}) if used else _attribute(traced, node),)
    return _lower_call(traced, node)


def _attribute(traced: fx.GraphModule, node: fx.Node) -> Lowered:
    value = operator.attrgetter(str(node.target))(traced)
    tensors: dict[str, Tensor] = {"value": value} if isinstance(value, nn.Parameter) else {}
    return "unknown", {"target": f"attribute {node.target}"}, tensors


def _parameters(module: nn.Module) -> dict[str, Tensor]:
    # An unknown operation still has parameters to count. Keys are "<node>.<name>", so the name may not have a dot.
    return {name.replace(".", "_"): value for name, value in module.named_parameters()}


def _present(**tensors: Tensor | None) -> dict[str, Tensor]:
    return {k: v for k, v in tensors.items() if v is not None}


def _before(node: fx.Node) -> tuple[int, ...]:
    return node.all_input_nodes[0].meta["shape"]


def _lower_module(m: nn.Module, node: fx.Node) -> Chain:
    if hasattr(m, "to_node"):
        return (cast(Lowers, m).to_node(),)
    if type(m) in (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d):
        return _lower_pool(m, node)
    return (_lower_layer(m, node),)


def _lower_pool(m: nn.Module, node: fx.Node) -> Chain:
    if isinstance(m, (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)):
        if getattr(m, "return_indices", False):
            return (unknown("adaptive_max_pool2d with return_indices"),)
        kind = "avg_pool2d" if isinstance(m, nn.AdaptiveAvgPool2d) else "max_pool2d"
        return adaptive_pool(kind, m.output_size, _before(node))
    if isinstance(m, nn.AvgPool2d):
        return avg_pool({k: getattr(m, k) for k in AVG_OPTIONS}, _before(node), node.meta["shape"])
    return max_pool({k: getattr(m, k) for k in MAX_OPTIONS})


def _lower_layer(m: nn.Module, node: fx.Node) -> Lowered:
    if isinstance(m, nn.Conv2d):
        return _lower_conv(m)
    if _is_batch_norm(m, node):
        assert isinstance(m, nn.modules.batchnorm._BatchNorm)
        return (
            "batch_norm",
            {"eps": m.eps},
            _present(weight=m.weight, bias=m.bias, mean=m.running_mean, var=m.running_var),
        )
    if isinstance(m, nn.Linear) and len(_before(node)) == 1:
        return "linear", {}, _present(weight=m.weight, bias=m.bias)
    if type(m) is nn.ReLU:
        return "relu", {}, {}
    if isinstance(m, RELU6_MODULES) and (m.min_val, m.max_val) == (0.0, 6.0):
        return "relu6", {}, {}
    if isinstance(m, nn.Flatten) and _flattens(m.start_dim, m.end_dim, node):
        return "flatten", {}, {}
    if isinstance(m, (nn.ZeroPad2d, nn.ConstantPad2d)):
        return _pad(list(m.padding), m.value, node)
    if isinstance(m, nn.ChannelShuffle) and len(_before(node)) == 3:
        return _shuffle(node, m.groups)
    if isinstance(m, nn.modules.batchnorm._BatchNorm):
        return unknown(f"{type(m).__name__} without running statistics" if m.running_mean is None else type(m).__name__)
    return ("identity", {}, {}) if isinstance(m, IDENTITIES) else unknown(type(m).__name__)


def _flattens(start: Any, end: Any, node: fx.Node) -> bool:
    """Whether a flatten from dimension `start` to `end` keeps the images and nothing else."""
    rank = 1 + len(_before(node))
    return start is not None and (int(start) % rank, int(end) % rank) == (min(1, rank - 1), rank - 1)


def _pad(pads: list[int], value: Any, node: fx.Node) -> Lowered:
    if value:
        return unknown(f"pad with {value} instead of zeros")
    if min(pads) < 0:
        return unknown("pad with a negative amount")
    return ("pad", {"pads": pads}, {}) if len(pads) <= 2 * len(_before(node)) else unknown("pad of the images")


def _is_batch_norm(m: nn.Module, node: fx.Node) -> bool:
    rank = len(_before(node)) if isinstance(m, nn.modules.batchnorm._BatchNorm) else 0
    kinds = (nn.BatchNorm2d, nn.SyncBatchNorm) if rank == 3 else (nn.BatchNorm1d, nn.SyncBatchNorm) if rank == 1 else ()
    # PyTorch asks for the tensors too, whatever `track_running_stats` says.
    return isinstance(m, kinds) and m.running_mean is not None and m.running_var is not None


def _lower_conv(m: nn.Conv2d) -> Lowered:
    padding = [0, 0] if m.padding == "valid" else m.padding
    if m.padding_mode != "zeros" and pair(padding if padding != "same" else 1) != [0, 0]:
        return unknown(f"Conv2d with padding_mode={m.padding_mode!r}")
    if padding == "same":
        zeros = [d * (k - 1) for d, k in zip(m.dilation, m.kernel_size, strict=True)]
        if any(z % 2 for z in zeros):
            return unknown(f"Conv2d with padding='same' and an even kernel {m.kernel_size}, which pads one side more")
        padding = [z // 2 for z in zeros]
    attrs = {"stride": pair(m.stride), "padding": pair(padding), "dilation": pair(m.dilation), "groups": m.groups}
    return "conv2d", attrs, _present(weight=m.weight, bias=m.bias)


def _lower_call(traced: fx.GraphModule, node: fx.Node) -> Chain:
    target: Any = node.target
    name = getattr(target, "__name__", target)
    if not all(is_tensor(n) for n in operands(node)) and target not in RESHAPES:
        return (unknown(f"{name} with an argument computed in forward"),)
    if target in MAX_POOLS:
        return max_pool({k: arg(node, i, k) for i, k in enumerate(MAX_OPTIONS, start=1)})
    if target is F.avg_pool2d:
        options = {k: arg(node, i, k) for i, k in enumerate(AVG_OPTIONS, start=1)}
        return avg_pool(options, _before(node), node.meta["shape"])
    if target in ADAPTIVE and not arg(node, 2, "return_indices", False):
        return adaptive_pool(ADAPTIVE[target], arg(node, 1, "output_size"), _before(node))
    return (_lower_function(traced, node, name),)


def _lower_function(traced: fx.GraphModule, node: fx.Node, name: Any) -> Lowered:
    target: Any = node.target
    if target in ARITHMETIC:
        return lower_arithmetic(traced, node)
    if target in RESHAPES:
        return unknown(f"reshape to {node.args[1:]}, which does not only flatten")
    if target in FLATTENS:
        start, end = arg(node, 1, "start_dim", 0), arg(node, 2, "end_dim", -1)
        return ("flatten", {}, {}) if _flattens(start, end, node) else unknown(f"flatten from {start} to {end}")
    if target in (torch.cat, torch.concat, torch.concatenate):
        dim = arg(node, 1, "dim", 0)
        return ("concat", {}, {}) if _is_channel(dim, node) else unknown(f"{name} along dimension {dim}")
    if target in MEANS:
        return _lower_mean(node)
    if target is F.pad:
        mode = arg(node, 2, "mode", "constant")
        pads = [int(p) for p in arg(node, 1, "pad")]
        return _pad(pads, arg(node, 3, "value", 0), node) if mode == "constant" else unknown(f"pad with mode {mode!r}")
    if target in RELU6_FUNCTIONS:
        bounds = _bounds(node)
        return ("relu6", {}, {}) if bounds == (0, 6) else unknown(f"{name} to {bounds}")
    if target in (torch.channel_shuffle, F.channel_shuffle):
        return _shuffle(node, arg(node, 1, "groups"))
    if target in (*DIVIDING, operator.getitem, *SELECTIONS):
        return _lower_index(traced, node)
    if target is getattr:
        return unknown(f"attribute .{node.args[1]} of a value")
    if target in CASTS and node.op == "call_method":
        return _lower_cast(node)
    return ("identity", {}, {}) if target in COPIES else unknown(name)


def _lower_mean(node: fx.Node) -> Lowered:
    dim = arg(node, 1, "dim")
    if _dims(dim) == {2, 3} and len(_before(node)) == 3 and arg(node, 3, "dtype") is None:
        return "mean", {"keepdim": bool(arg(node, 2, "keepdim", False))}, {}
    return unknown("mean of everything" if dim is None else f"mean over {dim} alone")


def _lower_cast(node: fx.Node) -> Lowered:
    same = operands(node)[0].meta["dtype"] == node.meta["dtype"]
    return ("identity", {}, {}) if same else unknown(f"{node.target} {node.meta['dtype']}")


def _lower_index(traced: fx.GraphModule, node: fx.Node) -> Lowered:
    if node.target not in DIVIDING:
        return lower_index(traced, node)
    if is_dividing(node):
        return "identity", {}, {}
    return unknown(f"{getattr(node.target, '__name__', node.target)} along a dimension other than the channels")


def _bounds(node: fx.Node) -> tuple[Any, Any]:
    if node.target is F.relu6:
        return 0, 6
    low, high = ("min", "max") if node.target in (torch.clamp, "clamp") else ("min_val", "max_val")
    return arg(node, 1, low), arg(node, 2, high)


def _dims(dim: Any) -> set[int]:
    """Dimensions of a 4-D tensor, counted from 0."""
    dims = dim if isinstance(dim, (tuple, list)) else () if dim is None else (dim,)
    return {int(d) % 4 for d in dims}


def _is_channel(dim: int, node: fx.Node) -> bool:
    return dim % (1 + len(node.meta["shape"])) == 1


def _shuffle(node: fx.Node, groups: int) -> Lowered:
    """Channel shuffle: channel c of the result is input channel (c mod groups) * (C / groups) + c // groups."""
    channels = _before(node)[0]
    order = [c % groups * (channels // groups) + c // groups for c in range(channels)]
    return take([order, *[None] * (len(_before(node)) - 1)])
