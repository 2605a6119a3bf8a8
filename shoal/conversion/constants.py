"""The constants of an ONNX file: its weights, and what operators compute from them alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from shoal.conversion.operators import Known, Operator
from shoal.conversion.source import Source
from shoal.conversion.values import Numbers, Value

if TYPE_CHECKING:
    from onnx import NodeProto

FOLDED = (
    *("Constant", "ConstantOfShape", "Range", "Identity", "Cast", "Reshape", "Transpose", "Squeeze", "Unsqueeze"),
    *("Flatten", "Gather", "Slice", "Concat", "Add", "Sub", "Mul", "Div", "Neg", "Sqrt", "Reciprocal", "ReduceProd"),
    *("Equal", "Where", "Floor"),
)
"""Operators that may be computed on constants: arithmetic of sizes, and weights in another form."""
MOST = 2**26
"""Largest number of entries of a computed constant."""


def weights_of(source: Source) -> dict[str, Known]:
    """The tensors in the file, by name. Floating-point numbers become float32."""
    from onnx.numpy_helper import to_array

    return {tensor.name: _single(to_array(tensor)) for tensor in source.model.graph.initializer}


def _single(array: Numbers) -> Numbers:
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def size_of(operator: Operator) -> Numbers:
    """The result of a Shape operator, for a batch of 1."""
    found = operator.inputs[0]
    shape = found.file_shape if isinstance(found, Value) else operator.weights(0).shape
    return np.array(shape[operator.get("start", 0) : operator.get("end", len(shape))], np.int64)


def computed(operator: Operator, opset: int) -> list[Numbers]:
    """The results of an operator in `FOLDED` on constants. Raises ShoalError for results that are too large."""
    given = [i for i in operator.inputs if isinstance(i, np.ndarray)]
    _check_result(operator, given)
    inputs = dict(zip([name for name in operator.names if name], given, strict=True))
    return [_single(np.asarray(array)) for array in _evaluated(operator.node, inputs, opset)]


def _check_result(operator: Operator, given: list[Numbers]) -> None:
    """Raise ShoalError before an operator makes too many numbers."""
    most = math.prod(max(1, array.size) for array in given) if operator.kind == "Gather" else 0
    if operator.kind in ("Add", "Sub", "Mul", "Div", "Equal", "Where"):
        most = math.prod(np.broadcast_shapes(*(array.shape for array in given)))
    if operator.kind == "ConstantOfShape" and given:
        most = math.prod(int(v) for v in given[0].ravel())
    if operator.kind == "Range":
        start, limit, delta = (float(array.ravel()[0]) for array in given)
        most = int(abs((limit - start) / delta))
    if most > MOST:
        raise operator.refused("a constant of too many numbers", f"at most {MOST:,}", "check the file")


def _evaluated(node: NodeProto, inputs: dict[str, Numbers], opset: int) -> list[Numbers]:
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator

    kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in inputs.items()}
    takes = [helper.make_tensor_value_info(name, kinds[name], array.shape) for name, array in inputs.items()]
    gives = [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in node.output]
    graph = helper.make_graph([node], "constants", takes, gives)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    return list(ReferenceEvaluator(model).run(None, inputs))
