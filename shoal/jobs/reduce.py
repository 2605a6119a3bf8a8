"""The job of `shoal reduce` with recipe shallow: reduce a trained network to a ReLU budget in three stages."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from torch import nn

from shoal.costs.plan import Plan
from shoal.costs.plan import read as read_plan
from shoal.errors import ShoalError
from shoal.jobs.inputs import epochs_of, given_sensitivity, longer, preset_of, teacher_of
from shoal.jobs.options import ARGUMENT, Shared
from shoal.jobs.training import Job, Prepared, prepare
from shoal.networks.spec import Spec
from shoal.networks.stored import load_network, save_network
from shoal.recipes import shallow
from shoal.recipes.shallow.masks_from import check_masks, has_masks, take_masks
from shoal.reduction.learners import LEARNERS
from shoal.report import gated_macs, plot_budget
from shoal.storage.origins import Config, inherited
from shoal.storage.run import Run, as_json
from shoal.storage.summary import Accounting, Figures, Summary


@dataclass(frozen=True)
class Request:
    """The options of `shoal reduce`, without those in `shallow.Choices`."""

    teacher: Path = field(metadata=ARGUMENT)
    """The trained network to reduce: a run folder of shoal train."""
    plan: Path | None = None
    """A plan file of shoal plan --out. It decides the budget, the blocks to replace and the classifier to deploy. Give
    this or --budget."""
    recipe: str = "shallow"
    """Method: shallow (Making Models Shallow Again) or deepreduce (the grid of designs of DeepReDuce)."""
    designs: str | None = None
    """With --recipe deepreduce: train only these designs, by their numbers in the grid, counted from 1, or by name (see
    shoal count -h), such as 1-5,8,S2RT+S3-a0.5-r0.5; all if left out."""
    kd: bool = True
    """With --recipe deepreduce: train the designs by distillation, or from labels only. Criticality is always measured
    with distillation."""
    taught_by: Path | None = None
    """With --recipe deepreduce: distil from this network, a run folder of shoal train with the same data, limit and
    seed, such as that of a larger network; the network to reduce if left out."""
    preset: str = "quick"
    """Preset of schedules and losses: quick, paper or reference-code; with --recipe deepreduce: quick, paper or
    paper-cifar10."""
    sensitivity: Path | None = None
    """JSON file {site: sensitivity} to use instead of the first stage; ReLU layers (sites) with a higher sensitivity
    keep more ReLUs."""
    masks_from: Path | None = None
    """A run folder of shoal reduce with the same teacher and budget: use its masks, and only fine-tune."""
    data_dir: Path | None = None
    """Folder with the files of the data set, laid out as published; the teacher's own if left out."""
    epochs: str | None = None
    """Numbers of epochs of the three stages (sensitivity, mask search, fine-tuning), such as 2,6,16; with --recipe
    deepreduce of criticality (how much each stage matters) and of each design, such as 4,8. The preset's if left
    out."""

    def config(self, origin: Config) -> Config:
        """The settings that the run records; `origin` is the configuration of the teacher's run."""
        own = {"command": "reduce", "preset": self.preset, "epochs": self.epochs, "teacher": self.teacher}
        return inherited(origin) | {f"teacher_{name}": origin.get(name) for name in ("preset", "epochs")} | own

    def check_sources(self, budget: int | None) -> None:
        """Raise ShoalError unless the recipe is shallow, with a budget or a plan, and no option of deepreduce."""
        if self.recipe != "shallow":
            raise ShoalError(f"found recipe {self.recipe!r}; need 'shallow' or 'deepreduce'; choose one")
        if (budget is None) == (self.plan is None):
            raise ShoalError(
                "found --budget and --plan, or neither; need one of them; --budget 50000, or shoal plan first"
            )
        given = {"designs": self.designs, "taught-by": self.taught_by, "no-kd": None if self.kd else True}
        odd = [name for name, value in given.items() if value is not None]
        if odd:
            raise ShoalError(f"found {odd[0]} for recipe shallow; need --recipe deepreduce for it; or leave it out")

    def schedules(self) -> shallow.Preset:
        """The preset with the chosen numbers of epochs. Raises ShoalError for an unknown preset or invalid numbers."""
        preset, names = preset_of(self.preset, shallow.PRESETS)(), ("sensitivity", "mask", "finetune")
        if self.epochs is None:
            return preset
        first, second, third = epochs_of(self.epochs, names)
        return replace(
            preset,
            sensitivity=longer(preset.sensitivity, first),
            mask=longer(preset.mask, second),
            finetune=longer(preset.finetune, third),
        )


