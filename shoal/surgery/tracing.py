"""Conversion of a module to a `Graph`, and a check that tracing preserved what it computes."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial

import torch
from torch import Tensor, fx, nn

from shoal.errors import ShoalError, first_line
from shoal.graph.counting import Cost, cost
from shoal.graph.graph import Chain, Graph, Lowered
from shoal.graph.ops import Node, evaluate
from shoal.surgery.idioms import join_idioms
from shoal.surgery.lowering import lower
from shoal.surgery.normal_form import normalise, results_of
from shoal.surgery.sizes import Shapes, fix_sizes, is_tensor, operands


def count(model: nn.Module, shape: tuple[int, ...]) -> Cost:
    """The `Cost` of `model` for one image of `shape` ([C, H, W]). Raises ShoalError when `trace` does."""
    return cost(trace(model, shape))


def shapes(model: nn.Module, shape: tuple[int, ...]) -> fx.GraphModule:
    """A normalised copy of `model` in eval mode, with every node's shape, without the batch, in ``meta["shape"]``.

    `shape` is the images' [C, H, W]. Raises ShoalError for a model that cannot be traced or that fails on such images.
    """
    traced = normalise(model).eval()
    device = next((p.device for p in traced.parameters()), torch.device("cpu"))
    try:
        with torch.no_grad():
            Shapes(traced).run(torch.zeros(1, *shape, device=device))
    except Exception as error:
        raise ShoalError(
            f"found that the model fails on images of shape {shape}: {first_line(error)}; need the "
            "input size and channels that it was built for"
        ) from error
    return traced


def trace(model: nn.Module, shape: tuple[int, ...]) -> Graph:
    """The `Graph` of `model` in eval mode for images of `shape` ([C, H, W]).

    Operations that a `Graph` does not have become nodes of type ``unknown``, which `cost` reports and `compile`
    rejects. Weights are copies; nodes that share a parameter share its copy. Raises ShoalError for a model that cannot
    be traced or that fails on such images.
    """
    return graph_of(shapes(model, shape))


def graph_of(normal: fx.GraphModule) -> Graph:
    """The `Graph` of a module that `shapes` returned, with copies of its current weights; `normal` is not changed."""
    traced = fx.GraphModule(normal, copy.deepcopy(normal.graph))
    join_idioms(traced, fix_sizes(traced))
    making = _Making()
    for node in traced.graph.nodes:
        if node.op == "output":
            return Graph(tuple(making.nodes), making.weights, _output_names(node, making.names))
        if is_tensor(node):  # `fix_sizes` has already written sizes into the arguments that use them
            making.add(node, lower(traced, node))
    raise ShoalError("found a traced model without an output; need one; trace it again")


class _Making:
    """A `Graph` under construction."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.weights: dict[str, Tensor] = {}
        self.names: dict[fx.Node, str] = {}
        self.taken: set[str] = set()
        self.copies: dict[Tensor, Tensor] = {}

    def add(self, node: fx.Node, chain: Chain) -> None:
        """Append the operations of `chain`, which `node` becomes; the last one gets the name of `node`."""
        inputs = tuple(self.names[n] for n in operands(node) if n in self.names)
        if [op for op, _, _ in chain] == ["identity"]:
            if inputs:
                self.names[node] = inputs[0]
            return
        # A module called twice shares its weights but is two nodes.
        name = str(node.target) if node.op == "call_module" else node.name
        name = name if name not in self.taken else node.name
        for i, lowered in enumerate(chain[:-1], start=1):
            inputs = (self._append(f"{name}.{lowered[0]}{i}", lowered, inputs, None),)
        self.names[node] = self._append(name, chain[-1], inputs, node.meta["shape"])

    def _append(self, name: str, lowered: Lowered, inputs: tuple[str, ...], shape: tuple[int, ...] | None) -> str:
        op, attrs, parameters = lowered
        made = Node(name, op, inputs, shape or (), attrs)
        if shape is None:
            before = {n.name: n.shape for n in self.nodes}
            value = evaluate(made, {}, [torch.empty(1, *before[i], device="meta") for i in inputs])
            made = dataclasses.replace(made, shape=tuple(value.shape[1:]))
        self.nodes.append(made)
        self.taken.add(name)
        self.copies |= {v: v.detach().clone() for v in parameters.values() if v not in self.copies}
        self.weights |= {f"{name}.{k}": self.copies[v] for k, v in parameters.items()}
        return name


def _output_names(node: fx.Node, names: dict[fx.Node, str]) -> tuple[str, ...]:
    missing = [r for r in results_of(node) if r not in names]
    if missing:
        raise ShoalError(f"found a size returned at {missing[0]}; need logits; return only tensors")
    return tuple(names[r] for r in results_of(node))


def check_trace(model: nn.Module, shape: tuple[int, ...]) -> None:
    """Raise ShoalError unless the traced and the original model give the same logits for one image of noise.

    `shape` is [C, H, W]. Tolerances are 1e-3 relative and 1e-4 absolute.
    """
    traced, own = shapes(model, shape), copy.deepcopy(model).eval()
    device = next((p.device for p in own.parameters()), torch.device("cpu"))
    image = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        # Copies: a network may change its input in place.
        a, b = (list(y) if isinstance(y, (tuple, list)) else [y] for y in (own(image.clone()), traced(image.clone())))
    close = partial(torch.allclose, rtol=1e-3, atol=1e-4, equal_nan=True)
    if len(a) != len(b) or not all(close(x, y) for x, y in zip(a, b, strict=True)):
        raise ShoalError(
            f"found that {type(model).__name__} computes something else once traced; need a forward pass without "
            "hidden state; look for values that are changed in place (+=) and read again under another name"
        )
