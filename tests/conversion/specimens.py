"""ONNX files as other frameworks write them, made node by node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

Weights = dict[str, Any]
Parts = tuple[list[NodeProto], Weights]
node = helper.make_node
FIRST: tuple[Any, ...] = ("N", 2, 8, 8)
LAST: tuple[Any, ...] = ("N", 8, 8, 2)
TO_FIRST, TO_LAST = [0, 3, 1, 2], [0, 2, 3, 1]


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).normal(0, 0.5, shape).astype(np.float32)


def sizes(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def file(
    nodes: Sequence[NodeProto],
    weights: Weights,
    given: Sequence[Any] = FIRST,
    outputs: Sequence[tuple[str, int]] = (("y", TensorProto.FLOAT),),
    opset: int = 17,
) -> ModelProto:
    """A model of these operators, whose input is `x`."""
    graph = helper.make_graph(
        list(nodes),
        "specimen",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, given)],
        [helper.make_tensor_value_info(name, kind, ["N", None]) for name, kind in outputs],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def content(model: ModelProto) -> bytes:
    return bytes(model.SerializeToString())


# ------------------------------------------------------------ parts


def norm(name: str, channels: int) -> Weights:
    values = [numbers(channels, seed=i) for i in range(4)]
    values[3] = np.abs(values[3]) + 0.5
    return {f"{name}{i}": value for i, value in enumerate(values)}


def head(x: str, nodes: Sequence[NodeProto] = ()) -> list[NodeProto]:
    """A linear layer on `x` that gives `y`, after other operators."""
    return [*nodes, node("Gemm", [x, "hw", "hb"], ["y"], name="head")]


def head_weights(features: int) -> Weights:
    return {"hw": numbers(features, 4), "hb": numbers(4)}


def torch_style() -> ModelProto:
    """Convolution, batch norm, residual sum, global pool: what torch.onnx.export writes for a small ResNet."""
    nodes = [
        node("Conv", ["x", "w"], ["a"], name="/stem/conv/Conv", pads=[1, 1, 1, 1]),
        node("BatchNormalization", ["a", "n0", "n1", "n2", "n3"], ["b"], name="/stem/bn/BatchNormalization"),
        node("Relu", ["b"], ["c"], name="/stem/relu/Relu"),
        node("Conv", ["c", "v", "vb"], ["d"], name="/block/conv/Conv", pads=[1, 1, 1, 1], group=3),
        node("Add", ["d", "c"], ["e"]),
        node("Relu", ["e"], ["f"], name="/block/relu/Relu"),
        node("Dropout", ["f"], ["g"]),
        node("GlobalAveragePool", ["g"], ["h"]),
        node("Flatten", ["h"], ["i"]),
    ]
    weights = {"w": numbers(6, 2, 3, 3), "v": numbers(6, 2, 3, 3, seed=1), "vb": numbers(6)}
    return file(head("i", nodes), weights | norm("n", 6) | head_weights(6))


def keras_style() -> ModelProto:
    """Channels last outside of convolutions, padding at the end only, a flatten in that order, and a Softmax."""
    nodes = [
        node("Pad", ["x", "pads"], ["p"], name="model/pad"),
        node("Transpose", ["p"], ["t"], perm=TO_FIRST),
        node("Conv", ["t", "w"], ["c"], name="model/conv/Conv2D", strides=[2, 2], auto_pad="SAME_UPPER"),
        node("Add", ["c", "b"], ["cb"]),
        node("Relu", ["cb"], ["r"], name="model/relu"),
        node("MaxPool", ["r"], ["m"], kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER"),
        node("Transpose", ["m"], ["l"], perm=TO_LAST),
        node("Reshape", ["l", "to"], ["f"]),
        node("BatchNormalization", ["f", "n0", "n1", "n2", "n3"], ["fn"]),
        node("MatMul", ["fn", "hw"], ["z"], name="model/dense/MatMul"),
        node("Add", ["z", "hb"], ["zb"], name="model/dense/BiasAdd"),
        node("Softmax", ["zb"], ["y"], name="model/dense/Softmax"),
    ]
    weights = {"pads": sizes(0, 0, 1, 0, 0, 1, 0, 0), "w": numbers(3, 2, 3, 3), "b": numbers(3, 1, 1)}
    weights |= {"to": sizes(-1, 27)} | norm("n", 27) | head_weights(27)
    return file(nodes, weights, LAST)


def keras_between() -> ModelProto:
    """Sums, concatenations, constants and means on values with channels last."""
    nodes = [
        node("Mul", ["x", "scale"], ["s"], name="rescaling"),
        node("Sub", ["s", "means"], ["n"]),
        node("Transpose", ["n"], ["t"], perm=TO_FIRST),
        node("Conv", ["t", "w"], ["c"], pads=[1, 1, 1, 1]),
        node("Transpose", ["c"], ["l"], perm=TO_LAST),
        node("Add", ["l", "b"], ["lb"]),
        node("Relu", ["lb"], ["r"]),
        node("Concat", ["r", "n"], ["k"], axis=3),
        node("ReduceMean", ["k"], ["m"], axes=[1, 2], keepdims=0),
        node("ReduceMax", ["r"], ["g"], axes=[1, 2], keepdims=1),
        node("Squeeze", ["g", "where"], ["q"]),
        node("Concat", ["m", "q"], ["j"], axis=-1),
    ]
    weights = {"scale": np.float32(0.5), "means": numbers(2), "w": numbers(3, 2, 3, 3), "b": numbers(3)}
    return file(head("j", nodes), weights | {"where": sizes(1, 2)} | head_weights(8), LAST)


def sizes_computed() -> ModelProto:
    """x.view(x.size(0), -1) as older exporters write it, a BN as arithmetic, and channels last for a flatten."""
    nodes = [
        node("Div", ["x", "std"], ["s"]),
        node("Conv", ["s", "w"], ["c"], strides=[2, 1], dilations=[1, 2], pads=[0, 0, 1, 2]),
        node("Mul", ["c", "scale"], ["d"]),
        node("Add", ["shift", "d"], ["e"]),
        node("Clip", ["e"], ["six"], min=0.0, max=6.0),
        node("Clip", ["six"], ["r"], min=0.0),
        node("Shape", ["r"], ["size"]),
        node("Gather", ["size", "zero"], ["images"]),
        node("Unsqueeze", ["images"], ["one"], axes=[0]),
        node("Concat", ["one", "rest"], ["to"], axis=0),
        node("Transpose", ["r"], ["l"], perm=TO_LAST),
        node("Reshape", ["l", "to"], ["f"]),
    ]
    weights = {"std": numbers(2, 1, 1) + 2, "w": numbers(3, 2, 2, 2), "scale": numbers(3, 1, 1)}
    weights |= {"shift": numbers(1, 3, 1, 1), "zero": np.int64(0), "rest": sizes(-1)} | head_weights(96)
    return file(head("f", nodes), weights, opset=9)


def pools() -> ModelProto:
    """Average and maximum pools with padding on one side, counted or not, and a sum of three."""
    two = {"kernel_shape": [2, 2], "strides": [2, 2]}
    three = {"kernel_shape": [3, 3], "strides": [2, 2]}
    nodes = [
        node("Relu", ["x"], ["r"]),
        node("AveragePool", ["r"], ["a"], pads=[0, 0, 1, 1], count_include_pad=1, **three),
        node("AveragePool", ["r"], ["b"], pads=[1, 1, 0, 0], count_include_pad=1, **three),
        node("AveragePool", ["r"], ["c"], **two),
        node("MaxPool", ["r"], ["d"], pads=[1, 1, 0, 0], auto_pad="NOTSET", **three),
        node("Sum", ["a", "b", "c"], ["e"]),
        node("Sub", ["e", "d"], ["f"]),
        node("GlobalMaxPool", ["f"], ["g"]),
        node("Reshape", ["g", "to"], ["h"]),
    ]
    return file(head("h", nodes), {"to": sizes(0, -1)} | head_weights(2))


def uncounted() -> ModelProto:
    """Average pools that leave the padding out of the mean, as Keras has them; no `Graph` has such."""
    three = {"kernel_shape": [3, 3], "strides": [2, 2]}
    nodes = [
        node("AveragePool", ["x"], ["a"], pads=[1, 1, 1, 1], **three),
        node("AveragePool", ["x"], ["b"], auto_pad="SAME_UPPER", **three),
        node("AveragePool", ["x"], ["c"], kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
        node("Sum", ["a", "b", "c"], ["d"]),
        node("Flatten", ["d"], ["e"]),
    ]
    return file(head("e", nodes), head_weights(32))


def fixed_batch() -> ModelProto:
    """A file for one image at a time, with that size in a Reshape."""
    nodes = [
        node("Constant", [], ["w"], value=numpy_helper.from_array(numbers(3, 2, 3, 3))),
        node("Conv", ["x", "w"], ["c"]),
        node("Relu", ["c"], ["r"]),
        node("Reshape", ["r", "to"], ["f"]),
    ]
    return file(head("f", nodes), {"to": sizes(1, 108)} | head_weights(108), (1, 2, 8, 8))


def scikit_style() -> ModelProto:
    """A perceptron on flat pixels, with a label and probabilities as outputs."""
    nodes = [
        node("Cast", ["x"], ["c"], to=TensorProto.FLOAT),
        node("MatMul", ["c", "w"], ["m"]),
        node("Add", ["m", "b"], ["a"]),
        node("Relu", ["a"], ["r"]),
        node("Gemm", ["r", "hw", "hb"], ["z"], alpha=0.5, beta=2.0),
        node("Softmax", ["z"], ["p"]),
        node("Identity", ["p"], ["y"]),
        node("ArgMax", ["p"], ["label"], axis=1),
    ]
    weights = {"w": numbers(64, 6), "b": numbers(1, 6)} | head_weights(6)
    return file(nodes, weights, ("N", 64), (("label", TensorProto.INT64), ("y", TensorProto.FLOAT)))


SPECIMENS: dict[str, tuple[Callable[[], ModelProto], tuple[int, int, int], int]] = {
    "torch": (torch_style, (2, 8, 8), 2),
    "keras": (keras_style, (2, 8, 8), 1),
    "keras, between": (keras_between, (2, 8, 8), 1),
    "computed sizes": (sizes_computed, (2, 8, 8), 1),
    "pools": (pools, (2, 8, 8), 1),
    "fixed batch": (fixed_batch, (2, 8, 8), 1),
    "scikit": (scikit_style, (1, 8, 8), 1),
}
"""Each specimen, the images that it takes, and the number of its ReLUs' layers (ReLU6 is none)."""


def with_outside(model: ModelProto, folder: Any, location: str = "weights.bin") -> None:
    """Write `model` to `folder`/net.onnx, with its weights in a file beside it."""
    onnx.save(model, folder / "net.onnx", save_as_external_data=True, location=location, size_threshold=0)
