"""`Outputs`: every network is a list of classifiers, weak to strong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from shoal.errors import ShoalError


@dataclass(frozen=True)
class Outputs:
    """What one forward pass gives: `logits` [N, classes] for each exit, and `taps`, activations by site name."""

    logits: tuple[Tensor, ...]
    taps: dict[str, Tensor] = field(default_factory=dict)

    @property
    def final(self) -> Tensor:
        """Logits of the strongest classifier."""
        return self.logits[-1]


def forward(model: nn.Module, x: Tensor, taps: Sequence[str] = ()) -> Outputs:
    """Run `model` on images `x` and keep the results of the submodules named in `taps`.

    The hooks are gone when this returns. Raises ShoalError when a tap is no submodule.
    """
    caught: dict[str, Tensor] = {}
    inner = unwrap(model)
    handles = []
    try:
        for name in taps:
            handles.append(_submodule(inner, name).register_forward_hook(_keep(caught, name)))
        result = model(x)
    finally:
        for handle in handles:
            handle.remove()
    logits = tuple(result) if isinstance(result, (tuple, list)) else (result,)
    return Outputs(logits, caught)


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module inside DistributedDataParallel, or `model` itself."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ShoalError(f"found no submodule {name!r} to tap; need a ReLU site of this model") from error


def _keep(caught: dict[str, Tensor], name: str) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        caught[name] = output

    return hook
