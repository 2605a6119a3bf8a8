"""A multi-exit network cut at its exits: stage i goes on from the tensors that stage i - 1 left, as far as exit i."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from shoal.channels.slimmable import Slimmable, narrowed
from shoal.errors import ShoalError
from shoal.exits.classifiers import keep_exit
from shoal.exits.figures import exit_costs
from shoal.surgery.sizes import fix_sizes, is_tensor, operands
from shoal.surgery.tracing import graph_of, shapes


class Cascade(nn.Module):
    """The stages of a network with K exits, in eval mode; stage i gives ``(logits, *carried)``.

    Stage 0 reads images, every other one what the stage before carried, in order. `macs` [K] are the multiply-adds
    for one image that leaves at exit i, those of all earlier exits and of linear layers among them; `alone` [K] those
    of each exit without the earlier ones. `uncounted` names operations without a formula, which these leave out.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        macs: tuple[int, ...],
        alone: tuple[int, ...],
        uncounted: tuple[str, ...],
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.macs, self.alone, self.uncounted = macs, alone, uncounted
        self.eval()

    @property
    def full_macs(self) -> int:
        """Multiply-adds of the strongest classifier alone."""
        return self.alone[-1]

    def __len__(self) -> int:
        return len(self.stages)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Logits [N, classes] of every exit, weak to strong, for images [N, C, H, W]: no image leaves early."""
        carried: tuple[Tensor, ...] = (x,)
        logits = []
        for stage in self.stages:
            z, *rest = stage(*carried)
            logits.append(z)
            carried = tuple(rest)
        return tuple(logits)

    def compile_stages(self, backend: str = "inductor") -> None:
        """Let torch.compile make each stage, in place, for batches of any size: compaction makes many sizes."""
        for stage in self.stages:
            stage.compile(backend=backend, dynamic=True)


def cascade(model: nn.Module, shape: tuple[int, ...]) -> Cascade:
    """The stages of `model` for images of `shape` [C, H, W], with copies of its weights.

    The widths of a slimmable network are exits, too, each computed from the image. Raises ShoalError for a network
    with one classifier, and for one that mixes images, which cannot leave one by one.
    """
    model = with_own_layers(model, shape)
    traced = shapes(model, shape)
    costs = exit_costs(graph_of(traced))
    fix_sizes(traced)
    traced.graph.eliminate_dead_code()
    results = results_of(traced)
    if len(results) < 2:
        raise ShoalError("found a network with one classifier; need two or more to leave early; add exits")
    made = Cascade(_cut(traced, results), costs.macs_in_order, costs.macs, costs.in_order[-1].unknown)
    _check_images_apart(made, shape)
    return made


def with_own_layers(model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """`model` itself, or where it is slimmable a network in which every width has layers of its own."""
    if not isinstance(model, Slimmable):
        return model
    return _SideBySide([narrowed(model, i, shape) for i in range(len(model.widths))])


def strongest(model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """The full network, in eval mode: the last classifier of `model` alone, which dynamic inference competes with."""
    if isinstance(model, Slimmable):
        return narrowed(model, len(model.widths) - 1, shape).eval()
    return keep_exit(model, -1).eval()


class _SideBySide(nn.Module):
    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(network(x) for network in self.networks)


def results_of(traced: fx.GraphModule) -> tuple[fx.Node, ...]:
    """The nodes of every exit's logits, weak to strong."""
    result = next(n for n in traced.graph.nodes if n.op == "output").args[0]
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def _cut(traced: fx.GraphModule, results: Sequence[fx.Node]) -> list[fx.GraphModule]:
    place = _places(traced, results)
    crossing = [_crossing(traced, place, i) for i in range(len(results))]
    parts = []
    for i, logits in enumerate(results):
        part = _Part(traced, place, i)
        part.receive(crossing[i - 1] if i else [n for n in traced.graph.nodes if n.op == "placeholder"])
        left = crossing[i] if i + 1 < len(results) else []
        parts.append(part.finish([logits, *left]))
    return parts


