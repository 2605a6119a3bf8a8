"""The three stages of *Making Models Shallow Again*: sensitivities, learned masks, and fine-tuning.

Fine-tuning also has gated branches, an auxiliary classifier or several widths.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn

from shoal.channels.slimmable import Slimmable, narrowed
from shoal.distillation.losses import kd, pram
from shoal.errors import ShoalError
from shoal.exits.classifiers import default_exit_point, keep_exit
from shoal.networks.assembly import assemble
from shoal.networks.spec import Spec, committed
from shoal.recipes.shallow.options import PRICES, Options, check_options
from shoal.recipes.shallow.presets import Preset
from shoal.recipes.stages import Stages, check_teacher, fresh
from shoal.reduction.budget import Budget, allocate
from shoal.reduction.depth import choose_blocks, gated_graph, importances
from shoal.reduction.gates import branched_blocks, commit_branches, named_blocks, set_gate
from shoal.reduction.learners import LEARNERS
from shoal.reduction.learners.search import Problem, kept
from shoal.reduction.masks import masked_sites
from shoal.reduction.sensitivity import DynamicRewiring, pruning_sensitivity
from shoal.surgery.sites import Block, ReluSite, relu_sites
from shoal.surgery.traced import Traced
from shoal.training.evaluation import evaluate
from shoal.training.loop import History
from shoal.training.objective import Objective, Term, cross_entropy
from shoal.training.schedule import ramp


@dataclass
class Result:
    """The reduced network, its spec, its ReLU budget by site, and the sensitivities and training histories.

    `narrower` has the same network with fewer channels, by the fraction of channels (`Options.widths`).
    """

    spec: Spec
    model: nn.Module
    budget: Budget
    sites: tuple[ReluSite, ...]
    sensitivity: dict[str, float]
    histories: dict[str, History]
    narrower: dict[float, tuple[Spec, nn.Module]] = field(default_factory=dict)


def reduce(spec: Spec, teacher: nn.Module, options: Options, preset: Preset, stages: Stages) -> Result:
    """Reduce `teacher` (the trained network of `spec`) to `options.budget` ReLUs by the paper's three stages.

    The result has one classifier, and no gated branches: only masks are left. Raises ShoalError for an impossible
    budget or options, and StoppedError when the time is up.
    """
    check_teacher(spec)
    check_options(options, preset, teacher, spec.shape)
    stages = stages.changed(select=preset.select)
    job = _Reduction(spec, teacher, relu_sites(teacher, spec.shape), options, preset, stages)
    eta = options.sensitivity or {}
    if LEARNERS[options.masks].per_site and not eta:
        eta = _sensitivity(job)
    masked = _search_masks(job, eta)
    budget = kept({name: module.mask for name, module in masked_sites(masked.model).items()})
    if budget.total != options.budget:
        raise ShoalError(
            f"found {budget.total:,} ReLUs after the search of masks; need {options.budget:,}; use a run folder of "
            "its own for each budget, or mend the learner"
        )
    final_spec, trained = _finetune(job, masked, budget)
    model = _cut(final_spec, trained).eval()
    return Result(final_spec, model, budget, job.sites, eta, stages.histories, _narrower(final_spec, trained))


@dataclass(frozen=True)
class _Reduction:
    """The inputs that all stages of one reduction share."""

    spec: Spec
    teacher: nn.Module
    sites: tuple[ReluSite, ...]
    options: Options
    preset: Preset
    stages: Stages

    @property
    def seed(self) -> int:
        return self.stages.settings.seed

    @property
    def device(self) -> str:
        return self.stages.settings.device


def _sensitivity(job: _Reduction) -> dict[str, float]:
    """Stage 1: train a sparse network from scratch; its densities give the sensitivities (eq. 1)."""
    run, preset = job.stages.run, job.preset
    if run and run.has("sensitivity.json"):
        return dict(run.read_json("sensitivity.json"))
    torch.manual_seed(job.seed + 1)
    sparse = fresh(job.teacher)
    epochs = preset.sensitivity.epochs
    often = max(1, -(-preset.rewirings // epochs))
    rewiring = DynamicRewiring(sparse, epochs, job.options.density, seed=job.seed, per_epoch=often)
    job.stages.fit("sensitivity", sparse, Objective((cross_entropy(),)), preset.sensitivity, hooks=(rewiring,))
    eta = pruning_sensitivity(rewiring.densities(), job.sites)
    if run:
        run.write_json("sensitivity.json", eta)
    return eta


@dataclass
class _Masked:
    spec: Spec
    model: nn.Module


def _search_masks(job: _Reduction, eta: dict[str, float]) -> _Masked:
    """Stage 2: learn which ReLUs to keep, by cross-entropy, distillation and the mask learner's own terms."""
    method, preset = LEARNERS[job.options.masks], job.preset
    search = method(_mask_problem(job, eta))
    objective = Objective((cross_entropy(preset.mask_ce), kd(preset.mask_kd, preset.temperature), *search.terms))
    job.stages.fit(
        "mask", search.model, objective, preset.mask, teacher=job.teacher, hooks=search.hooks,
        settings={"select_from": search.select_from},
    )  # fmt: skip
    masked = replace(job.spec, masked=tuple(site.name for site in job.sites), rest=method.rest)
    return _Masked(masked, search.finished())


