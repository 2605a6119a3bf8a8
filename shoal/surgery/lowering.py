"""Conversion of each node of a traced forward pass to operations of a `Graph`."""

from __future__ import annotations

import math
import operator
import os
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from shoal.graph.graph import Chain, Lowered, unknown
from shoal.surgery.constants import CASTS
from shoal.surgery.idioms import FLATTENS, MEANS
from shoal.surgery.operations.arithmetic import ARITHMETIC, is_absorbed, lower_arithmetic
from shoal.surgery.operations.functional import LAYERS, is_weight, lower_functional
from shoal.surgery.operations.indexing import DIVIDING, SELECTIONS, is_dividing, is_index, lower_index, take
from shoal.surgery.operations.moves import lower_move, moved
from shoal.surgery.operations.pooling import AVG_OPTIONS, MAX_OPTIONS, adaptive_pool, avg_pool, max_pool, pair
from shoal.surgery.sizes import RESHAPES, arg, is_tensor, operands

MAX_POOLS = (F.max_pool2d, torch.max_pool2d)
ADAPTIVE = {F.adaptive_avg_pool2d: "avg_pool2d", F.adaptive_max_pool2d: "max_pool2d"}
IDENTITIES = (nn.Identity, nn.modules.dropout._DropoutNd)
SUMS, LARGEST = (torch.sum, "sum"), (torch.amax, "amax")
COPIES = ("contiguous", "clone", torch.clone, "detach")
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
        used = is_absorbed(traced, node) or is_index(traced, node) or is_weight(traced, node)
        return (("identity", {}, {}) if used else _attribute(traced, node),)
    chain, line = _lower_call(traced, node), _line(node)
    return tuple((op, attrs | line if op == "unknown" else attrs, own) for op, attrs, own in chain)


def _line(node: fx.Node) -> dict[str, str]:
    """The user's file and line that made `node`, without its folder, for refusals."""
    if node.meta.get("line") is None:
        return {}
    file, number = node.meta["line"]
    return {"line": f"{os.path.basename(file)}:{number}"}


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
    if isinstance(m, nn.Conv2d):
        return (*_borders(m, node), _lower_conv(m))
    return (lower_move(node, m) or _lower_layer(m, node),)


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
    if _is_batch_norm(m, node):
        assert isinstance(m, nn.modules.batchnorm._NormBase)
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
    rank = len(_before(node)) if isinstance(m, nn.modules.batchnorm._NormBase) else 0
    # An instance norm with running statistics uses them in inference.
    flat = (nn.BatchNorm1d, nn.SyncBatchNorm) if rank == 1 else ()
    kinds = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d) if rank == 3 else flat
    # PyTorch asks for the tensors too, whatever `track_running_stats` says.
    return isinstance(m, kinds) and m.running_mean is not None and m.running_var is not None


def _padding(m: nn.Conv2d) -> list[int] | None:
    """[down, right] of a convolution's padding; None if it differs between the two sides."""
    if not isinstance(m.padding, str):
        return pair(m.padding)
    zeros = [d * (k - 1) if m.padding == "same" else 0 for d, k in zip(m.dilation, m.kernel_size, strict=True)]
    return None if any(z % 2 for z in zeros) else [z // 2 for z in zeros]


def _borders(m: nn.Conv2d, node: fx.Node) -> Chain:
    """What a convolution with borders other than zeros does first."""
    down, right = _padding(m) or (0, 0)
    if m.padding_mode == "zeros" or not (down or right):
        return ()
    found = moved(lambda x: F.pad(x, [right, right, down, down], m.padding_mode), _before(node))
    return (found or unknown(f"Conv2d with padding_mode={m.padding_mode!r}"),)


def _lower_conv(m: nn.Conv2d) -> Lowered:
    padding = _padding(m)
    if padding is None:
        return unknown(f"Conv2d with padding='same' and an even kernel {m.kernel_size}, which pads one side more")
    padding = padding if m.padding_mode == "zeros" else [0, 0]
    attrs = {"stride": pair(m.stride), "padding": padding, "dilation": pair(m.dilation), "groups": m.groups}
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
    if target in (*SUMS, *LARGEST) and len(_before(node)) == 3 and _dims(arg(node, 1, "dim")) == {2, 3}:
        return _over_positions(node)
    return (_lower_function(traced, node, name),)


def _over_positions(node: fx.Node) -> Chain:
    """The sum or the maximum of each channel."""
    kept, shape = bool(arg(node, 2, "keepdim", False)), _before(node)
    if node.target in SUMS:
        area = torch.tensor(float(math.prod(shape[1:])))
        return ("mean", {"keepdim": kept}, {}), ("affine", {}, {"scale": area})
    largest = adaptive_pool("max_pool2d", 1, shape)
    return largest if kept else (*largest, ("flatten", {}, {}))


def _lower_function(traced: fx.GraphModule, node: fx.Node, name: Any) -> Lowered:
    target: Any = node.target
    if target in ARITHMETIC:
        return lower_arithmetic(traced, node)
    if target in LAYERS:
        return lower_functional(traced, node)
    if (move := lower_move(node)) is not None:
        return move
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
    if target in (torch.zeros_like, "zero_"):
        return "affine", {}, {"scale": torch.tensor(0.0)}
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