def _places(traced: fx.GraphModule, results: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """The stage of every node that computes something of an image: the first whose exit needs it.

    Sizes and constants have none: each stage works them out where it needs them.
    """
    of_image: set[fx.Node] = set()
    for node in traced.graph.nodes:
        if node.op == "placeholder" or any(n in of_image for n in operands(node)):
            of_image.add(node)
    place: dict[fx.Node, int] = {}
    for node in reversed(list(traced.graph.nodes)):
        own = [i for i, result in enumerate(results) if result is node]
        found = [*own, *(place[user] for user in node.users if user in place)]
        if found and node in of_image:
            place[node] = 0 if node.op == "placeholder" else min(found)
    for node in traced.graph.nodes:  # the parts of a tuple belong where the tuple is made
        if node in place and "parts" in node.meta:
            place |= {user: place[node] for user in node.users if user in place and user.target is operator.getitem}
    return {n: i for n, i in place.items() if is_tensor(n)}


def _crossing(traced: fx.GraphModule, place: dict[fx.Node, int], stage: int) -> list[fx.Node]:
    """What later stages read of `stage` and those before it."""
    return [n for n, i in _ordered(traced, place) if i <= stage and any(p > stage for p in _readers(n, place))]


def _ordered(traced: fx.GraphModule, place: dict[fx.Node, int]) -> list[tuple[fx.Node, int]]:
    return [(n, place[n]) for n in traced.graph.nodes if n in place]


def _readers(node: fx.Node, place: dict[fx.Node, int]) -> set[int]:
    """Stages that read `node`, also by way of its sizes."""
    found: set[int] = set()
    for user in node.users:
        found |= {place[user]} if user in place else _readers(user, place)
    return found


class _Part:
    """The graph of one stage while its nodes are copied."""

    def __init__(self, traced: fx.GraphModule, place: dict[fx.Node, int], stage: int) -> None:
        self.traced, self.place, self.stage = traced, place, stage
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}

    def receive(self, nodes: Sequence[fx.Node]) -> None:
        """Make `nodes` the stage's inputs."""
        for i, node in enumerate(nodes):
            _check_carried(node)
            self.copies[node] = self.graph.placeholder(f"carried_{i}" if self.stage else "images")

    def finish(self, results: Sequence[fx.Node]) -> fx.GraphModule:
        """The stage, which gives `results`."""
        for node, place in _ordered(self.traced, self.place):
            if place == self.stage and node.op != "placeholder":
                self._copy(node)
        self.graph.output(tuple(self._copy(node) for node in results))
        self.graph.lint()
        return fx.GraphModule(self.traced, self.graph, f"Stage{self.stage}")

    def _copy(self, node: fx.Node) -> fx.Node:
        if node not in self.copies:
            assert self.place.get(node, self.stage) == self.stage, f"{node} is computed in another stage"
            for source in operands(node):
                self._copy(source)
            self.copies[node] = self.graph.node_copy(node, self.copies.__getitem__)
        return self.copies[node]


def _check_carried(node: fx.Node) -> None:
    if node.op != "placeholder" and ("parts" in node.meta or node.meta["batch"] != (1,)):
        raise ShoalError(
            f"found at {node} a result that is no tensor of one row an image; need such tensors alone where an exit "
            "divides the network; place the exit elsewhere"
        )


@torch.no_grad()
def _check_images_apart(made: Cascade, shape: tuple[int, ...]) -> None:
    """Raise ShoalError unless all results have one row an image, and an image's are the same beside another one."""
    device = next((p.device for p in made.parameters()), torch.device("cpu"))
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    both: tuple[Tensor, ...] = (images,)
    one: tuple[Tensor, ...] = (images[:1],)
    for i, stage in enumerate(made.stages):
        both, one = stage(*both), stage(*one)
        pairs = list(zip(both, one, strict=True))
        if any(len(b) != 2 or (b[:1] - a).abs().max() > 1e-3 * (1 + a.abs().max()) for b, a in pairs):
            raise ShoalError(
                f"found that stage {i} mixes the images of a batch; need results of one row an image, each from its "
                "image alone; rewrite that layer"
            )
        both, one = both[1:], one[1:]
