"""Operators with weights, and pools, as layers of PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shoal.conversion.building import Building
from shoal.conversion.operators import Operator
from shoal.conversion.values import Numbers, Value, check_size

MOST_PADDING = 1024


def tensor(array: Numbers) -> Tensor:
    """A copy of a constant as a float32 tensor."""
    return torch.tensor(np.ascontiguousarray(array), dtype=torch.float32)


def feature_maps(operator: Operator) -> Value:
    """The first input, if it is [N, C, H, W] in PyTorch's order."""
    value = operator.value()
    if value.order is not None or len(value.shape) != 3:
        raise operator.refused(
            f"an input of shape {value.file_shape} whose dimensions were reordered or reshaped",
            "images x channels x height x width",
            "export the network in that order (channels first)",
        )
    return value


def _pair(numbers: Sequence[int]) -> tuple[int, int]:
    """The first two numbers, for height and width."""
    return int(numbers[0]), int(numbers[1])


def _filled(layer: Any, weight: Numbers, bias: Numbers | None) -> Any:
    with torch.no_grad():
        layer.weight.copy_(tensor(weight))
        if bias is not None:
            layer.bias.copy_(tensor(bias))
    return layer


# ------------------------------------------------------------ padding


def padding_of(operator: Operator, value: Value, kernel: Sequence[int], stride: Sequence[int]) -> list[int]:
    """[top, left, bottom, right] of a convolution or pool on [C, H, W]."""
    auto, dilation = operator.get("auto_pad", "NOTSET"), operator.get("dilations", [1, 1])
    if auto in ("NOTSET", "VALID"):
        pads = [int(v) for v in operator.get("pads", [0, 0, 0, 0])] if auto == "NOTSET" else [0, 0, 0, 0]
    else:
        sizes = zip(value.shape[1:], kernel, stride, dilation, strict=True)
        whole = [max(0, (-(-n // s) - 1) * s + d * (k - 1) + 1 - n) for n, k, s, d in sizes]
        less, more = [p // 2 for p in whole], [p - p // 2 for p in whole]
        pads = [*less, *more] if auto == "SAME_UPPER" else [*more, *less]
    check_padding(operator, value, pads)
    return pads


def check_padding(operator: Operator, value: Value, pads: Sequence[int]) -> None:
    """Raise ShoalError unless `pads`, top, left, bottom and right, are usual."""
    if len(pads) != 4 or not all(0 <= p <= MOST_PADDING for p in pads):
        raise operator.refused(f"pads {list(pads)}", f"four numbers from 0 to {MOST_PADDING}")
    channels, height, width = value.shape
    check_size((channels, height + pads[0] + pads[2], width + pads[1] + pads[3]), operator.label)


def padded(building: Building, operator: Operator, value: Value, pads: Sequence[int]) -> tuple[Value, list[int]]:
    """The value with zeros around it where a layer cannot pad by itself; and the padding left for the layer."""
    top, left, bottom, right = pads
    if (top, left) == (bottom, right):
        return value, [top, left]
    module = nn.ZeroPad2d((left, right, top, bottom))
    return building.add(operator, module, value, part="pad"), [0, 0]


# ------------------------------------------------------------ convolutions and linear layers


def conv(building: Building, operator: Operator) -> Value:
    """Conv in two dimensions."""
    value, weight, bias = feature_maps(operator), operator.weights(1), operator.constant(2)
    groups = operator.get("group", 1)
    if weight.ndim != 4 or groups < 1 or weight.shape[1] * groups != value.shape[0]:
        raise operator.refused(
            f"weights of shape {weight.shape} on {value.shape[0]} channels", "a convolution in two dimensions"
        )
    kernel, stride = weight.shape[2:], operator.get("strides", [1, 1])
    value, left = padded(building, operator, value, padding_of(operator, value, kernel, stride))
    layer = nn.Conv2d(
        value.shape[0],
        weight.shape[0],
        (kernel[0], kernel[1]),
        _pair(stride),
        _pair(left),
        _pair(operator.get("dilations", [1, 1])),
        groups,
        bias=bias is not None,
    )
    return building.add(operator, _filled(layer, weight, bias), value)


def gemm(building: Building, operator: Operator) -> Value:
    """Gemm with constant weights: alpha x W + beta b."""
    weight, bias = operator.weights(1), operator.constant(2)
    if operator.get("transA", 0):
        raise operator.refused("transA", "images as rows")
    weight = weight.T if operator.get("transB", 0) else weight
    bias = None if bias is None else bias * np.float32(operator.get("beta", 1.0))
    return _linear(building, operator, weight * np.float32(operator.get("alpha", 1.0)), bias)


def matmul(building: Building, operator: Operator) -> Value:
    """MatMul with constant weights on the right."""
    return _linear(building, operator, operator.weights(1), None)


def _linear(building: Building, operator: Operator, weight: Numbers, bias: Numbers | None) -> Value:
    """A linear layer with `weight` [F, O] in the file's order of the features."""
    value = operator.value()
    if weight.ndim != 2 or value.file_shape != (1, weight.shape[0]):
        raise operator.refused(
            f"weights of shape {weight.shape} on values of shape {value.file_shape}", "one row of features an image"
        )
    order = value.places.ravel()
    own = np.empty((weight.shape[1], weight.shape[0]), np.float32)
    own[:, order] = weight.T
    layer = nn.Linear(weight.shape[0], weight.shape[1], bias=bias is not None)
    if bias is not None:
        bias = np.broadcast_to(bias.reshape(-1), weight.shape[1:])
    return building.add(operator, _filled(layer, own, bias), building.flat(operator, value))


def batch_norm(building: Building, operator: Operator) -> Value:
    """BatchNormalization with the statistics of the training."""
    value = operator.value()
    scale, bias, mean, variance = (operator.weights(i) for i in range(1, 5))
    flat = value.order is not None and len(value.file_shape) == 2
    value = building.flat(operator, value) if flat else value
    if not flat and value.order is not None:
        feature_maps(operator)
    places = value.places.ravel() if len(value.shape) == 1 else np.arange(value.shape[0])
    layer = (nn.BatchNorm1d if len(value.shape) == 1 else nn.BatchNorm2d)(
        value.shape[0], eps=operator.get("epsilon", 1e-5)
    )
    targets = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
    with torch.no_grad():
        for target, source in zip(targets, (scale, bias, mean, variance), strict=True):
            assert target is not None
            target[torch.from_numpy(places)] = tensor(source)
    return building.keeping(operator, layer, value)


# ------------------------------------------------------------ pools


def global_average(building: Building, operator: Operator) -> Value:
    """GlobalAveragePool."""
    return building.add(operator, nn.AdaptiveAvgPool2d(1), feature_maps(operator))


def global_maximum(building: Building, operator: Operator) -> Value:
    """GlobalMaxPool."""
    return building.add(operator, nn.AdaptiveMaxPool2d(1), feature_maps(operator))


def max_pool(building: Building, operator: Operator) -> Value:
    """MaxPool; padding at the end alone is PyTorch's ceil_mode, where that gives the same windows."""
    value, kernel, stride, pads = _window(operator)
    dilation = [int(d) for d in operator.get("dilations", [1, 1])]
    wanted = _pooled(operator, value, (kernel, stride, dilation), pads)
    for ceil in (False, True):
        layer = nn.MaxPool2d(_pair(kernel), _pair(stride), _pair(pads), _pair(dilation), ceil_mode=ceil)
        if all(2 * p <= k for p, k in zip(pads[:2], kernel, strict=True)) and _size(layer, value) == wanted:
            return building.add(operator, layer, value)
    raise operator.refused(f"pads {pads} for windows of {kernel}", "padding that PyTorch's max pool has", "pad before")


def average_pool(building: Building, operator: Operator) -> Value:
    """AveragePool, counting the padding or not."""
    value, kernel, stride, pads = _window(operator)
    counted = bool(operator.get("count_include_pad", 0)) or not any(pads)
    if counted and not operator.get("ceil_mode", 0):
        value, left = padded(building, operator, value, pads)
        return building.add(operator, nn.AvgPool2d(_pair(kernel), _pair(stride), _pair(left)), value)
    wanted = _pooled(operator, value, (kernel, stride, [1, 1]), pads)
    for ceil in (False, True):
        layer = nn.AvgPool2d(_pair(kernel), _pair(stride), _pair(pads), ceil, counted)
        if all(2 * p <= k for p, k in zip(pads[:2], kernel, strict=True)) and _size(layer, value) == wanted:
            return building.add(operator, layer, value)
    raise operator.refused(f"pads {pads} that are not counted", "padding that PyTorch's average pool has", "pad before")


def _window(operator: Operator) -> tuple[Value, list[int], list[int], list[int]]:
    """The input, the kernel, the stride, and the padding (top, left, bottom, right) of a pool."""
    value, kernel = feature_maps(operator), [int(k) for k in operator.get("kernel_shape", [])]
    stride = [int(s) for s in operator.get("strides", [1] * len(kernel))]
    if len(kernel) != 2 or len(stride) != 2 or min(*kernel, *stride) < 1:
        raise operator.refused(f"windows {kernel}", "windows in two dimensions")
    if operator.get("storage_order", 0) or len(operator.node.output) > 1:
        raise operator.refused("positions as results", "the values alone")
    return value, kernel, stride, padding_of(operator, value, kernel, stride)


def _pooled(
    operator: Operator, value: Value, window: tuple[list[int], list[int], list[int]], pads: list[int]
) -> tuple[int, ...]:
    """Height and width after a pool with `window` (kernel, stride, dilation), by the rule of ONNX."""
    sizes = zip(value.shape[1:], *window, pads[:2], pads[2:], strict=True)
    spans = [(n + a + b - d * (k - 1) - 1, s, n + a) for n, k, s, d, a, b in sizes]
    if not operator.get("ceil_mode", 0):
        return tuple(span // s + 1 for span, s, _ in spans)
    return tuple(-(-span // s) + (-(-span // s) * s < end) for span, s, end in spans)


def _size(layer: nn.Module, value: Value) -> tuple[int, ...]:
    return tuple(layer(torch.empty(1, *value.shape, device="meta")).shape[2:])
