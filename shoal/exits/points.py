"""Where classifiers go: the schemes of *Self-Distillation* (TPAMI'21, sections 4.8 to 4.10), for any traced CNN."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import fx, nn

from shoal.data.clouds import is_cloud
from shoal.errors import ShoalError
from shoal.surgery.sites import ReluSite, is_sum
from shoal.surgery.sizes import is_tensor
from shoal.surgery.traced import Traced

COUNT = 3
"""Shallow classifiers of the schemes that let one choose."""

Names = list[str]


def _uniform(ends: Names, count: int) -> Names:
    return [ends[len(ends) * (i + 1) // (count + 1) - 1] for i in range(count)]


CHOSEN: dict[str, Callable[[Names, int], Names]] = {
    "uniform": _uniform,
    "shallow": lambda ends, count: ends[:count],
    "deep": lambda ends, count: ends[-1 - count : -1],
}
"""Schemes that place as many classifiers as are asked for."""

FIXED = ("downsample", "every-block", "every-layer")
"""Schemes whose number of classifiers the network decides."""

SCHEMES = (*FIXED, *CHOSEN)


def exit_points(
    model: nn.Module, shape: tuple[int, ...], scheme: str = "downsample", count: int | None = None
) -> tuple[str, ...]:
    """Submodules after which shallow classifiers go, in order, for images of `shape` [C, H, W].

    ``downsample`` is before each change of resolution (the paper's), ``uniform`` after equal numbers of blocks,
    ``shallow`` after the first and ``deep`` after the last `count` blocks (3 unless given), ``every-block`` and
    ``every-layer`` (each ReLU) everywhere but at the end, where the final classifier is. A block ends with the module
    that takes what its paths were joined to; where sums have none (pre-activation), with its last ReLU; in a network
    without branches each ReLU is one. In networks for point clouds, whose end reads every block again, each sum is one.
    Raises ShoalError for an unknown scheme, a `count` that the scheme does not use, and a network that is too short.
    """
    _check(scheme, count)
    traced = Traced(model, shape)
    sites = [site for site in traced.sites if len(site.shape) == 3]  # gates' vectors are no feature maps
    ends = [site.name for site in sites] if scheme == "every-layer" else _block_ends(traced.normal, sites)
    points = _chosen(ends, scheme, COUNT if count is None else count) if scheme in CHOSEN else ends[:-1]
    if scheme == "downsample":
        points = [a for a, b in pairwise(ends) if traced.shape_at(a)[1:] != traced.shape_at(b)[1:]]
    if not points:
        raise ShoalError(
            f"found no place for an exit by scheme {scheme!r}; need a network with several blocks or resolutions; "
            "name sites, or use every-layer"
        )
    return tuple(points)


def _check(scheme: str, count: int | None) -> None:
    if scheme not in SCHEMES:
        raise ShoalError(f"found scheme {scheme!r}; need one of {', '.join(SCHEMES)}; choose one")
    if count is not None and scheme in FIXED:
        raise ShoalError(
            f"found {count} exits for scheme {scheme!r}; need no number, as the network decides it; leave it out, or "
            f"use {', '.join(CHOSEN)}"
        )


def _chosen(ends: Names, scheme: str, count: int) -> Names:
    if not 1 <= count < len(ends):
        raise ShoalError(
            f"found {count} exits for a network of {len(ends)} blocks; need 1 to {len(ends) - 1}; choose another number"
        )
    return CHOSEN[scheme](ends, count)


def _block_ends(traced: fx.GraphModule, sites: Sequence[ReluSite]) -> Names:
    if is_cloud(next(node for node in traced.graph.nodes if node.op == "placeholder").meta["shape"]):
        return _after_sums(traced)
    cuts = _cuts(traced)
    joins = [node for node in cuts if len(node.all_input_nodes) > 1]
    followers = [user for node in joins for user in node.users]
    joints = [str(node.target) for node in cuts if node in followers and node.op == "call_module"]
    if joins and len(joints) == len(joins):
        return joints
    last = {site.block: site.name for site in sites if site.block is not None}
    return list(last.values()) or [site.name for site in sites]


def _after_sums(traced: fx.GraphModule) -> Names:
    """The modules that take residual sums."""
    users = [user for node in traced.graph.nodes if is_sum(node) for user in node.users]
    return [str(user.target) for user in users if user.op == "call_module"]


def _cuts(traced: fx.GraphModule) -> list[fx.Node]:
    """Nodes that all later ones depend on alone: nothing behind them reads what was made before them."""
    nodes = [node for node in traced.graph.nodes if is_tensor(node) and node.op not in ("get_attr", "output")]
    position = {node: i for i, node in enumerate(nodes)}
    reach, cuts = 0, []
    for node in nodes:
        if reach <= position[node]:
            cuts.append(node)
        reach = max([reach, *(position[user] for user in node.users if user in position)])
    return cuts
