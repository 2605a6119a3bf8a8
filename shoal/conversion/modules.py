"""Modules for what PyTorch has only as functions, and the network that calls all of a file's modules in their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class Sum(nn.Module):
    """The sum of two or more values of one shape."""

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        """x + y + ..."""
        for other in others:
            x = x + other
        return x


class Difference(nn.Module):
    """The difference of two values of one shape."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x - y."""
        return x - y


class Concatenation(nn.Module):
    """Values side by side along a dimension, counted with the batch."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, *parts: Tensor) -> Tensor:
        """The parts [N, ...] as one tensor."""
        return torch.cat(parts, self.dim)


class Scale(nn.Module):
    """A fixed factor for each channel: [C, 1, 1] or [F]."""

    factor: Tensor

    def __init__(self, factor: Tensor) -> None:
        super().__init__()
        self.register_buffer("factor", factor)

    def forward(self, x: Tensor) -> Tensor:
        """X * factor."""
        return x * self.factor


class Shift(nn.Module):
    """A fixed summand for each channel: [C, 1, 1] or [F]."""

    summand: Tensor

    def __init__(self, summand: Tensor) -> None:
        super().__init__()
        self.register_buffer("summand", summand)

    def forward(self, x: Tensor) -> Tensor:
        """X + summand."""
        return x + self.summand


@dataclass(frozen=True)
class Step:
    """A call of the submodule `name` on the results of the steps `inputs`; "" stands for the images."""

    name: str
    inputs: tuple[str, ...]


class OnnxNetwork(nn.Module):
    """The network of an ONNX file: a submodule for each operator that computes, called in the order of the file."""

    def __init__(self, modules: Mapping[str, nn.Module], steps: Sequence[Step]) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.steps = tuple(steps)
        self.last = {name: i for i, step in enumerate(steps) for name in step.inputs}

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes] of images [N, C, H, W]."""
        results = {"": images}
        for i, step in enumerate(self.steps):
            results[step.name] = self.get_submodule(step.name)(*[results[name] for name in step.inputs])
            for name in {name for name in step.inputs if self.last[name] == i}:
                del results[name]  # so that memory holds only what is still read
        return results[self.steps[-1].name]
