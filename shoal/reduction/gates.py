"""Gated branching: a block with few ReLUs is gradually replaced by one convolution (shallow section 4, Fig. 3b)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from shoal.errors import ShoalError
from shoal.graph.graph import Lowered
from shoal.outputs import unwrap
from shoal.reduction.budget import Budget
from shoal.surgery.normal_form import edit, module_calls
from shoal.surgery.sites import Block

PREFIX = "branches."


class GatedBranch(nn.Module):
    """gate * bn(conv(x)) + (1 - gate) * main, where the gate is a buffer in [0, 1]."""

    gate: Tensor

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.bn = nn.BatchNorm2d(conv.out_channels)
        self.register_buffer("gate", torch.zeros(()))

    def forward(self, x: Tensor, main: Tensor) -> Tensor:
        """Mix the shallow branch of `x` [N, C, H, W] into the main branch's result `main` [N, C', H', W']."""
        return torch.lerp(main, self.bn(self.conv(x)).to(main.dtype), self.gate.to(main.dtype))

    def to_node(self) -> Lowered:
        """An unknown operation, since a `Graph` must have either one branch or the other."""
        return "unknown", {"target": "GatedBranch (call commit_branches first)"}, {}


def branched_blocks(blocks: Sequence[Block], budget: Budget, d_th: float) -> tuple[Block, ...]:
    """The blocks whose inner site has an assigned ratio below `d_th`; of two that share a convolution, the first."""
    chosen: list[Block] = []
    for block in blocks:
        overlaps = chosen and set(block.convs) & set(chosen[-1].convs)
        if budget.ratio(block.name) < d_th and not overlaps:
            chosen.append(block)
    return tuple(chosen)


def named_blocks(blocks: Sequence[Block], names: Sequence[str]) -> tuple[Block, ...]:
    """The blocks of these names (inner ReLU sites), in execution order.

    Raises ShoalError for a name that is not that of a block, and for two blocks that share a convolution.
    """
    known = {block.name: block for block in blocks}
    missing = [name for name in names if name not in known]
    if missing:
        raise ShoalError(f"found no replaceable block {missing[0]!r}; need some of {', '.join(known) or 'none at all'}")
    chosen = tuple(block for block in blocks if block.name in names)
    for one, next_ in itertools.pairwise(chosen):
        if set(one.convs) & set(next_.convs):
            raise ShoalError(f"found blocks {one.name} and {next_.name} with a shared convolution; need one of them")
    return chosen


def _shallow_conv(block: Block) -> nn.Conv2d:
    k = block.kernel
    conv = nn.Conv2d(*block.channels, k, stride=block.stride, padding=k // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out")
    return conv


def add_branches(model: nn.Module, blocks: Sequence[Block], *, keep_skip: bool = True) -> fx.GraphModule:
    """A copy of `model` with a gated branch at each of `blocks`; gates are 0, so its results do not change yet.

    With `keep_skip` the branch replaces the run conv-relu-conv and the skip path stays. Otherwise it replaces the whole
    residual block, skip path included. Raises ShoalError when `blocks` is empty.
    """
    if not blocks:
        raise ShoalError("found no block to branch; need an assigned ratio below d_th; raise d_th or lower the budget")

    def insert(traced: fx.GraphModule) -> None:
        nodes = {node.name: node for node in traced.graph.nodes}
        for block in blocks:
            _insert(traced, nodes, block, keep_skip)

    return edit(model, insert)


def _insert(traced: fx.GraphModule, nodes: dict[str, fx.Node], block: Block, keep_skip: bool) -> None:
    whole = not keep_skip and block.add is not None
    main = nodes[str(block.add)] if whole else nodes[block.result]
    name = PREFIX + block.name.replace(".", "_")
    device = next((p.device for p in traced.parameters()), torch.device("cpu"))
    traced.add_submodule(name, GatedBranch(_shallow_conv(block)).to(device))
    readers = list(main.users)
    with traced.graph.inserting_after(main):
        mix = traced.graph.call_module(name, (nodes[block.source], main))
    for reader in readers:
        reader.replace_input_with(main, mix)


def gated_branches(model: nn.Module) -> list[GatedBranch]:
    """The gated branches of `model`, in order of insertion."""
    return [m for m in unwrap(model).modules() if isinstance(m, GatedBranch)]


def set_gate(model: nn.Module, value: float) -> None:
    """Set every gate of `model` to `value`, in place. Raises ShoalError when `value` is not in [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise ShoalError(f"found gate {value}; need a value in [0, 1]")
    for branch in gated_branches(model):
        branch.gate.fill_(value)


def commit_branches(model: nn.Module) -> fx.GraphModule:
    """A copy of `model` in which each gated branch is replaced by its convolution and batch norm.

    Raises ShoalError when a gate is not 1, because the copy would then compute something else.
    """

    def commit(traced: fx.GraphModule) -> None:
        for name, node in module_calls(traced).items():
            branch = traced.get_submodule(name)
            if isinstance(branch, GatedBranch):
                _commit(traced, name, branch, node)

    return edit(model, commit)


def _commit(traced: fx.GraphModule, name: str, branch: GatedBranch, node: fx.Node) -> None:
    if float(branch.gate) != 1.0:
        raise ShoalError(f"found gate {float(branch.gate):.3f} at {name}; need 1; train until the ramp has ended")
    # The path stays the same, so that the parameters keep their names.
    conv, bn = branch.conv, branch.bn
    traced.add_submodule(name, nn.ModuleDict({"conv": conv, "bn": bn}))
    with traced.graph.inserting_before(node):
        result = traced.graph.call_module(f"{name}.conv", (node.args[0],))
        result = traced.graph.call_module(f"{name}.bn", (result,))
    node.replace_all_uses_with(result)
    traced.graph.erase_node(node)
