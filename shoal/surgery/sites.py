"""ReLU sites and replaceable blocks, found in the traced graph and not by class name."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import prod

from torch import fx, nn

from shoal.errors import ShoalError
from shoal.surgery.sizes import is_tensor
from shoal.surgery.tracing import shapes


@dataclass(frozen=True)
class ReluSite:
    """One ReLU layer. Sensitivities, budgets, masks, costs and reports all refer to it by `name`.

    `shape` is [C, H, W]. `stage` is 0 for the stem and rises by 1 wherever the output shape of the residual blocks
    changes. `block` is the number of the residual block, from 0, or None before the first. `conv` names the nearest
    convolution before the layer.
    """

    name: str
    shape: tuple[int, ...]
    stage: int
    block: int | None
    conv: str | None

    @property
    def relus(self) -> int:
        """Number of ReLU operations for one image."""
        return prod(self.shape)


@dataclass(frozen=True)
class Block:
    """A run conv - (bn) - relu - (dropout) - conv - (bn) that one convolution could replace.

    `name` is that of its inner ReLU site. `source`, `result` and `add` are names of fx nodes: the input of the run, its
    result, and the residual addition that reads the result (None in a plain CNN). `channels`, `stride` and `kernel` are
    those of the replacing convolution.
    """

    name: str
    source: str
    result: str
    add: str | None
    convs: tuple[str, str]
    channels: tuple[int, int]
    stride: int
    kernel: int


def is_relu_site(module: nn.Module) -> bool:
    """True for plain and masked ReLU modules."""
    return type(module) is nn.ReLU or bool(getattr(module, "is_relu_site", False))


def relu_sites(model: nn.Module, shape: tuple[int, ...]) -> tuple[ReluSite, ...]:
    """All ReLU sites of `model` in execution order for images of `shape` ([C, H, W]).

    Raises ShoalError for a model without any ReLU.
    """
    return sites_in(shapes(model, shape))


def sites_in(traced: fx.GraphModule) -> tuple[ReluSite, ...]:
    """The ReLU sites of a module that `tracing.shapes` returned, in execution order.

    Raises ShoalError when there is none.
    """
    order = {node: i for i, node in enumerate(traced.graph.nodes)}
    stages = _stage_starts(traced, order)
    sites = []
    for node in traced.graph.nodes:
        if node.op == "call_module" and is_relu_site(traced.get_submodule(str(node.target))):
            block, stage = _locate(order[node], stages)
            if not stages:
                stage = _plain_stage(traced, node)
            sites.append(ReluSite(str(node.target), node.meta["shape"], stage, block, _conv_before(traced, node)))
    if not sites:
        raise ShoalError(
            "found no ReLU in the model; need at least one nn.ReLU, F.relu or Tensor.relu call; exchange other "
            "activations first (--replace, shoal.substitute)"
        )
    return tuple(sites)


def find_blocks(model: nn.Module, shape: tuple[int, ...]) -> tuple[Block, ...]:
    """The replaceable blocks of `model` in execution order, for images of `shape` ([C, H, W]).

    The first ReLU of the network (the stem's) is never the inner ReLU of a block. Raises ShoalError when `model`
    cannot be traced.
    """
    return blocks_in(shapes(model, shape))


def blocks_in(traced: fx.GraphModule) -> tuple[Block, ...]:
    """The replaceable blocks of a module that `tracing.shapes` returned, in execution order."""
    first = next((n for n in traced.graph.nodes if _module_is(traced, n, "relu")), None)
    found = [_match(traced, n) for n in traced.graph.nodes if _module_is(traced, n, "relu") and n is not first]
    return tuple(block for block in found if block is not None)


IDLE = (nn.Identity, nn.Dropout, nn.Dropout2d)
"""Modules that compute nothing in inference; a block may contain them."""


def _module_is(traced: fx.GraphModule, node: fx.Node | None, kind: str) -> bool:
    if node is None or node.op != "call_module":
        return False
    module = traced.get_submodule(str(node.target))
    if kind == "relu":
        return is_relu_site(module)
    if kind == "idle":
        return isinstance(module, IDLE)
    return isinstance(module, nn.Conv2d if kind == "conv" else nn.BatchNorm2d)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _upstream(traced: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The first input of `node`, skipping idle modules that only this path reads."""
    before = node.all_input_nodes[0]
    while _module_is(traced, before, "idle") and _only_user(before) is not None:
        before = before.all_input_nodes[0]
    return before


def _match(traced: fx.GraphModule, relu: fx.Node) -> Block | None:
    before = _upstream(traced, relu)
    if _module_is(traced, before, "bn") and _only_user(before) is not None:
        before = _upstream(traced, before)
    after = _only_user(relu)
    while after is not None and _module_is(traced, after, "idle"):
        after = _only_user(after)
    if not (_module_is(traced, before, "conv") and _module_is(traced, after, "conv")) or len(before.users) != 1:
        return None
    assert after is not None
    result = after
    follower = _only_user(after)
    if follower is not None and _module_is(traced, follower, "bn"):
        result = follower
    return _block(traced, relu, before, after, result)


def _block(traced: fx.GraphModule, relu: fx.Node, first: fx.Node, second: fx.Node, result: fx.Node) -> Block | None:
    a, b = (traced.get_submodule(str(n.target)) for n in (first, second))
    assert isinstance(a, nn.Conv2d)
    assert isinstance(b, nn.Conv2d)
    plain = all(c.groups == 1 and c.dilation == (1, 1) and c.kernel_size[0] % 2 for c in (a, b))
    square = all(c.stride[0] == c.stride[1] and c.kernel_size[0] == c.kernel_size[1] for c in (a, b))
    stride, kernel = a.stride[0] * b.stride[0], max(a.kernel_size[0], b.kernel_size[0])
    source = first.all_input_nodes[0]
    fits = tuple(-(-s // stride) for s in source.meta["shape"][1:]) == result.meta["shape"][1:]
    if not (plain and square and fits):
        return None
    user = _only_user(result)
    add = user.name if user is not None and is_sum(user) else None
    names = (str(first.target), str(second.target))
    channels = (a.in_channels, b.out_channels)
    return Block(str(relu.target), source.name, result.name, add, names, channels, stride, kernel)


def is_sum(node: fx.Node) -> bool:
    """Whether `node` adds two computed tensors, and not a parameter or a size."""
    # In torch.fx only `+`, torch.add and Tensor.add have these names.
    name = getattr(node.target, "__name__", node.target)
    named = node.op in ("call_function", "call_method") and name in ("add", "iadd", "add_")
    if not named or not is_tensor(node):
        return False
    return len([n for n in node.all_input_nodes if _reads_images(n)]) == 2


def _reads_images(node: fx.Node) -> bool:
    """Whether `node` depends on the images, and not on parameters and numbers alone."""
    seen, left = {node}, [node]
    while left:
        found = left.pop()
        if found.op == "placeholder":
            return True
        more = [source for source in found.all_input_nodes if source not in seen]
        seen.update(more)
        left += more
    return False


def _ancestors(node: fx.Node) -> list[fx.Node]:
    seen, queue = [node], deque([node])
    while queue:
        for source in queue.popleft().all_input_nodes:
            if source not in seen:
                seen.append(source)
                queue.append(source)
    return seen


def _split(add: fx.Node, order: dict[fx.Node, int]) -> fx.Node:
    """The last common ancestor of the two inputs of a residual addition, where the branches split."""
    left, right = (set(_ancestors(n)) for n in add.all_input_nodes if _reads_images(n))
    return max(left & right, key=order.__getitem__)


def _stage_starts(traced: fx.GraphModule, order: dict[fx.Node, int]) -> list[tuple[int, int]]:
    """(position of the block's split, stage) for every residual block, in order."""
    starts, stage, last = [], 0, None
    for node in traced.graph.nodes:
        if is_sum(node):
            stage += node.meta["shape"] != last
            last = node.meta["shape"]
            starts.append((order[_split(node, order)], stage))
    return starts


def _locate(position: int, starts: list[tuple[int, int]]) -> tuple[int | None, int]:
    inside = [i for i, (start, _) in enumerate(starts) if start < position]
    return (inside[-1], starts[inside[-1]][1]) if inside else (None, 0)


def _plain_stage(traced: fx.GraphModule, node: fx.Node) -> int:
    sizes = []
    for other in traced.graph.nodes:
        if _module_is(traced, other, "relu") and other.meta["shape"][1:] not in sizes:
            sizes.append(other.meta["shape"][1:])
    return sizes.index(node.meta["shape"][1:]) + 1


def _conv_before(traced: fx.GraphModule, relu: fx.Node) -> str | None:
    """The nearest convolution upstream; of several at the same distance the largest, so never a 1x1 shortcut."""
    level = [relu]
    while level:
        level = [source for node in level for source in node.all_input_nodes]
        convs = [n for n in level if _module_is(traced, n, "conv")]
        if convs:
            sizes = {n: next(traced.get_submodule(str(n.target)).parameters()).numel() for n in convs}
            return str(max(convs, key=sizes.__getitem__).target)
    return None
