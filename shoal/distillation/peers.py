"""Several networks in one module, either separate or with shared first stages, whose forward pass returns all logits.

ONE (Lan et al., NeurIPS'18) and feature fusion learning (Kim et al., ICPR'20) train branches that split before the last
stage, with a gate or a fusion of features on top. Here graph surgery branches any network with stages.
`keep_exit(model, 0)` cuts it back to the plain network, with unchanged names.
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
    """Separate networks side by side. The forward pass returns all logits [N, classes] for images [N, C, H, W]."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        check_count(len(networks))
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The logits of every network, in order."""
        return tuple(z for network in self.networks for z in forward(network, x).logits)


def check_count(count: int) -> None:
    """Raise ShoalError for fewer than two networks or branches."""
    if count < 2:
        raise ShoalError(f"found {count} networks to teach each other; need 2 or more; take more branches")


class Gate(nn.Module):
    """The sum of the branches' logits, weighted by a function of the shared features (ONE).

    The weights come from global average pool, linear layer, batch norm, ReLU, and softmax over the branches.
    """

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, count)
        self.bn = nn.BatchNorm1d(count)

    def forward(self, features: Tensor, *logits: Tensor) -> Tensor:
        """Logits [N, classes] from shared features [N, C, H, W] and the logits [N, classes] of every branch."""
        weights = self.bn(self.fc(features.mean((2, 3)))).relu().softmax(1)
        return (weights[:, :, None] * torch.stack(logits, 1)).sum(1)


class Fusion(nn.Module):
    """A classifier on the last maps of all branches together (FFL): 3x3 depthwise, 1x1, batch norm, ReLU, linear layer.

    It has its own weight decay, the authors' 1e-5.
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
        """Logits [N, classes] from one map [N, C, H, W] per branch."""
        fused = self.bn(self.pointwise(self.depthwise(torch.cat(maps, 1)))).relu()
        return self.fc(fused.mean((2, 3)))


def gated(networks: Sequence[nn.Module], shape: tuple[int, ...]) -> fx.GraphModule:
    """Branches and their gated ensemble, which is the last classifier (ONE), for images of `shape` [C, H, W].

    `networks` have the same architecture. The first gives the shared stages and its own last stage; each other one
    gives only its last stage. Raises ShoalError for fewer than two networks, and for one without two stages of feature
    maps.
    """
    cut = _Branched(networks, shape)
    shared = cut.nodes[0][cut.fork]
    gate = Gate(shared.meta["shape"][0], len(networks))
    return cut.finish("gate", gate, (shared, *cut.logits))


def fused(networks: Sequence[nn.Module], shape: tuple[int, ...]) -> fx.GraphModule:
    """Branches and the classifier of their fused features, which is the last one (FFL). Otherwise as `gated`."""
    cut = _Branched(networks, shape)
    maps = tuple(nodes[cut.last] for nodes in cut.nodes)
    classes = cut.logits[0].meta["shape"][0]
    return cut.finish("fusion", Fusion(maps[0].meta["shape"][0], len(networks), classes), maps)


@dataclass(frozen=True)
class Fork:
    """Branches split after the site `shared`; `last` is the last site with feature maps."""

    shared: str
    last: str


def fork_of(found: Sequence[ReluSite]) -> Fork:
    """The last ReLU site before the last stage with feature maps, and the last site of that stage.

    Raises ShoalError for a network with only one such stage.
    """
    sites = [site for site in found if len(site.shape) == 3]
    before = [site for site in sites if site.stage < _last_stage(sites)]
    if not before:
        raise ShoalError("found a network with one stage of maps; need two or more, all but the last to be shared")
    return Fork(before[-1].name, sites[-1].name)


def _last_stage(sites: Sequence[ReluSite]) -> int:
    return sites[-1].stage if sites else 0


class _Branched:
    """The graph of the first network, with the last stages of all others added.

    `nodes` has an entry per branch: the nodes that correspond to the first network's submodules, by name.
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
        """The network that returns the branches' logits and those of `joint`, which reads `inputs`."""
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
    """All nodes that depend on `start`, in order, except the output."""
    found = {start}
    for node in start.graph.nodes:
        if node.op != "output" and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return [node for node in start.graph.nodes if node in found and node is not start]


def _like(first: fx.GraphModule, other: fx.GraphModule, name: str) -> nn.Module:
    """The other network's submodule. Raises ShoalError when it has different shapes."""
    sizes = [{k: v.shape for k, v in traced.get_submodule(name).state_dict().items()}
             for traced in (first, other) if name in dict(traced.named_modules())]  # fmt: skip
    if len(sizes) < 2 or sizes[0] != sizes[1]:
        raise ShoalError(
            f"found branches that differ at {name!r}; need networks of the same architecture; build them alike"
        )
    return other.get_submodule(name)
