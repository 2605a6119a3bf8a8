"""Which channels of every value stay when layers keep some of their outputs: followed along a traced graph.

A layer's kept outputs are given; what reads them has to leave out the same inputs. Sums and products need operands that
are cut alike, a concatenation shifts places, and flattening repeats a channel's place for each of its pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

import torch
from torch import fx, nn

from shoal.errors import ShoalError
from shoal.reduction.masks import MaskedReLU
from shoal.reduction.quadratic import QuadraticReLU
from shoal.surgery.sizes import arg, is_tensor, operands

Indices = tuple[int, ...]
"""Places of channels that stay, rising."""

ROOTS = (nn.Conv2d, nn.Linear)
"""Layers whose outputs can be cut by name."""

FOLLOWERS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.PReLU, MaskedReLU, QuadraticReLU)
"""Layers with values for each channel, which keep what they are given."""

CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)


class CoupledError(ShoalError):
    """An operation cannot follow the channels cut before it. `layers` names those that would have to stay whole."""

    def __init__(self, text: str, layers: Iterable[str]) -> None:
        super().__init__(text)
        self.layers = frozenset(layers)


@dataclass
class Flow:
    """Places of the channels that stay, None for all: of each node's value, and of what each layer reads and gives."""

    values: dict[fx.Node, Indices | None] = field(default_factory=dict)
    inputs: dict[str, Indices | None] = field(default_factory=dict)
    outputs: dict[str, Indices | None] = field(default_factory=dict)


def follow(traced: fx.GraphModule, kept: Mapping[str, Indices]) -> Flow:
    """The flow in `traced`, whose nodes carry shapes (`surgery.shapes`), when layers keep the outputs `kept`.

    Raises CoupledError, naming the node, for what reads channels by their place or joins ones that are cut differently.
    """
    following = _Following(traced, kept)
    for node in traced.graph.nodes:
        following.flow.values[node] = following.after(node)
    return following.flow


def is_depthwise(layer: nn.Module) -> bool:
    """Whether `layer` is a convolution of each channel by itself, which keeps the channels that it is given."""
    return isinstance(layer, nn.Conv2d) and layer.in_channels == layer.groups == layer.out_channels > 1


def layers_before(traced: fx.GraphModule, nodes: Sequence[fx.Node]) -> set[str]:
    """Names of the layers whose outputs reach `nodes` with no other such layer between."""
    found, seen, waiting = set[str](), set[fx.Node](), list(nodes)
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        layer = traced.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, ROOTS) and not is_depthwise(layer):
            found.add(str(node.target))
        else:
            waiting += node.all_input_nodes
    return found


def classifiers(traced: fx.GraphModule) -> set[str]:
    """Names of the layers that give logits."""
    return layers_before(traced, next(n for n in traced.graph.nodes if n.op == "output").all_input_nodes)


class _Following:
    """A flow while it is found, node by node."""

    def __init__(self, traced: fx.GraphModule, kept: Mapping[str, Indices]) -> None:
        self.traced, self.kept, self.flow = traced, kept, Flow()

    def after(self, node: fx.Node) -> Indices | None:
        """Channels of the node's value that stay."""
        if node.op == "call_module":
            return self._module(node, self.traced.get_submodule(str(node.target)))
        cut = [n for n in operands(node) if self.flow.values[n] is not None]
        if not cut or not (is_tensor(node) or node.op == "output"):  # a size of a cut value is no channel
            return None
        if node.op == "output":
            raise self._refusal(node, "logits cut")
        return self._joined(node) if node.target in CONCATENATIONS else self._same(node, cut)

    def _module(self, node: fx.Node, layer: nn.Module) -> Indices | None:
        name, before = str(node.target), self.flow.values[operands(node)[0]]
        if name in self.flow.inputs and self.flow.inputs[name] != before:
            raise self._refusal(node, "a layer called on channels that are cut differently")
        if isinstance(layer, nn.Linear) and before is not None and len(operands(node)[0].meta["shape"]) != 1:
            raise self._refusal(node, "a linear layer along another dimension than channels")
        if isinstance(layer, ROOTS):
            after = before if is_depthwise(layer) else self.kept.get(name)
        elif type(layer) in FOLLOWERS or before is None:
            after = before
        elif layer.state_dict():
            raise self._refusal(node, f"{type(layer).__name__} with values of its own")
        else:
            after = self._same(node, operands(node)[:1])
        self.flow.inputs[name], self.flow.outputs[name] = before, after
        return after

    def _same(self, node: fx.Node, cut: Sequence[fx.Node]) -> Indices | None:
        """Of an operation that keeps channels apart, or flattens them."""
        source, shape = cut[0], node.meta["shape"]
        kept, before = self.flow.values[source], source.meta["shape"]
        assert kept is not None
        if shape[:1] == before[:1] and all(self._fits(n, kept, shape[0]) for n in operands(node)):
            return kept
        if len(shape) == 1 and len(operands(node)) >= 1 and shape[0] == math.prod(before):
            pixels = math.prod(before[1:])
            return tuple(channel * pixels + i for channel in kept for i in range(pixels))
        raise self._refusal(node, "an operation that joins channels by their place")

    def _fits(self, operand: fx.Node, kept: Indices, channels: int) -> bool:
        """Whether an operand is cut alike, or has one value for all channels, or is no tensor."""
        if operand.op == "get_attr":
            return attrgetter(str(operand.target))(self.traced).numel() == 1
        if not is_tensor(operand) or operand.meta["shape"][:1] in ((), (1,)):
            return self.flow.values[operand] in (None, kept)
        return operand.meta["shape"][0] == channels and self.flow.values[operand] == kept

    def _joined(self, node: fx.Node) -> Indices:
        """Of a concatenation along channels."""
        parts, dim = arg(node, 0, "tensors"), arg(node, 1, "dim", 0)
        if not isinstance(parts, (list, tuple)) or dim not in (1, -len(node.meta["shape"])):
            raise self._refusal(node, "a concatenation along another dimension than channels")
        places: list[int] = []
        offset = 0
        for part in parts:
            size, kept = part.meta["shape"][0], self.flow.values[part]
            places += [offset + i for i in (range(size) if kept is None else kept)]
            offset += size
        return tuple(places)

    def _refusal(self, node: fx.Node, what: str) -> CoupledError:
        layers = layers_before(self.traced, node.all_input_nodes)
        return CoupledError(
            f"found {what} at {node.target if node.op == 'call_module' else node.name}, which reads the outputs of "
            f"{', '.join(sorted(layers)) or 'the network'}; need channels that are cut alike wherever they are read; "
            "use another network, or --method filters",
            layers,
        )
