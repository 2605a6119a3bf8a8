"""Classifiers with attention and alignment (*Self-Distillation*, TPAMI'21, section 3.2 and Fig. 3).

The figure does not show every layer, so the layers follow the authors' public code: a separable convolution is two
depthwise-pointwise pairs, and the attention mask covers all channels. Features are average-pooled to one value per
channel, for any image size. They are the output of the submodule ``exits.<site>.features``, and for the final
classifier of ``exits.final.features``.

Table 8 compares the paper's attention module with those of SENet (Hu et al., CVPR'18), CBAM (Woo et al., ECCV'18) and
BAM (Park et al., BMVC'18). CBAM and BAM have the layers of their authors' public code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from shoal.errors import ShoalError
from shoal.exits.classifiers import PREFIX, attach, check_grid
from shoal.models.bottleneck import SqueezeExcite
from shoal.surgery.normal_form import edit, normalise
from shoal.surgery.sites import relu_sites

FINAL = PREFIX + "final"
"""Prefix of the final classifier's features. Its own layers keep their names."""


class SepConv(nn.Module):
    """Two depthwise-pointwise pairs, the first with stride 2: [N, c_in, H, W] -> [N, c_out, ceil(H/2), ceil(W/2)]."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.depthwise1 = nn.Conv2d(c_in, c_in, 3, stride=2, padding=1, groups=c_in, bias=False)
        self.pointwise1 = nn.Conv2d(c_in, c_in, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_in)
        self.relu1 = nn.ReLU()
        self.depthwise2 = nn.Conv2d(c_in, c_in, 3, padding=1, groups=c_in, bias=False)
        self.pointwise2 = nn.Conv2d(c_in, c_out, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, c_in, H, W] to [N, c_out, ceil(H/2), ceil(W/2)]."""
        x = self.relu1(self.bn1(self.pointwise1(self.depthwise1(x))))
        return self.relu2(self.bn2(self.pointwise2(self.depthwise2(x))))


class Attention(nn.Module):
    """Multiplies features [N, C, H, W] by a mask in (0, 1) of the same shape, learned at half the resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = SepConv(channels, channels)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the same shape."""
        mask = self.relu(self.bn(self.conv(x)))
        return x * torch.sigmoid(F.interpolate(mask, size=x.shape[2:], mode="bilinear", align_corners=False))


class ChannelAndSpatialAttention(nn.Module):
    """CBAM: multiplies each channel, and then each position, of features [N, C, H, W] by a value in (0, 1).

    The value of a channel is the sum of one MLP's results for the channels' averages and for their maxima. The value
    of a position comes from a 7x7 convolution of the maximum and the average over the channels.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        # 1x1 convolutions are the MLP for both columns of pooled values, so it is one layer that is called once.
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.relu = nn.ReLU()
        self.fc2 = nn.Conv2d(hidden, channels, 1)
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.bn = nn.BatchNorm2d(1, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the same shape."""
        pooled = torch.cat((x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)), dim=2)
        x = x * torch.sigmoid(self.fc2(self.relu(self.fc1(pooled))).sum(2, keepdim=True))
        over_channels = torch.cat((x.amax(1, keepdim=True), x.mean(1, keepdim=True)), dim=1)
        return x * torch.sigmoid(self.bn(self.conv(over_channels)))


