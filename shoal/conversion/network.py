"""Conversion of an ONNX file to a PyTorch network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from shoal.conversion import layers, movements
from shoal.conversion.arithmetic import COMPUTED
from shoal.conversion.building import Building
from shoal.conversion.constants import FOLDED, computed, size_of, weights_of
from shoal.conversion.modules import OnnxNetwork
from shoal.conversion.operators import Known, Operator
from shoal.conversion.source import Source, kind, label, parse
from shoal.conversion.values import Value, image
from shoal.errors import ShoalError, first_line

Rule = Callable[[Building, Operator], Value]

RULES: dict[str, Rule] = COMPUTED | {
    "Conv": layers.conv,
    "Gemm": layers.gemm,
    "MatMul": layers.matmul,
    "BatchNormalization": layers.batch_norm,
    "MaxPool": layers.max_pool,
    "AveragePool": layers.average_pool,
    "GlobalAveragePool": layers.global_average,
    "GlobalMaxPool": layers.global_maximum,
    "Pad": movements.pad,
    "Concat": movements.concat,
    "Transpose": movements.transpose,
    "Reshape": movements.reshape,
    "Flatten": movements.flatten,
    "Squeeze": movements.squeeze,
    "Unsqueeze": movements.unsqueeze,
    "Identity": movements.identity,
    "Dropout": movements.identity,
    "Cast": movements.identity,
}
"""What each operator becomes if it depends on the images."""


@dataclass(frozen=True)
class Converted:
    """The network of an ONNX file, the file, where its images have their dimensions, and what was left out."""

    network: OnnxNetwork
    source: Source
    images: Value

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out, as sentences."""
        return self.source.notes


def convert(content: bytes, shape: tuple[int, ...], name: str) -> Converted:
    """The network in `content`, the bytes of an ONNX file, for images of `shape` ([C, H, W]); errors call it `name`.

    The network takes images [N, C, H, W] also where the file has channels last, and returns logits also where the file
    ends with a Softmax. Raises ShoalError for a damaged file, other images, and operators that have no rule.
    """
    source = parse(content, name)
    _check_kinds(source)
    images = image(shape, source.shape, name)
    building = Building(source, images)
    node = source.nodes[0] if source.nodes else None
    try:
        building.known |= weights_of(source)
        for node in source.nodes:
            _take(building, Operator(node, building.known))
        return Converted(_finished(building), source, images)
    except ShoalError:
        raise
    except Exception as error:  # a damaged file can have any attribute and any constant
        where = label(node) if node is not None else name
        raise ShoalError(
            f"found an operator that cannot be converted at {where} in {name} ({type(error).__name__}: "
            f"{first_line(error)}); need an intact file; export the network again"
        ) from error


def _check_kinds(source: Source) -> None:
    """Raise ShoalError for operators that have no rule."""
    odd = {kind(node): label(node) for node in reversed(source.nodes) if not _is_known(kind(node))}
    if odd:
        listed = ", ".join(f"{name} at {place}" for name, place in sorted(odd.items())[:5])
        raise ShoalError(
            f"found operators without a rule in {source.name}: {listed}; need {', '.join(sorted(RULES))}; replace "
            "those layers and train the network, or define it in PyTorch and give --weights"
        )


def _is_known(name: str) -> bool:
    return name in RULES or name in FOLDED or name == "Shape"


def _take(building: Building, operator: Operator) -> None:
    """Add the results of an operator to what is known."""
    depends = any(isinstance(given, Value) for given in operator.inputs)
    results: list[Known]
    if operator.kind == "Shape":
        results = [size_of(operator)]
    elif depends:
        results = [_rule(operator)(building, operator)]
    else:
        results = _constants(building, operator)
    building.known |= zip(operator.node.output, results, strict=False)


def _rule(operator: Operator) -> Rule:
    if operator.kind not in RULES:
        raise operator.refused("an input that depends on the images", "a constant there")
    return RULES[operator.kind]


def _constants(building: Building, operator: Operator) -> list[Known]:
    if operator.kind not in FOLDED:
        raise operator.refused("constants alone", "a value that depends on the images")
    found = computed(operator, building.source.opset)
    building.spend(operator, sum(array.size for array in found))
    return list(found)


def _finished(building: Building) -> OnnxNetwork:
    """The network, whose last step gives the logits [N, classes]."""
    source = building.source
    logits = building.known.get(source.logits)
    if not isinstance(logits, Value) or not logits.step:
        raise ShoalError(
            f"found an output in {source.name} that no layer computes; need the logits; export the network again"
        )
    maker = next(node for node in source.nodes if source.logits in node.output)
    if len(logits.shape) > 1:
        logits = building.flat(Operator(maker, building.known), logits)
    if not np.array_equal(logits.places.ravel(), np.arange(logits.places.size)):
        raise ShoalError(
            f"found logits of {source.name} in another order than their layer; need a linear layer at the end; export "
            "the network again"
        )
    while building.steps[-1].name != logits.step:
        building.modules.pop(building.steps.pop().name)
    return building.network()
