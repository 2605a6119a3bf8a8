"""The job of `shoal reduce --recipe deepreduce`: train a grid of designs, and choose one by a ReLU budget."""

from __future__ import annotations

from dataclasses import fields, replace

from shoal import units
from shoal.errors import ShoalError
from shoal.jobs.inputs import epochs_of, longer, other_teacher, preset_of, teacher_of
from shoal.jobs.options import Shared
from shoal.jobs.reduce import Request
from shoal.jobs.training import Job, prepare
from shoal.networks.stored import load_network, save_network
from shoal.recipes import deepreduce, shallow
from shoal.recipes.deepreduce.front import Point, pareto
from shoal.recipes.deepreduce.space import DesignSpace
from shoal.report.layout import Grid
from shoal.storage.environment import environment
from shoal.storage.origins import Config
from shoal.storage.run import Run
from shoal.storage.summary import DesignRow, Figures, Summary

LABELS = "labels only"
"""`Summary.taught_by` of designs that were trained without distillation."""


def reduce_by_grid(request: Request, choices: shallow.Choices, shared: Shared) -> Summary:
    """Train the designs of a teacher's run, each in its own folder inside the run folder, and choose one.

    The run folder itself holds the chosen network. Budget and `request.designs` may change when a run is resumed:
    trained designs stay, and the choice is made again. Raises ShoalError, before anything is written, for impossible
    options.
    """
    check_unused(request, choices)
    shared.check("reduce")
    spec, network, origin = teacher_of(request.teacher)
    preset, options = _preset(request), _options(request, choices.budget)
    config = request.config(origin) | {"recipe": "deepreduce"} | _taught(request)
    tutor, tutoring = other_teacher(request.taught_by, config, shared.device)
    prepared = prepare(config, request.data_dir, shared)
    deepreduce.check_options(options, spec, network)
    space = DesignSpace(spec, network)
    if tutoring is not None and not request.kd and not space.needs_grid(options.designs):
        raise ShoalError(
            f"found --taught-by {request.taught_by} with --no-kd and named designs, where it has no effect; need one "
            "of them; leave one out"
        )
    job = prepared.fingerprinted(teacher=network, taught_by=tutoring).begin()
    save_network(job.run, spec, network, "teacher")
    critical = {f"criticality-S{k}": preset.criticality.epochs for k in space.stages}
    with job.training(critical, other=preset.design.epochs) as stages:
        result = deepreduce.reduce(spec, network, options, preset, stages, deepreduce.Teaching(tutoring, request.kd))
    taught_by = None if tutor is None else tutor.base
    return _finish(job, result, choices.budget, taught_by if request.kd else LABELS)


def _taught(request: Request) -> Config:
    """The settings of what teaches, as far as they are not the usual ones. Runs of earlier versions have none."""
    return ({} if request.kd else {"kd": False}) | ({"taught_by": request.taught_by} if request.taught_by else {})


def _options(request: Request, budget: int | None) -> deepreduce.Options:
    designs = request.designs.split(",") if request.designs else []
    return deepreduce.Options(budget, tuple(part.strip() for part in designs))


def _preset(request: Request) -> deepreduce.Preset:
    preset = preset_of(request.preset, deepreduce.PRESETS)()
    if request.epochs is None:
        return preset
    first, second = epochs_of(request.epochs, ("criticality", "design"))
    return replace(preset, criticality=longer(preset.criticality, first), design=longer(preset.design, second))


def check_unused(request: Request, choices: shallow.Choices) -> None:
    """Raise ShoalError for an option of the shallow recipe, because it would have no effect."""
    pairs: tuple[tuple[object, tuple[str, ...]], ...] = (
        (choices, tuple(own.name for own in fields(choices) if own.name != "budget")),
        (request, ("sensitivity", "plan", "masks_from")),
    )
    usual = vars(shallow.Choices()) | {"sensitivity": None, "plan": None, "masks_from": None}
    for given, names in pairs:
        for name in names:
            value = getattr(given, name)
            if value != usual[name]:
                raise ShoalError(
                    f"found {name} {value!r} with recipe deepreduce; need no option of the shallow recipe; leave it "
                    "out, or use --recipe shallow"
                )


def _finish(job: Job, result: deepreduce.Result, budget: int | None, taught_by: str | None) -> Summary:
    """Save the chosen design's network as that of the run, and write the run's summary with all designs.

    `taught_by` says what taught the designs if not the unreduced network.
    """
    run = job.run
    chosen = Run(run.folder / "designs" / result.chosen.name)
    save_network(run, *load_network(chosen))
    summary = replace(Summary.read(chosen), budget=budget, designs=_rows(run, result.points), environment=environment())
    summary.taught_by = taught_by
    if run.has("criticality.json"):
        summary.criticality = run.read_json("criticality.json")
    summary.write(run)
    if run.has("metrics.jsonl"):
        job.draw_curves()
    return summary


def _rows(run: Run, points: tuple[Point, ...]) -> list[DesignRow]:
    """All designs, with their costs after merging linear layers."""
    best = {point.name for point in pareto(points)}
    merging = {p.name: Run(run.folder / "designs" / p.name).read_json("figures.json")["merging"] for p in points}
    return [
        DesignRow(
            name=p.name,
            relus=p.relus,
            validation=p.validation,
            test=p.test,
            front=p.name in best,
            merging=merging[p.name],
        )
        for p in points
    ]


def front_table(summary: Summary) -> Grid:
    """A table of all designs, by falling ReLU count; * marks designs on the front, ** the chosen one."""
    taught = f", taught by {summary.taught_by}" if summary.taught_by else ""
    title = f"{summary.model} on {summary.data}, seed {summary.seed}{taught}: chosen {summary.design}"
    baseline = summary.side("baseline")
    rows = [["all ReLUs", "", *_cells(baseline, baseline["accuracy"])]]
    for row in sorted(summary.designs or (), key=lambda row: -row["relus"]):
        mark = "*" * (row["front"] + (row["name"] == summary.design))
        rows.append([row["name"], mark, *_cells(row, row["test"])])
    head = ["design", "", "ReLUs", "validation, %", "test, %", "convolutions", "MACs, millions"]
    caption = (
        "* on the front, ** chosen. Convolutions and MACs (linear layers included) are those after folding; "
        "in brackets, as the paper merges."
    )
    return Grid(title, head, rows, texts=(0, 1), caption=caption)


def _cells(row: Figures | DesignRow, test: float) -> tuple[str, ...]:
    folded, paper = row["merging"]["folded"], row["merging"]["paper"]
    macs = units.millions(folded["macs"] + folded["linear_macs"])
    counts = (f"{folded['convs']} ({paper['convs']})", f"{macs} ({units.millions(paper['macs'])})")
    return (units.count(row["relus"]), units.percent(row["validation"]), units.percent(test), *counts)
