"""*Inplace knowledge distillation with teacher assistant*: train all exits or widths of a network at once.

Ozerov and Duong. The strongest classifier learns from the labels. Each weaker one learns from the labels and from
stronger ones of the same network: the strongest (IPKD, eq. 5), the next stronger (IPKD-TA-1, eq. 6) or all stronger
ones (IPKD-TA-M, eq. 7).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn

from shoal.channels.batch_norm import Calibration
from shoal.channels.slim_layers import SharedAffineBatchNorm2d
from shoal.channels.slimmable import Slimmable, narrowed
from shoal.distillation.paths import self_kd
from shoal.errors import ShoalError
from shoal.exits.classifiers import keep_exit
from shoal.networks.assembly import assemble
from shoal.networks.spec import Spec
from shoal.recipes.stages import Stages
from shoal.surgery.tracing import trace
from shoal.training.loop import History
from shoal.training.objective import Objective, cross_entropy
from shoal.training.schedule import Schedule

METHODS: dict[str, str | None] = {"conventional": None, "ipkd": "deepest", "ta-1": "transitive", "ta-m": "dense"}
"""Method -> its path (`distillation.paths`): which classifiers teach which. Conventional training (eq. 4) has none."""

TEACHERS = {
    "conventional": "none; all learn from the labels",
    "ipkd": "the strongest",
    "ta-1": "the next stronger one",
    "ta-m": "all stronger ones",
}
"""Method -> the classifiers that teach a weaker one."""


@dataclass(frozen=True)
class Options:
    """What to train. The network must have several classifiers already, or get them by `exits` or `widths`."""

    method: str = field(default="ta-m", metadata={"values": TEACHERS})
    """Which classifiers teach a weaker one."""
    widths: tuple[float, ...] = ()
    """Make the network slimmable to these fractions of its channels, such as 0.25,0.5,0.75,1."""
    exits: tuple[str, ...] = field(default=(), metadata={"cli": "--exit"})
    """Add a classifier after this ReLU site, named as shoal count lists it, such as layer2.0.relu2 (repeatable)."""
    shared_affine: bool = False
    """Let all widths share the scales and shifts of the batch norms; each width keeps its own statistics."""
    drawn: int = field(default=0, metadata={"cli": "--sandwich"})
    """In each step train only the narrowest width, the widest, and this many random widths between them (US-Nets: 2).
    Implies --shared-affine. 0 trains all widths in each step."""
    direction: str = "forward"
    """Direction of the KL divergence: forward, KL(teacher || student), or reverse, which the paper writes."""

    def spec(self, base: Spec) -> Spec:
        """The spec of the network to train: `base` with these exits or widths."""
        return replace(base, widths=self.widths, exits=self.exits, shared_affine=self.shared_affine or self.drawn > 0)


@dataclass(frozen=True)
class Preset:
    """A schedule, and the weight (lambda) and temperature (tau) of the divergence in the loss of weaker classifiers.

    With `decay_all` false, batch norms and depthwise convolutions get no weight decay.
    """

    schedule: Schedule
    weight: float = 0.8
    temperature: float = 5.0
    decay_all: bool = True


def quick(widths: bool, epochs: int = 12, batch: int = 64) -> Preset:
    """A short cosine schedule for small data, with the paper's loss."""
    return replace(paper(widths), schedule=Schedule(epochs, 0.1, kind="cosine", warmup=0.5, batch_size=batch))


def paper(widths: bool) -> Preset:
    """Section IV: lambda 0.8; multi-exit networks tau 5 and 300 epochs, slimmable ones tau 1 and 200 epochs.

    What the paper does not state is taken from the code that it builds on: for exits MSDNet's, for widths that of the
    CIFAR networks whose strides it uses (see docs/papers/inplace.md).
    """
    if widths:
        return Preset(Schedule(200, 0.1, (60, 120, 160), gamma=0.2, warmup=1.0), temperature=1.0)
    return Preset(Schedule(300, 0.1, (150, 225), batch_size=64, weight_decay=1e-4))


def slimmable_code(widths: bool) -> Preset:
    """Training as in the public code of slimmable networks: narrower widths learn from soft targets only (lambda 1).

    It also has Nesterov momentum, and a weight decay of 1e-4 on dense convolutions and linear layers only. Raises
    ShoalError for a network without widths.
    """
    if not widths:
        raise ShoalError("found preset 'slimmable-code' without widths; need a slimmable network; add widths, 0.5,1")
    plan = paper(widths)
    schedule = replace(plan.schedule, nesterov=True, weight_decay=1e-4)
    return replace(plan, schedule=schedule, weight=1.0, decay_all=False)


PRESETS: dict[str, Callable[[bool], Preset]] = {"quick": quick, "paper": paper, "slimmable-code": slimmable_code}
"""Name -> the preset, for a network with (True) or without (False) widths."""


@dataclass
class Result:
    """The trained network, with its classifiers from weak to strong, and each classifier as a separate network.

    The names of `parts` are widths (``0.25``) or exit numbers from 1.
    """

    spec: Spec
    model: nn.Module
    history: History
    parts: dict[str, tuple[Spec, nn.Module]] = field(default_factory=dict)


