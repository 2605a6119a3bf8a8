"""Choose the channels to cut, by Torch-Pruning: its dependency graph finds groups, magnitudes rank the channels.

DepGraph (Fang et al., CVPR'23) finds groups of layers whose channels depend on each other. The same fraction of every
group is cut, least important channels first. Importance is the group's L2 magnitude: the mean over its layers of the
sum of squares of a channel's weights (`GroupMagnitudeImportance(p=2)` of Torch-Pruning).
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, fx, nn

from shoal.channels.cut import Kept, keep_channels
from shoal.channels.flow import ROOTS, CoupledError, Flow, Indices, classifiers, follow, is_depthwise
from shoal.errors import ShoalError
from shoal.surgery.normal_form import normalise
from shoal.surgery.tracing import shapes


@dataclass(frozen=True)
class Cut:
    """A network with fewer channels, the outputs that its layers keep, and the layers that stayed uncut (`whole`)."""

    network: fx.GraphModule
    kept: dict[str, Kept]
    whole: tuple[str, ...]


def torch_pruning() -> Any:
    """The package `torch_pruning`. Raises ShoalError when it is not installed."""
    try:
        import torch_pruning as package
    except ImportError as error:
        raise ShoalError(
            "found no Torch-Pruning; need it to choose channels; pip install shoal[prune], or take --method filters"
        ) from error
    return package


def torch_pruning_version() -> str:
    """The installed version by package metadata, because the module's own `__version__` has been out of date."""
    try:
        return version("torch-pruning")
    except PackageNotFoundError:
        return str(torch_pruning().__version__)


def cut_channels(model: nn.Module, shape: tuple[int, ...], amount: float) -> Cut:
    """Cut a fraction `amount` of the channels of each group of layers in `model`, for images of `shape` [C, H, W].

    The input and the logits stay, and so does at least one channel of each group. Layers stay uncut if an operation
    depends on the position of their channels, such as a shortcut that pads with zeros. Raises ShoalError for an amount
    outside (0, 1), where Torch-Pruning fails, and where nothing or something else would be cut (the message names the
    layer).
    """
    if not 0 < amount < 1:
        raise ShoalError(f"found an amount of {amount:g}; need a fraction between 0 and 1, such as 0.5")
    torch_pruning()
    traced = shapes(model, shape)
    logits = classifiers(traced)
    whole = set(logits)
    while True:
        kept = _choose(traced, shape, amount, whole)
        try:
            flow = follow(traced, {name: one.indices for name, one in kept.items()})
            break
        except CoupledError as error:
            if error.layers <= whole:
                raise
            whole |= error.layers
    if not kept:
        raise ShoalError(
            "found no channels that can be cut alone; need layers whose channels are not all tied by position; use "
            "another network"
        )
    network = keep_channels(model, shape, kept)
    _check(traced, network, flow, shape)
    return Cut(network, kept, tuple(sorted(whole - logits)))


def _choose(traced: fx.GraphModule, shape: tuple[int, ...], amount: float, whole: Collection[str]) -> dict[str, Kept]:
    """The outputs of every layer that Torch-Pruning keeps; it prunes a copy."""
    pruned = normalise(traced).eval().cpu().requires_grad_(True)
    names = {module: name for name, module in pruned.named_modules() if isinstance(module, ROOTS)}
    left = {module: list(range(len(module.weight))) for module in names}
    counts = {module: len(places) for module, places in left.items()}
    try:
        groups = _groups(pruned, shape, [module for module, name in names.items() if name in whole])
    except Exception as error:
        raise _failure(error, _suspect(traced, whole)) from error
    for group, importance in groups:
        _prune(group, _least(group, importance, amount), left, names)
    fewer = {m: places for m, places in left.items() if len(places) < counts[m] and not is_depthwise(m)}
    return {names[m]: Kept(tuple(places), counts[m]) for m, places in fewer.items()}


def _groups(model: nn.Module, shape: tuple[int, ...], whole: list[nn.Module]) -> list[tuple[Any, Tensor]]:
    """Every group that can be cut, with the importance of each of its channels."""
    package = torch_pruning()
    scores = package.importance.GroupMagnitudeImportance(p=2)
    with torch.enable_grad():
        graph = package.DependencyGraph().build_dependency(model, (torch.zeros(1, *shape),), verbose=False)
    groups = list(graph.get_all_groups(ignored_layers=whole, root_module_types=ROOTS))
    return [(group, scores(group)) for group in groups]


