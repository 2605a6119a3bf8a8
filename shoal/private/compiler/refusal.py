"""The operations of a graph that have no private form, and what to use instead."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.errors import ShoalError
from shoal.graph.graph import Graph, live
from shoal.graph.ops import Node
from shoal.private.program.steps import OPS

RELU = "ReLU, which takes one comparison; train with --replace {name}=relu"
GATE = "no gate: its factors are private too, and every product of two private values is a protocol of its own; "
GATE += "train the network without squeeze-excite or attention"
NORM = "batch normalisation, whose statistics are fixed and fold into the layers beside it; train with that"
LOGITS = "logits; leave the softmax to the loss, and to whoever reads the logits"

INSTEAD: dict[str, str] = {
    "batchnorm": "a graph without batch normalisation; fold it into the convolutions first (shoal.fold)",
    "affine": "a graph without constant factors; fold them into the layers beside them first (shoal.fold)",
    "maxpool2d": "a max pool without indices; return the maxima alone, or train with --replace max_pool=avg_pool",
    "adaptivemaxpool2d": "a max pool without indices; return the maxima alone",
    "avgpool2d": "count_include_pad=True, no divisor_override, and windows inside the padded image; change the layer",
    "quadratic": "the identity where there is no ReLU; reduce with --masks autorep-linear",
    "attribute": "numbers or one value a channel, added to what forward computes or multiplied with it",
    "interpolate": "features at one resolution; train exits without attention, or use a stride instead",
    "squeeze": "a view that keeps the images apart; use flatten(1)",
    **dict.fromkeys(("mul", "div", "matmul", "bmm", "einsum", "scaleddotproductattention"), GATE),
    **dict.fromkeys(("sigmoid", "hardsigmoid"), GATE),
    **dict.fromkeys(("groupnorm", "layernorm", "instancenorm2d", "localresponsenorm", "normalize"), NORM),
    **dict.fromkeys(("softmax", "logsoftmax", "softmax2d"), LOGITS),
}
"""What to use instead, by the operation's name in lower case without underscores. `ACTIVATIONS` has activations."""

ACTIVATIONS = {
    "relu6": "relu6", "hardtanh": "hardtanh", "silu": "silu", "gelu": "gelu", "hardswish": "hardswish", "mish": "mish",
    "leakyrelu": "leaky_relu", "prelu": "prelu", "elu": "elu", "celu": "celu", "selu": "selu", "softplus": "softplus",
    "tanh": "tanh",
}  # fmt: skip


@dataclass(frozen=True)
class Refusal:
    """A node without a private form: its name, its operation, and what to use instead."""

    node: str
    found: str
    need: str

    def error(self) -> ShoalError:
        """The refusal as an error with one sentence."""
        return ShoalError(f"found {self.found} at {self.node}; need {self.need}")


def refusals(graph: Graph) -> tuple[Refusal, ...]:
    """All nodes of a folded `graph` that the outputs need and that have no private form, in order."""
    names = live(graph)
    odd = [n for n in graph.nodes[1:] if n.name in names and n.op not in (*OPS, "max_pool2d")]
    return tuple(Refusal(n.name, str(n.attrs.get("target", n.op)), _instead(n)) for n in odd)


def _instead(node: Node) -> str:
    words = str(node.attrs.get("target", node.op)).split()
    key = words[0].lower().replace("_", "") if words else ""
    if key in ACTIVATIONS:
        return RELU.format(name=ACTIVATIONS[key])
    return INSTEAD.get(key, f"one of {', '.join(OPS)}, max_pool2d; rewrite that part of the model with them")
