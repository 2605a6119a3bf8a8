"""What `shoal reduce --recipe deepreduce` does: check everything, train a grid of designs, choose one by its ReLUs."""

from __future__ import annotations

from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any

from shoal import units
from shoal.errors import ShoalError
from shoal.jobs.inputs import Shared, load_data, longer, teacher_of
from shoal.networks.stored import load_network, save_network
from shoal.progress import bars
from shoal.recipes import deepreduce, shallow
from shoal.recipes.deepreduce.front import pareto
from shoal.recipes.deepreduce.space import DesignSpace
from shoal.report import plot_curves
from shoal.report.layout import Grid
from shoal.storage.environment import environment
from shoal.storage.origins import began
from shoal.storage.run import Run


def reduce_by_grid(
    teacher: Path,
    preset: str,
    budget: int | None,
    designs: str | None,
    data_dir: Path | None,
    epochs: str | None,
    shared: Shared,
) -> dict[str, Any]:
    """Train the designs of a teacher's run, each in a folder of its own below `shared.out`, and choose one.

    The run's own network is the chosen one. `budget` and `designs` may change when a run is resumed: what has been
    trained stays, and the choice is made anew.
    """
    spec, network, origin = teacher_of(teacher, shared)
    plan = _preset(preset, epochs)
    config = {k: origin.get(k) for k in ("data", "data_dir", "seed", "limit")}
    config |= {f"teacher_{k}": origin.get(k) for k in ("preset", "epochs")}
    config |= {"command": "reduce", "recipe": "deepreduce", "preset": preset, "epochs": epochs, "teacher": teacher}
    data = load_data(config, data_dir, shared.device)
    options = deepreduce.Options(budget, tuple(part.strip() for part in designs.split(",")) if designs else ())
    deepreduce.check_options(options, spec, network)  # before anything is written
    run = shared.run(began(config, data, data_dir, teacher=network))
    settings = shared.settings(config["seed"])
    save_network(run, spec, network, "teacher")
    critical = {f"criticality-S{k}": plan.criticality.epochs for k in DesignSpace(spec, network).stages}
    with bars(critical, other=plan.design.epochs) as shown:
        result = deepreduce.reduce(
            spec, network, data, options, plan, settings, run=run, listen=shown.listen, tensorboard=shared.tensorboard
        )
    return _summarise(run, result, budget)


def _preset(name: str, epochs: str | None) -> deepreduce.Preset:
    if name not in deepreduce.PRESETS:
        raise ShoalError(f"found preset {name!r}; need one of {', '.join(deepreduce.PRESETS)} for recipe deepreduce")
    plan = deepreduce.PRESETS[name]()
    if epochs is None:
        return plan
    parts = epochs.split(",")
    if len(parts) != 2 or not all(p.strip().isdigit() for p in parts):
        raise ShoalError(f"found --epochs {epochs!r}; need two numbers for recipe deepreduce: criticality,design")
    first, second = (int(p) for p in parts)
    return replace(plan, criticality=longer(plan.criticality, first), design=longer(plan.design, second))


def check_unused(choices: dict[str, Any]) -> None:
    """Raise ShoalError for an option of the shallow recipe, which would have no effect here."""
    usual = {f.name: f.default for f in fields(shallow.Options) if f.default is not MISSING}
    usual |= {"plan": None, "masks_from": None}
    odd = [name for name, value in choices.items() if name in usual and value != usual[name]]
    if odd:
        raise ShoalError(
            f"found {odd[0]} {choices[odd[0]]!r} with recipe deepreduce; need no option of the shallow recipe's; "
            "leave it out, or use --recipe shallow"
        )


def _summarise(run: Run, result: deepreduce.Result, budget: int | None) -> dict[str, Any]:
    """Make the chosen design's network the run's own; the summary of its run, with the front and every design."""
    chosen = Run(run.folder / "designs" / result.chosen.name)
    save_network(run, *load_network(chosen))
    best = {point.name for point in pareto(result.points)}
    merging = {p.name: Run(run.folder / "designs" / p.name).read_json("figures.json")["merging"] for p in result.points}
    designs = [asdict(p) | {"front": p.name in best, "merging": merging[p.name]} for p in result.points]
    summary = chosen.read_json("summary.json") | {"budget": budget, "designs": designs}
    if run.has("criticality.json"):
        summary["criticality"] = run.read_json("criticality.json")
    run.write_json("summary.json", summary | {"environment": environment()})
    if run.has("metrics.jsonl"):
        plot_curves(run, run.folder / "curves.png")
    return summary


def front_table(summary: dict[str, Any]) -> Grid:
    """All designs by falling ReLU count; the front's are marked, the chosen one doubly."""
    title = f"{summary['model']} on {summary['data']}, seed {summary['seed']}: chosen {summary['design']}"
    baseline = summary["baseline"]
    rows = [["all ReLUs", "", *_cells(baseline, baseline["accuracy"])]]
    for row in sorted(summary["designs"], key=lambda row: -row["relus"]):
        mark = "*" * (row["front"] + (row["name"] == summary["design"]))
        rows.append([row["name"], mark, *_cells(row, row["test"])])
    head = ["design", "", "ReLUs", "validation, %", "test, %", "convolutions", "MACs, millions"]
    caption = (
        "* on the front, ** chosen. Convolutions and MACs (linear layers included) are those after folding; "
        "in brackets, as the paper merges."
    )
    return Grid(title, head, rows, texts=(0, 1), caption=caption)


def _cells(row: dict[str, Any], test: float) -> tuple[str, ...]:
    folded, paper = row["merging"]["folded"], row["merging"]["paper"]
    macs = units.millions(folded["macs"] + folded["linear_macs"])
    counts = (f"{folded['convs']} ({paper['convs']})", f"{macs} ({units.millions(paper['macs'])})")
    return (units.count(row["relus"]), units.percent(row["validation"]), units.percent(test), *counts)
