"""`Outputs`: every network is a list of classifiers, weak to strong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

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


class Tapped:
    """A network called for `Outputs`, with its taps installed until `close`: a training step need not renew them.

    `model` may be wrapped by DistributedDataParallel; taps are submodules of what is inside. Raises ShoalError when a
    tap is no submodule.
    """

    def __init__(self, model: nn.Module, taps: Sequence[str] = ()) -> None:
        self.model, self.caught, inner = model, dict[str, Tensor](), unwrap(model)
        self.handles: list[RemovableHandle] = []
        for name, module in {name: _submodule(inner, name) for name in taps}.items():
            self.handles.append(module.register_forward_hook(_keep(self.caught, name)))

    def __call__(self, x: Tensor) -> Outputs:
        """Run the network on images `x` [N, C, H, W]."""
        result = self.model(x)
        logits = tuple(result) if isinstance(result, (tuple, list)) else (result,)
        taps = dict(self.caught)
        self.caught.clear()  # or activations would lie in memory until the next call
        return Outputs(logits, taps)

    def close(self) -> None:
        """Leave the network as it was."""
        for handle in self.handles:
            handle.remove()


def forward(model: nn.Module, x: Tensor, taps: Sequence[str] = ()) -> Outputs:
    """Run `model` on images `x` and keep the results of the submodules named in `taps`.

    The hooks are gone when this returns. Raises ShoalError when a tap is no submodule.
    """
    tapped = Tapped(model, taps)
    try:
        return tapped(x)
    finally:
        tapped.close()


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