class BottleneckAttention(nn.Module):
    """BAM: multiplies features [N, C, H, W] by values in (1, 2), from an MLP on averages and dilated convolutions.

    Each value is 1 + sigmoid(channel x position), as in the public code; the paper's text adds channel and position.
    """

    def __init__(self, channels: int, reduction: int = 16, dilation: int = 4) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.channel = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), *_normed(nn.Conv2d(channels, hidden, 1)), nn.Conv2d(hidden, channels, 1)
        )
        dilated = (nn.Conv2d(hidden, hidden, 3, padding=dilation, dilation=dilation) for _ in range(2))
        self.spatial = nn.Sequential(
            *_normed(nn.Conv2d(channels, hidden, 1)),
            *(layer for conv in dilated for layer in _normed(conv)),
            nn.Conv2d(hidden, 1, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the same shape."""
        return x + x * torch.sigmoid(self.channel(x) * self.spatial(x))


def _normed(conv: nn.Conv2d) -> tuple[nn.Module, ...]:
    return conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU()


ATTENTIONS: dict[str, Callable[[int], nn.Module]] = {
    "aligned": nn.Identity,
    "attention": Attention,
    "attention-se": SqueezeExcite,
    "attention-cbam": ChannelAndSpatialAttention,
    "attention-bam": BottleneckAttention,
}
"""Kinds of aligned classifiers: name -> the module before the alignment network, for a number of channels."""


class AlignedExit(nn.Module):
    """An attention module, an alignment network, average pooling, and one linear layer: [N, C, H, W] -> [N, classes].

    `channels` lists the channels of the input, C, and after each separable convolution. `kind` is one of `ATTENTIONS`;
    ``aligned`` has no attention.
    """

    def __init__(self, channels: Sequence[int], classes: int, *, kind: str = "attention") -> None:
        super().__init__()
        self.attention = ATTENTIONS[kind](channels[0])
        self.align = nn.Sequential(*(SepConv(a, b) for a, b in pairwise(channels)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.features = nn.Flatten()
        self.fc = nn.Linear(channels[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, classes] for features [N, C, H, W]."""
        return self.fc(self.features(self.pool(self.align(self.attention(x)))))


def alignment(channels: int, halvings: int, features: int) -> tuple[int, ...]:
    """Channels before and after each convolution of the alignment network: one convolution per halving, at least one.

    Each convolution doubles the channels, up to `features`; the last one always has `features`, as the final
    classifier.
    """
    steps = max(1, halvings)
    return (channels, *(min(features, channels << i) for i in range(1, steps)), features)


def add_aligned_exits(
    model: nn.Module, after: Sequence[str], classes: int, shape: tuple[int, ...], *, kind: str = "attention"
) -> fx.GraphModule:
    """A copy of `model` with an aligned classifier after each named submodule, for images of `shape` [C, H, W].

    Its forward pass returns the logits of all classifiers, weakest first. `kind` is one of `ATTENTIONS`. Exits of kind
    ``aligned`` use only operations that private inference supports; all others multiply two private values. Raises
    ShoalError when a name has no feature map, when the model does not end in a linear layer, and for point clouds.
    """
    check_grid(shape)
    marked = edit(model, mark_features)
    last = [site.shape for site in relu_sites(marked, shape) if len(site.shape) == 3][-1]
    features = final_layer(marked).in_features

    def make(site: tuple[int, ...]) -> nn.Module:
        halvings = round(math.log2(site[1] / last[1]))
        return AlignedExit(alignment(site[0], halvings, features), classes, kind=kind)

    return attach(marked, after, shape, make)


def feature_taps(model: nn.Module) -> tuple[str, ...]:
    """Names of the submodules that output each classifier's features [N, D], weakest first.

    Raises ShoalError for a model without aligned exits.
    """
    traced = normalise(model)
    called = (str(node.target) for node in traced.graph.nodes if node.op == "call_module")
    taps = [name for name in called if name.startswith(PREFIX) and name.endswith(".features")]
    if len(taps) < 2:
        raise ShoalError("found no aligned exits; need them for a feature loss; call add_aligned_exits first")
    return (*(name for name in taps if not name.startswith(f"{FINAL}.")), f"{FINAL}.features")


def add_adapters(model: nn.Module, taps: Sequence[str]) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """A copy of `model` with a linear layer on the features at each of `taps`, and the names of these layers.

    The layers' outputs are read only as taps, for the feature loss of the public code. `surgery.drop_unread` removes
    them after training.
    """
    traced = normalise(model)
    device = next(traced.parameters()).device
    names = []
    for node in list(traced.graph.nodes):
        if node.op == "call_module" and node.target in taps:
            name = str(node.target).removesuffix(".features") + ".adapter"
            size = final_layer(traced).in_features
            traced.add_submodule(name, nn.Linear(size, size).to(device).train(traced.training))
            with traced.graph.inserting_after(node):
                traced.graph.call_module(name, (node,))
            names.append(name)
    traced.recompile()
    return traced, tuple(names)


def _result(traced: fx.GraphModule) -> fx.Node:
    output = next(n for n in traced.graph.nodes if n.op == "output")
    results = output.args[0]
    last = results[-1] if isinstance(results, (tuple, list)) else results
    assert isinstance(last, fx.Node)
    return last


def final_layer(traced: fx.GraphModule) -> nn.Linear:
    """The linear layer that computes the last classifier's logits. Raises ShoalError when it is not a linear layer."""
    node = _result(traced)
    layer = traced.get_submodule(str(node.target)) if node.op == "call_module" else None
    if not isinstance(layer, nn.Linear):
        raise ShoalError(
            f"found {node.name} as the model's last operation; need a linear layer, whose input is the features; "
            "use plain exits, or end forward with nn.Linear"
        )
    return layer


def mark_features(traced: fx.GraphModule) -> None:
    """Insert a named identity before the final linear layer, so that a tap can read its input."""
    final_layer(traced)
    result = _result(traced)
    traced.add_submodule(f"{FINAL}.features", nn.Identity())
    with traced.graph.inserting_before(result):
        result.args = (traced.graph.call_module(f"{FINAL}.features", result.args),)
