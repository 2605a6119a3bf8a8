"""Options of a reduction by *Making Models Shallow Again*, and their check against a network."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from shoal.channels.slimmable import slimmable
from shoal.costs.model import layout_of, prepared_cost
from shoal.errors import ShoalError
from shoal.graph.counting import cost
from shoal.graph.graph import Graph
from shoal.recipes.shallow.presets import Preset
from shoal.reduction.budget import allocate
from shoal.reduction.depth import Price, choose_blocks, gated_graph
from shoal.reduction.gates import named_blocks
from shoal.reduction.learners import LEARNERS, SUMMARIES
from shoal.reduction.masks import add_masks, random_masks
from shoal.surgery.traced import Traced

HIDDEN = {"cli": None}
"""Metadata of a field that is not an option of `shoal reduce`."""


@dataclass(frozen=True)
class Choices:
    """The options of a reduction that a user chooses. Without a budget, a plan of `shoal plan` gives it."""

    budget: int | None = None
    """Number of ReLUs to keep in the whole network, such as 50000. With --recipe deepreduce: choose the most accurate
    design with at most this many ReLUs."""
    d_th: float = 0.05
    """Replace each block by one convolution if it keeps less than this fraction of its ReLUs (0.05 = 5 %)."""
    gates: bool = True
    """Replace blocks that keep few ReLUs by one convolution each; see --d-th, --gate and --gate-limit."""
    gated: tuple[str, ...] | None = field(default=None, metadata={"cli": "--gate"})
    """Replace this block; its name is that of the ReLU layer inside it, such as layer1.0.relu1 (repeatable). --d-th is
    then not used."""
    gate_limit: float | None = None
    """Replace blocks until the price (see --gate-price) is at most this fraction of the original (0.6 = 60 %), and
    choose those whose replacement costs the least accuracy. --d-th is then not used."""
    gate_price: str = "macs"
    """The price for --gate-limit: macs, or the forecast seconds of private inference: online or offline."""
    ramp: str = "linear"
    """How fine-tuning fades from each replaced block to its convolution: linear or cosine."""
    exit: bool = True
    """Also train an auxiliary classifier before the last stage of the network (AKD in the paper)."""
    keep: str = "final"
    """The classifier to deploy: final or auxiliary."""
    masks: str = field(default="senet", metadata={"values": SUMMARIES})
    """The method that chooses which ReLUs to keep; a site is a layer of ReLUs, a position one activation."""
    granularity: str = "pixel"
    """What keeps or loses its ReLUs as a unit: pixel (one activation) or channel (a whole channel of a feature map)."""
    density: float = field(default=0.1, metadata=HIDDEN)
    """Fraction of the weights that the sparse training of stage 1 keeps."""
    keep_skip: bool = field(default=True, metadata=HIDDEN)
    """Whether a replaced block keeps its shortcut."""
    widths: tuple[float, ...] = ()
    """Train one network that also works with fractions of its channels, such as 0.5,1 (SENet++). Each narrower network
    is saved as a run folder in OUT/widths."""


@dataclass(frozen=True)
class Options(Choices):
    """All options of a reduction; here `budget` is required."""

    budget: int = field()
    """Number of ReLUs to keep in the whole network."""
    sensitivity: dict[str, float] | None = field(default=None)
    """Sensitivity of each ReLU site by name; None to measure it in stage 1."""


def check_options(options: Options, preset: Preset, teacher: nn.Module, shape: tuple[int, ...]) -> None:
    """Raise ShoalError, before any training, for an impossible budget or schedule, or an unknown value or block.

    `shape` is the shape [C, H, W] of an image.
    """
    traced = Traced(teacher, shape)
    sites = traced.sites
    named_blocks(traced.blocks, options.gated or ())
    known = {
        "keep": ("final", "auxiliary"),
        "masks": tuple(LEARNERS),
        "granularity": ("pixel", "channel"),
        "ramp": ("linear", "cosine"),
        "gate_price": tuple(PRICES),
    }
    for name, values in known.items():
        if getattr(options, name) not in values:
            raise ShoalError(f"found {name} {getattr(options, name)!r}; need one of {', '.join(values)}")
    _check_used(options)
    _check_gate_limit(options, traced)
    if options.keep == "auxiliary" and not options.exit:
        raise ShoalError("found keep 'auxiliary' without an exit; need the auxiliary classifier trained; use --exit")
    if options.masks == "senet" and not preset.begins_learned and preset.mask.epochs < 2:
        raise ShoalError(
            f"found {preset.mask.epochs} epochs of mask search; need 2 or more, as the first has random masks"
        )
    LEARNERS[options.masks].check(teacher, shape)
    _check_widths(options, teacher, shape)
    last, opened = preset.finetune.epochs, preset.finetune.first_drop
    if options.gates and last <= opened:
        raise ShoalError(
            f"found {last} fine-tuning epochs and gates open at {opened}; need more epochs; or use --no-gates"
        )
    allocate(sites, options.sensitivity or {s.name: 1.0 for s in sites}, options.budget)
    if options.exit and not any(site.stage < sites[-1].stage for site in sites):
        raise ShoalError(
            "found a network with one stage; need two or more for an auxiliary classifier; "
            "reduce it with --no-exit (Options.exit=False)"
        )


def _check_widths(options: Options, teacher: nn.Module, shape: tuple[int, ...]) -> None:
    """Raise ShoalError for widths that do not fit the network or the other options."""
    if not options.widths:
        return
    if options.gates or options.exit or LEARNERS[options.masks].rest != "identity":
        raise ShoalError(
            f"found widths {list(options.widths)} with gates, an exit or quadratics; need a network of convolutions, "
            "norms and masked ReLUs; use --no-gates --no-exit and masks that leave the identity"
        )
    slimmable(teacher, shape, options.widths)


def _check_used(options: Options) -> None:
    """Raise ShoalError for an option that has no effect with the other options."""
    method = LEARNERS[options.masks]
    unused = {
        "sensitivities": options.sensitivity is not None and not method.per_site,
        f"granularity {options.granularity!r}": options.granularity not in method.granularities,
        f"blocks to gate ({', '.join(options.gated or ())})": bool(options.gated) and not options.gates,
        f"gate_price {options.gate_price!r}": options.gate_price != "macs" and options.gate_limit is None,
    }
    for what, is_unused in unused.items():
        if is_unused:
            raise ShoalError(
                f"found {what} with masks {options.masks!r}, gates {options.gates} and gate_limit "
                f"{options.gate_limit}, where it has no effect; need options that fit together; leave it out, or "
                "change the others"
            )


def _check_gate_limit(options: Options, teacher: Traced) -> None:
    """Raise ShoalError for a limit that replacing blocks cannot reach, or a limit together with named blocks.

    Prices are those of the teacher with the budget's number of ReLUs at random places.
    """
    if options.gate_limit is None:
        return
    if not 0 < options.gate_limit <= 1 or options.gated is not None or not options.gates:
        raise ShoalError(
            f"found a gate limit of {options.gate_limit} with gates {options.gated or options.gates}; need a "
            "fraction of the price in (0, 1], gates on and no named blocks; leave one of them out"
        )
    if LEARNERS[options.masks].rest != "identity" and options.gate_price in ("online", "offline"):
        raise ShoalError(
            f"found masks {options.masks!r} with gate_price {options.gate_price!r}; need masks without squares, which "
            "private inference does not have; use autorep-linear, or another price"
        )
    budget = allocate(teacher.sites, {site.name: 1.0 for site in teacher.sites}, options.budget)
    masked = add_masks(teacher.module, random_masks(budget, teacher.sites, torch.Generator().manual_seed(0)))
    traced, price = Traced(masked, teacher.shape), PRICES[options.gate_price]
    equal = {block.name: 1.0 for block in traced.blocks}
    limit = options.gate_limit * price(gated_graph(traced, ()))
    choose_blocks(traced, price, limit, equal, keep_skip=options.keep_skip)


def conv_macs(graph: Graph) -> float:
    """Multiply-adds of the convolutions of a graph."""
    return float(cost(graph).macs)


def online_seconds(graph: Graph) -> float:
    """Forecast seconds of the online phase of a prepared inference, without link delays (`prepared_cost`)."""
    return prepared_cost(layout_of(graph)).online.seconds


def offline_seconds(graph: Graph) -> float:
    """Forecast seconds of the offline phase of a prepared inference, without link delays."""
    return prepared_cost(layout_of(graph)).offline.seconds


PRICES: dict[str, Price] = {
    "macs": conv_macs,
    "online": online_seconds,
    "offline": offline_seconds,
}
"""Prices by the names that `Choices.gate_price` takes."""
