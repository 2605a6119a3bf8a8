"""Slimmable networks (Yu et al., ICLR'19): one set of weights for several widths, each of the first channels.

SENet++ (Kundu et al., ICLR'23) trains reduced networks so, by ordered dropout of channels: one training gives a network
for each width, the narrower ones with fewer ReLUs and fewer multiply-adds. Universally slimmable networks (Yu and
Huang, ICCV'19) share the batch norms' scales and shifts, draw widths in training, and take statistics afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, fx, nn

from shoal.channels.slim_layers import (
    SharedAffineBatchNorm2d,
    SlimBatchNorm2d,
    SlimConv2d,
    SlimLayer,
    SlimLinear,
    SlimMaskedReLU,
    kept,
)
from shoal.errors import ShoalError, first_line
from shoal.reduction.masks import MaskedReLU
from shoal.surgery.normal_form import normalise, replace
from shoal.surgery.tracing import trace


class Slimmable(nn.Module):
    """A network of several widths; its forward gives the logits of each, the narrowest first.

    Submodules keep the names that they have in the network it was made from.
    """

    def __init__(self, body: fx.GraphModule, widths: Sequence[float]) -> None:
        super().__init__()
        for name, child in body.named_children():
            self.add_module(name, child)
        self.widths = tuple(widths)
        self.drawn = 0
        """Widths that a forward pass in training draws between the narrowest and the widest; 0 for all `widths`."""
        self._body = [body]  # in a list: as a submodule, every name would have a prefix

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Logits [N, classes] of every width for images [N, C, H, W]; of the drawn ones in training, if any."""
        if self.training and self.drawn:
            return tuple(self._use(part, index)(x) for part, index in self._sandwich())
        return tuple(self.at(index)(x) for index in range(len(self.widths)))

    @property
    def recordable(self) -> bool:
        """Whether each step runs the same widths (see `shoal.training.stepping`)."""
        return not self.drawn

    def sandwich(self, drawn: int) -> None:
        """In training, run the narrowest and the widest and `drawn` widths between them (US-Nets' sandwich rule).

        Each forward pass draws anew, from torch's generator, uniformly; those widths are none of `widths` and leave no
        statistics, so that `calibrate_bn` has to take those of every width afterwards. Raises ShoalError unless the
        batch norms share their scales and shifts, and for groups of channels, which some width would split.
        """
        own = [name for name, module in self.named_modules() if isinstance(module, SlimBatchNorm2d)]
        if drawn < 1 or own:
            what = f"a batch norm for each width at {own[0]}" if own else f"{drawn} drawn widths"
            raise ShoalError(f"found {what}; need 1 or more and shared scales; make it with shared_affine=True")
        for name, module in self.named_modules():
            if isinstance(module, SlimConv2d) and not (
                module.groups == 1 or module.in_channels == module.groups == module.out_channels
            ):
                raise ShoalError(
                    f"found {module.groups} groups of channels at {name}, which a drawn width would split; need plain "
                    "or depthwise convolutions; train the listed widths alone"
                )
        self.drawn = drawn

    def _sandwich(self) -> list[tuple[float, int | None]]:
        low = self.widths[0]
        parts = (low + (1 - low) * torch.rand(self.drawn)).sort().values.tolist()
        return [(low, 0), *((part, None) for part in parts), (1.0, len(self.widths) - 1)]

    def at(self, index: int) -> fx.GraphModule:
        """The network with the width `index` in use, until another is."""
        return self._use(self.widths[index], index % len(self.widths))

    def _use(self, part: float, index: int | None) -> fx.GraphModule:
        for module in self.modules():
            if isinstance(module, SlimLayer):
                module.part, module.index = part, index
        return self._body[0]


