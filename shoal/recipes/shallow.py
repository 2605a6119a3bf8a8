"""*Making Models Shallow Again*: budgets, learned masks, gated branches, an auxiliary classifier, one page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from shoal.branch import branched_blocks, commit_branches, named_blocks, set_gate
from shoal.budget import Budget, allocate
from shoal.data import Dataset
from shoal.distill import Objective, Term, cross_entropy, kd, pram
from shoal.errors import ShoalError
from shoal.exits import default_exit_point, keep_exit
from shoal.mask import DifferenceLearner, check_budget, masked_sites, random_masks
from shoal.run import Run
from shoal.sensitivity import DynamicRewiring, pruning_sensitivity
from shoal.sites import Block, ReluSite, find_blocks, relu_sites
from shoal.spec import Spec, assemble, committed
from shoal.stages import Listener, Stages, check_teacher, fresh
from shoal.train import History, Schedule, Settings, ramp


@dataclass(frozen=True)
class Preset:
    """Schedules and loss weights of the three stages."""

    teacher: Schedule
    sensitivity: Schedule
    mask: Schedule
    finetune: Schedule
    mask_ce: float = 0.5
    mask_kd: float = 0.5
    kd_weight: float = 0.9
    temperature: float = 4.0
    beta: float = 1000.0
    pram_form: str = "paper"
    pram_sites: str = "all"
    select: str = "val"
    student_from_teacher: bool = True
    mask_score: str = "counterfactual"
    rewirings: int = 0
    """Rewirings in stage 1 at least; an epoch has one or as many as that takes."""

    @property
    def begins_learned(self) -> bool:
        """Whether the mask search begins with masks that the teacher gives, and not with random ones."""
        return self.student_from_teacher and self.mask_score == "counterfactual"


def quick(teacher: int = 12, sensitivity: int = 2, mask: int = 6, finetune: int = 16, batch: int = 64) -> Preset:
    """Short cosine schedules for small data; masks search from the teacher's weights."""

    def cosine(epochs: int, lr: float, drop: tuple[int, ...] = ()) -> Schedule:
        return Schedule(epochs, lr, drop, kind="cosine", warmup=0.5, batch_size=batch)

    return Preset(
        cosine(teacher, 0.1),
        cosine(sensitivity, 0.05),
        cosine(mask, 0.02),
        cosine(finetune, 0.03, (max(1, finetune // 3),)),
        beta=1.0,
        rewirings=16,
    )


def paper() -> Preset:
    """shallow section 5.1, with SENet's stages 1 and 2 as its authors' follow-up code has them."""
    decay = (150, 180, 210)
    return Preset(
        Schedule(240, 0.05, decay),
        Schedule(30, 0.05, decay),
        Schedule(150, 0.05, decay),
        Schedule(180, 0.01, (90, 140, 160)),
        student_from_teacher=False,
        mask_score="published",
    )


def reference_code() -> Preset:
    """What the SENet group's public code does where it differs from the papers (see docs/papers/shallow.md).

    Attention-transfer PRAM over the four stage outputs, 240 fine-tuning epochs, and the test set for selection.
    """
    return replace(
        paper(),
        finetune=Schedule(240, 0.01, (150, 180, 210)),
        pram_form="attention-transfer",
        pram_sites="stages",
        select="test",
    )


PRESETS: dict[str, Callable[[], Preset]] = {"quick": quick, "paper": paper, "reference-code": reference_code}


@dataclass(frozen=True)
class Options:
    """What to reduce to, and which variant of each stage."""

    budget: int
    d_th: float = 0.05
    gates: bool = True
    gated: tuple[str, ...] | None = None
    """Blocks to gate, by their inner sites, instead of those whose assigned ratio is below `d_th`."""
    ramp: str = "linear"
    exit: bool = True
    keep: str = "final"
    masks: str = "senet"
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
    eta = options.sensitivity or _sensitivity(stages, spec, teacher, sites, options, preset)
    budget = allocate(sites, eta, options.budget)
    masked = _search_masks(stages, spec, teacher, sites, budget, options, preset)
    final_spec, model = _finetune(stages, masked, teacher, sites, budget, options, preset)
    return Result(final_spec, model, budget, sites, eta, stages.histories)


def check_options(options: Options, preset: Preset, teacher: nn.Module, shape: tuple[int, ...]) -> None:
    """Raise ShoalError, before any training, for an impossible budget or schedule, or unknown variants or blocks."""
    sites = relu_sites(teacher, shape)
    named_blocks(find_blocks(teacher, shape), options.gated or ())
    known = {
        "keep": ("final", "auxiliary"),
        "masks": ("senet", "random"),
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
    budget: Budget,
    options: Options,
    preset: Preset,
) -> _Masked:
    """Stage 2: learn where the ReLUs go, with CE + KD; `random` keeps the first draw, at equal budget and epochs."""
    spec = replace(spec, masked=tuple(site.name for site in sites))
    torch.manual_seed(stages.settings.seed + 2)
    model = assemble(spec, teacher if preset.student_from_teacher else fresh(teacher))
    seed, learned = stages.settings.seed, options.masks == "senet"
    start = random_masks(budget, sites, torch.Generator().manual_seed(seed), options.granularity)
    for name, module in masked_sites(model).items():
        module.set_mask(start[name])
    learner = DifferenceLearner(budget, options.granularity, preset.mask_score)
    if learned and preset.begins_learned:
        learner.look(model, teacher, stages.some_images())
    objective = Objective((cross_entropy(preset.mask_ce), kd(preset.mask_kd, preset.temperature)))
    # A search that begins with random masks trains its first epoch on them; they must not be what is kept.
    choice = {"select_from": int(learned and not preset.begins_learned)}
    hooks = (learner,) if learned else ()
    stages.fit("mask", model, objective, preset.mask, teacher=teacher, hooks=hooks, settings=choice)
    check_budget(model, budget)
    return _Masked(spec, model)


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
    blocks = _gated(find_blocks(masked.model, spec.shape), budget, options)
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


def _gated(blocks: tuple[Block, ...], budget: Budget, options: Options) -> tuple[Block, ...]:
    if not options.gates:
        return ()
    if options.gated is not None:
        return named_blocks(blocks, options.gated)
    return branched_blocks(blocks, budget, options.d_th)


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
