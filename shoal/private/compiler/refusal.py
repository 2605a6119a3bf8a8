"""The operations of a graph that have no private form, and what to use instead."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from shoal.errors import ShoalError
from shoal.graph.graph import Graph, live
from shoal.graph.max_pool import windows
from shoal.graph.ops import Node
from shoal.private.program.steps import OPS, Step, check_step

RELU = "ReLU, which takes one comparison for each value; train with --replace {name}=relu"
GATE = "no gate: both factors are private, and private inference has no product of two private values; "
GATE += "train the network without squeeze-excite or attention"
NORM = "batch norm, whose statistics are constants in inference; train the network with batch norms instead"
LOGITS = "logits; remove the softmax from the network, and apply it to the logits that come back"
RESHAPED = "a reshape that flattens [N, C, H, W] to [N, CHW]; use x.flatten(1), or F.channel_shuffle to mix channels"
WINDOWS = "count_include_pad=True, no divisor_override, and windows inside the padded image; change the layer"
MAX_POOLS = tuple(f"{kind}maxpool2d{end}" for kind in ("", "adaptive") for end in ("", "withindices"))
INDICES = "a max pool that returns only the maxima; leave out return_indices, or train with --replace max_pool=avg_pool"
SIZE = "features that keep their size, or copies of the nearest value (mode='nearest'); train exits without attention, "
SIZE += "or use a convolution with a stride instead"
SQUARE = "no square: both factors are private, and private inference has no product of two private values; train the "
SQUARE += "network with ReLU"
LARGER = "ReLU and sums; write the larger of a and b as a + F.relu(b - a), and the smaller as a - F.relu(a - b)"
CHOICE = "ReLU, the only comparison that private inference has; write it with F.relu, such as F.relu(x) for x * (x > 0)"
ORDER = "dimensions in the order [N, C, H, W]; leave out the permutation, and use F.channel_shuffle to mix channels"
MADE = "constants that depend on no image; use F.pad to add zeros, or make them in __init__ (self.register_buffer)"
WEIGHTED = "one factor that is a weight: private inference has no product of two private values; use nn.Linear or "
WEIGHTED += "F.linear, and train the network without attention"
LENGTH = (
    "features that are not divided by their own length, which is private; leave it out before the last layer, since "
)
LENGTH += "the order of the logits does not depend on it"
PLAIN = "ReLU, which takes one comparison for each value; write nn.ReLU in its place, and train the network"
OTHER = "an operation with a private form (see docs/your_network.md); rewrite that part of the model, or leave it out"

INSTEAD: dict[str, str] = {
    "batchnorm": "a graph without batch normalisation; fold it into the convolutions first (shoal.fold)",
    "affine": "a graph without constant factors; fold them into the layers next to them first (shoal.fold)",
    **dict.fromkeys(("batchnorm1d", "batchnorm2d", "syncbatchnorm"), "running statistics, which are constants in "
    "inference; give it running statistics (track_running_stats=True) and train again"),
    "conv2d": "a layer nn.Conv2d with zero padding, equal on opposite sides; use nn.ZeroPad2d or F.pad before it "
    "for other sides, and keep its weight as nn.Conv2d",
    "linear": "a layer nn.Linear on flat features [N, D]; flatten the features first (x.flatten(1))",
    **dict.fromkeys(MAX_POOLS, INDICES),
    "avgpool2d": WINDOWS,
    "quadratic": "the identity where there is no ReLU; reduce with --masks autorep-linear",
    "attribute": "a number, or a tensor with one value for each channel, that forward adds to or multiplies "
    "with features; give the parameter the shape [C, 1, 1], or use a layer of torch.nn",
    **dict.fromkeys(("interpolate", "upsample", "upsamplingbilinear2d"), SIZE),
    **dict.fromkeys(("pow", "square", "float_power"), SQUARE),
    **dict.fromkeys(("max", "maximum", "min", "minimum", "fmax", "fmin"), LARGER),
    "abs": "ReLU and sums; write |x| as F.relu(x) + F.relu(-x)",
    **dict.fromkeys(("gt", "lt", "ge", "le", "eq", "ne", "where", "sign", "heaviside", "maskedfill"), CHOICE),
    **dict.fromkeys(("newzeros", "newones", "newfull", "newtensor", "newempty", "oneslike", "fulllike", "randlike",
    "randnlike"), MADE),
    "unsqueeze": "dimensions [N, C, H, W]; leave out the added dimension, or write x[:, i:i+1] for one channel",
    **dict.fromkeys(("expand", "expandas", "broadcastto"), "values of one shape; copy them with F.interpolate"),
    **dict.fromkeys(("pixelshuffle", "pixelunshuffle"), "slices that are joined along the channels; write "
    "torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], ...], 1), with the weights in that order"),
    "convtranspose2d": "nn.Conv2d; use a convolution, or nn.Upsample (nearest) and a convolution",
    **dict.fromkeys(("conv1d", "conv3d", "adaptiveavgpool1d", "adaptivemaxpool1d"), "layers for images; use nn.Conv2d "
    "and 2d pools with a kernel of one row"),
    **dict.fromkeys(("fractionalmaxpool2d", "lppool2d"), "nn.MaxPool2d or nn.AvgPool2d; train the network with it"),
    "options": "a sum or product without further arguments; write a factor out, such as x + 2 * y for alpha=2",
    "result": "an operation with a private form before it; change that operation",
    "squeeze": "a reshape that keeps the images apart; use flatten(1)",
    **dict.fromkeys(("reshape", "view", "viewas", "unflatten"), RESHAPED),
    **dict.fromkeys(("permute", "transpose", "swapaxes", "movedim", "t"), ORDER),
    "flatten": "all dimensions but the first in one; use x.flatten(1)",
    "mean": "a mean over height and width; use x.mean((2, 3)) or nn.AdaptiveAvgPool2d(1)",
    "sum": "a total over height and width, or tensors that are added; use x.sum((2, 3)), or write +",
    "pad": "zeros that are added at the borders; use F.pad with amounts of 0 or more, and slices to cut off rows",
    **dict.fromkeys(("cat", "concat", "concatenate", "stack"), "parts that are joined along the channels; use "
    "torch.cat(parts, dim=1)"),
    **dict.fromkeys(("chunk", "split", "tensorsplit", "part"), "parts of the channels; use dim=1 and fixed numbers"),
    **dict.fromkeys(("indexing", "indexselect"), "slices that keep the batch and all dimensions, or one list of fixed "
    "positions; write them with `:` and numbers, such as x[:, :2] or x[:, [2, 1, 0]]"),
    **dict.fromkeys(("add", "sub"), "two tensors of one shape, or a tensor and one constant for each channel; give "
    "both the same shape"),
    **dict.fromkeys(("clamp", "clampmin", "clampmax"), "ReLU, clamp(min=0); train the network with it"),
    **dict.fromkeys(("float", "double", "half", "to", "type", "typeas"), "float32 throughout; leave out the cast"),
    **dict.fromkeys(("mul", "div"), GATE),
    **dict.fromkeys(("matmul", "mm", "bmm", "einsum", "addmm", "bilinear", "scaleddotproductattention",
    "multiheadattention"), WEIGHTED),
    **dict.fromkeys(("sigmoid", "hardsigmoid"), GATE),
    **dict.fromkeys(("groupnorm", "layernorm", "rmsnorm", "localresponsenorm", "var", "std", "varmean"), NORM),
    **dict.fromkeys(("instancenorm", "instancenorm2d"), NORM),
    **dict.fromkeys(("normalize", "norm", "cosinesimilarity"), LENGTH),
    **dict.fromkeys(("threshold", "logsigmoid", "rrelu", "softsign", "glu", "softshrink", "hardshrink", "tanhshrink",
    "exp", "log", "sqrt", "reciprocal"), PLAIN),
    **dict.fromkeys(("softmax", "logsoftmax", "softmax2d"), GATE),
}  # fmt: skip
"""What to use instead, by the operation's name in lower case without underscores. `ACTIVATIONS` has activations."""