def slimmable(
    model: nn.Module, shape: tuple[int, ...], widths: Sequence[float], *, shared_affine: bool = False
) -> Slimmable:
    """A copy of `model`, for images of `shape` [C, H, W], that also runs with parts of its channels.

    `widths` are parts in (0, 1], rising to 1, at which it computes what `model` does. Each has batch norms of its own,
    or with `shared_affine` statistics alone. Raises ShoalError for other widths and for a network whose channels
    cannot be cut in this way, such as a concatenating one.
    """
    check_widths(widths)
    traced = normalise(model)
    last = _classifier(model, shape)
    modules = dict(traced.named_modules())
    called = {str(n.target): modules[str(n.target)] for n in traced.graph.nodes if n.op == "call_module"}
    if shared_affine:
        _check_affine(called)
    made = {name: _slim(name, module, widths, name == last, shared_affine) for name, module in called.items()}
    slim = {name: layer for name, layer in made.items() if layer is not None}
    result = Slimmable(replace(traced, slim), widths).train(model.training)
    _try(result, shape)
    return result


def check_widths(widths: Sequence[float]) -> None:
    """Raise ShoalError unless these are two or more parts that rise to 1."""
    rising = all(a < b for a, b in pairwise(widths))
    if len(widths) < 2 or not rising or not widths[0] > 0 or widths[-1] != 1:
        raise ShoalError(f"found widths {list(widths)}; need two or more parts of the channels that rise to 1; 0.5,1")


def _classifier(model: nn.Module, shape: tuple[int, ...]) -> str:
    """The linear layer whose results are the logits, after a look at what is not cut by the channel."""
    graph = trace(model, shape)
    for node in graph.nodes:
        if node.op in ("concat", "take", "affine", "pad", "unknown"):
            what = node.attrs.get("target", node.op)
            raise ShoalError(
                f"found {what} at {node.name}; need layers that read the first channels of the one before, in order; "
                "use a network without it, or leave out the widths"
            )
    if len(graph.outputs) != 1 or graph[graph.outputs[0]].op != "linear":
        raise ShoalError(f"found logits from {', '.join(graph.outputs)}; need one linear layer at the end")
    return graph.outputs[0]


def _check_affine(modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        if isinstance(module, nn.BatchNorm2d) and not (module.affine and module.track_running_stats):
            raise ShoalError(
                f"found a batch norm without scales or statistics at {name}; need both for widths to share; "
                "leave out shared_affine"
            )


def _slim(name: str, module: nn.Module, widths: Sequence[float], whole: bool, shared_affine: bool) -> nn.Module | None:
    """The layer for several widths (`whole`: with all outputs at each); None for one without parameters."""
    if type(module) is nn.Conv2d:
        return SlimConv2d(module, whole)
    if type(module) is nn.Linear:
        return SlimLinear(module, whole)
    if type(module) is nn.BatchNorm2d:
        make = SharedAffineBatchNorm2d if shared_affine else SlimBatchNorm2d
        return make(module, [kept(module.num_features, part) for part in widths])
    if type(module) is MaskedReLU:
        return SlimMaskedReLU(module.mask)
    if module.state_dict():
        raise ShoalError(
            f"found {type(module).__name__} at {name}; need convolutions, batch norms, linear layers and masked ReLUs "
            "for several widths; use a network of these, or leave out the widths"
        )
    return None


def _try(model: Slimmable, shape: tuple[int, ...]) -> None:
    for index, width in enumerate(model.widths):
        _inputs(model, index, shape, f"found that the network fails at width {width:g}")


def _inputs(model: Slimmable, index: int, shape: tuple[int, ...], failure: str) -> dict[str, int]:
    """Channels that each slim layer reads at a width, by its name."""
    found: dict[str, int] = {}
    modes = {module: module.training for module in model.modules()}
    hooks = [
        m.register_forward_pre_hook(lambda m, args, name=name: found.__setitem__(name, args[0].shape[1]))
        for name, m in model.named_modules()
        if isinstance(m, SlimLayer)
    ]
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            model.eval().at(index).eval()(torch.zeros(1, *shape, device=device))
    except RuntimeError as error:
        raise ShoalError(f"{failure} ({first_line(error)}); need one that scales; choose other widths") from error
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return found


def narrowed(model: Slimmable, index: int, shape: tuple[int, ...]) -> fx.GraphModule:
    """The network of one width alone, of plain layers with copies of its weights."""
    inputs = _inputs(model, index, shape, "found a network that fails")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SlimLayer)}
    return replace(model.at(index), {name: layer.plain(inputs[name]) for name, layer in layers.items()})