def _suspect(traced: fx.GraphModule, whole: Collection[str]) -> str:
    """The first operation that cannot follow cut channels."""
    layers = {n: m for n, m in traced.named_modules() if isinstance(m, ROOTS) and n not in whole}
    try:
        follow(traced, {name: tuple(range(len(layer.weight))) for name, layer in layers.items()})
    except CoupledError as error:
        return str(error).partition(";")[0].removeprefix("found ")
    return "a part of the network that it does not name"


def _failure(error: Exception, where: str) -> ShoalError:
    return ShoalError(
        f"found that Torch-Pruning fails ({type(error).__name__}: {error}), likely for {where}; need a network whose "
        "channels it can follow, without splits and shuffles; use another one, or --method filters"
    )


def _least(group: Any, importance: Tensor, amount: float) -> list[int]:
    """Indices of a group's least important channels. Every channel group of a convolution loses the same ones."""
    parts = max((m.groups for m in _modules(group) if isinstance(m, nn.Conv2d) and not is_depthwise(m)), default=1)
    means = importance.view(parts, -1).mean(0)
    # Keep two channels per group: a convolution with one channel per group would look like a depthwise one.
    count = min(round(amount * len(means)), len(means) - (1 if parts == 1 else 2))
    least = means.argsort(stable=True)[: max(0, count)].tolist()
    return sorted(place + part * len(means) for part in range(parts) for place in least)


def _modules(group: Any) -> list[nn.Module]:
    return [dependency.target.module for dependency, _ in group]


def _prune(group: Any, places: list[int], left: dict[Any, list[int]], names: dict[Any, str]) -> None:
    """Cut `places` of the group's first layer and everything that depends on them, and update `left`."""
    if not places:
        return
    root, handler, graph = group[0].dep.target.module, group[0].dep.handler, group._DG
    try:
        found = graph.get_pruning_group(root, handler, places)
        for dependency, gone in found:
            module = dependency.target.module
            if module in left and graph.is_out_channel_pruning_fn(dependency.handler):
                dropped = set(gone)
                left[module] = [place for i, place in enumerate(left[module]) if i not in dropped]
        found.prune()
    except Exception as error:
        raise _failure(error, f"the channels of {names.get(root, type(root).__name__)}") from error


class _Values(fx.Interpreter):
    """An interpreter that stores each layer's result."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.found: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and return its value."""
        result = super().run_node(n)
        if n.op == "call_module":
            self.found[str(n.target)] = result
        return result


def _check(traced: fx.GraphModule, cut: fx.GraphModule, flow: Flow, shape: tuple[int, ...]) -> None:
    """Raise ShoalError unless `cut` computes the same as `traced` with zero weights on the inputs that were cut."""
    whole, images = copy.deepcopy(traced), torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    for name, inputs in flow.inputs.items():
        layer: Any = whole.get_submodule(name)
        if inputs is not None and isinstance(layer, ROOTS) and not is_depthwise(layer):
            _blind(layer, inputs)
    old, new = _Values(whole.cpu()), _Values(copy.deepcopy(cut).cpu().eval())
    with torch.no_grad():
        old.run(images)
        new.run(images)
    for name, value in new.found.items():
        kept = flow.outputs.get(name)
        wanted = old.found[name] if kept is None else old.found[name][:, list(kept)]
        if not torch.allclose(value, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()) + 1e-6):
            raise ShoalError(
                f"found that {name} mixes channels that are cut with others; need operations that keep channels "
                "apart; use another network, or --method filters"
            )


def _blind(layer: Any, inputs: Indices) -> None:
    """Set the weights of inputs that were cut to zero, in place."""
    weight = layer.weight.detach()
    reads = weight.shape[1]
    gives = len(weight) // getattr(layer, "groups", 1)
    for group in range(len(weight) // gives):
        gone = sorted(set(range(reads)) - {i - group * reads for i in inputs})
        weight[group * gives : (group + 1) * gives, gone] = 0
