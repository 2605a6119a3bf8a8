"""An ONNX file as a checked model: its one input, the tensor with its logits, and the operators between them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.errors import ShoalError, first_line

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, ValueInfoProto

NEEDED = ("onnx", "onnxruntime")
"""Packages that reading and comparing ONNX files needs."""
OLDEST = 7
"""The first version of ONNX's operators with today's rules of broadcasting."""
PROBABILITIES = ("Softmax", "LogSoftmax")
"""Operators that turn logits into probabilities; one at the end of a file is left out."""
DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True)
class Source:
    """A checked ONNX model: the name and shape of its input, the tensor that holds the logits, and what was left out.

    Numbers in `shape` are None where the file leaves a size open. `nodes` are those that the logits need, in order.
    """

    model: ModelProto
    name: str
    input: str
    shape: tuple[int | None, ...]
    logits: str
    nodes: tuple[NodeProto, ...]
    opset: int
    notes: tuple[str, ...]


def check_installed() -> None:
    """Raise ShoalError unless the packages for ONNX files are installed."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ShoalError(f"found no {missing[0]}; need {' and '.join(NEEDED)} for ONNX; pip install shoal[onnx]")


def read_content(path: Path) -> bytes:
    """The bytes of an ONNX file; weights that are in other files of its folder are put into it.

    Raises ShoalError when a file is missing or damaged, and when weights are in another folder.
    """
    check_installed()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ShoalError(f"found no readable ONNX file at {path} ({error}); need one; check the path") from error
    model = _parsed(content, str(path))
    return _with_weights(model, path) if _outside(model) else content


def _parsed(content: bytes, name: str) -> ModelProto:
    import onnx

    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's errors share no base class but Exception
        raise _unreadable(name, error) from error
    if not model.graph.node:
        raise ShoalError(f"found no network in {name}; need an ONNX file; export the network again")
    return model


def _unreadable(name: str, error: Exception) -> ShoalError:
    return ShoalError(
        f"found no readable ONNX at {name} ({type(error).__name__}: {first_line(error)}); need an intact file; export "
        "the network again"
    )


def _outside(model: ModelProto) -> list[str]:
    """The files that hold weights of `model`."""
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    tensors = [*model.graph.initializer, *(a.t for node in model.graph.node for a in node.attribute)]
    return sorted({ExternalDataInfo(tensor).location for tensor in tensors if uses_external_data(tensor)})


def _with_weights(model: ModelProto, path: Path) -> bytes:
    from onnx.external_data_helper import load_external_data_for_model

    away = [name for name in _outside(model) if Path(name).name != name]
    if away:
        raise ShoalError(
            f"found weights of {path} in {away[0]!r}, another folder; need them in the same folder, or in the file; "
            "save it again with onnx.save(model, FILE)"
        )
    try:
        load_external_data_for_model(model, str(path.parent))
    except Exception as error:  # errors of the system, of protobuf and of onnx's own checks
        raise ShoalError(
            f"found no readable weights of {path} in {', '.join(_outside(model))} ({first_line(error)}); need that "
            "file beside it; put it there, or export with external_data=False"
        ) from error
    return bytes(model.SerializeToString(deterministic=True))


def parse(content: bytes, name: str) -> Source:
    """The checked model in `content`; errors call it `name`.

    Raises ShoalError for damaged content, for several inputs, and unless one output has floating-point numbers.
    """
    import onnx

    check_installed()
    model = _parsed(content, name)
    try:
        onnx.checker.check_model(model)
    except Exception as error:
        raise _unreadable(name, error) from error
    opset = next((o.version for o in model.opset_import if o.domain in DOMAINS), OLDEST)
    if opset < OLDEST:
        raise ShoalError(
            f"found operators of version {opset} in {name}; need {OLDEST} or later; export with opset_version=17, say"
        )
    entrance, shape = _input(model, name)
    logits, notes = _logits(model, _output(model, name))
    return Source(model, name, entrance, shape, logits, _needed(model, logits), opset, notes)


def _input(model: ModelProto, name: str) -> tuple[str, tuple[int | None, ...]]:
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1 or not _is_float(inputs[0]):
        listed = ", ".join(value.name for value in inputs) or "none"
        raise ShoalError(
            f"found the inputs {listed} in {name}; need one, the images as float32; export the network with that alone"
        )
    shape = inputs[0].type.tensor_type.shape
    sizes = tuple(size.dim_value if size.HasField("dim_value") else None for size in shape.dim)
    if sizes and sizes[0] not in (None, 0, 1):
        raise ShoalError(
            f"found a fixed batch of {sizes[0]} images in {name}; need 1, or any number; export with a batch of 1 or "
            "a dynamic one"
        )
    return inputs[0].name, tuple(size or None for size in sizes)


def _output(model: ModelProto, name: str) -> str:
    outputs = [value.name for value in model.graph.output if _is_float(value)]
    if len(outputs) != 1:
        listed = ", ".join(value.name for value in model.graph.output)
        raise ShoalError(
            f"found the outputs {listed} in {name}; need one with float32 numbers, the logits; export the network with "
            "that alone"
        )
    return outputs[0]


def _is_float(value: ValueInfoProto) -> bool:
    import onnx

    return bool(value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT)


def _logits(model: ModelProto, output: str) -> tuple[str, tuple[str, ...]]:
    """The tensor before a Softmax at the end, or else `output`; and what was left out, as sentences."""
    makers = {made: node for node in model.graph.node for made in node.output}
    name = output
    notes: tuple[str, ...] = ()
    while name in makers and makers[name].op_type in (*PROBABILITIES, "Identity"):
        node = makers[name]
        if node.op_type in PROBABILITIES:
            notes = (f"removed {node.op_type} at the end ({label(node)})",)
        name = node.input[0]
    return (name, notes) if notes else (output, ())


def _needed(model: ModelProto, wanted: str) -> tuple[NodeProto, ...]:
    """The operators that `wanted` depends on, in the order of the file."""
    names, found = {wanted}, []
    for node in reversed(model.graph.node):
        if names & set(node.output):
            names |= set(node.input)
            found.append(node)
    return tuple(reversed(found))


def label(node: NodeProto) -> str:
    """The name of an operator, or of what it computes if it has none."""
    return str(node.name or (node.output[0] if node.output else node.op_type))


def kind(node: NodeProto) -> str:
    """The kind of an operator, with its domain unless that is ONNX's own."""
    return str(node.op_type) if node.domain in DOMAINS else f"{node.domain}.{node.op_type}"
