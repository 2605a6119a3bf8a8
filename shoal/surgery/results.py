"""What a forward pass returns: the logits of one classifier or of several, and the choice of one output."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from shoal.errors import ShoalError

WEIGHTED = (F.linear, F.conv2d, torch.matmul, torch.mm, torch.addmm, torch.einsum, "matmul", "mm", "addmm")
"""Functions and methods that multiply by a matrix of weights."""


def results_of(graph: fx.Graph) -> tuple[Any, ...]:
    """The values that `graph` returns, as a tuple also when there is one."""
    result = output_of(graph).args[0]
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def output_of(graph: fx.Graph) -> fx.Node:
    """The node that returns the results of `graph`."""
    return next(node for node in graph.nodes if node.op == "output")


def choose(graph: fx.Graph, index: int, name: str) -> None:
    """Make `graph`, traced from a network called `name`, return only its output `index` (from 0), in place.

    Other outputs may be anything. Raises ShoalError when there is no such output.
    """
    output = output_of(graph)
    results = results_of(graph)
    if isinstance(output.args[0], dict) or not 0 <= index < len(results):
        found = "a dict" if isinstance(output.args[0], dict) else f"{len(results)} output{'s'[: len(results) - 1]}"
        raise ShoalError(
            f"found {found} of forward at {name} and output {index}; need the number of one of the outputs of a tuple, "
            "from 0; correct --output (output=), or leave it out"
        )
    output.args = (results[index],)


def check_results(graph: fx.Graph, name: str) -> None:
    """Raise ShoalError unless `graph`, traced from a network called `name`, returns nothing but tensors."""
    results = results_of(graph)
    bad = [r for r in results if not isinstance(r, fx.Node)]
    if bad or not results:
        what = "nothing" if not bad or bad[0] is None else f"a {type(bad[0]).__name__.removeprefix('immutable_')}"
        chosen = " (or choose one of a tuple by --output)" if len(results) > 1 else ""
        raise ShoalError(
            f"found that forward returns {what} at {name}; need logits, or a flat tuple of them, from weak to strong; "
            f"return only those tensors{chosen}"
        )


def check_classifiers(traced: fx.GraphModule, name: str) -> None:
    """Raise ShoalError unless every result of `traced` is the logits [N, classes] of a classifier of its own.

    `traced` has the shapes that `sizes.Shapes` records; `name` is that of the network. Two results are two classifiers
    if neither is computed from the last layer with weights of the other. So logits and the features from which they
    are computed are refused, and so are logits and their softmax.
    """
    results = results_of(traced.graph)
    shapes = [tuple(r.meta["shape"]) for r in results]
    if len(set(shapes)) > 1:
        raise ShoalError(
            f"found that forward returns results of shapes {', '.join(map(str, shapes))} at {name}; need "
            f"logits of one number of classes, from weak to strong; {_choice(results)}"
        )
    if len(shapes[0]) != 1:
        raise ShoalError(
            f"found that forward returns a result of shape {shapes[0]} for one image at {name}; need one logit for "
            "each class, [N, classes]; pool and flatten the features (x.flatten(1)), and return neither the class "
            "(argmax) nor feature maps"
        )
    _check_own_layers(traced, results, name)


def _check_own_layers(traced: fx.GraphModule, results: Sequence[fx.Node], name: str) -> None:
    ends = [{result, *_last_layers(traced, result)} for result in results]
    reads = [sources(result) for result in results]
    for one, other in permutations(range(len(results)), 2):
        if ends[one] & reads[other]:
            raise ShoalError(
                f"found that output {other} is computed from the last layer of output {one} at {name}; "
                "need one output, or classifiers that each end in a layer of their own; " + _choice(results)
            )


def sources(node: fx.Node) -> set[fx.Node]:
    """`node` and all nodes that it is computed from."""
    found, waiting = set[fx.Node](), [node]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _last_layers(traced: fx.GraphModule, result: fx.Node) -> set[fx.Node]:
    """The layers with weights from which `result` is computed without a further such layer."""
    found, seen, waiting = set[fx.Node](), set[fx.Node](), [result]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if _has_weights(traced, node):
            found.add(node)
        else:
            waiting += node.all_input_nodes
    return found


def _has_weights(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether `node` is a convolution or linear layer, or another that has a matrix; norms and activations are not."""
    if node.op == "call_module":
        layer = traced.get_submodule(str(node.target))
        norm = isinstance(layer, (nn.LayerNorm, nn.GroupNorm))
        return not norm and any(p.dim() in (2, 4) for p in layer.parameters())
    return node.op in ("call_function", "call_method") and node.target in WEIGHTED


def _choice(results: Sequence[fx.Node]) -> str:
    """What to do when forward also returns something other than logits."""
    names = [node.target if node.op == "call_module" else node.name for node in results]
    listed = ", ".join(f"{i} ({name})" for i, name in enumerate(names))
    return (
        f"choose the one with the logits by --output (output= of adopt and Spec in Python), out of {listed}; or return "
        "only the logits"
    )
