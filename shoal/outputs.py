"""`Outputs`: the logits of every exit of a network, weak to strong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from shoal.errors import ShoalError


@dataclass(frozen=True)
class Outputs:
    """Result of one forward pass: `logits` [N, classes] per exit, weak to strong; `taps`, outputs by submodule name."""

    logits: tuple[Tensor, ...]
    taps: dict[str, Tensor] = field(default_factory=dict)

    @property
    def final(self) -> Tensor:
        """Logits [N, classes] of the strongest exit."""
        return self.logits[-1]


class Tapped:
    """A network that returns `Outputs`; its hooks stay until `close`, so a training loop installs them once.

    `model` may be wrapped in DistributedDataParallel; `taps` name submodules of the network inside. Raises ShoalError
    when a tap is not a submodule.
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
        self.caught.clear()  # free the activations before the next call
        return Outputs(logits, taps)

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()


def forward(model: nn.Module, x: Tensor, taps: Sequence[str] = ()) -> Outputs:
    """Run `model` on images `x` [N, C, H, W], and return `Outputs` with the outputs of the submodules in `taps`.

    The hooks are removed before it returns. Raises ShoalError when a tap is not a submodule.
    """
    tapped = Tapped(model, taps)
    try:
        return tapped(x)
    finally:
        tapped.close()


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel, or `model` itself if it is not wrapped."""
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
