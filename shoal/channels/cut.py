"""Cutting channels out of a network: what stays, as text for a `Spec`, and the surgery that leaves out the rest.

What is cut is decided elsewhere (`channel_pruning`); here it is only done, so that a network that was cut is loaded
without the tool that chose its channels.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from shoal.channels.flow import ROOTS, Flow, Indices, follow, is_depthwise
from shoal.errors import ShoalError
from shoal.reduction.masks import MaskedReLU
from shoal.surgery.normal_form import normalise, replace
from shoal.surgery.sizes import RESHAPES, operands
from shoal.surgery.tracing import shapes


@dataclass(frozen=True)
class Kept:
    """Outputs of a layer that stay: their places, rising, among the `of` that it had."""

    indices: Indices
    of: int

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in pairwise(self.indices))
        if not self.indices or not rising or self.indices[0] < 0 or self.indices[-1] >= self.of:
            raise ShoalError(f"found outputs {list(self.indices)} to keep; need rising places below {self.of}")


def written(kept: Mapping[str, Kept]) -> tuple[str, ...]:
    """One text a layer, such as ``layer1.0.conv1=0-3,5/16``: places 0 to 3 and 5 of 16."""
    return tuple(f"{name}={','.join(_runs(one.indices))}/{one.of}" for name, one in kept.items())


def _runs(indices: Indices) -> list[str]:
    runs: list[list[int]] = []
    for i in indices:
        if runs and runs[-1][-1] == i - 1:
            runs[-1][1:] = [i]
        else:
            runs.append([i])
    return ["-".join(map(str, run)) for run in runs]


def parse(texts: Iterable[str]) -> dict[str, Kept]:
    """What `written` wrote. Raises ShoalError for other texts, and for a layer named twice."""
    found: dict[str, Kept] = {}
    for text in texts:
        name, _, places = text.rpartition("=")
        ranges, _, of = places.rpartition("/")
        count = _number(of)
        if not name or name in found or count is None:
            raise ShoalError(f"found {text!r:.80} for channels kept; need a layer once, as in conv1=0-3,5/16")
        found[name] = Kept(_places(ranges, count, text), count)
    return found


def _number(text: str) -> int | None:
    # Seven digits at most: no layer has more outputs, and a damaged file is to cost no memory.
    return int(text) if text.isdecimal() and len(text) <= 7 else None


def _places(ranges: str, of: int, text: str) -> Indices:
    places: list[int] = []
    for run in ranges.split(","):
        first, _, last = run.partition("-")
        low, high = _number(first), _number(last or first)
        if low is None or high is None or high >= of:
            raise ShoalError(f"found {text!r:.80} for channels kept; need places below {of}, as in conv1=0-3,5/16")
        places += range(low, high + 1)
    return tuple(places)


def composed(first: Mapping[str, Kept], then: Mapping[str, Kept]) -> dict[str, Kept]:
    """What stays of a network that kept `first` and of that `then`, in places of the network at the start."""
    joined = dict(first)
    for name, kept in then.items():
        before = first.get(name)
        joined[name] = kept if before is None else Kept(tuple(before.indices[i] for i in kept.indices), before.of)
    return joined


def keep_channels(model: nn.Module, shape: tuple[int, ...], kept: Mapping[str, Kept]) -> fx.GraphModule:
    """A copy of `model`, for images of `shape` [C, H, W], whose named layers have only the outputs `kept`.

    Convolutions and linear layers are named; what reads them (other layers, batch norms, masks of ReLUs, depthwise
    convolutions) is cut to fit. Names stay, and weights that stay are unchanged. Raises ShoalError for a name that is
    no such layer, for another number of outputs, and, naming the node, where channels are joined that are cut
    differently.
    """
    traced = shapes(model, shape)
    _check(traced, kept)
    flow = follow(traced, {name: one.indices for name, one in kept.items()})
    cut = replace(_relaxed(normalise(model), flow), _layers(model, flow))
    shapes(cut, shape)  # raises where the forward pass has a number of channels written into it
    return cut


def _check(traced: fx.GraphModule, kept: Mapping[str, Kept]) -> None:
    names = dict(traced.named_modules())
    for name, one in kept.items():
        layer = names.get(name)
        if not isinstance(layer, ROOTS) or is_depthwise(layer):
            raise ShoalError(f"found no layer {name!r} with outputs to cut; need the network that they were cut from")
        if (has := len(layer.weight)) != one.of:
            raise ShoalError(
                f"found {has} outputs at {name}; need {one.of}, those of the network whose channels were cut; "
                "leave its width as it was"
            )


def _layers(model: nn.Module, flow: Flow) -> dict[str, nn.Module]:
    """Every layer that reads or gives fewer channels, cut."""
    own = dict(normalise(model).named_modules())  # in the modes of `model`; a traced copy is in eval mode
    sides = {name: (flow.inputs[name], flow.outputs[name]) for name in flow.inputs}
    fewer = {name: both for name, both in sides.items() if both != (None, None) and own[name].state_dict()}
    return {name: _cut(name, copy.deepcopy(own[name]), *both) for name, both in fewer.items()}


def _cut(name: str, layer: Any, inputs: Indices | None, outputs: Indices | None) -> nn.Module:
    if isinstance(layer, nn.Conv2d):
        return _convolution(name, layer, inputs, outputs)
    if isinstance(layer, nn.Linear):
        rows, columns = _all(outputs, layer.out_features), _all(inputs, layer.in_features)
        layer.weight, layer.in_features, layer.out_features = _of(layer.weight, rows, columns), len(columns), len(rows)
        layer.bias = None if layer.bias is None else _of(layer.bias, rows)
        return layer
    assert outputs is not None
    for holder in layer.modules():
        _follow(holder, outputs)
    if isinstance(layer, MaskedReLU):
        layer.refresh()
    return layer


def _convolution(name: str, conv: nn.Conv2d, inputs: Indices | None, outputs: Indices | None) -> nn.Conv2d:
    rows, columns = _all(outputs, conv.out_channels), _all(inputs, conv.in_channels)
    if is_depthwise(conv):
        weight, conv.groups = _of(conv.weight, rows), len(rows)
    else:
        weight = nn.Parameter(_grouped(name, conv, rows, columns), conv.weight.requires_grad)
    conv.weight, conv.in_channels, conv.out_channels = weight, len(columns), len(rows)
    conv.bias = None if conv.bias is None else _of(conv.bias, rows)
    return conv


def _grouped(name: str, conv: nn.Conv2d, rows: Indices, columns: Indices) -> Tensor:
    """Weights of the rows and columns that stay of each group."""
    gives, reads = conv.out_channels // conv.groups, conv.in_channels // conv.groups
    parts = []
    for group in range(conv.groups):
        own = [row for row in rows if row // gives == group]
        parts.append(conv.weight.detach()[own][:, [c % reads for c in columns if c // reads == group]])
    if len({part.shape for part in parts}) > 1 or 0 in parts[0].shape:
        raise ShoalError(
            f"found groups at {name} that keep different numbers of channels; need as many of each; "
            "use a network without groups"
        )
    return torch.cat(parts)


def _follow(layer: Any, kept: Indices) -> None:
    """Cut every value that a layer has for each channel, in place."""
    for key, value in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
        if value.dim() and len(value) > 1 and key != "floor":
            setattr(layer, key, _of(value, kept) if isinstance(value, nn.Parameter) else value[list(kept)].clone())
    for count in ("num_features", "num_parameters"):
        if getattr(layer, count, 1) > 1:
            setattr(layer, count, len(kept))


def _all(kept: Indices | None, count: int) -> Indices:
    return tuple(range(count)) if kept is None else kept


def _of(value: Tensor, rows: Indices, columns: Indices | None = None) -> nn.Parameter:
    part = value.detach()[list(rows)]
    part = part if columns is None else part[:, list(columns)]
    return nn.Parameter(part.clone(), value.requires_grad)


def _relaxed(model: fx.GraphModule, flow: Flow) -> fx.GraphModule:
    """`model` with reshapes of cut values that only flatten written as such: the number of features is another."""
    cut = {n.name for n, kept in flow.values.items() if kept and n.target in RESHAPES and len(n.meta["shape"]) == 1}
    for node in model.graph.nodes:
        if node.name in cut:
            node.op, node.target, node.args, node.kwargs = "call_function", torch.flatten, (operands(node)[0], 1), {}
    return model
