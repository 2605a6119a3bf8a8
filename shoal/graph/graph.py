"""`Graph`: the deployed form of a network, as nodes and weights, stored as JSON and safetensors (never pickled).

`fold`, `cost`, `compile` and every executor work on this structure.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from shoal.errors import ShoalError, first_line
from shoal.graph.ops import OPS, Node, evaluate
from shoal.storage.files import read_json
from shoal.storage.tensors import load_weights

FORMAT = "shoal-graph-1"
Lowered = tuple[str, dict[str, Any], dict[str, Tensor]]
"""The operation that a module or call becomes in a Graph: its name, attributes and weights."""
Chain = tuple[Lowered, ...]
"""Several operations, each of which reads the result of the previous one."""


def unknown(what: object) -> Lowered:
    """An operation that a Graph does not have: `cost` reports it as unknown, executors reject it by the name `what`."""
    return "unknown", {"target": str(what)}, {}


@dataclass(frozen=True)
class Graph:
    """A network as a list of nodes in execution order.

    `weights` maps ``"<node>.<parameter>"`` to a tensor. `outputs` names the nodes of the classifiers' logits, from the
    weakest classifier to the strongest.
    """

    nodes: tuple[Node, ...]
    weights: dict[str, Tensor]
    outputs: tuple[str, ...]

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def __getitem__(self, name: str) -> Node:
        for node in self.nodes:
            if node.name == name:
                return node
        raise ShoalError(f"found no node {name!r} in the graph; need one of its {len(self.nodes)} names")

    @property
    def input(self) -> Node:
        """The node of the input image."""
        return self.nodes[0]

    def parameters(self, node: Node | str) -> dict[str, Tensor]:
        """The weights of one node, by parameter name."""
        name = node if isinstance(node, str) else node.name
        # A parameter's own name has no dot, so the last dot separates it from the node's path.
        return {k.rpartition(".")[2]: w for k, w in self.weights.items() if k.rpartition(".")[0] == name}

    def users(self) -> dict[str, list[Node]]:
        """For each node name, the nodes that read it."""
        table: dict[str, list[Node]] = {node.name: [] for node in self.nodes}
        for node in self.nodes:
            for source in node.inputs:
                table[source].append(node)
        return table

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Logits [N, classes] of every exit, weakest first, for images `x` [N, *input.shape].

        Raises ShoalError when the images' shape is not the one that the graph was traced with, and when the graph has
        an unknown operation.
        """
        values = self.values(x)
        return tuple(values[name] for name in self.outputs)

    def values(self, x: Tensor, keep: bool = False) -> dict[str, Tensor]:
        """Values by node name for images `x` [N, *input.shape]: of all nodes if `keep`, else only of those not freed.

        Without `keep` a value is freed after its last reader; the outputs' values stay. Raises ShoalError as a call
        of the graph does.
        """
        if tuple(x.shape[1:]) != self.input.shape:
            raise ShoalError(
                f"found images of shape {tuple(x.shape[1:])}; need {self.input.shape}, the shape that this "
                "network was traced and masked for; resize the images or trace again"
            )
        values = {self.input.name: x}
        last = self._last_use()
        for i, node in enumerate(self.nodes[1:], start=1):
            values[node.name] = evaluate(node, self.parameters(node), [values[n] for n in node.inputs])
            if not keep:
                for name in node.inputs:
                    if last.get(name) == i:
                        values.pop(name, None)
        return values

    def _last_use(self) -> dict[str, int]:
        last = {name: i for i, node in enumerate(self.nodes) for name in node.inputs}
        return {name: i for name, i in last.items() if name not in self.outputs}

    def with_nodes(self, nodes: list[Node], weights: Mapping[str, Tensor]) -> Graph:
        """A graph of `nodes` with the same outputs; of `weights`, those of other nodes are dropped."""
        names = {node.name for node in nodes}
        kept = {k: w for k, w in weights.items() if k.rpartition(".")[0] in names}
        return replace(self, nodes=tuple(nodes), weights=kept)

    def dumps(self) -> str:
        """The public structure as JSON text. It has no weights and no masks, which are stored as weights."""
        body = {"format": FORMAT, "outputs": self.outputs, "nodes": [asdict(node) for node in self.nodes]}
        return json.dumps(body | {"shared": self._shared()}, indent=1)

    def _shared(self) -> dict[str, str]:
        """Maps each key whose tensor an earlier key has too to that earlier key; from layers that are called twice."""
        first: dict[int, str] = {}
        return {k: name for k, w in self.weights.items() if (name := first.setdefault(id(w), k)) != k}

    def save(self, folder: Path | str) -> None:
        """Write `graph.json` and `graph.safetensors` into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "graph.json").write_text(self.dumps())
        own = {k: w.detach().cpu().contiguous() for k, w in self.weights.items() if k not in self._shared()}
        save_file(own, folder / "graph.safetensors")

    @classmethod
    def load(cls, folder: Path | str) -> Graph:
        """Read what `save` wrote. Raises ShoalError, naming the file, when it is damaged or not a valid graph."""
        path = Path(folder) / "graph.json"
        nodes, outputs, shared = _parse(path)
        weights = load_weights(Path(folder) / "graph.safetensors")
        absent = sorted(set(shared.values()) - set(weights))
        if absent:
            raise ShoalError(f"found no weights {absent[:3]} beside {path}; need a matching pair; make them again")
        graph = cls(nodes, weights | {k: weights[name] for k, name in shared.items()}, outputs)
        stray = {k.rpartition(".")[0] for k in graph.weights} - {node.name for node in nodes}
        if stray:
            raise ShoalError(f"found weights of unknown nodes {sorted(stray)[:3]} beside {path}; need a matching pair")
        for node in nodes[1:]:
            _check_node(graph, node, path)
        return graph


def _parse(path: Path) -> tuple[tuple[Node, ...], tuple[str, ...], dict[str, str]]:
    """Nodes, outputs and shared weights of a `graph.json`, after checks of types, node order and names."""
    body = read_json(path)
    found = body.get("format") if isinstance(body, dict) else None
    if found != FORMAT:
        raise ShoalError(f"found format {found!r} at {path}; need {FORMAT!r}; trace the model again")
    try:
        nodes = tuple(_parse_node(n) for n in _typed(body["nodes"], list))
        outputs = tuple(_typed(name, str) for name in _typed(body["outputs"], list))
        shared = {k: _typed(name, str) for k, name in _typed(body.get("shared", {}), dict).items()}
    except (KeyError, TypeError) as error:
        raise ShoalError(f"found a graph with {error!r} at {path}; need an intact file; make it again") from error
    check_order(nodes, outputs, str(path))
    return nodes, outputs, shared


def _parse_node(n: Any) -> Node:
    inputs = tuple(_typed(name, str) for name in _typed(_typed(n, dict)["inputs"], list))
    shape = tuple(_typed(size, int) for size in _typed(n["shape"], list))
    if _typed(n["op"], str) not in (*OPS, "input", "unknown"):
        raise TypeError(f"operation {n['op']!r:.60}, which this version does not know")
    return Node(_typed(n["name"], str), n["op"], inputs, shape, _typed(n["attrs"], dict))


def _typed(value: Any, wanted: type) -> Any:
    if type(value) is not wanted:  # not isinstance, since a bool is an instance of int
        raise TypeError(f"{value!r:.60} where a {wanted.__name__} belongs")
    return value


def _meta(name: str, weight: Tensor) -> Tensor:
    if weight.dtype != torch.bool if name == "mask" else not weight.is_floating_point():
        raise TypeError(f"{name} is of type {weight.dtype}")
    return weight.to("meta")


def _check_pairs(attrs: dict[str, Any]) -> None:
    # PyTorch also accepts other forms, such as one number for both directions; other readers of a Graph do not.
    for name, least in (("stride", 1), ("kernel", 1), ("dilation", 1), ("padding", 0)):
        pair = _typed(attrs.get(name, [1, 1]), list)
        if len(pair) != 2 or any(_typed(v, int) < least for v in pair):
            raise ValueError(f"{name} {pair!r:.60}, not two counts")


def _check_node(graph: Graph, node: Node, path: Path) -> None:
    """Raise ShoalError unless the node's attributes and weights give the shape that it states.

    Uses meta tensors, so nothing is computed.
    """
    if node.op not in OPS:
        return
    try:
        _check_pairs(node.attrs)
        parameters = {k: _meta(k, w) for k, w in graph.parameters(node).items()}
        dtype = next((w.dtype for w in parameters.values() if w.is_floating_point()), torch.float32)
        inputs = [torch.empty(1, *graph[name].shape, dtype=dtype, device="meta") for name in node.inputs]
        shape = tuple(evaluate(node, parameters, inputs).shape[1:])
    except (KeyError, TypeError, ValueError, IndexError, ArithmeticError, AttributeError, RuntimeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else first_line(error)
        raise ShoalError(
            f"found a {node.op} that cannot be computed ({reason:.200}) at {node.name} in {path}; need an intact "
            "graph.json and graph.safetensors of one graph; make them again"
        ) from error
    if shape != node.shape:
        raise ShoalError(f"found shape {node.shape} at {node.name} in {path}; need {shape}; make the graph again")


def live(graph: Graph) -> set[str]:
    """Names of the outputs and of all nodes that they depend on."""
    names = set(graph.outputs)
    for node in reversed(graph.nodes):
        if node.name in names:
            names |= set(node.inputs)
    return names


def check_order(nodes: tuple[Node, ...], outputs: tuple[str, ...], where: str) -> None:
    """Raise ShoalError unless every node reads only earlier nodes, names are unique and the outputs are nodes.

    `where` is the path that the error names.
    """
    seen: set[str] = set()
    for node in nodes:
        missing = [name for name in node.inputs if name not in seen]
        if missing or node.name in seen or (not seen and node.op != "input"):
            raise ShoalError(f"found node {node.name!r} out of order at {where}; need inputs first; make it again")
        seen.add(node.name)
    if not outputs or not set(outputs) <= seen:
        raise ShoalError(f"found outputs {outputs} at {where}; need names of its nodes; make it again")