def train(spec: Spec, options: Options, preset: Preset, stages: Stages, base: nn.Module | None = None) -> Result:
    """Add the exits or widths of `options` to the network of `spec` (or to `base`), and train all classifiers at once.

    Keeps the epoch with the highest validation accuracy, averaged over the classifiers. Raises ShoalError for options
    that do not fit the network, and StoppedError when the time is up.
    """
    check_options(options, spec, base)
    spec = options.spec(spec)
    torch.manual_seed(stages.settings.seed)
    model = assemble(spec, base)
    stages = stages.changed(exit=None)
    hooks = _draw(model, options.drawn, stages, preset.schedule.batch_size)
    if not preset.decay_all:
        _without_decay(model)
    # With drawn widths, a training step has the narrowest, the widest and the drawn ones.
    trained = options.drawn + 2 if options.drawn else len(names(spec, model))
    loss = objective(options.method, trained, preset.weight, preset.temperature, options.direction)
    history = stages.fit("inplace", model, loss, preset.schedule, hooks=hooks)
    return Result(spec, model.eval(), history, parts(spec, model))


def objective(
    method: str, count: int, weight: float, temperature: float = 1.0, direction: str = "forward"
) -> Objective:
    """The loss of eq. 4 to 7 for `count` classifiers. `weight` (lambda) is that of the divergence of weaker ones.

    For slimmable networks the paper has the cross-entropy with soft targets instead of the divergence. The two differ
    only by the teacher's entropy, so their gradients are equal. Raises ShoalError for an unknown method, and for fewer
    than two classifiers when one has to teach.
    """
    if method not in METHODS:
        raise ShoalError(f"found method {method!r}; need one of {', '.join(METHODS)}; choose one")
    path, last = METHODS[method], count - 1
    rest = 1.0 if path is None else 1.0 - weight
    terms = [cross_entropy(rest, i, f"classifier{i}_cross_entropy") for i in range(last) if rest]
    terms.append(cross_entropy(1.0, last, f"classifier{last}_cross_entropy"))
    if path is not None:
        terms.append(self_kd(path, count, weight, temperature, direction=direction))
    return Objective(tuple(terms))


def _draw(model: nn.Module, drawn: int, stages: Stages, batch: int) -> tuple[Calibration, ...]:
    """Let `model` draw widths; returns the hook that measures its statistics on 5 batches, as in US-Nets."""
    if not drawn:
        return ()
    assert isinstance(model, Slimmable)
    model.sandwich(drawn)
    # Only whole batches, because the mean over batches gives each batch the same weight.
    size = min(batch, len(stages.data.train))
    most = min(5, len(stages.data.train) // size) * size
    return (Calibration(lambda: (x for x, _ in stages.some_batches(most, size))),)


def _without_decay(model: nn.Module) -> None:
    for module in model.modules():
        depthwise = isinstance(module, nn.Conv2d) and module.weight.shape[1] == 1 and module.groups > 1
        if depthwise or isinstance(module, (nn.BatchNorm2d, SharedAffineBatchNorm2d)):
            module.rate_multiplier = 1.0  # type: ignore[assignment]


def names(spec: Spec, model: nn.Module) -> tuple[str, ...]:
    """Names of the classifiers of `model`, weak to strong: widths (``0.25``), or exit numbers from 1."""
    if isinstance(model, Slimmable):
        return tuple(f"{part:g}" for part in model.widths)
    return tuple(str(number) for number in range(1, len(trace(model, spec.shape).outputs) + 1))


def parts(spec: Spec, model: nn.Module) -> dict[str, tuple[Spec, nn.Module]]:
    """Each classifier of the network of `spec` as a separate network in eval mode, with its spec."""
    cut: Callable[[int], nn.Module] = partial(keep_exit, model)
    if isinstance(model, Slimmable):
        cut = partial(narrowed, model, shape=spec.shape)
    kept = "kept_width" if isinstance(model, Slimmable) else "kept_exit"
    return {
        name: (replace(spec, **{kept: index}), cut(index).eval())  # type: ignore[arg-type]
        for index, name in enumerate(names(spec, model))
    }


def _check_logits(model: nn.Module, spec: Spec) -> None:
    if isinstance(model, Slimmable):
        return
    graph = trace(model, spec.shape)
    shapes = [graph[name].shape for name in graph.outputs]
    odd = [shape for shape in shapes if len(shape) != 1 or shape[0] < spec.classes]
    if odd:
        raise ShoalError(
            f"found a result of shape {odd[0]} an image from {spec.base!r}; need {spec.classes} logits, one a class, "
            "from every classifier; change what forward gives"
        )


def check_options(options: Options, spec: Spec, base: nn.Module | None = None) -> None:
    """Raise ShoalError for options that are invalid or have no effect, and for a network that they do not fit."""
    if options.widths and options.exits:
        raise ShoalError("found widths and exits; need one kind of classifiers; leave one out")
    if (options.shared_affine or options.drawn) and not options.widths:
        raise ShoalError("found shared scales or drawn widths without widths; need a slimmable network; add widths")
    if options.drawn < 0 or not options.drawn < 16:
        raise ShoalError(f"found {options.drawn} drawn widths a step; need 1 to 15, or 0 for none; US-Nets draw 2")
    if options.direction not in ("forward", "reverse"):
        raise ShoalError(f"found KL direction {options.direction!r}; need 'forward' or 'reverse'")
    if options.method == "conventional" and options.direction != "forward":
        raise ShoalError("found a KL direction for conventional training; need a method that distils; leave it out")
    made = options.spec(spec)
    model = assemble(made, base)
    _check_logits(model, spec)
    if isinstance(model, Slimmable) and options.drawn:
        model.sandwich(options.drawn)
    count = len(names(made, model))
    if count < 2:
        raise ShoalError(f"found one classifier in {spec.base!r}; need two or more; name exits or widths for it")
    objective(options.method, count, 0.5)