def reduce(request: Request, choices: shallow.Choices, shared: Shared) -> Summary:
    """Reduce the network of a teacher's run into a new run folder.

    A plan replaces some of the choices. With `masks_from`, the masks of another reduction are used, and only
    fine-tuning is done. Raises ShoalError, before anything is written, for impossible options.
    """
    request.check_sources(choices.budget)
    shared.check("reduce")
    spec, network, origin = teacher_of(request.teacher)
    plan = _plan(request, spec)
    options, preset = _options(request, choices, plan), request.schedules()
    config = request.config(origin) | {"options": options}
    config |= {"plan": request.plan} if request.plan else {}
    config |= {"masks_from": request.masks_from} if request.masks_from else {}
    prepared = prepare(config, request.data_dir, shared)
    shallow.check_options(options, preset, network, spec.shape)
    job = _begin(prepared.fingerprinted(request.plan, teacher=network), request, preset.mask.epochs)
    save_network(job.run, spec, network, "teacher")
    summary = fit_stages(job, spec, network, options, preset)
    if plan is not None:
        summary.reduced["plan"] = plan.outcome(load_network(job.run)[1])
        summary.write(job.run)
    return summary


def _plan(request: Request, spec: Spec) -> Plan | None:
    """The plan that the request names. Raises ShoalError unless it was made for this teacher."""
    if request.plan is None:
        return None
    plan = read_plan(request.plan)
    plan.check(spec)
    return plan


def _options(request: Request, choices: shallow.Choices, plan: Plan | None) -> shallow.Options:
    decided = choices if plan is None else replace(choices, **plan.choices())
    options = shallow.Options(**vars(decided), sensitivity=given_sensitivity(request.sensitivity))
    if plan is not None and options.masks in LEARNERS and LEARNERS[options.masks].rest != "identity":
        raise ShoalError(f"found a plan with masks {options.masks!r}; need masks without squares; use autorep-linear")
    return options


def _begin(prepared: Prepared, request: Request, epochs: int) -> Job:
    """Begin the run; with `masks_from`, first copy the other run's masks unless they have been copied already."""
    shared = prepared.shared
    if request.masks_from is None or (shared.resume and has_masks(Run(shared.out))):
        return prepared.begin()
    earlier = Run(request.masks_from)
    check_masks(as_json(shared.recorded(prepared.config)), earlier, epochs)
    job = prepared.begin()
    take_masks(job.run, earlier)
    # Stages 1 and 2 resume from the copied checkpoints, which are complete.
    return replace(job, settings=replace(job.settings, resume=True))


def fit_stages(job: Job, spec: Spec, teacher: nn.Module, options: shallow.Options, preset: shallow.Preset) -> Summary:
    """Run the recipe's three stages, and save the network, its figures and its plots in the job's run folder."""
    epochs = {name: getattr(preset, name).epochs for name in ("sensitivity", "mask", "finetune")}
    with job.training(epochs) as stages:
        result = shallow.reduce(spec, teacher, options, preset, stages)
    save_network(job.run, result.spec, result.model)
    job.run.write_json("budget.json", asdict(result.budget))
    summary = Summary(
        data=job.data.name,
        model=spec.base,
        seed=job.settings.seed,
        narrower={width: job.part(f"widths/{width:g}", *own) for width, own in result.narrower.items()},
        baseline=job.figures(teacher, spec),
        reduced=_reduced(job, result, teacher),
        selected_on=preset.select,
    )
    plot_budget(result.sites, result.budget.counts, result.spec.branches, job.run.folder / "budget.png")
    return job.finish(summary)


def _reduced(job: Job, result: shallow.Result, teacher: nn.Module) -> Figures:
    """Figures of the reduced network, its replaced blocks, and their MACs by both ways of counting."""
    found = job.figures(result.model, result.spec)
    found["replaced_blocks"] = list(result.spec.branches)
    honest, paper = gated_macs(teacher, result.spec.shape, result.spec.branches)
    found["macs_accounting"] = Accounting(honest=honest, paper=paper)
    return found
