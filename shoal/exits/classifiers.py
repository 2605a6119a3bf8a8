"""Classifiers at intermediate depths: attach them, count them, and keep just one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx, nn

from shoal.data.clouds import is_cloud
from shoal.errors import ShoalError
from shoal.surgery.normal_form import NORMAL, edit, free_name, module_calls, normalise
from shoal.surgery.results import output_of, results_of, sources
from shoal.surgery.sites import ReluSite, relu_sites
from shoal.surgery.tracing import shapes

PREFIX = "exits."


class Exit(nn.Module):
    """A classifier for private inference: 3x3 CONV-BN-ReLU with stride 2, global average pool, linear layer.

    The paper does not publish the layers of its auxiliary classifier. This one uses only operations that private
    inference supports (convolution, average pool, linear) and adds one small ReLU site.
    """

    def __init__(self, channels: int, classes: int, relu: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU() if relu else nn.Identity()
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, classes] for features [N, C, H, W]."""
        return self.fc(self.relu(self.bn(self.conv(x))).mean((2, 3)))


def default_exit_point(model: nn.Module, shape: tuple[int, ...]) -> str:
    """The last ReLU site before the final stage, for images of `shape` [C, H, W]. Raises as `exit_site` does."""
    return exit_site(relu_sites(model, shape))


def exit_site(sites: Sequence[ReluSite]) -> str:
    """The last of `sites` before the final stage: the place of shallow's auxiliary classifier (Table 2).

    Raises ShoalError for a network with a single stage.
    """
    before = [site for site in sites if site.stage < sites[-1].stage]
    if not before:
        raise ShoalError("found a network with one stage; need two or more for an auxiliary classifier; name a site")
    return before[-1].name


def check_grid(shape: Sequence[int]) -> None:
    """Raise ShoalError for point clouds: a 3x3 convolution needs neighbours on a grid, which points do not have."""
    if is_cloud(shape):
        raise ShoalError(
            f"found classifiers of 3x3 convolutions for clouds of {shape[1]} points; need ones that do not depend on "
            "the order of points; use exits of kind pooled"
        )


def add_exits(
    model: nn.Module, after: Sequence[str], classes: int, shape: tuple[int, ...], *, relu: bool = True
) -> fx.GraphModule:
    """A copy of `model` with a classifier after each named ReLU site, for images of `shape` [C, H, W].

    Its forward pass returns the logits [N, classes] of all classifiers, weakest first. Raises ShoalError when a name is
    not a ReLU site, and for point clouds.
    """
    check_grid(shape)
    return attach(model, after, shape, lambda site: Exit(site[0], classes, relu))


def attach(
    model: nn.Module, after: Sequence[str], shape: tuple[int, ...], make: Callable[[tuple[int, ...]], nn.Module]
) -> fx.GraphModule:
    """A copy of `model` with a classifier after each named submodule, for images of `shape` [C, H, W].

    `make` builds a classifier from the shape [C, H, W] of its features. The forward pass returns all logits, weakest
    first. Classifiers that the network already has keep their order; each is placed by the depth at which it branches
    off the path to the last one. Raises ShoalError when a name is not a submodule that forward calls, is given twice,
    or has no feature map.
    """
    traced = shapes(model, shape)
    traced.train(model.training)
    calls = module_calls(traced)
    _check_sites(after, calls)
    output, found = output_of(traced.graph), results_of(traced.graph)
    place = {node: i for i, node in enumerate(traced.graph.nodes)}
    results = [(_leaves(node, found[-1], place), node) for node in found]
    device = next((p.device for p in traced.parameters()), torch.device("cpu"))
    for site in after:
        name = free_name(traced, PREFIX + site.replace(".", "_"))
        traced.add_submodule(name, make(calls[site].meta["shape"]).to(device))
        with traced.graph.inserting_before(output):
            results.append((place[calls[site]], traced.graph.call_module(name, (calls[site],))))
    output.args = (tuple(node for _, node in sorted(results, key=lambda result: result[0])),)
    traced.recompile()
    traced.meta[NORMAL] = False  # inline the exits' own layers, so that their ReLUs become sites
    return normalise(traced)


def _check_sites(after: Sequence[str], calls: dict[str, fx.Node]) -> None:
    missing = [name for name in after if name not in calls]
    if missing or not after:
        raise ShoalError(f"found no site {missing or '(none named)'} for an exit; need a name that relu_sites gives")
    if len(set(after)) < len(after):
        raise ShoalError(f"found a site twice in {list(after)}; need one exit per site; leave one out")
    odd = [name for name in after if len(calls[name].meta["shape"]) != 3]
    if odd:
        raise ShoalError(
            f"found no feature map at {odd[0]!r} for an exit; need a feature map [C, H, W]; name a ReLU site"
        )


def _leaves(result: fx.Node, last: fx.Node, place: dict[fx.Node, int]) -> int:
    """The place of the last node that both results depend on, which is where `result` branches off the path to `last`.

    The last result itself comes after all nodes.
    """
    if result is last:
        return len(place)
    return max((place[node] for node in sources(result) & sources(last)), default=0)


def depth_order(model: nn.Module, after: Sequence[str]) -> tuple[str, ...]:
    """The submodules `after` in the order in which forward calls them. Unknown names come last."""
    called = list(module_calls(normalise(model)))
    return tuple(sorted(after, key=lambda name: called.index(name) if name in called else len(called)))


def keep_exit(model: nn.Module, index: int) -> fx.GraphModule:
    """A copy of `model` with only classifier `index` (0 the weakest, -1 the final one); all others are removed.

    Raises ShoalError when there is no such classifier.
    """

    def cut(traced: fx.GraphModule) -> None:
        results = results_of(traced.graph)
        if not -len(results) <= index < len(results):
            raise ShoalError(f"found no exit {index}; need one of 0 to {len(results) - 1} (or -1 for the final one)")
        output_of(traced.graph).args = (results[index],)

    return edit(model, cut)


def check_one_classifier(model: nn.Module, name: str) -> None:
    """Raise ShoalError when `model`, called `name` in the message, has several classifiers."""
    found = count_exits(model)
    if found > 1:
        raise ShoalError(
            f"found {found} classifiers in {name!r}; need a network with one; train all of them at once with shoal "
            "inplace"
        )


def count_exits(model: nn.Module) -> int:
    """The number of classifiers whose logits the forward pass of `model` returns."""
    return len(results_of(normalise(model).graph))
