"""Classifiers at intermediate depths, and how to keep just one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx, nn

from shoal.errors import ShoalError
from shoal.sites import relu_sites
from shoal.surgery import NORMAL, edit, module_calls, normalise, shapes

PREFIX = "exits."


class Exit(nn.Module):
    """A compilable classifier: 3x3 CONV-BN-ReLU with stride 2, global average pool, linear.

    The paper does not publish its auxiliary classifier's layers; this one has operations that private inference
    has (convolution, average pool, linear) and one small ReLU site of its own.
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
    """The last ReLU site before the final stage: where shallow puts its auxiliary classifier (Table 2).

    Raises ShoalError for a network with a single stage.
    """
    sites = relu_sites(model, shape)
    before = [site for site in sites if site.stage < sites[-1].stage]
    if not before:
        raise ShoalError("found a network with one stage; need two or more for an auxiliary classifier; name a site")
    return before[-1].name


def add_exits(
    model: nn.Module, after: Sequence[str], classes: int, shape: tuple[int, ...], *, relu: bool = True
) -> fx.GraphModule:
    """A copy of `model` with a classifier after each named ReLU site; its forward gives logits weak to strong.

    Raises ShoalError when a name is no ReLU site.
    """
    return attach(model, after, shape, lambda site: Exit(site[0], classes, relu))


def attach(
    model: nn.Module, after: Sequence[str], shape: tuple[int, ...], make: Callable[[tuple[int, ...]], nn.Module]
) -> fx.GraphModule:
    """A copy of `model` with the classifier that `make` gives for a shape [C, H, W] after each submodule named.

    Its forward gives logits weak to strong. Raises ShoalError when a name is no submodule's that forward calls.
    """
    traced = shapes(model, shape)
    traced.train(model.training)
    calls = module_calls(traced)
    output = next(n for n in traced.graph.nodes if n.op == "output")
    missing = [name for name in after if name not in calls]
    if missing or not after:
        raise ShoalError(f"found no site {missing or '(none named)'} for an exit; need a name that relu_sites gives")
    position = {node: i for i, node in enumerate(traced.graph.nodes)}
    device = next((p.device for p in traced.parameters()), torch.device("cpu"))
    logits = []
    for site in sorted(after, key=lambda name: position[calls[name]]):
        name = PREFIX + site.replace(".", "_")
        traced.add_submodule(name, make(calls[site].meta["shape"]).to(device))
        with traced.graph.inserting_before(output):
            logits.append(traced.graph.call_module(name, (calls[site],)))
    final = output.args[0]
    output.args = ((*logits, *(final if isinstance(final, (tuple, list)) else (final,))),)
    traced.recompile()
    traced.meta[NORMAL] = False  # inline the exits' own layers, so that their ReLUs become sites
    return normalise(traced)


def keep_exit(model: nn.Module, index: int) -> fx.GraphModule:
    """A copy of `model` with only classifier `index` (0 the weakest, -1 the final one); the rest is removed.

    Raises ShoalError when there is no such classifier.
    """

    def cut(traced: fx.GraphModule) -> None:
        output = next(n for n in traced.graph.nodes if n.op == "output")
        result = output.args[0]
        results = tuple(result) if isinstance(result, (tuple, list)) else (result,)
        if not -len(results) <= index < len(results):
            raise ShoalError(f"found no exit {index}; need one of 0 to {len(results) - 1} (or -1 for the final one)")
        output.args = (results[index],)

    return edit(model, cut)


def count_exits(model: nn.Module) -> int:
    """How many classifiers the forward pass of `model` gives the logits of."""
    result = next(n for n in normalise(model).graph.nodes if n.op == "output").args[0]
    return len(result) if isinstance(result, (tuple, list)) else 1
