"""Cut channels out of a network: record which ones stay, as text for a `Spec`, and remove the rest.

`torch_pruning` chooses the channels; this module only cuts. A network that was cut can therefore be loaded without the
package that chose its channels.
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
    """Outputs of a layer that stay: their indices in rising order, among the `of` outputs that it had."""

    indices: Indices
    of: int

    def __post_init__(self) -> None:
        """Raise ShoalError unless the indices rise and lie in range, and at least one stays."""
        rising = all(a < b for a, b in pairwise(self.indices))
        if not self.indices or not rising or self.indices[0] < 0 or self.indices[-1] >= self.of:
            raise ShoalError(f"found outputs {list(self.indices)} to keep; need rising indices below {self.of}")


def written(kept: Mapping[str, Kept]) -> tuple[str, ...]:
    """One text per layer, such as ``layer1.0.conv1=0-3,5/16``: outputs 0 to 3 and 5 of 16 stay."""
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
    """Parse what `written` wrote. Raises ShoalError for other texts, and for a layer that is named twice."""
    found: dict[str, Kept] = {}
    for text in texts:
        name, _, places = text.rpartition("=")
        ranges, _, of = places.rpartition("/")
        count = _number(of)
        if not name or name in found or count is None:
            raise ShoalError(f"found {text!r:.80} for channels kept; need each layer once, as in conv1=0-3,5/16")
        found[name] = Kept(_places(ranges, count, text), count)
    return found


def _number(text: str) -> int | None:
    # At most seven digits: no layer has more outputs, and a damaged file must not fill the memory.
    return int(text) if text.isdecimal() and len(text) <= 7 else None


def _places(ranges: str, of: int, text: str) -> Indices:
    places: list[int] = []
    for run in ranges.split(","):
        first, _, last = run.partition("-")
        low, high = _number(first), _number(last or first)
        if low is None or high is None or high >= of:
            raise ShoalError(f"found {text!r:.80} for channels kept; need indices below {of}, as in conv1=0-3,5/16")
        places += range(low, high + 1)
    return tuple(places)


def composed(first: Mapping[str, Kept], then: Mapping[str, Kept]) -> dict[str, Kept]:
    """What stays when a network that kept `first` is cut again and keeps `then`, as indices of the original network."""
    joined = dict(first)
    for name, kept in then.items():
        before = first.get(name)
        joined[name] = kept if before is None else Kept(tuple(before.indices[i] for i in kept.indices), before.of)
    return joined


def keep_channels(model: nn.Module, shape: tuple[int, ...], kept: Mapping[str, Kept]) -> fx.GraphModule:
    """A copy of `model`, for images of `shape` [C, H, W], whose named layers keep only the outputs in `kept`.

    The names are those of convolutions and linear layers. Everything that reads their outputs (other layers, batch
    norms, ReLU masks, depthwise convolutions) is cut to match. Names and remaining weights do not change. Raises
    ShoalError for a name that is no such layer, for a different number of outputs, and where channels that were cut
    differently are combined (the message names the node).
    """
    traced = shapes(model, shape)
    _check(traced, kept)
    flow = follow(traced, {name: one.indices for name, one in kept.items()})
    cut = replace(_relaxed(normalise(model), flow), _layers(model, flow))
    shapes(cut, shape)  # raises if the forward pass contains a fixed number of channels
    return cut


def _check(traced: fx.GraphModule, kept: Mapping[str, Kept]) -> None:
    names = dict(traced.named_modules())
    for name, one in kept.items():
        layer = names.get(name)
        if not isinstance(layer, ROOTS) or is_depthwise(layer):
            raise ShoalError(f"found no layer {name!r} with outputs to cut; need the network whose channels were cut")
        if (has := len(layer.weight)) != one.of:
            raise ShoalError(
                f"found {has} outputs at {name}; need {one.of}, those of the network whose channels were cut; "
                "leave its width as it was"
            )


def _layers(model: nn.Module, flow: Flow) -> dict[str, nn.Module]:
    """All layers that read or return fewer channels, cut."""
    own = dict(normalise(model).named_modules())  # keeps train or eval mode; `shapes` returns a copy in eval mode
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
    """The weights of the remaining rows and columns, group by group."""
    gives, reads = conv.out_channels // conv.groups, conv.in_channels // conv.groups
    parts = []
    for group in range(conv.groups):
        own = [row for row in rows if row // gives == group]
        parts.append(conv.weight.detach()[own][:, [c % reads for c in columns if c // reads == group]])
    if len({part.shape for part in parts}) > 1 or 0 in parts[0].shape:
        raise ShoalError(
            f"found groups at {name} that keep different numbers of channels; need equal numbers; "
            "use a network without groups"
        )
    return torch.cat(parts)


def _follow(layer: Any, kept: Indices) -> None:
    """Cut every parameter and buffer that has one value per channel, in place."""
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
    """Replace flattening reshapes of cut values by `torch.flatten`, because their number of features changes."""
    cut = {n.name for n, kept in flow.values.items() if kept and n.target in RESHAPES and len(n.meta["shape"]) == 1}
    for node in model.graph.nodes:
        if node.name in cut:
            node.op, node.target, node.args, node.kwargs = "call_function", torch.flatten, (operands(node)[0], 1), {}
    return model
