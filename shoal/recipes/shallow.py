"""*Making Models Shallow Again*: budgets, learned masks, gated branches, an auxiliary classifier, one page."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn

from shoal.branch import branched_blocks, commit_branches, named_blocks, set_gate
from shoal.budget import Budget, allocate
from shoal.cost import cost
from shoal.data import Dataset
from shoal.depth import choose_blocks, gated_graph, importances
from shoal.distill import Objective, Term, cross_entropy, kd, pram
from shoal.errors import ShoalError
from shoal.exits import default_exit_point, keep_exit
from shoal.graph import Graph
from shoal.learners import LEARNERS, Problem, kept
from shoal.mask import masked_sites
from shoal.recipes.presets import PRESETS, Preset, paper, quick, reference_code
from shoal.run import Run
from shoal.sensitivity import DynamicRewiring, pruning_sensitivity
from shoal.sites import Block, ReluSite, find_blocks, relu_sites
from shoal.spec import Spec, assemble, committed
from shoal.stages import Listener, Stages, check_teacher, fresh
from shoal.train import History, Settings, evaluate, ramp

__all__ = [
    "PRESETS", "Options", "Preset", "Result", "check_options", "paper", "quick", "reduce", "reference_code",
]  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What to reduce to, and which variant of each stage."""

    budget: int
    d_th: float = 0.05
    gates: bool = True
    gated: tuple[str, ...] | None = None
    """Blocks to gate, by their inner sites, instead of those whose assigned ratio is below `d_th`."""
    gate_limit: float | None = None
    """Gate, instead, what brings the MACs down to this part of the network's at the least loss (`shoal.depth`)."""
    ramp: str = "linear"
    exit: bool = True
    keep: str = "final"
    masks: str = "senet"
    """A name of `LEARNERS`."""
    granularity: str = "pixel"
    density: float = 0.1
    keep_skip: bool = True
    sensitivity: dict[str, float] | None = field(default=None)


@dataclass
class Result:
    """The reduced network, ready to trace, and how it came about."""

    spec: Spec
    model: nn.Module
    budget: Budget
    sites: tuple[ReluSite, ...]
    sensitivity: dict[str, float]
    histories: dict[str, History]


def reduce(
    spec: Spec,
    teacher: nn.Module,
    data: Dataset,
    options: Options,
    preset: Preset,
    settings: Settings,
    *,
    run: Run | None = None,
    listen: Listener | None = None,
    tensorboard: bool = False,
) -> Result:
    """Reduce `teacher` (the network of `spec`, trained) to `options.budget` ReLUs by the paper's three stages.

    Returns a network with one classifier and no wrapper but masks. Raises ShoalError for an impossible budget or
    options, and StoppedError when the settings' time ran out.
    """
    check_teacher(spec)
    check_options(options, preset, teacher, spec.shape)
    sites = relu_sites(teacher, spec.shape)
    stages = Stages(data, replace(settings, select=preset.select), run, listen, tensorboard)
    eta = options.sensitivity or {}
    if LEARNERS[options.masks].per_site and not eta:
        eta = _sensitivity(stages, spec, teacher, sites, options, preset)
    masked = _search_masks(stages, spec, teacher, sites, eta, options, preset)
    budget = kept({name: module.mask for name, module in masked_sites(masked.model).items()})
    final_spec, model = _finetune(stages, masked, teacher, sites, budget, options, preset)
    return Result(final_spec, model, budget, sites, eta, stages.histories)


def check_options(options: Options, preset: Preset, teacher: nn.Module, shape: tuple[int, ...]) -> None:
    """Raise ShoalError, before any training, for an impossible budget or schedule, or unknown variants or blocks."""
    sites = relu_sites(teacher, shape)
    named_blocks(find_blocks(teacher, shape), options.gated or ())
    _check_gate_limit(options, teacher, shape)
    known = {
        "keep": ("final", "auxiliary"),
        "masks": tuple(LEARNERS),
        "granularity": ("pixel", "channel"),
        "ramp": ("linear", "cosine"),
    }
    for name, values in known.items():
        if getattr(options, name) not in values:
            raise ShoalError(f"found {name} {getattr(options, name)!r}; need one of {', '.join(values)}")
    if options.keep == "auxiliary" and not options.exit:
        raise ShoalError("found keep 'auxiliary' without an exit; need the auxiliary classifier trained; use --exit")
    if options.masks == "senet" and not preset.begins_learned and preset.mask.epochs < 2:
        raise ShoalError(
            f"found {preset.mask.epochs} epochs of mask search; need 2 or more, of which the first runs on random masks"
        )
    LEARNERS[options.masks].check(teacher, shape)
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