def _mask_problem(job: _Reduction, eta: dict[str, float]) -> Problem:
    """The input of the mask learner."""
    method, preset, stages = LEARNERS[job.options.masks], job.preset, job.stages
    torch.manual_seed(job.seed + 2)
    start = job.teacher if preset.student_from_teacher or method.from_teacher else fresh(job.teacher)
    return Problem(
        model=assemble(job.spec, start.to(job.device)),
        teacher=job.teacher.to(job.device),
        sites=job.sites,
        shape=job.spec.shape,
        total=job.options.budget,
        schedule=preset.mask,
        steps=max(1, len(stages.data.train) // preset.mask.batch_size),
        seed=job.seed,
        batches=stages.some_batches,
        share=partial(allocate, job.sites, eta) if method.per_site else None,
        granularity=job.options.granularity,
        score=preset.mask_score,
        begins_learned=preset.begins_learned,
        beta=preset.beta,
        pram_form=preset.pram_form,
    )


class _GateRamp:
    """Hook that raises every gate along the ramp; it is 1 from epoch `until` on."""

    taps: tuple[str, ...] = ()
    recordable = True

    def __init__(self, until: int, kind: str) -> None:
        self.until, self.kind = until, kind

    def on_epoch_start(self, model: nn.Module, epoch: int) -> None:
        """Set the gates for this epoch: `epoch` / `until` for the linear ramp of the paper."""
        set_gate(model, ramp(epoch, self.until, self.kind))


def _finetune(job: _Reduction, masked: _Masked, budget: Budget) -> tuple[Spec, nn.Module]:
    """Stage 3: fine-tune with frozen masks by KL + CE + PRAM; with gated branches, an auxiliary classifier or widths.

    Returns the spec of the network to deploy, and the whole trained network.
    """
    options, schedule = job.options, job.preset.finetune
    blocks = _gated(job, masked, budget)
    spec = _finetuned_spec(masked, blocks, options)
    torch.manual_seed(job.seed + 3)
    model = _grow(spec, masked)
    until = schedule.first_drop if blocks else 0
    hooks = (_GateRamp(until, options.ramp),) if blocks else ()
    kept = 0 if options.keep == "auxiliary" else -1
    job.stages.fit(
        "finetune", model, Objective(finetune_terms(job.preset, job.sites, spec)), schedule, teacher=job.teacher,
        hooks=hooks, settings={"select_from": min(until, schedule.epochs - 1), "exit": kept},
    )  # fmt: skip
    set_gate(model, 1.0)
    return replace(committed(spec, kept), kept_width=len(spec.widths) - 1 if spec.widths else None), model


def _finetuned_spec(masked: _Masked, blocks: tuple[Block, ...], options: Options) -> Spec:
    """The spec of the network that stage 3 trains."""
    exits = (default_exit_point(masked.model, masked.spec.shape),) if options.exit else ()
    names = tuple(block.name for block in blocks)
    return replace(masked.spec, branches=names, keep_skip=options.keep_skip, exits=exits, widths=options.widths)


def _gated(job: _Reduction, masked: _Masked, budget: Budget) -> tuple[Block, ...]:
    """The blocks that get a gated branch by the options."""
    options = job.options
    if not options.gates:
        return ()
    traced = Traced(masked.model, masked.spec.shape)
    if options.gated is not None:
        return named_blocks(traced.blocks, options.gated)
    if options.gate_limit is not None:
        return named_blocks(traced.blocks, _least_loss(job, traced, options.gate_limit))
    return branched_blocks(traced.blocks, budget, options.d_th)


def _least_loss(job: _Reduction, traced: Traced, part: float) -> tuple[str, ...]:
    """Names of blocks whose replacement lowers the price to the fraction `part` and costs least validation accuracy."""
    data, settings = job.stages.data, job.stages.settings
    split = data.val if len(data.val) else data.train
    importance = importances(traced, lambda m: evaluate(m, data, split, settings)[-1])
    price = PRICES[job.options.gate_price]
    limit = part * price(gated_graph(traced, ()))
    return choose_blocks(traced, price, limit, importance, keep_skip=job.options.keep_skip)


def _grow(spec: Spec, masked: _Masked) -> nn.Module:
    """The network of stage 3 with the weights and masks of stage 2."""
    return assemble(replace(spec, masked=()), masked.model)


def _cut(spec: Spec, model: nn.Module) -> nn.Module:
    if isinstance(model, Slimmable) and spec.kept_width is not None:
        return narrowed(model, spec.kept_width, spec.shape)
    model = keep_exit(model, spec.kept_exit if spec.kept_exit is not None else -1)
    return commit_branches(model) if spec.committed else model


def _narrower(spec: Spec, model: nn.Module) -> dict[float, tuple[Spec, nn.Module]]:
    """The networks of all widths but the full one."""
    specs = {part: replace(spec, kept_width=index) for index, part in enumerate(spec.widths[:-1])}
    return {part: (own, _cut(own, model).eval()) for part, own in specs.items()}


def finetune_terms(preset: Preset, sites: tuple[ReluSite, ...], spec: Spec) -> tuple[Term, ...]:
    """Loss terms of eq. 2: CE, KL and PRAM for the final classifier.

    The auxiliary classifier (AKD), or each narrower width, has the same CE and KL.
    """
    # A gated block's inner activation means nothing once its branch has taken over.
    pairs = [site for site in sites if site.name not in spec.branches]
    if preset.pram_sites == "stages":
        pairs = [a for a, b in zip(pairs, [*pairs[1:], None], strict=True) if b is None or b.stage != a.stage]
        pairs = [site for site in pairs if site.stage > 0]
    ce, weight = 1 - preset.kd_weight, preset.kd_weight
    terms = [cross_entropy(ce), kd(weight, preset.temperature)]
    others = {"auxiliary": 0} if spec.exits else {f"width_{w:g}": i for i, w in enumerate(spec.widths[:-1])}
    for name, index in others.items():
        terms.append(cross_entropy(ce, exit=index, name=f"{name}_cross_entropy"))
        terms.append(kd(weight, preset.temperature, exit=index, name=f"{name}_kd"))
    terms.append(pram(preset.beta, [site.name for site in pairs], preset.pram_form))
    return tuple(terms)
