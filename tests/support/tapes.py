"""A stand-in for CUDA graphs on any device: what it records is played back without its Python, on the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::lift_fresh")
"""Operators for which the host waits for the device; the last is what makes a tensor of Python's numbers."""


class Taping(TorchDispatchMode):
    """Notes every operator with the tensors that it read and gave."""

    def __init__(self, calls: list[tuple[Any, Any, Any, list[Tensor]]]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, tensors(result)))
        return result


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


class StandIn:
    """What stand-ins for CUDA graphs share: `recorded` counts."""

    def __init__(self) -> None:
        self.recorded, self.played, self.compiled = 0, 0, 0

    def warm(self, work: Callable[[], None]) -> None:
        work()


class Tapes(StandIn):
    """Plays back operators; `played` counts."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.recorded += 1
        with Taping(calls):
            work()
        return lambda: self._play(calls)

    @torch.no_grad()
    def _play(self, calls: list[tuple[Any, Any, Any, list[Tensor]]]) -> None:
        self.played += 1
        for func, args, kwargs, given in calls:
            for old, new in zip(given, tensors(func(*args, **kwargs)), strict=True):
                if new.data_ptr() != old.data_ptr():  # neither a view nor a change in place
                    old.copy_(new)


class Again(StandIn):
    """Runs the Python again, under which the compiler works; `compiled` counts what it did while recording."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        before = compilations()
        work()
        self.recorded += 1
        self.compiled += compilations() - before
        return work


def compilations() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


class Waits(TorchDispatchMode):
    """Notes the operators for which a host would wait for its GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        by_bools = name.startswith("aten::index") and any(t.dtype == torch.bool for t in tensors(args[1:2]))
        if name in WAITING or by_bools:
            self.found.append(name)
        return func(*args, **(kwargs or {}))
