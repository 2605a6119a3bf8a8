"""A network with exits split into stages: stage i continues from the tensors of stage i - 1 and computes exit i."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from shoal.channels.slimmable import Slimmable, narrowed
from shoal.errors import ShoalError
from shoal.exits.classifiers import keep_exit
from shoal.exits.figures import exit_costs
from shoal.surgery.results import results_of
from shoal.surgery.sizes import fix_sizes, is_tensor, operands
from shoal.surgery.tracing import graph_of, shapes


class Cascade(nn.Module):
    """The stages of a network with K exits, in eval mode. Each stage returns ``(logits, *carried)``.

    Stage 0 takes images; each later stage takes what the stage before carried, in the same order. `macs` [K] are the
    multiply-adds (convolutions and linear layers) of an image that leaves at exit i, including all earlier exits;
    `alone` [K] are those of each exit without the earlier ones. `uncounted` names operations whose multiply-adds cannot
    be counted; both leave them out.
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
        """Multiply-adds of the strongest classifier alone, for one image."""
        return self.alone[-1]

    def __len__(self) -> int:
        return len(self.stages)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Logits [N, classes] of every exit, weakest first, for images [N, C, H, W]. No image leaves early."""
        carried: tuple[Tensor, ...] = (x,)
        logits = []
        for stage in self.stages:
            z, *rest = stage(*carried)
            logits.append(z)
            carried = tuple(rest)
        return tuple(logits)

    def compile_stages(self, backend: str = "inductor") -> None:
        """Compile each stage with torch.compile, in place.

        Shapes are dynamic, because batches shrink when images leave.
        """
        for stage in self.stages:
            stage.compile(backend=backend, dynamic=True)


def cascade(model: nn.Module, shape: tuple[int, ...]) -> Cascade:
    """Split `model` into stages for images of `shape` [C, H, W]; weights are copied.

    Each width of a slimmable network is an exit too, computed from the image. Raises ShoalError for a network with one
    classifier, and for one that mixes the images of a batch, so that they cannot leave one by one.
    """
    model = with_own_layers(model, shape)
    traced = shapes(model, shape)
    costs = exit_costs(graph_of(traced))
    fix_sizes(traced)
    traced.graph.eliminate_dead_code()
    results = results_of(traced.graph)
    if len(results) < 2:
        raise ShoalError("found a network with one classifier; need two or more to leave early; add exits")
    made = Cascade(_cut(traced, results), costs.macs_in_order, costs.macs, costs.in_order[-1].unknown)
    _check_images_apart(made, shape)
    return made


def with_own_layers(model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """`model` itself; a slimmable network becomes one in which every width has its own layers."""
    if not isinstance(model, Slimmable):
        return model
    return _SideBySide([narrowed(model, i, shape) for i in range(len(model.widths))])


def strongest(model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """The last classifier of `model` alone, in eval mode: the baseline that early exits are compared with."""
    if isinstance(model, Slimmable):
        return narrowed(model, len(model.widths) - 1, shape).eval()
    return keep_exit(model, -1).eval()


class _SideBySide(nn.Module):
    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(network(x) for network in self.networks)


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
    """The stage of every node that depends on the images: the first stage whose exit needs it.

    Sizes and constants have no stage; each stage computes them where it needs them.
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
    for node in traced.graph.nodes:  # the items of a tuple belong to the stage that makes the tuple
        if node in place and "parts" in node.meta:
            place |= {user: place[node] for user in node.users if user in place and user.target is operator.getitem}
    return {n: i for n, i in place.items() if is_tensor(n)}


def _crossing(traced: fx.GraphModule, place: dict[fx.Node, int], stage: int) -> list[fx.Node]:
    """The nodes of `stage` and earlier ones that later stages read."""
    return [n for n, i in _ordered(traced, place) if i <= stage and any(p > stage for p in _readers(n, place))]


def _ordered(traced: fx.GraphModule, place: dict[fx.Node, int]) -> list[tuple[fx.Node, int]]:
    return [(n, place[n]) for n in traced.graph.nodes if n in place]


def _readers(node: fx.Node, place: dict[fx.Node, int]) -> set[int]:
    """The stages that read `node`, directly or through its sizes."""
    found: set[int] = set()
    for user in node.users:
        found |= {place[user]} if user in place else _readers(user, place)
    return found


class _Part:
    """The graph of one stage while its nodes are copied into it."""

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
        """The finished stage, which returns `results`."""
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
            f"found at {node} a value without one row per image; need only tensors with one row per image where an "
            "exit splits the network; place the exit elsewhere"
        )


@torch.no_grad()
def _check_images_apart(made: Cascade, shape: tuple[int, ...]) -> None:
    """Raise ShoalError unless each result has one row per image that does not depend on the other images."""
    device = next((p.device for p in made.parameters()), torch.device("cpu"))
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    both: tuple[Tensor, ...] = (images,)
    one: tuple[Tensor, ...] = (images[:1],)
    for i, stage in enumerate(made.stages):
        both, one = stage(*both), stage(*one)
        pairs = list(zip(both, one, strict=True))
        if any(len(b) != 2 or (b[:1] - a).abs().max() > 1e-3 * (1 + a.abs().max()) for b, a in pairs):
            raise ShoalError(
                f"found that stage {i} mixes the images of a batch; need one row per image, computed from that image "
                "alone; rewrite that layer"
            )
        both, one = both[1:], one[1:]
