"""Slimmable networks (Yu et al., ICLR'19): one set of weights for several widths, which use the first channels.

SENet++ (Kundu et al., ICLR'23) trains reduced networks in this way, by ordered dropout of channels: one training run
gives a network for each width, and narrower ones have fewer ReLUs and multiply-adds. Universally slimmable networks (Yu
and Huang, ICCV'19) share the scales and shifts of batch norms, draw widths at random in training, and compute
statistics afterwards.
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
    """A network with several widths; its forward pass returns the logits of each, narrowest first.

    Submodules keep the names of the network that it was made from.
    """

    def __init__(self, body: fx.GraphModule, widths: Sequence[float]) -> None:
        super().__init__()
        for name, child in body.named_children():
            self.add_module(name, child)
        self.widths = tuple(widths)
        self.drawn = 0
        """Number of random widths per forward pass in training; 0 runs all `widths` instead."""
        self._body = [body]  # in a list, because a submodule would add a prefix to every name

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Logits [N, classes] of every width for images [N, C, H, W]; in training, of the drawn widths, if any."""
        if self.training and self.drawn:
            return tuple(self._use(part, index)(x) for part, index in self._sandwich())
        return tuple(self.at(index)(x) for index in range(len(self.widths)))

    @property
    def recordable(self) -> bool:
        """Whether every step runs the same widths (see `shoal.training.stepping`)."""
        return not self.drawn

    def sandwich(self, drawn: int) -> None:
        """In training, run the narrowest width, the widest, and `drawn` random ones between (sandwich rule of US-Nets).

        Each forward pass draws the random widths uniformly from torch's generator. They store no statistics, so call
        `calibrate_bn` afterwards to compute those of every width. Raises ShoalError when `drawn` is below 1, when batch
        norms do not share scales and shifts, and for grouped convolutions (except depthwise ones), whose groups a
        random width could split.
        """
        own = [name for name, module in self.named_modules() if isinstance(module, SlimBatchNorm2d)]
        if drawn < 1 or own:
            what = f"a batch norm for each width at {own[0]}" if own else f"{drawn} drawn widths"
            raise ShoalError(
                f"found {what}; need one or more, and batch norms that share scales; make it with shared_affine=True"
            )
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
        """The network at width number `index`. It stays at that width until another one is set."""
        return self._use(self.widths[index], index % len(self.widths))

    def _use(self, part: float, index: int | None) -> fx.GraphModule:
        for module in self.modules():
            if isinstance(module, SlimLayer):
                module.part, module.index = part, index
        return self._body[0]


def slimmable(
    model: nn.Module, shape: tuple[int, ...], widths: Sequence[float], *, shared_affine: bool = False
) -> Slimmable:
    """A copy of `model`, for images of `shape` [C, H, W], that also runs with fractions of its channels.

    `widths` are fractions in (0, 1] that rise to 1; at width 1 the copy computes the same as `model`. Each width has
    its own batch norms, or with `shared_affine` only its own batch-norm statistics. Raises ShoalError for other widths
    and for a network whose channels cannot be cut in this way, such as one with concatenations.
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
    """Raise ShoalError unless there are two or more fractions that rise to 1."""
    rising = all(a < b for a, b in pairwise(widths))
    if len(widths) < 2 or not rising or not widths[0] > 0 or widths[-1] != 1:
        raise ShoalError(f"found widths {list(widths)}; need two or more fractions that rise to 1; give, say, 0.5,1")


def _classifier(model: nn.Module, shape: tuple[int, ...]) -> str:
    """The linear layer that computes the logits.

    Raises ShoalError for a network with operations that cannot use the first channels alone.
    """
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
    """The layer for several widths, or None for a module without parameters.

    If `whole` is true, the layer has all its outputs at each width.
    """
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
    """The number of channels that each slim layer reads at a width, by the layer's name."""
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
    """The network of one width alone, for images of `shape` [C, H, W], as plain layers with copies of its weights."""
    inputs = _inputs(model, index, shape, "found a network that fails")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SlimLayer)}
    return replace(model.at(index), {name: layer.plain(inputs[name]) for name, layer in layers.items()})
