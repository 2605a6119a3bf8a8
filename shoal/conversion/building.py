"""A network under construction from an ONNX file: its modules, their names and the order of their calls."""

from __future__ import annotations

import keyword
import math
import re
from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from shoal.conversion.modules import OnnxNetwork, Step
from shoal.conversion.operators import Known, Operator
from shoal.conversion.source import Source
from shoal.conversion.values import Numbers, Value, check_size, natural

MOST_IN_ALL = 2**28
"""Largest number of entries of all weights, constants and values for one image, so that no file fills the memory."""


class Building:
    """The modules and calls so far, and `known`: the values and constants of the file, by name."""

    def __init__(self, source: Source, images: Value) -> None:
        self.source = source
        self.modules: dict[str, nn.Module] = {}
        self.steps: list[Step] = []
        self.known: dict[str, Known] = {source.input: images}
        self.left = MOST_IN_ALL
        self.taken = {*dir(OnnxNetwork), "training", "steps", "last"}
        self.readers = Counter(name for node in source.nodes for name in node.input)
        self.readers[source.logits] += 1

    def add(self, operator: Operator, module: nn.Module, *inputs: Value, part: str = "") -> Value:
        """Call `module` on `inputs`; the result in PyTorch's order. `part` is added to the operator's name."""
        shape = _result_shape(module.eval(), [value.shape for value in inputs])
        check_size(shape, operator.label)
        self.spend(operator, math.prod(shape) + sum(tensor.numel() for tensor in module.state_dict().values()))
        name = self._name(f"{operator.label}_{part}" if part else operator.label, operator.kind)
        self.modules[name] = module
        self.steps.append(Step(name, tuple(value.step for value in inputs)))
        return Value(name, shape)

    def spend(self, operator: Operator, entries: int) -> None:
        """Raise ShoalError when weights, values and constants together have too many entries."""
        self.left -= entries
        if self.left < 0:
            raise operator.refused("a network that is too large", f"at most {MOST_IN_ALL:,} numbers", "check the file")

    def keeping(self, operator: Operator, module: nn.Module, value: Value) -> Value:
        """Call `module`, which treats all entries alike, on `value`, whose order stays."""
        return replace(self.add(operator, module, value), order=value.order)

    def flat(self, operator: Operator, value: Value) -> Value:
        """The same value as one dimension [F] in PyTorch."""
        if len(value.shape) == 1:
            return value
        return self.add(operator, nn.Flatten(), value, part="flatten").ordered(value.places)

    def layer(self, operator: Operator) -> nn.Module | None:
        """The layer that gives the first input of `operator`, if nothing else reads it; otherwise None."""
        value, name = operator.value(), operator.names[0]
        found = self.modules.get(value.step)
        plain = self.steps and self.steps[-1].name == value.step and self.readers[name] == 1
        return found if plain else None

    def network(self) -> OnnxNetwork:
        """The network of all steps, in eval mode."""
        return OnnxNetwork(self.modules, self.steps).eval()

    def _name(self, wanted: str, kind: str) -> str:
        """A free name for a submodule, made of the letters and digits in `wanted`."""
        name = re.sub(r"[^0-9A-Za-z]+", "_", wanted).strip("_") or kind
        name = f"{kind.lower()}_{name}" if name[0].isdigit() or keyword.iskeyword(name) else name
        number = 2
        found = name
        while found in self.taken:
            found, number = f"{name}_{number}", number + 1
        self.taken.add(found)
        return found


def _result_shape(module: nn.Module, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape, without the batch, that `module` gives; nothing is computed."""
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    hollow: dict[str, Tensor] = {name: tensor.to("meta") for name, tensor in state.items()}
    images = tuple(torch.empty(1, *shape, device="meta") for shape in shapes)
    with torch.no_grad():
        return tuple(functional_call(module, hollow, images).shape[1:])


def in_axes(shape: tuple[int, ...], axes: tuple[int, ...]) -> Numbers:
    """The order of a value of PyTorch's `shape` whose axes the file has in the order `axes`."""
    return natural(shape).transpose(axes)