ENDS = ("softmax", "logsoftmax", "sigmoid", "logsigmoid", "hardsigmoid")
"""Functions that turn logits into probabilities."""
ACTIVATIONS = {
    "relu6": "relu6", "hardtanh": "hardtanh", "silu": "silu", "gelu": "gelu", "hardswish": "hardswish", "mish": "mish",
    "leakyrelu": "leaky_relu", "prelu": "prelu", "elu": "elu", "celu": "celu", "selu": "selu", "softplus": "softplus",
    "tanh": "tanh",
}  # fmt: skip


@dataclass(frozen=True)
class Refusal:
    """A node without a private form: its name, its operation, what to use instead, and its line of code if known."""

    node: str
    found: str
    need: str
    line: str = ""

    def error(self) -> ShoalError:
        """The refusal as an error with one sentence."""
        return ShoalError(f"found {self.found} at {self.place}; need {self.need}")

    @property
    def place(self) -> str:
        """The node's name, with the line of a call that no layer names."""
        return f"{self.node} ({self.line})" if self.line else self.node


def refusals(graph: Graph) -> tuple[Refusal, ...]:
    """All nodes of a folded `graph` that the outputs need and that have no private form, in order.

    `shoal check` and `compile` both ask this function, so they agree.
    """
    names = live(graph)
    found = [_refusal(graph, n) for n in graph.nodes[1:] if n.name in names]
    return tuple(refusal for refusal in found if refusal is not None)


def _refusal(graph: Graph, node: Node) -> Refusal | None:
    if node.op not in (*OPS, "max_pool2d"):
        line = node.attrs.get("line")
        last = node.name in graph.outputs
        return Refusal(node.name, str(node.attrs.get("target", node.op)), _instead(node, last), line or "")
    try:
        if node.op == "max_pool2d":
            for axis, size in enumerate(graph[node.inputs[0]].shape[1:]):
                windows(node, size, axis)
        else:
            check_step(step_of(graph, node), [graph[name].shape for name in node.inputs])
    except ShoalError as error:
        found, _, need = str(error).removeprefix("found ").partition("; need ")
        return Refusal(node.name, found.removesuffix(f" at {node.name}"), need)
    return None


def step_of(graph: Graph, node: Node) -> Step:
    """The step that a node of `graph` with an operation of `steps.OPS` becomes.

    Its attributes have types of JSON, so a saved program equals the one in memory.
    """
    attrs: dict[str, Any] = {name: node.attrs[name] for name in OPS[node.op].attrs if name in node.attrs}
    if node.op == "conv2d":
        # The client must know the kernel's size, which does not follow from the result's shape with strides.
        attrs["kernel"] = list(graph.weights[f"{node.name}.weight"].shape[2:])
    return Step(node.name, node.op, node.inputs, tuple(node.shape), json.loads(json.dumps(attrs)))


def _instead(node: Node, last: bool) -> str:
    """What to use in place of `node`, which is a result of the network if `last`."""
    words = str(node.attrs.get("target", node.op)).split()
    key = words[0].lower().replace("_", "") if words else ""
    if last and key in ENDS:
        return LOGITS
    if key in ACTIVATIONS:
        return RELU.format(name=ACTIVATIONS[key])
    return INSTEAD.get(key, OTHER)
