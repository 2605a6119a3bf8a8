"""Operators that only move values: they compute nothing in PyTorch, except for padding and concatenation."""

from __future__ import annotations

import math

import numpy as np
from torch import nn

from shoal.conversion.building import Building, in_axes
from shoal.conversion.layers import check_padding
from shoal.conversion.modules import Concatenation
from shoal.conversion.operators import Operator
from shoal.conversion.values import Numbers, Value


def _moved(operator: Operator, order: Numbers) -> Value:
    try:
        return operator.value().ordered(order)
    except ValueError as error:
        raise operator.refused(
            f"a result of shape {order.shape}", "a network that treats images one by one, with the batch first"
        ) from error


def transpose(building: Building, operator: Operator) -> Value:
    """Transpose of anything but the images."""
    value = operator.value()
    axes = operator.get("perm", list(range(len(value.file_shape)))[::-1])
    if axes[:1] != [0]:
        raise operator.refused(f"the order {list(axes)}", "the images first")
    return _moved(operator, value.places.transpose(axes))


def reshape(building: Building, operator: Operator) -> Value:
    """Reshape to constant sizes."""
    value, sizes = operator.value(), operator.numbers("shape", 1)
    if sizes is None:
        raise operator.refused("no shape", "constant sizes")
    if not operator.get("allowzero", 0):
        sizes = [value.file_shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    return _moved(operator, value.places.reshape(sizes))


def flatten(building: Building, operator: Operator) -> Value:
    """Flatten from an axis on."""
    value, axis = operator.value(), operator.get("axis", 1)
    axis = axis if axis >= 0 else axis + len(value.file_shape)
    return _moved(operator, value.places.reshape(math.prod(value.file_shape[:axis]), -1))


def squeeze(building: Building, operator: Operator) -> Value:
    """Squeeze of given axes, or of all of size 1."""
    axes = operator.numbers("axes", 1)
    return _moved(operator, operator.value().places.squeeze(None if axes is None else tuple(axes)))


def unsqueeze(building: Building, operator: Operator) -> Value:
    """Unsqueeze at given axes."""
    return _moved(operator, np.expand_dims(operator.value().places, tuple(operator.numbers("axes", 1) or ())))


def identity(building: Building, operator: Operator) -> Value:
    """Identity, Dropout in inference, and Cast to float32."""
    if operator.kind == "Cast" and operator.get("to", 1) != 1:
        raise operator.refused("another type than float32", "float32 throughout", "export the network in float32")
    return operator.value()


def pad(building: Building, operator: Operator) -> Value:
    """Pad with zeros around the height and width."""
    value, pads, fill = operator.value(), operator.numbers("pads", 1), operator.constant(2)
    filled = operator.get("value", 0.0) if fill is None else float(fill.ravel()[0]) if fill.size else 0.0
    mode = operator.get("mode", "constant")
    if mode != "constant" or filled or pads is None:
        raise operator.refused(f"mode {mode} and value {filled:g}", "zeros around height and width")
    rank, given = len(value.file_shape), operator.numbers("axes", 3)
    named = list(range(rank)) if given is None else [axis % rank for axis in given]
    orders = value.axes()
    if rank != 4 or not orders or len(pads) != 2 * len(named):
        raise operator.refused(f"values of shape {value.file_shape}", "feature maps, with four dimensions")
    amounts = [(0, 0)] * 4  # by PyTorch's axes
    for axis, before, after in zip(named, pads, pads[len(named) :], strict=False):
        amounts[orders[0][axis]] = before, after
    if any(amounts[0]) or any(amounts[1]):
        raise operator.refused("padding of images or channels", "zeros around height and width")
    (top, bottom), (left, right) = amounts[2:]
    check_padding(operator, value, [top, left, bottom, right])
    made = building.add(operator, nn.ZeroPad2d((left, right, top, bottom)), value)
    return made.ordered(in_axes(made.shape, orders[0]))


def concat(building: Building, operator: Operator) -> Value:
    """Concat along the channels, or of features."""
    parts = [operator.value(i) for i in range(len(operator.inputs))]
    axis = operator.get("axis", 1) % len(parts[0].file_shape)
    if len(parts[0].file_shape) == 2 and axis == 1:
        return _concat_features(building, operator, parts)
    shared = [axes for axes in parts[0].axes() if axes[axis] == 1 and all(axes in part.axes() for part in parts)]
    if not shared:
        raise operator.refused(f"axis {axis} of values of shape {parts[0].file_shape}", "the axis of the channels")
    made = building.add(operator, Concatenation(1), *parts)
    return made.ordered(in_axes(made.shape, shared[0]))


def _concat_features(building: Building, operator: Operator, parts: list[Value]) -> Value:
    flat = [building.flat(operator, part) for part in parts]
    starts = np.cumsum([0, *(part.shape[0] for part in flat[:-1])])
    orders = [part.places + start for part, start in zip(flat, starts, strict=True)]
    return building.add(operator, Concatenation(1), *flat).ordered(np.concatenate(orders, axis=1))
