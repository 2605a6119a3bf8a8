"""What Python code in a forward pass asks of a traced value: sizes are known, values are not.

Sizes of the images are fixed for a network, so `if x.size(2) > 4` and `int(x.size(1) * 0.5)` have one answer. Values of
pixels and the number of images do not.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

BATCHES = (1, 2)
"""Numbers of images that are tried; an answer that differs between them depends on the number of images."""


class UntraceableError(Exception):
    """Code in forward that cannot be traced: what was found, and what to write instead."""

    def __init__(self, found: str, instead: str) -> None:
        super().__init__(f"{found}; {instead}")
        self.found, self.instead = found, instead


VALUES = (
    "need code that is the same for all images; write it with tensor operations, or decide by sizes or flags of self"
)
IMAGES = "need code that is the same for any number of images; leave the first dimension out of the decision"
SHAPELESS = "need the image's shape to decide it; pass the shape as [C, H, W] (normalise(model, shape))"


class KnownSizes:
    """Answers about the values of the nodes in `graph`, for images of `shape` ([C, H, W]), from runs without data.

    The runs use fake tensors, which have a shape but no values, so they cost no arithmetic and change no buffer.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, shape: tuple[int, ...] | None) -> None:
        self.root, self.graph, self.shape = root, graph, shape
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.values: tuple[dict[fx.Node, Any], ...] = tuple({} for _ in BATCHES)

    def answer(self, node: fx.Node, what: str) -> Any:
        """The value of `node`, which is not a tensor. `what` says what the code does, for the error.

        Raises UntraceableError when it depends on the values of an image or on the number of images, or when the shape
        is not given.
        """
        if self.shape is None:
            raise UntraceableError(f"{what} by a size", SHAPELESS)
        found = self.for_batches(node)
        if any(isinstance(value, Tensor) for value in found):
            raise UntraceableError(f"{what} by the values of a tensor", VALUES)
        if found[0] != found[1]:
            raise UntraceableError(f"{what} by the number of images", IMAGES)
        return found[0]

    def for_batches(self, node: fx.Node) -> list[Any]:
        """The value of `node` for each number of images in `BATCHES`; a fake tensor if it is or depends on a tensor."""
        needed = self._needed(node)
        with torch.no_grad(), self.mode:
            for batch, known in zip(BATCHES, self.values, strict=True):
                for n in self.graph.nodes:
                    if n in needed and n not in known:
                        known[n] = self._run(n, batch, known)
        return [known[node] for known in self.values]

    def _needed(self, node: fx.Node) -> set[fx.Node]:
        needed, left = {node}, [node]
        while left:
            for source in left.pop().all_input_nodes:
                if source not in needed:
                    needed.add(source)
                    left.append(source)
        return needed

    def _run(self, node: fx.Node, batch: int, known: dict[fx.Node, Any]) -> Any:
        if node.op == "placeholder":
            device = next((p.device for p in self.root.parameters()), torch.device("cpu"))
            return torch.zeros(batch, *(self.shape or ()), device=device)
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(self.root)
            return self.mode.from_tensor(value) if isinstance(value, Tensor) else value
        args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        function: Callable[..., Any]
        function = self.root.get_submodule(str(node.target)) if node.op == "call_module" else node.target  # type: ignore[assignment]
        return function(*args, **kwargs)


class Value(fx.Proxy):
    """A traced value. Whatever Python asks of it is answered if it is a size, and refused with a reason if not."""

    def _answer(self, what: str) -> Any:
        tracer: Any = self.tracer
        return tracer.answer(self.node, what)

    def __int__(self) -> int:
        return int(self._answer("a conversion with int()"))

    def __index__(self) -> int:
        return operator.index(self._answer("a number (in range(), as an index or as a size)"))

    def __float__(self) -> float:
        return float(self._answer("a conversion with float()"))

    def __round__(self, digits: int | None = None) -> Any:
        return round(self._answer("a conversion with round()"), digits)

    def __trunc__(self) -> int:
        return int(self._answer("a conversion with int()"))

    def __ceil__(self) -> int:
        return -int(-self._answer("a conversion with math.ceil()") // 1)

    def __floor__(self) -> int:
        return int(self._answer("a conversion with math.floor()") // 1)

    def __array__(self, *given: Any, **options: Any) -> Any:
        tracer: Any = self.tracer
        found = tracer.measured(self.node)
        if found is None or isinstance(found, Tensor):
            raise UntraceableError("a call of NumPy", "need operations of torch; write it with torch, or leave it out")
        return np.array(self._answer("a call of NumPy"), *given)

    def __getattr__(self, k: str) -> Value:  # type: ignore[override]
        if k.startswith("__") and k.endswith("__"):
            raise AttributeError(k)  # NumPy and others ask for what a value may offer
        return ValueAttribute(self, k)

    def __setitem__(self, index: Any, value: Any) -> None:
        raise UntraceableError(
            "an assignment to a part of a tensor (x[...] = ...)",
            "need tensors that are not changed in part; join parts with torch.cat, or add zeros with F.pad",
        )

    def __len__(self) -> int:
        # `*x.shape` asks for it too. The number of sizes is fixed where one of them is the number of images.
        tracer: Any = self.tracer
        found = tracer.measured(self.node)
        return len(found if isinstance(found, (tuple, list)) else self._answer("a use of len()"))

    def __contains__(self, item: Any) -> bool:
        return bool(item in self._answer("a test with `in`"))

    def __str__(self) -> str:
        tracer: Any = self.tracer
        return str(tracer.text(self.node))

    def __format__(self, form: str) -> str:
        tracer: Any = self.tracer
        return format(tracer.text(self.node), form)


class ValueAttribute(fx.proxy.Attribute, Value):
    """An attribute of a traced value, such as its shape, or a method of it before the call."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The call of the method; the product of sizes where NumPy asks for it (np.prod(x.shape[1:]))."""
        root: Any = self.root
        if self.attr == "prod" and isinstance(root.tracer.measured(root.node), tuple):
            return int(np.prod(root.tracer.answer(root.node, "a call of NumPy")))
        return super().__call__(*args, **kwargs)
