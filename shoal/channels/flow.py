"""Follow through a traced graph which channels of every value stay when layers keep only some of their outputs.

Whatever reads a cut output must drop the same inputs. Operands of sums and products must be cut alike, a concatenation
shifts indices, and flattening turns a channel's index into one index per pixel.
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
"""Indices of the channels that stay, in rising order."""

ROOTS = (nn.Conv2d, nn.Linear)
"""Layers whose outputs can be cut by name."""

FOLLOWERS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.PReLU, MaskedReLU, QuadraticReLU)
"""Layers with values per channel, which keep the channels that they receive."""

CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)


class CoupledError(ShoalError):
    """An operation cannot follow the channels cut before it. `layers` are those that would have to stay uncut."""

    def __init__(self, text: str, layers: Iterable[str]) -> None:
        super().__init__(text)
        self.layers = frozenset(layers)


@dataclass
class Flow:
    """Indices of the channels that stay (None: all) in each node's value, and in each layer's inputs and outputs."""

    values: dict[fx.Node, Indices | None] = field(default_factory=dict)
    inputs: dict[str, Indices | None] = field(default_factory=dict)
    outputs: dict[str, Indices | None] = field(default_factory=dict)


def follow(traced: fx.GraphModule, kept: Mapping[str, Indices]) -> Flow:
    """The flow in `traced`, whose nodes carry shapes (`surgery.shapes`), when the layers keep the outputs `kept`.

    Raises CoupledError, naming the node, where an operation depends on the position of channels, or combines channels
    that are cut differently.
    """
    following = _Following(traced, kept)
    for node in traced.graph.nodes:
        following.flow.values[node] = following.after(node)
    return following.flow


def is_depthwise(layer: nn.Module) -> bool:
    """Whether `layer` convolves each channel separately, and so keeps the channels that it receives."""
    return isinstance(layer, nn.Conv2d) and layer.in_channels == layer.groups == layer.out_channels > 1


def layers_before(traced: fx.GraphModule, nodes: Sequence[fx.Node]) -> set[str]:
    """Names of the layers in `ROOTS` whose outputs reach `nodes` without another such layer in between."""
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
    """Names of the layers that compute the logits."""
    return layers_before(traced, next(n for n in traced.graph.nodes if n.op == "output").all_input_nodes)


class _Following:
    """Computes a flow, node by node."""

    def __init__(self, traced: fx.GraphModule, kept: Mapping[str, Indices]) -> None:
        self.traced, self.kept, self.flow = traced, kept, Flow()

    def after(self, node: fx.Node) -> Indices | None:
        """The channels of the node's value that stay."""
        if node.op == "call_module":
            return self._module(node, self.traced.get_submodule(str(node.target)))
        cut = [n for n in operands(node) if self.flow.values[n] is not None]
        if not cut or not (is_tensor(node) or node.op == "output"):  # sizes of cut values are not channels
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
        """The channels after an operation that keeps channels separate, or flattens them."""
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
        """Whether an operand is cut in the same way, has one value for all channels, or is not a tensor."""
        if operand.op == "get_attr":
            return attrgetter(str(operand.target))(self.traced).numel() == 1
        if not is_tensor(operand) or operand.meta["shape"][:1] in ((), (1,)):
            return self.flow.values[operand] in (None, kept)
        return operand.meta["shape"][0] == channels and self.flow.values[operand] == kept

    def _joined(self, node: fx.Node) -> Indices:
        """The channels after a concatenation along channels."""
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
