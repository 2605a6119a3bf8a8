"""MACs of a network with replaced blocks, counted in two ways: as they are, and as the paper counts them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from shoal.graph.counting import cost
from shoal.surgery.sites import Block
from shoal.surgery.traced import Traced


def gated_macs(model: nn.Module, shape: tuple[int, ...], blocks: Sequence[str]) -> tuple[int, int]:
    """MACs of `model` for images of `shape` [C, H, W] with the named blocks replaced: (actual, as the paper counts).

    Actual: a replaced block costs one strided k x k convolution, and its shortcut stays. Paper: the block keeps the
    cost of its second convolution, and a projection shortcut is not counted (relu_reduction.md 6.4).
    """
    traced = Traced(model, shape)
    total = cost(traced.graph)
    macs = {row.name: row.macs for row in total.rows}
    chosen = [b for b in traced.blocks if b.name in blocks]
    honest = paper = total.macs
    for block in chosen:
        first, second = (macs[name] for name in block.convs)
        honest += _shallow_macs(total.rows, block) - first - second
        paper -= first + _shortcut_macs(traced, macs, block)
    return honest, paper


def _shallow_macs(rows: Sequence[Any], block: Block) -> int:
    shape = next(row.shape for row in rows if row.name == block.convs[1])
    return block.channels[0] * block.kernel**2 * shape[0] * shape[1] * shape[2]


def _shortcut_macs(traced: Traced, macs: Mapping[str, int], block: Block) -> int:
    calls = {node.name: node for node in traced.normal.graph.nodes}
    if block.add is None:
        return 0
    others = [n for n in calls[block.add].all_input_nodes if n.name != block.result]
    node = others[0] if others else None
    names = {n: name for name, n in traced.calls.items()}
    while node is not None and node.name != block.source and len(node.all_input_nodes) == 1:
        if macs.get(names.get(node, ""), 0):
            return macs[names[node]]
        node = node.all_input_nodes[0]
    return 0
