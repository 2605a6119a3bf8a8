"""Conversion of a module to a `Graph`, and a check that it preserved what the module computes."""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import Tensor, fx, nn

from shoal.errors import ShoalError, first_line
from shoal.graph.counting import Cost, cost
from shoal.graph.graph import Chain, Graph, Lowered, live
from shoal.graph.ops import OPS, Node, evaluate
from shoal.surgery.constants import settle_constants
from shoal.surgery.explanation import line_of, no_such_images
from shoal.surgery.idioms import join_idioms, rename_options
from shoal.surgery.lowering import lower
from shoal.surgery.normal_form import normalise
from shoal.surgery.preparation import failure, output_to_stderr, plain_copy
from shoal.surgery.results import check_classifiers, results_of
from shoal.surgery.sizes import Shapes, fix_sizes, is_tensor, operands


def count(model: nn.Module, shape: tuple[int, ...]) -> Cost:
    """The `Cost` of `model` for one image of `shape` ([C, H, W]). Raises ShoalError when `trace` does.

    `check_trace` also compares the graph with the model.
    """
    return cost(trace(model, shape))


def shapes(model: nn.Module, shape: tuple[int, ...]) -> fx.GraphModule:
    """A normalised copy of `model` in eval mode, with every node's shape, without the batch, in ``meta["shape"]``.

    `shape` is the images' [C, H, W]. Raises ShoalError for a model that cannot be traced or that fails on such images.
    """
    traced = normalise(model, shape).eval()
    device = next((p.device for p in traced.parameters()), torch.device("cpu"))
    image, run = torch.zeros(1, *shape, device=device), Shapes(traced)
    try:
        with torch.no_grad(), output_to_stderr():
            run.run(image)
    except Exception as error:
        raise _failed(model, image, run, error) from error
    return traced


def _failed(model: nn.Module, image: Tensor, run: Shapes, error: Exception) -> ShoalError:
    if failure(model, image) is not None:
        return no_such_images(tuple(image.shape[1:]), error)
    where = line_of(run.current) if run.current is not None else type(model).__name__
    return ShoalError(
        f"found a call that computes something else on traced values at {where}: {first_line(error)}; need operations "
        "of torch on tensors (NumPy and others are not traced); write that line with them"
    )


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
    rename_options(traced)
    known = fix_sizes(traced)
    settle_constants(traced)
    join_idioms(traced, known)
    making = _Making()
    for node in traced.graph.nodes:
        if node.op == "output":
            return Graph(tuple(making.nodes), making.weights, _output_names(traced.graph, making.names))
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


def _output_names(graph: fx.Graph, names: dict[fx.Node, str]) -> tuple[str, ...]:
    results = results_of(graph)
    missing = [r for r in results if r not in names]
    if missing:
        raise ShoalError(f"found a size returned at {missing[0]}; need logits; return only tensors")
    return tuple(names[r] for r in results)


IMAGES = 3
"""Number of random images on which a network and its graph are compared."""


def check_trace(model: nn.Module, shape: tuple[int, ...]) -> Graph:
    """The `Graph` of `model` for images of `shape` ([C, H, W]), after checks that it computes what `model` computes.

    All commands use this function, so they accept the same networks. The traced module and the graph are compared with
    the module on random images in eval mode, with tolerances of 1e-3 relative and 1e-4 absolute; a graph with
    operations that it cannot run is not run. Raises ShoalError when `model` cannot be traced, fails on such images,
    computes something else once traced, or returns anything other than the logits of classifiers (`check_classifiers`).
    """
    traced, own = shapes(model, shape), plain_copy(model).eval()
    graph, name = graph_of(traced), type(model).__name__
    check_classifiers(traced, name)
    reads: list[nn.Module | Graph] = [traced, *([graph] if _can_run(graph) else [])]
    device = next((p.device for p in own.parameters()), torch.device("cpu"))
    images = torch.randn(IMAGES, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), output_to_stderr():
        truth = _results(own, images)
        if not _close(truth, _results(own, images)):
            raise ShoalError(
                f"found that {name} gives two results for the same images; need one, in eval mode; use nn.Dropout or "
                "F.dropout(x, p, self.training), and no random numbers or counters in forward"
            )
        if not all(_close(truth, _results(read, images)) or _close_in_double(own, read, images) for read in reads):
            raise ShoalError(
                f"found that {name} computes something else once traced; need a forward pass without "
                "hidden state; look for values that are changed in place (+=) and read again under another name, "
                "and for code that asks for the type of a value"
            )
    return graph


def check_same(model: nn.Module, graph: Graph, images: Tensor) -> None:
    """Raise ShoalError unless `graph` gives the logits of `model` for `images` [N, C, H, W], with the same tolerances.

    `graph` may be folded. The images are real ones; `check_trace` compares on random images only.
    """
    own = plain_copy(model).eval()
    with torch.no_grad(), output_to_stderr():
        same = _close(_results(own, images), _results(graph, images)) or _close_in_double(own, graph, images)
    if not same:
        raise ShoalError(
            f"found that the deployed graph of {type(model).__name__} gives other logits than the module on "
            f"{len(images)} images of the data set; need the same function; look for hooks, and for code in forward "
            "that depends on values"
        )


def _can_run(graph: Graph) -> bool:
    names = live(graph)
    return all(node.op in OPS or node.op == "input" for node in graph if node.name in names)


def _results(network: nn.Module | Graph, images: Tensor) -> list[Tensor]:
    found = network(images.clone())  # a clone, since a network may change its input in place
    return list(found) if isinstance(found, (tuple, list)) else [found]


def _close(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.shape == y.shape and torch.allclose(x, y, rtol=1e-3, atol=1e-4, equal_nan=True)
        for x, y in zip(a, b, strict=True)
    )


def _close_in_double(own: nn.Module, read: nn.Module | Graph, images: Tensor) -> bool:
    """The comparison in float64, where large values in the network leave no rounding errors to mistake for others."""
    exact: nn.Module | Graph
    if isinstance(read, Graph):
        weights = {k: w.double() if w.is_floating_point() else w for k, w in read.weights.items()}
        exact = dataclasses.replace(read, weights=weights)
    else:
        exact = copy.deepcopy(read).double()
    try:
        return _close(_results(copy.deepcopy(own).double(), images.double()), _results(exact, images.double()))
    except (RuntimeError, ShoalError):
        return False  # a network that states float32 itself
