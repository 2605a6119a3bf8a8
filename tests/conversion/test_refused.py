"""Files that cannot become a network: one sentence for each, with the operator and what to do."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="needs the onnx extra")

from onnx import ModelProto, NodeProto, TensorProto, helper

from shoal.conversion.network import convert
from shoal.conversion.source import read_content
from shoal.errors import ShoalError
from tests.conversion.specimens import (
    content,
    file,
    head,
    head_weights,
    keras_style,
    node,
    numbers,
    sizes,
    torch_style,
    with_outside,
)

SHAPE = (2, 8, 8)
FLOAT = TensorProto.FLOAT


def ending(*nodes: NodeProto, features: int = 128, **more: Any) -> ModelProto:
    """Operators from `x` to `f`, then a flatten and a linear layer."""
    weights = more.pop("weights", {}) | head_weights(features)
    return file(head("g", [*nodes, node("Flatten", ["f"], ["g"])]), weights, **more)


def changed(change: Callable[[ModelProto], Any]) -> ModelProto:
    model = torch_style()
    change(model)
    return model


def relu(**attributes: Any) -> NodeProto:
    return node("Relu", ["x"], ["f"], **attributes)


WIDE = numbers(3, 2, 3, 3)
ROWS: dict[str, tuple[Callable[[], ModelProto], str]] = {
    "operators without a rule": (
        lambda: ending(node("HardSwish", ["x"], ["h"], name="act"), node("Sigmoid", ["h"], ["f"], name="gate")),
        r"operators without a rule in net.onnx: HardSwish at act, Sigmoid at gate; need Add, .*; replace those layers",
    ),
    "another domain": (
        lambda: changed(lambda m: _foreign(m)),
        r"found operators without a rule in net.onnx: com.microsoft.FusedConv at",
    ),
    "a gate": (
        lambda: ending(node("Relu", ["x"], ["r"]), node("Mul", ["x", "r"], ["f"], name="se")),
        r"found Mul with two values that depend on the images at se; need a constant",
    ),
    "other limits": (
        lambda: ending(node("Clip", ["x"], ["f"], name="tanh", min=-1.0, max=1.0), opset=9),
        r"found Clip with the limits -1 and 1 at tanh; need 0 and 6",
    ),
    "a fixed batch": (
        lambda: file(*fixed(), given=(4, 2, 8, 8)),
        r"found a fixed batch of 4 images in net.onnx; need 1, or any number",
    ),
    "other images": (
        lambda: file(*fixed(), given=("N", 3, 32, 32)),
        r"found an input of any x 3 x 32 x 32 in net.onnx; need images x 2 x 8 x 8 as the data set has",
    ),
    "two inputs": (
        lambda: changed(lambda m: m.graph.input.append(helper.make_tensor_value_info("z", FLOAT, [1]))),
        r"found the inputs x, z in net.onnx; need one, the images",
    ),
    "two outputs": (
        lambda: file(*fixed(), outputs=(("y", FLOAT), ("f", FLOAT))),
        r"found the outputs y, f in net.onnx; need one with float32 numbers",
    ),
    "half precision": (
        lambda: changed(lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", TensorProto.FLOAT16)),
        r"found the inputs x in net.onnx; need one, the images as float32",
    ),
    "old operators": (
        lambda: changed(lambda m: setattr(m.opset_import[0], "version", 6)),
        r"found operators of version 6 in net.onnx; need 7 or later",
    ),
    "channels last in a convolution": (
        lambda: ending(
            node("Transpose", ["x"], ["t"], perm=[0, 1, 3, 2]),
            node("Conv", ["t", "w"], ["f"], name="c"),
            weights={"w": WIDE},
        ),
        r"found Conv with an input of shape \(1, 2, 8, 8\) whose dimensions were reordered or reshaped at c",
    ),
    "a convolution in one dimension": (
        lambda: ending(node("Conv", ["x", "w"], ["f"], name="c"), weights={"w": numbers(3, 2, 3)}),
        r"found Conv with weights of shape \(3, 2, 3\) on 2 channels at c; need a convolution in two dimensions",
    ),
    "computed weights": (
        lambda: ending(node("Conv", ["x", "x"], ["f"], name="c")),
        r"found Conv with input 1 computed from the images at c; need a constant there",
    ),
    "a constant for each pixel": (
        lambda: ending(node("Add", ["x", "b"], ["f"], name="position"), weights={"b": numbers(1, 2, 8, 8)}),
        r"found Add with a constant that differs between pixels at position; need one number, or one for each channel",
    ),
    "images that are merged": (
        lambda: file(
            head("f", [node("Reshape", ["x", "to"], ["f"], name="r")]), {"to": sizes(-1, 4)} | head_weights(4)
        ),
        r"found Reshape with a result of shape \(32, 4\) at r; need a network that treats images one by one",
    ),
    "images in another place": (
        lambda: ending(node("Transpose", ["x"], ["f"], name="t", perm=[1, 0, 2, 3])),
        r"found Transpose with the order \[1, 0, 2, 3\] at t; need the images first",
    ),
    "other orders in one sum": (
        lambda: ending(node("Transpose", ["x"], ["t"], perm=[0, 1, 3, 2]), node("Add", ["x", "t"], ["f"], name="s")),
        r"found Add with values whose dimensions are in different orders at s",
    ),
    "a reflected border": (
        lambda: ending(
            node("Pad", ["x", "p"], ["f"], name="pad", mode="reflect"), weights={"p": sizes(*[0, 0, 1, 1] * 2)}
        ),
        r"found Pad with mode reflect and value 0 at pad; need zeros around height and width",
    ),
    "a huge border": (
        lambda: ending(node("Pad", ["x", "p"], ["f"], name="pad"), weights={"p": sizes(0, 0, 10**9, 0, 0, 0, 0, 0)}),
        r"found Pad with pads \[1000000000, 0, 0, 0\] at pad; need four numbers from 0 to 1024",
    ),
    "a large border of a convolution": (
        lambda: ending(node("Conv", ["x", "w"], ["f"], name="c", pads=[999] * 4), weights={"w": numbers(40, 2, 3, 3)}),
        r"found a value of shape \(40, 2004, 2004\) at c; need at most 16,777,216 numbers for one image",
    ),
    "a huge constant": (
        lambda: ending(
            node("ConstantOfShape", ["n"], ["z"], name="zeros"),
            node("Add", ["x", "z"], ["f"]),
            weights={"n": sizes(10**6, 10**6)},
        ),
        r"found ConstantOfShape with a constant of too many numbers at zeros; need at most 67,108,864",
    ),
    "a max over images": (
        lambda: ending(node("ReduceMax", ["x"], ["f"], name="m", axes=[0, 1])),
        r"found ReduceMax with axes \[0, 1\] of values of shape \(1, 2, 8, 8\) at m; need height and width",
    ),
    "weights of another size": (
        lambda: ending(relu(), features=64),
        r"found Gemm with weights of shape \(64, 4\) on values of shape \(1, 128\) at head",
    ),
    "an attribute of the wrong type": (
        lambda: ending(node("Transpose", ["x"], ["f"], name="t", perm=[0, 7, 1, 2])),
        r"found an operator that cannot be converted at t in net.onnx \(.*Error: .*need an intact file",
    ),
    "logits without a layer": (
        lambda: file([node("Flatten", ["x"], ["y"])], {}),
        r"found an output in net.onnx that no layer computes; need the logits",
    ),
    "an operator before its input": (
        lambda: changed(lambda m: m.graph.node.reverse()),
        r"found no readable ONNX at net.onnx \(ValidationError: ",
    ),
    "no operators": (lambda: changed(lambda m: m.graph.ClearField("node")), r"found no network in net.onnx"),
}


def fixed() -> tuple[list[NodeProto], dict[str, np.ndarray]]:
    return head("f", [node("Flatten", ["x"], ["f"])]), head_weights(128)


def _foreign(model: ModelProto) -> None:
    model.graph.node[0].op_type, model.graph.node[0].domain = "FusedConv", "com.microsoft"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


@pytest.mark.parametrize("row", ROWS)
def test_a_file_that_cannot_be_converted_gets_one_sentence(row: str) -> None:
    make, text = ROWS[row]
    with pytest.raises(ShoalError, match=text) as caught:
        convert(content(make()), SHAPE, "net.onnx")
    assert "\n" not in str(caught.value)


def test_weights_and_values_together_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.conversion.building.MOST_IN_ALL", 2_000)
    names = ["x", *(f"v{i}" for i in range(8)), "y"]
    many = [node("Gemm", [a, "w"], [b]) for a, b in itertools.pairwise(names)]  # one weight in many layers
    model = file(many, {"w": numbers(16, 16)}, ("N", 16))
    with pytest.raises(ShoalError, match=r"found Gemm with a network that is too large at v\d+; need at most 2,000"):
        convert(content(model), (1, 4, 4), "net.onnx")


@pytest.mark.parametrize("seed", range(3))
def test_damaged_bytes_give_a_network_or_one_sentence(seed: int) -> None:
    rng, whole = np.random.default_rng(seed), content(keras_style())
    said: list[str] = []
    for _ in range(60):
        damaged = bytearray(whole[: rng.integers(1, len(whole) + 1)] if rng.random() < 0.3 else whole)
        for place in rng.integers(0, min(900, len(damaged)), 3):  # the operators come first
            damaged[place] = rng.integers(256)
        try:
            convert(bytes(damaged), SHAPE, "net.onnx")
        except ShoalError as error:
            said.append(str(error))
    assert len(said) > 20
    assert all("net.onnx" in text or " at " in text for text in said)


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (None, r"found no readable ONNX file at .*net.onnx"),
        (b"", r"found no network in .*net.onnx"),
        (b"not a protobuf at all" * 9, r"found no readable ONNX at .*net.onnx"),
    ],
)
def test_what_is_no_onnx_is_refused(written: bytes | None, text: str, tmp_path: Path) -> None:
    if written is not None:
        (tmp_path / "net.onnx").write_bytes(written)
    with pytest.raises(ShoalError, match=text):
        read_content(tmp_path / "net.onnx")


def test_weights_in_a_file_beside_it_are_read_and_put_into_the_content(tmp_path: Path) -> None:
    with_outside(torch_style(), tmp_path)
    found = read_content(tmp_path / "net.onnx")
    (tmp_path / "weights.bin").unlink()
    own, other = (convert(c, SHAPE, "net.onnx").network.state_dict() for c in (content(torch_style()), found))
    assert own.keys() == other.keys()
    assert all(bool((own[name] == other[name]).all()) for name in own)
    with pytest.raises(ShoalError, match=r"found no readable weights of .*net.onnx in weights.bin"):
        read_content(tmp_path / "net.onnx")


@pytest.mark.parametrize("location", ["/etc/hostname", "../weights.bin", "below/weights.bin"])
def test_weights_in_another_folder_are_not_read(location: str, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    with_outside(torch_style(), tmp_path)
    model = ModelProto.FromString(path.read_bytes())
    for tensor in model.graph.initializer:
        tensor.external_data[0].value = location
    path.write_bytes(content(model))
    with pytest.raises(ShoalError, match=r"another folder; need them in the same folder"):
        read_content(path)
