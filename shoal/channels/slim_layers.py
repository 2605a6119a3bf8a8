"""Layers that run at several widths, each of which uses the first channels of shared weights (Yu et al., ICLR'19)."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.errors import ShoalError
from shoal.reduction.masks import MaskedClamp, MaskedReLU


def kept(channels: int, part: float) -> int:
    """The number of channels of a layer at width `part`, rounded half up, at least 1."""
    return max(1, int(channels * part + 0.5))


class SlimLayer(nn.Module, ABC):
    """A layer with several widths, of which it uses the fraction `part` of its channels.

    It reads as many channels as it receives. `index` is the position of the current width in the network's list of
    widths, or None for a width that is not in the list.
    """

    part: float = 1.0
    index: int | None = -1

    @abstractmethod
    def plain(self, channels: int) -> nn.Module:
        """A separate plain layer of the current width, for inputs of `channels`. It shares no memory with this one."""


class SlimConv2d(SlimLayer, nn.Conv2d):
    """Uses the first outputs and inputs of a convolution; with groups, the first groups.

    Holds the parameters of `conv`. If `whole` is true, it returns all outputs at every width.
    """

    def __init__(self, conv: nn.Conv2d, whole: bool) -> None:
        nn.Module.__init__(self)
        self.__dict__ |= {k: v for k, v in conv.__dict__.items() if k not in nn.Module().__dict__}
        self.weight, self.bias, self.whole = conv.weight, conv.bias, whole

    @property
    def outputs(self) -> int:
        """The number of output channels at the current width."""
        return self.out_channels if self.whole else kept(self.out_channels, self.part)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, c, H, W] to [N, outputs, H', W']. Raises ShoalError where the width splits a group."""
        groups, outputs = self._sizes(x.shape[1])
        bias = None if self.bias is None else self.bias[:outputs]
        weight = self.weight[:outputs, : x.shape[1] // groups]
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, groups)

    def _sizes(self, channels: int) -> tuple[int, int]:
        """Groups and outputs for inputs of `channels`. Raises ShoalError where the width splits a group."""
        outputs = self.outputs
        if self.groups == 1:
            return 1, outputs
        groups, rest = divmod(channels * self.groups, self.in_channels)
        if rest or groups * self.out_channels != outputs * self.groups:
            raise ShoalError(
                f"found {self.groups} groups of {self.in_channels} channels, of which a width uses {channels}; need "
                "whole groups; choose other widths"
            )
        return groups, outputs

    def plain(self, channels: int) -> nn.Conv2d:
        """A plain convolution of the current width."""
        groups, outputs = self._sizes(channels)
        conv = nn.Conv2d(
            channels, outputs, self.kernel_size, self.stride, self.padding, self.dilation, groups,  # type: ignore[arg-type]
            self.bias is not None, self.padding_mode,
        )  # fmt: skip
        return _filled(conv, {"weight": self.weight[:outputs, : channels // groups], "bias": self.bias})


class SlimLinear(SlimLayer, nn.Linear):
    """Uses the first inputs and outputs of a linear layer, whose parameters it holds.

    If `whole` is true, it returns all outputs at every width.
    """

    def __init__(self, linear: nn.Linear, whole: bool) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias, self.whole = linear.weight, linear.bias, whole

    @property
    def outputs(self) -> int:
        """The number of output features at the current width."""
        return self.out_features if self.whole else kept(self.out_features, self.part)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, c] to [N, outputs]."""
        outputs = self.outputs
        return F.linear(x, self.weight[:outputs, : x.shape[1]], None if self.bias is None else self.bias[:outputs])

    def plain(self, channels: int) -> nn.Linear:
        """A plain linear layer of the current width."""
        outputs = self.outputs
        linear = nn.Linear(channels, outputs, self.bias is not None)
        return _filled(linear, {"weight": self.weight[:outputs, :channels], "bias": self.bias})


class SlimBatchNorm2d(SlimLayer):
    """A separate batch norm for each width (Yu et al., ICLR'19): its own statistics, scale and shift.

    `outputs` are the numbers of channels of the widths.
    """

    def __init__(self, norm: nn.BatchNorm2d, outputs: Sequence[int]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(_first(norm, channels) for channels in outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [N, c, H, W]. Raises ShoalError for a width that has no batch norm."""
        return self._own()(x)

    def _own(self) -> nn.Module:
        if self.index is None:
            raise ShoalError(
                f"found no batch norm for width {self.part:g}; need one of the widths that the network was made for; "
                "or make it with shared_affine=True"
            )
        return self.norms[self.index]

    def plain(self, channels: int) -> nn.Module:
        """A copy of the batch norm of the current width."""
        return copy.deepcopy(self._own())


class SharedAffineBatchNorm2d(SlimLayer):
    """One scale and shift for all widths, with statistics for each of `outputs` channels (Yu and Huang, ICCV'19).

    A width that is not in the list normalises by the statistics of the batch and stores none.
    """

    def __init__(self, norm: nn.BatchNorm2d, outputs: Sequence[int]) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.norms = nn.ModuleList(_first(norm, channels, affine=False) for channels in outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [N, c, H, W]."""
        weight, bias = self.weight[: x.shape[1]], self.bias[: x.shape[1]]
        if self.index is None:
            return F.batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)
        norm: Any = self.norms[self.index]
        factor = norm.momentum or 0.0
        if norm.training:
            norm.num_batches_tracked.add_(1)
            if norm.momentum is None:  # None means the mean over all batches, as in torch
                factor = 1 / float(norm.num_batches_tracked)
        return F.batch_norm(x, norm.running_mean, norm.running_var, weight, bias, norm.training, factor, norm.eps)

    def plain(self, channels: int) -> nn.BatchNorm2d:
        """A plain batch norm of the current width."""
        statistics: Any = self.norms[-1 if self.index is None else self.index]
        norm = nn.BatchNorm2d(channels, statistics.eps, statistics.momentum).train(statistics.training)
        return _filled(norm, {"weight": self.weight, "bias": self.bias} | statistics.state_dict())


class SlimMaskedReLU(SlimLayer, MaskedReLU):
    """Uses the masks of the first channels."""

    def check(self, x: Tensor) -> None:
        """Raise ShoalError unless [H, W] equals that of the mask and there are at most as many channels."""
        if x.shape[1] > len(self.mask) or x.shape[2:] != self.mask.shape[1:]:
            super().check(x)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, c, H, W] to the same shape."""
        self.check(x)
        floor = self.floor[:, : x.shape[1]].to(x.dtype)
        return MaskedClamp.apply(x, floor) if x.requires_grad else torch.clamp(x, min=floor)

    def plain(self, channels: int) -> MaskedReLU:
        """A plain masked ReLU with the masks of the first `channels`."""
        return MaskedReLU(self.mask[:channels].clone())


def _filled(layer: Any, values: Mapping[str, Tensor | None]) -> Any:
    """`layer` with copies of these values, cut to the layer's own outputs."""
    with torch.no_grad():
        for name, value in values.items():
            if value is not None:
                own = getattr(layer, name)
                own.copy_(value[: len(own)] if own.dim() else value)
    return layer.to(next(v for v in values.values() if v is not None).device)


def _first(norm: nn.BatchNorm2d, channels: int, affine: bool = True) -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(channels, norm.eps, norm.momentum, norm.affine and affine, norm.track_running_stats)
    values = {k: v[:channels] if v.dim() else v for k, v in norm.state_dict().items()}
    made.load_state_dict({k: values[k] for k in made.state_dict()})
    return made.to(next((v.device for v in norm.state_dict().values()), torch.device("cpu"))).train(norm.training)
