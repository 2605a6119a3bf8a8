"""Where classifiers are placed: the schemes of *Self-Distillation* (TPAMI'21, sections 4.8 to 4.10).

They work for any traced CNN.
"""

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
"""Default number of shallow classifiers, for schemes that allow a choice."""

Names = list[str]


def _uniform(ends: Names, count: int) -> Names:
    return [ends[len(ends) * (i + 1) // (count + 1) - 1] for i in range(count)]


CHOSEN: dict[str, Callable[[Names, int], Names]] = {
    "uniform": _uniform,
    "shallow": lambda ends, count: ends[:count],
    "deep": lambda ends, count: ends[-1 - count : -1],
}
"""Schemes with a chosen number of classifiers: functions of the blocks' ends and the number."""

FIXED = ("downsample", "every-block", "every-layer")
"""Schemes in which the network determines the number of classifiers."""

SCHEMES = (*FIXED, *CHOSEN)


def exit_points(
    model: nn.Module, shape: tuple[int, ...], scheme: str = "downsample", count: int | None = None
) -> tuple[str, ...]:
    """Submodules after which shallow classifiers are placed, in order, for images of `shape` [C, H, W].

    ``downsample`` places them before each change of resolution (the paper's scheme), ``uniform`` after equal numbers of
    blocks, ``shallow`` after the first and ``deep`` after the last `count` blocks (3 by default). ``every-block`` and
    ``every-layer`` (each ReLU) place them everywhere except at the end, where the final classifier is.

    A block ends with the module that takes the sum of its paths. If no module takes the sums (pre-activation), it ends
    with its last ReLU. In a network without branches, each ReLU is a block. Networks for point clouds read every block
    again at the end, so there each sum ends a block.

    Raises ShoalError for an unknown scheme, a `count` that the scheme does not use, and a network that is too short.
    """
    _check(scheme, count)
    traced = Traced(model, shape)
    # Some ReLUs, as in gates, act on vectors instead of feature maps.
    sites = [site for site in traced.sites if len(site.shape) == 3]
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
    """The modules that read residual sums."""
    users = [user for node in traced.graph.nodes if is_sum(node) for user in node.users]
    return [str(user.target) for user in users if user.op == "call_module"]


def _cuts(traced: fx.GraphModule) -> list[fx.Node]:
    """Nodes through which all data passes: no later node reads anything computed before them."""
    nodes = [node for node in traced.graph.nodes if is_tensor(node) and node.op not in ("get_attr", "output")]
    position = {node: i for i, node in enumerate(nodes)}
    reach, cuts = 0, []
    for node in nodes:
        if reach <= position[node]:
            cuts.append(node)
        reach = max([reach, *(position[user] for user in node.users if user in position)])
    return cuts
