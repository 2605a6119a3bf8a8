"""What `shoal reduce` does: a trained network to a ReLU budget, in the paper's three stages."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from shoal.costs.plan import read as read_plan
from shoal.data.dataset import Dataset
from shoal.errors import ShoalError
from shoal.jobs.inputs import Shared, given_sensitivity, load_data, longer, teacher_of
from shoal.networks.figures import figures
from shoal.networks.spec import Spec
from shoal.networks.stored import load_network, save_network
from shoal.progress import bars
from shoal.recipes import shallow
from shoal.recipes.shallow.masks_from import check_masks, has_masks, take_masks
from shoal.reduction.learners import LEARNERS
from shoal.report import gated_macs, plot_budget, plot_curves
from shoal.storage.environment import environment
from shoal.storage.origins import began
from shoal.storage.run import Run, as_json
from shoal.training.settings import Settings


def _preset(name: str) -> shallow.Preset:
    if name not in shallow.PRESETS:
        raise ShoalError(f"found preset {name!r}; need one of {', '.join(shallow.PRESETS)}")
    return shallow.PRESETS[name]()


def check_sources(budget: int | None, planned: Path | None, designs: str | None) -> None:
    """Raise ShoalError unless the shallow recipe is told its budget once, and nothing of another recipe."""
    if (budget is None) == (planned is None):
        raise ShoalError("found --budget and --plan, or neither; need one of them; --budget 50000, or shoal plan first")
    if designs is not None:
        raise ShoalError("found designs for recipe shallow; need --recipe deepreduce for them; or leave them out")


def reduce(
    teacher: Path,
    recipe: str,
    preset: str,
    choices: dict[str, Any],
    sensitivity: Path | None,
    data_dir: Path | None,
    epochs: str | None,
    shared: Shared,
    planned: Path | None = None,
    masks_from: Path | None = None,
) -> dict[str, Any]:
    """Reduce the network of a teacher's run into a run folder of its own, by options or by a plan's.

    With `masks_from`, the run of another reduction, its masks are taken, and fine-tuning alone is done.
    """
    if recipe != "shallow":
        raise ShoalError(f"found recipe {recipe!r}; need 'shallow' or 'deepreduce'")
    spec, network, origin = teacher_of(teacher, shared)
    chosen = read_plan(planned) if planned else None
    if chosen is not None:
        chosen.check(spec)
        choices |= chosen.choices()
    options = shallow.Options(**choices, sensitivity=given_sensitivity(sensitivity))
    if chosen is not None and options.masks in LEARNERS and LEARNERS[options.masks].rest != "identity":
        raise ShoalError(f"found a plan with masks {options.masks!r}; need masks without squares; use autorep-linear")
    config = {k: origin.get(k) for k in ("data", "data_dir", "seed", "limit")}
    config |= {f"teacher_{k}": origin.get(k) for k in ("preset", "epochs")}
    config |= {"command": "reduce", "preset": preset, "epochs": epochs, "options": options, "teacher": teacher}
    config |= {"plan": planned} if planned else {}
    config |= {"masks_from": masks_from} if masks_from else {}
    plan = _stages(_preset(preset), epochs)
    data = load_data(config, data_dir, shared.device)
    shallow.check_options(options, plan, network, spec.shape)  # before anything is written
    config = began(config, data, data_dir, plan=planned, teacher=network)
    begin = masks_from is not None and not (shared.resume and has_masks(Run(shared.out)))
    if masks_from is not None and begin:
        check_masks(as_json(shared.recorded(config)), Run(masks_from), plan.mask.epochs)
    run = shared.run(config)
    save_network(run, spec, network, "teacher")
    settings = shared.settings(config["seed"])
    if masks_from is not None and begin:
        take_masks(run, Run(masks_from))
        settings = replace(settings, resume=True)  # what has been taken is gone on from
    summary = fit_stages(run, spec, network, data, options, plan, settings, shared.tensorboard)
    if chosen is not None:
        summary["reduced"]["plan"] = chosen.outcome(load_network(run)[1])
        run.write_json("summary.json", summary)
    return summary


def _stages(plan: shallow.Preset, epochs: str | None) -> shallow.Preset:
    if epochs is None:
        return plan
    parts = epochs.split(",")
    if len(parts) != 3 or not all(p.strip().isdigit() for p in parts):
        raise ShoalError(f"found --epochs {epochs!r}; need three numbers: sensitivity,mask,finetune")
    a, b, c = (int(p) for p in parts)
    plans = (plan.sensitivity, plan.mask, plan.finetune)
    s, m, f = (longer(stage, n) for stage, n in zip(plans, (a, b, c), strict=True))
    return replace(plan, sensitivity=s, mask=m, finetune=f)


def fit_stages(
    run: Run,
    spec: Spec,
    network: nn.Module,
    data: Dataset,
    options: shallow.Options,
    plan: shallow.Preset,
    settings: Settings,
    tensorboard: bool = False,
) -> dict[str, Any]:
    epochs = {"sensitivity": plan.sensitivity.epochs, "mask": plan.mask.epochs, "finetune": plan.finetune.epochs}
    with bars(epochs) as shown:
        result = shallow.reduce(
            spec, network, data, options, plan, settings, run=run, listen=shown.listen, tensorboard=tensorboard
        )
    save_network(run, result.spec, result.model)
    run.write_json("budget.json", asdict(result.budget))
    narrower = {part: _save_width(run, part, *result.narrower[part], data, settings) for part in result.narrower}
    honest, paper = gated_macs(network, spec.shape, result.spec.branches)
    summary = {
        "data": data.name,
        "model": spec.base,
        "baseline": figures(network, data, spec, settings),
        "reduced": figures(result.model, data, result.spec, settings)
        | {"replaced_blocks": list(result.spec.branches), "macs_accounting": {"honest": honest, "paper": paper}},
        "narrower": narrower,
        "selected_on": plan.select,
        "environment": environment(),
        "seed": settings.seed,
    }
    run.write_json("summary.json", summary)
    plot_budget(result.sites, result.budget.counts, result.spec.branches, run.folder / "budget.png")
    plot_curves(run, run.folder / "curves.png")
    return summary


def _save_width(run: Run, part: float, spec: Spec, model: nn.Module, data: Dataset, settings: Settings) -> Any:
    """Make a narrower network a run of its own, `widths/PART`, for shoal evaluate and compile; returns its figures."""
    own = run.below(f"widths/{part:g}")
    save_network(own, spec, model)
    return figures(model, data, spec, settings)
