"""Operators that compute entry by entry, and means and maxima over height and width."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from shoal.conversion.building import Building
from shoal.conversion.layers import tensor
from shoal.conversion.modules import Difference, Scale, Shift, Sum
from shoal.conversion.operators import Operator
from shoal.conversion.values import Numbers, Value


def relu(building: Building, operator: Operator) -> Value:
    """Relu."""
    return building.keeping(operator, nn.ReLU(), operator.value())


def clip(building: Building, operator: Operator) -> Value:
    """Clip from 0 to 6 (ReLU6), or from 0 on (ReLU)."""
    bounds = []
    for index, (name, default) in enumerate((("min", -np.inf), ("max", np.inf)), start=1):
        found = operator.constant(index)
        bounds.append(float(operator.get(name, default)) if found is None else float(found.ravel()[0]))
    low, high = bounds
    if low != 0 or not (high == 6 or high >= np.finfo(np.float32).max):
        raise operator.refused(
            f"the limits {low:g} and {high:g}", "0 and 6, or 0 and none", "train it with ReLU or ReLU6"
        )
    return building.keeping(operator, nn.ReLU6() if high == 6 else nn.ReLU(), operator.value())


def add(building: Building, operator: Operator) -> Value:
    """Add of two values, or of a value and a constant, which becomes the bias of the layer before if it can."""
    constant = _constant(operator, either=True)
    if constant is None:
        return _joined(building, operator, Sum())
    return _shifted(building, operator, constant)


def add_all(building: Building, operator: Operator) -> Value:
    """Sum of values."""
    return operator.value() if len(operator.inputs) == 1 else _joined(building, operator, Sum())


def subtract(building: Building, operator: Operator) -> Value:
    """Sub of two values, or of a constant from a value."""
    constant = _constant(operator, either=False)
    if constant is None:
        return _joined(building, operator, Difference())
    return _shifted(building, operator, -constant)


def multiply(building: Building, operator: Operator) -> Value:
    """Mul of a value and a constant."""
    constant = _constant(operator, either=True)
    if constant is None:
        raise operator.refused("two values that depend on the images", "a constant as one of them")
    return _scaled(building, operator, constant)


def divide(building: Building, operator: Operator) -> Value:
    """Div of a value by a constant."""
    constant = _constant(operator, either=False)
    if constant is None or not constant.all():
        raise operator.refused("a divisor that depends on the images or is 0", "another constant as divisor")
    return _scaled(building, operator, 1 / constant)


def _constant(operator: Operator, either: bool) -> Numbers | None:
    """The constant operand, or None for two values; afterwards the first input is the value."""
    inputs, names = operator.inputs, operator.names
    if either and isinstance(inputs[0], np.ndarray):
        inputs[:], names[:] = inputs[::-1], names[::-1]
    operator.value()
    return inputs[1] if isinstance(inputs[1], np.ndarray) else None


def _joined(building: Building, operator: Operator, module: nn.Module) -> Value:
    """A module on two or more values of one shape, whose entries are in one order."""
    parts = [operator.value(i) for i in range(len(operator.inputs))]
    if len({part.file_shape for part in parts}) > 1:
        shown = " and ".join(str(part.file_shape) for part in parts)
        raise operator.refused(f"values of shapes {shown}", "values of one shape")
    if len({part.shape for part in parts}) > 1:
        parts = [building.flat(operator, part) for part in parts]
    if any(not np.array_equal(part.places, parts[0].places) for part in parts):
        raise operator.refused("values whose dimensions are in different orders", "one order for both")
    return building.add(operator, module, *parts).ordered(parts[0].places)


def _spread(operator: Operator, constant: Numbers) -> Numbers:
    """The constant for each channel: [C, 1, 1] or [F], in PyTorch's order."""
    try:
        wide = operator.value().spread(constant)
    except ValueError as error:
        raise operator.refused(
            f"a constant of shape {constant.shape} and values of shape {operator.value().file_shape}",
            "a constant that has no further dimension",
        ) from error
    if wide.ndim == 1:
        return wide
    single = wide[:, :1, :1]
    if (wide != single).any():
        raise operator.refused("a constant that differs between pixels", "one number, or one for each channel")
    return single


def _shifted(building: Building, operator: Operator, constant: Numbers) -> Value:
    wide, layer, value = tensor(_spread(operator, constant)), building.layer(operator), operator.value()
    if not isinstance(layer, (nn.Conv2d, nn.Linear)):
        return building.keeping(operator, Shift(wide), value)
    with torch.no_grad():
        own = wide.flatten() if layer.bias is None else layer.bias + wide.flatten()
    layer.bias = nn.Parameter(own)
    return value


def _scaled(building: Building, operator: Operator, constant: Numbers) -> Value:
    return building.keeping(operator, Scale(tensor(_spread(operator, constant))), operator.value())


def mean(building: Building, operator: Operator) -> Value:
    """ReduceMean over height and width."""
    return _reduced(building, operator, nn.AdaptiveAvgPool2d(1))


def maximum(building: Building, operator: Operator) -> Value:
    """ReduceMax over height and width."""
    return _reduced(building, operator, nn.AdaptiveMaxPool2d(1))


def _reduced(building: Building, operator: Operator, module: nn.Module) -> Value:
    value, axes = operator.value(), operator.numbers("axes", 1)
    rank = len(value.file_shape)
    over = {axis % rank for axis in axes} if axes is not None else set(range(rank))
    if not any({order[axis] for axis in over} == {2, 3} for order in value.axes() if len(order) == 4):
        raise operator.refused(f"axes {sorted(over)} of values of shape {value.file_shape}", "height and width")
    kept = [1 if axis in over else size for axis, size in enumerate(value.file_shape)]
    if not operator.get("keepdims", 1):
        kept = [size for axis, size in enumerate(kept) if axis not in over]
    made = building.add(operator, module, value)
    return made.ordered(made.places.reshape(kept))


COMPUTED: dict[str, Callable[[Building, Operator], Value]] = {
    "Relu": relu,
    "Clip": clip,
    "Add": add,
    "Sum": add_all,
    "Sub": subtract,
    "Mul": multiply,
    "Div": divide,
    "ReduceMean": mean,
    "ReduceMax": maximum,
}
"""The operators of this module."""
