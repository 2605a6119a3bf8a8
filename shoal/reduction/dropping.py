"""Removing whole ReLU layers and blocks: DeepReDuce's culling, thinning and single-block stages (ICML'21, sec. 3)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from torch import fx, nn

from shoal.errors import ShoalError
from shoal.surgery.normal_form import edit, module_calls
from shoal.surgery.sites import ReluSite, find_blocks, is_relu_site
from shoal.surgery.traced import Traced


def culled(sites: Sequence[ReluSite], stages: Collection[int]) -> tuple[str, ...]:
    """Names of the sites of these stages, and of the stem (stage 0) if any stage is given.

    Raises ShoalError for a stage that the network does not have.
    """
    known = {site.stage for site in sites}
    missing = set(stages) - known
    if missing:
        raise ShoalError(f"found no stage {min(missing)}; need some of {sorted(known)}; count the network to see them")
    gone = {0, *stages} if stages else set()
    return tuple(site.name for site in sites if site.stage in gone)


def thinned(sites: Sequence[ReluSite], stages: Collection[int]) -> tuple[str, ...]:
    """Names of every other site of these stages, starting with the first: in residual blocks, the inner ReLUs."""
    names = []
    for stage in sorted(stages):
        names += [site.name for site in sites if site.stage == stage][::2]
    return tuple(names)


def _module(traced: fx.GraphModule, node: fx.Node) -> nn.Module:
    return traced.get_submodule(str(node.target))


def drop_relus(model: nn.Module, names: Iterable[str]) -> fx.GraphModule:
    """A copy of `model` without these ReLUs. Raises ShoalError for a name that is not that of a ReLU site."""
    wanted = list(dict.fromkeys(names))

    def remove(traced: fx.GraphModule) -> None:
        calls = {name: node for name, node in module_calls(traced).items() if is_relu_site(_module(traced, node))}
        missing = [name for name in wanted if name not in calls]
        if missing:
            raise ShoalError(f"found no ReLU {missing[0]!r}; need a name that relu_sites gives")
        for name in wanted:
            node = calls[name]
            node.replace_all_uses_with(node.all_input_nodes[0])
            traced.graph.erase_node(node)

    return edit(model, remove)


def spare_blocks(model: nn.Module, shape: tuple[int, ...], stages: Collection[int]) -> tuple[str, ...]:
    """Names (inner ReLU sites) of the residual blocks of these stages, except the first block of each stage."""
    traced = Traced(model, shape)
    stage_of = {site.name: site.stage for site in traced.sites}
    blocks = [b.name for b in traced.blocks if b.add is not None and stage_of[b.name] in stages]
    return tuple(name for i, name in enumerate(blocks) if i and stage_of[blocks[i - 1]] == stage_of[name])


def drop_blocks(model: nn.Module, shape: tuple[int, ...], names: Iterable[str]) -> fx.GraphModule:
    """A copy of `model` without these residual blocks; the layers after a removed block read its input.

    Each block is named by its inner ReLU site. `shape` is the images' [C, H, W]. Raises ShoalError for a name that is
    not that of a residual block, and for a block that changes the shape.
    """
    blocks, wanted = {b.name: b for b in find_blocks(model, shape)}, list(names)

    for name in wanted:
        block = blocks.get(name)
        if block is None or block.add is None or block.stride != 1 or block.channels[0] != block.channels[1]:
            raise ShoalError(f"found no residual block {name!r} that keeps its shape; need one to drop")

    def remove(traced: fx.GraphModule) -> None:
        nodes = {node.name: node for node in traced.graph.nodes}
        # Last block first: if two adjacent blocks go, the second one reads the end of the first.
        for block in reversed([block for name, block in blocks.items() if name in wanted]):
            end = nodes[str(block.add)]
            users = list(end.users)
            # The ReLU after the sum belongs to the block.
            if len(users) == 1 and users[0].op == "call_module" and is_relu_site(_module(traced, users[0])):
                end = users[0]
            end.replace_all_uses_with(nodes[block.source])
        traced.graph.eliminate_dead_code()

    return edit(model, remove)
