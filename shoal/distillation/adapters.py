"""Adapters on the features of a network. They are trained together with it and removed afterwards.

Layers have different names in student and teacher. `attach` gives the features that a loss compares the same name in
both, so that one tap serves both. An adapter is the layer in between: a trained regressor, a margin, or an identity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from shoal.errors import ShoalError
from shoal.surgery.normal_form import module_calls
from shoal.surgery.traced import Traced
from shoal.surgery.tracing import shapes

PREFIX = "hints."


@dataclass(frozen=True)
class Feature:
    """The output of the submodule `site`; with `before`, its input."""

    site: str
    before: bool = False


def attach(
    model: nn.Module, shape: tuple[int, ...], adapters: Mapping[str, tuple[Feature, nn.Module]]
) -> fx.GraphModule:
    """A copy of `model`, for images of `shape` [C, H, W], that also applies each adapter to its feature.

    The output of adapter `a` is the tap ``hints.a``. Logits and names of other submodules do not change.
    `surgery.drop_unread` removes the adapters. Raises ShoalError when a site is not a submodule.
    """
    traced = shapes(model, shape)
    traced.train(model.training)
    for name, (feature, adapter) in adapters.items():
        node = _node(traced, feature)
        path = f"{PREFIX}{name}"
        device = next((p.device for p in traced.parameters()), torch.device("cpu"))
        traced.add_submodule(path, adapter.to(device).train(model.training))
        with traced.graph.inserting_after(node):
            traced.graph.call_module(path, (node,))
    traced.recompile()
    return traced


def feature_shape(traced: Traced, feature: Feature) -> tuple[int, ...]:
    """The shape [C, H, W] or [D] of a feature for one image. Raises ShoalError when the site is not a submodule."""
    result: tuple[int, ...] = _node(traced.normal, feature).meta["shape"]
    return result


def _node(traced: fx.GraphModule, feature: Feature) -> fx.Node:
    calls = module_calls(traced)
    if feature.site not in calls:
        raise ShoalError(f"found no submodule {feature.site!r} to read; need one that forward calls; see relu_sites")
    node = calls[feature.site]
    return node.all_input_nodes[0] if feature.before else node


def stage_ends(traced: Traced) -> tuple[str, ...]:
    """The last ReLU site of each stage with feature maps, in order, without the stem.

    Raises ShoalError for a network without such a site.
    """
    ends = {site.stage: site.name for site in traced.sites if len(site.shape) == 3 and site.stage > 0}
    if not ends:
        raise ShoalError("found no stage with maps; need a convolutional network with ReLUs for feature losses")
    return tuple(ends[stage] for stage in sorted(ends))


def embedding(traced: Traced) -> Feature:
    """The input of the classifier. Raises ShoalError unless one linear layer computes the logits."""
    result = next(node for node in traced.normal.graph.nodes if node.op == "output").args[0]
    if not isinstance(result, fx.Node) or not _is(traced.normal, result, nn.Linear):
        raise ShoalError(f"found logits from {result}; need one linear layer at the end for this loss")
    return Feature(str(result.target), before=True)


def _is(traced: fx.GraphModule, node: fx.Node, kind: type[nn.Module]) -> bool:
    return node.op == "call_module" and isinstance(traced.get_submodule(str(node.target)), kind)


def regressor(channels: int, teacher_channels: int) -> nn.Module:
    """A 1x1 convolution, batch norm and ReLU: [N, channels, H, W] -> [N, teacher_channels, H, W].

    The regressor of FitNets has no batch norm. That of the public codes has one and needs it: at the usual weight of
    100, a plain convolution diverges.
    """
    return nn.Sequential(nn.Conv2d(channels, teacher_channels, 1), nn.BatchNorm2d(teacher_channels), nn.ReLU())


def connector(channels: int, teacher_channels: int) -> nn.Module:
    """A 1x1 convolution and batch norm: [N, channels, H, W] -> [N, teacher_channels, H, W].

    It is the student transform of the feature overhaul.
    """
    return nn.Sequential(nn.Conv2d(channels, teacher_channels, 1, bias=False), nn.BatchNorm2d(teacher_channels))


class MarginReLU(nn.Module):
    """max(x, margin) with one negative margin per channel: the teacher transform of the feature overhaul."""

    margin: Tensor

    def __init__(self, margin: Tensor) -> None:
        super().__init__()
        self.register_buffer("margin", margin.reshape(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the same shape."""
        return torch.maximum(x, self.margin.to(x.dtype))


def margins(traced: Traced, site: str) -> Tensor:
    """The mean [C] (float32) of the negative inputs of the ReLU `site`, from the batch norm before it.

    Before a residual sum, the batch norm after the convolution with the most weights is used, as in the authors' code.
    Raises ShoalError when there is no batch norm, or when it has no scale and shift.
    """
    normal = traced.normal
    level = [_node(normal, Feature(site, before=True))]
    while level:
        norms = [node for node in level if _is(normal, node, nn.BatchNorm2d)]
        if norms:
            norm = normal.get_submodule(str(max(norms, key=lambda n: _weights_before(normal, n)).target))
            assert isinstance(norm, nn.BatchNorm2d)
            return expected_negative(norm)
        level = [source for node in level for source in node.all_input_nodes]
    raise ShoalError(f"found no batch norm before {site!r}; need one for the margins of overhaul; use another loss")


def _weights_before(traced: fx.GraphModule, norm: fx.Node) -> int:
    source = norm.all_input_nodes[0]
    owned = traced.get_submodule(str(source.target)).parameters() if source.op == "call_module" else ()
    return sum(p.numel() for p in owned)


def expected_negative(norm: nn.BatchNorm2d) -> Tensor:
    """E[x | x < 0] for x ~ N(shift, scale^2), [C]: shift - scale * phi(shift / scale) / Phi(-shift / scale).

    Raises ShoalError for a batch norm without scale and shift.
    """
    if not norm.affine:
        raise ShoalError("found a batch norm without scale and shift; need both for margins; use another loss")
    # In logarithms, because both factors underflow when a channel is almost never negative.
    scale, shift = norm.weight.detach().double().abs().clamp_min(1e-6), norm.bias.detach().double()
    ratio = shift / scale
    log_density = -0.5 * (ratio.square() + math.log(2 * math.pi))
    mean = shift - scale * (log_density - torch.special.log_ndtr(-ratio)).exp()
    return mean.clamp_max(0.0).float()