def _macs(graph: Graph) -> float:
    return float(cost(graph).macs)


def _check_gate_limit(options: Options, teacher: nn.Module, shape: tuple[int, ...]) -> None:
    """Raise ShoalError for a limit that gating cannot keep, or one beside named blocks."""
    if options.gate_limit is None:
        return
    if not 0 < options.gate_limit <= 1 or options.gated is not None or not options.gates:
        raise ShoalError(
            f"found a gate limit of {options.gate_limit} with gates {options.gated or options.gates}; need a part of "
            "the MACs in (0, 1], gates on and no named blocks; leave one of them out"
        )
    limit = options.gate_limit * _macs(gated_graph(teacher, shape, ()))
    equal = {block.name: 1.0 for block in find_blocks(teacher, shape)}
    choose_blocks(teacher, shape, _macs, limit, equal, keep_skip=options.keep_skip)


def _sensitivity(
    stages: Stages, spec: Spec, teacher: nn.Module, sites: tuple[ReluSite, ...], options: Options, preset: Preset
) -> dict[str, float]:
    """Stage 1: train sparsely from scratch and read the densities (eq. 1)."""
    run = stages.run
    if run and run.has("sensitivity.json"):
        return dict(run.read_json("sensitivity.json"))
    torch.manual_seed(stages.settings.seed + 1)
    sparse = fresh(teacher)
    epochs = preset.sensitivity.epochs
    often = max(1, -(-preset.rewirings // epochs))
    rewiring = DynamicRewiring(sparse, epochs, options.density, seed=stages.settings.seed, per_epoch=often)
    stages.fit("sensitivity", sparse, Objective((cross_entropy(),)), preset.sensitivity, hooks=(rewiring,))
    eta = pruning_sensitivity(rewiring.densities(), sites)
    if run:
        run.write_json("sensitivity.json", eta)
    return eta


@dataclass
class _Masked:
    spec: Spec
    model: nn.Module


def _search_masks(
    stages: Stages,
    spec: Spec,
    teacher: nn.Module,
    sites: tuple[ReluSite, ...],
    eta: dict[str, float],
    options: Options,
    preset: Preset,
) -> _Masked:
    """Stage 2: learn where the ReLUs go, with CE + KD and what the learner adds."""
    method, seed = LEARNERS[options.masks], stages.settings.seed
    torch.manual_seed(seed + 2)
    start = teacher if preset.student_from_teacher or method.from_teacher else fresh(teacher)
    problem = Problem(
        assemble(spec, start.to(stages.settings.device)),
        teacher.to(stages.settings.device),
        sites,
        spec.shape,
        options.budget,
        preset.mask,
        max(1, len(stages.data.train) // preset.mask.batch_size),
        seed,
        stages.some_batches,
        partial(allocate, sites, eta) if method.per_site else None,
        options.granularity,
        preset.mask_score,
        preset.begins_learned,
        preset.beta,
        preset.pram_form,
    )
    search = method(problem)
    objective = Objective((cross_entropy(preset.mask_ce), kd(preset.mask_kd, preset.temperature), *search.terms))
    choice = {"select_from": search.select_from}
    stages.fit("mask", search.model, objective, preset.mask, teacher=teacher, hooks=search.hooks, settings=choice)
    masked = replace(spec, masked=tuple(site.name for site in sites), rest=method.rest)
    return _Masked(masked, search.finished())


class _GateRamp:
    """Hook: opens every gate by the ramp, to 1 at the first drop of the learning rate."""

    taps: tuple[str, ...] = ()

    def __init__(self, until: int, kind: str) -> None:
        self.until, self.kind = until, kind

    def on_epoch_start(self, model: nn.Module, epoch: int) -> None:
        """Set the gate for this epoch: epoch / until, as the paper does."""
        set_gate(model, ramp(epoch, self.until, self.kind))


def _finetune(
    stages: Stages,
    masked: _Masked,
    teacher: nn.Module,
    sites: tuple[ReluSite, ...],
    budget: Budget,
    options: Options,
    preset: Preset,
) -> tuple[Spec, nn.Module]:
    """Stage 3: frozen masks, gated branches, auxiliary classifier, KL + CE + PRAM; then one plain network."""
    spec = masked.spec
    blocks = _gated(stages, masked, budget, options)
    exits = (default_exit_point(masked.model, spec.shape),) if options.exit else ()
    spec = replace(spec, branches=tuple(b.name for b in blocks), keep_skip=options.keep_skip, exits=exits)
    torch.manual_seed(stages.settings.seed + 3)
    model = _grow(spec, masked)
    until = preset.finetune.first_drop if blocks else 0
    hooks = (_GateRamp(until, options.ramp),) if blocks else ()
    objective = Objective(_finetune_terms(preset, sites, spec))
    kept = 0 if options.keep == "auxiliary" else -1
    choice = {"select_from": min(until, preset.finetune.epochs - 1), "exit": kept}
    stages.fit("finetune", model, objective, preset.finetune, teacher=teacher, hooks=hooks, settings=choice)
    final = committed(spec, kept)
    set_gate(model, 1.0)
    return final, _cut(final, model).eval()


def _gated(stages: Stages, masked: _Masked, budget: Budget, options: Options) -> tuple[Block, ...]:
    blocks = find_blocks(masked.model, masked.spec.shape)
    if not options.gates:
        return ()
    if options.gated is not None:
        return named_blocks(blocks, options.gated)
    if options.gate_limit is not None:
        return named_blocks(blocks, _least_loss(stages, masked, options.gate_limit, options.keep_skip))
    return branched_blocks(blocks, budget, options.d_th)


def _least_loss(stages: Stages, masked: _Masked, part: float, keep_skip: bool) -> tuple[str, ...]:
    """The blocks whose gating brings the MACs to `part` and costs the least validation accuracy, block by block."""
    data, shape = stages.data, masked.spec.shape
    split = data.val if len(data.val) else data.train
    importance = importances(masked.model, shape, lambda m: evaluate(m, data, split, stages.settings)[-1])
    limit = part * _macs(gated_graph(masked.model, shape, ()))
    return choose_blocks(masked.model, shape, _macs, limit, importance, keep_skip=keep_skip)


def _grow(spec: Spec, masked: _Masked) -> nn.Module:
    """The stage-3 network on the stage-2 weights and masks."""
    return assemble(replace(spec, masked=()), masked.model)


def _cut(spec: Spec, model: nn.Module) -> nn.Module:
    model = keep_exit(model, spec.kept_exit if spec.kept_exit is not None else -1)
    return commit_branches(model) if spec.committed else model


def _finetune_terms(preset: Preset, sites: tuple[ReluSite, ...], spec: Spec) -> tuple[Term, ...]:
    """Eq. 2 for the final classifier, and the same CE and KL for the auxiliary one (AKD)."""
    # A gated block's inner activation means nothing once its branch has taken over.
    pairs = [site for site in sites if site.name not in spec.branches]
    if preset.pram_sites == "stages":
        pairs = [a for a, b in zip(pairs, [*pairs[1:], None], strict=True) if b is None or b.stage != a.stage]
        pairs = [site for site in pairs if site.stage > 0]
    ce, weight = 1 - preset.kd_weight, preset.kd_weight
    terms = [cross_entropy(ce), kd(weight, preset.temperature)]
    if spec.exits:
        terms.append(cross_entropy(ce, exit=0, name="auxiliary_cross_entropy"))
        terms.append(kd(weight, preset.temperature, exit=0, name="auxiliary_kd"))
    terms.append(pram(preset.beta, [site.name for site in pairs], preset.pram_form))
    return tuple(terms)
