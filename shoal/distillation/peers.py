"""Several networks in one module, apart or with shared first stages, whose forward gives all their logits.

ONE (Lan et al., NeurIPS'18) and feature fusion learning (Kim et al., ICPR'20) train branches that part before the last
stage, with a gate or a fusion of features on top. Here any network that has stages is branched by surgery, and
`keep_exit(model, 0)` cuts it back to the plain one, whose names never changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from shoal.errors import ShoalError
from shoal.outputs import forward
from shoal.surgery.normal_form import module_calls
from shoal.surgery.sites import ReluSite, sites_in
from shoal.surgery.tracing import shapes

PREFIX = "branches."


class Peers(nn.Module):
    """Networks side by side; the forward gives all logits [N, classes] of each for images [N, C, H, W]."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        check_count(len(networks))
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Logits of every network."""
        return tuple(z for network in self.networks for z in forward(network, x).logits)


def check_count(count: int) -> None:
    """Raise ShoalError for fewer than two networks or branches."""
    if count < 2:
        raise ShoalError(f"found {count} networks to teach each other; need 2 or more; take more branches")


class Gate(nn.Module):
    """The sum of the branches' logits by weights from the shared features (ONE).

    Global average pool, linear layer, batch norm, ReLU, softmax over the branches.
    """

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, count)
        self.bn = nn.BatchNorm1d(count)

    def forward(self, features: Tensor, *logits: Tensor) -> Tensor:
        """Logits [N, classes] from shared features [N, C, H, W] and the logits of every branch."""
        weights = self.bn(self.fc(features.mean((2, 3)))).relu().softmax(1)
        return (weights[:, :, None] * torch.stack(logits, 1)).sum(1)


class Fusion(nn.Module):
    """A classifier of all branches' last maps together (FFL): 3x3 depthwise, 1x1, batch norm, ReLU.

    Trains with a weight decay of its own, the authors' 1e-5.
    """

    own_weight_decay = 1e-5

    def __init__(self, channels: int, count: int, classes: int) -> None:
        super().__init__()
        together = channels * count
        self.depthwise = nn.Conv2d(together, together, 3, padding=1, groups=together, bias=False)
        self.pointwise = nn.Conv2d(together, channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, classes)

    def forward(self, *maps: Tensor) -> Tensor:
        """Logits [N, classes] from a map [N, C, H, W] of each branch."""
        fused = self.bn(self.pointwise(self.depthwise(torch.cat(maps, 1)))).relu()
        return self.fc(fused.mean((2, 3)))


def gated(networks: Sequence[nn.Module], shape: tuple[int, ...]) -> fx.GraphModule:
    """Branches and their gated ensemble, which is the last classifier (ONE).

    `networks` are of one kind, for images of `shape` [C, H, W]: the first gives the shared stages and its own last
    one, each other its last stage. Raises ShoalError for fewer than two, and for one without two stages of maps.
    """
    cut = _Branched(networks, shape)
    shared = cut.nodes[0][cut.fork]
    gate = Gate(shared.meta["shape"][0], len(networks))
    return cut.finish("gate", gate, (shared, *cut.logits))


def fused(networks: Sequence[nn.Module], shape: tuple[int, ...]) -> fx.GraphModule:
    """Branches and the classifier of their fused features, which is the last (FFL); as `gated` otherwise."""
    cut = _Branched(networks, shape)
    maps = tuple(nodes[cut.last] for nodes in cut.nodes)
    classes = cut.logits[0].meta["shape"][0]
    return cut.finish("fusion", Fusion(maps[0].meta["shape"][0], len(networks), classes), maps)


@dataclass(frozen=True)
class Fork:
    """Where branches part, after the site `shared`, and the last site with maps, `last`."""

    shared: str
    last: str


def fork_of(found: Sequence[ReluSite]) -> Fork:
    """The last ReLU site before the last stage that has maps, and the last site of that stage, among all `found`.

    Raises ShoalError for a network with one such stage.
    """
    sites = [site for site in found if len(site.shape) == 3]
    before = [site for site in sites if site.stage < _last_stage(sites)]
    if not before:
        raise ShoalError("found a network with one stage of maps; need two or more, all but the last to be shared")
    return Fork(before[-1].name, sites[-1].name)


def _last_stage(sites: Sequence[ReluSite]) -> int:
    return sites[-1].stage if sites else 0


class _Branched:
    """The first network's graph with the last stages of all others beside its own.

    `nodes` gives, a branch, the nodes that stand for the first one's submodules, by name.
    """

    def __init__(self, networks: Sequence[nn.Module], shape: tuple[int, ...]) -> None:
        check_count(len(networks))
        first, *others = (shapes(network, shape) for network in networks)
        first.train(networks[0].training)
        where = fork_of(sites_in(first))
        self.fork, self.last, self.traced = where.shared, where.last, first
        self.output = next(node for node in first.graph.nodes if node.op == "output")
        self.logits = [_one_result(self.output)]
        calls = module_calls(first)
        self.nodes = [calls]
        after = _reached(calls[self.fork])
        for index, other in enumerate(others, start=1):
            copies = self._copy(after, other, f"{PREFIX}{index}.")
            self.logits.append(copies[self.logits[0]])
            self.nodes.append({name: copies.get(node, node) for name, node in calls.items()})

    def _copy(self, after: Sequence[fx.Node], other: fx.GraphModule, prefix: str) -> dict[fx.Node, fx.Node]:
        copies: dict[fx.Node, fx.Node] = {}
        with self.traced.graph.inserting_before(self.output):
            for node in after:
                copies[node] = self.traced.graph.node_copy(node, lambda n: copies.get(n, n))
                if node.op == "call_module":
                    copies[node].target = f"{prefix}{node.target}"
                    module = _like(self.traced, other, str(node.target))
                    self.traced.add_submodule(f"{prefix}{node.target}", module.train(self.traced.training))
        return copies

    def finish(self, name: str, joint: nn.Module, inputs: tuple[fx.Node, ...]) -> fx.GraphModule:
        """The network with the branches' logits and, from `inputs`, those of `joint`."""
        device = next((p.device for p in self.traced.parameters()), torch.device("cpu"))
        self.traced.add_submodule(name, joint.to(device).train(self.traced.training))
        with self.traced.graph.inserting_before(self.output):
            last = self.traced.graph.call_module(name, inputs)
        self.output.args = ((*self.logits, last),)
        self.traced.graph.lint()
        self.traced.recompile()
        return self.traced


def _one_result(output: fx.Node) -> fx.Node:
    if not isinstance(output.args[0], fx.Node):
        raise ShoalError("found a network of several classifiers to branch; need one; keep one exit first")
    return output.args[0]


def _reached(start: fx.Node) -> list[fx.Node]:
    """All nodes that depend on `start` but the output, in order."""
    found = {start}
    for node in start.graph.nodes:
        if node.op != "output" and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return [node for node in start.graph.nodes if node in found and node is not start]


def _like(first: fx.GraphModule, other: fx.GraphModule, name: str) -> nn.Module:
    """The other network's submodule. Raises ShoalError when it is of another shape."""
    sizes = [{k: v.shape for k, v in traced.get_submodule(name).state_dict().items()}
             for traced in (first, other) if name in dict(traced.named_modules())]  # fmt: skip
    if len(sizes) < 2 or sizes[0] != sizes[1]:
        raise ShoalError(f"found branches that differ at {name!r}; need networks of one kind; build them alike")
    return other.get_submodule(name)
