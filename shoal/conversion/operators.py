"""One operator of an ONNX file: its attributes, inputs and constants, with errors that name it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from shoal.conversion.source import kind, label
from shoal.conversion.values import Numbers, Value
from shoal.errors import ShoalError

if TYPE_CHECKING:
    from onnx import NodeProto

Known = Value | Numbers
"""A value that depends on the images, or a constant."""


class Operator:
    """An operator with what is known about its inputs: values, constants, and None for inputs that are left out."""

    def __init__(self, node: NodeProto, known: Mapping[str, Known]) -> None:
        from onnx.helper import get_attribute_value

        self.node, self.kind, self.label = node, kind(node), label(node)
        self.attributes: dict[str, Any] = {a.name: get_attribute_value(a) for a in node.attribute}
        missing = [name for name in node.input if name and name not in known]
        if missing:
            raise self.refused(f"an input {missing[0]!r} that the file does not have", "an intact file")
        self.names: list[str] = list(node.input)
        self.inputs: list[Known | None] = [known[name] if name else None for name in self.names]

    def refused(self, found: str, need: str, do: str = "export the network without it") -> ShoalError:
        """The error for this operator."""
        return ShoalError(f"found {self.kind} with {found} at {self.label}; need {need}; {do}")

    def get(self, name: str, default: Any) -> Any:
        """An attribute, as text if it is bytes."""
        value = self.attributes.get(name, default)
        return value.decode(errors="replace") if isinstance(value, bytes) else value

    def value(self, index: int = 0) -> Value:
        """An input that depends on the images."""
        found = self.inputs[index] if index < len(self.inputs) else None
        if not isinstance(found, Value):
            raise self.refused(f"a constant as input {index}", "a value that depends on the images")
        return found

    def constant(self, index: int) -> Numbers | None:
        """A constant input, or None if it is left out."""
        found = self.inputs[index] if index < len(self.inputs) else None
        if isinstance(found, Value):
            raise self.refused(f"input {index} computed from the images", "a constant there", "replace that part")
        return found

    def weights(self, index: int) -> Numbers:
        """A constant input that must be there."""
        found = self.constant(index)
        if found is None:
            raise self.refused(f"no input {index}", "its weights")
        return found

    def numbers(self, name: str, index: int) -> list[int] | None:
        """Whole numbers that older versions have as the attribute `name`, and newer ones as input `index`."""
        if name in self.attributes:
            return [int(v) for v in self.attributes[name]]
        found = self.constant(index)
        return None if found is None else [int(v) for v in found.ravel()]
