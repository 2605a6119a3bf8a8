"""What the commands that train do: check everything, make a run folder, fill it."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from shoal.data import Dataset, load
from shoal.earlier_masks import check_masks, has_masks, take_masks
from shoal.equivalence import check_trace
from shoal.errors import ShoalError
from shoal.exits import is_cloud
from shoal.figures import figures
from shoal.graph import read_json
from shoal.learners import LEARNERS
from shoal.models import CLOUDS, NAMES
from shoal.origins import began, placed
from shoal.plans import read as read_plan
from shoal.progress import bars
from shoal.recipes import deepreduce, shallow
from shoal.report import gated_macs, plot_budget, plot_comparison, plot_curves
from shoal.run import Run, as_json, environment, own_network, summary_writer
from shoal.shards import check_limit
from shoal.spec import Spec
from shoal.stages import check_teacher, train_teacher
from shoal.surgery import trace
from shoal.train import Schedule, Settings, join


@dataclass(frozen=True)
class Shared:
    """Options that all training commands have."""

    out: Path
    seed: int = 0
    device: str = "cpu"
    precision: str = "fp32"
    max_seconds: float | None = None
    resume: bool = False
    tensorboard: bool = False
    stop: Callable[[], bool] = lambda: False
    """Asked before each step: whether to stop at a checkpoint."""
    begun: float = field(default_factory=time.monotonic)
    """When the command began: what it has done before training counts, too."""
    shard_mb: float | None = None
    """Most MB (of 10^6 bytes) of a file of weights; None for one file, however large."""
    step: str = "eager"
    save_seconds: float = 0.0

    @property
    def shard_bytes(self) -> int | None:
        """The limit in bytes. Raises ShoalError for one that is too small."""
        if self.shard_mb is None:
            return None
        check_limit(1e6 * self.shard_mb)
        return int(1e6 * self.shard_mb)

    def recorded(self, config: dict[str, Any]) -> dict[str, Any]:
        """The configuration with what of these options decides the result: the precision, where it is not fp32."""
        return config | ({"precision": self.precision} if self.precision != "fp32" else {})

    def run(self, config: dict[str, Any]) -> Run:
        """The run at `out`, begun or gone on with in the same precision. Raises ShoalError as `Run.create` does."""
        return Run.create(self.out, self.recorded(config), self.resume, self.shard_bytes)

    def settings(self, seed: int | None = None) -> Settings:
        """The loop's settings from now on."""
        chosen, limit = self.seed if seed is None else seed, self.max_seconds
        if limit is not None and limit > 0:
            limit = max(0.0, limit - (time.monotonic() - self.begun))
        return Settings(
            chosen, self.device, self.precision, max_seconds=limit, resume=self.resume, stop=self.stop, step=self.step,
            save_seconds=self.save_seconds,
        )  # fmt: skip

    def check(self) -> None:
        """Raise ShoalError for what cannot be had on this machine, and for a place that is no run's."""
        self.settings().check()
        _ = self.shard_bytes  # raises
        if self.tensorboard:
            summary_writer()
        run, first = Run(self.out), os.environ.get("RANK", "0") == "0"
        if first and not run.has("config.json"):  # the other processes of torchrun may find what the first has made
            run.check_free()


def load_data(config: dict[str, Any], data_dir: Path | None, device: str = "cpu") -> Dataset:
    """The data set of a run's configuration, under `data_dir` or where it lay."""
    there = placed(config, data_dir)
    return load(there["data"], there.get("data_dir"), seed=config["seed"], limit=config.get("limit")).to(device)


def train(
    model: str,
    data: str,
    data_dir: Path | None,
    width: float,
    resolution: float,
    preset: str,
    epochs: int | None,
    limit: int | None,
    shared: Shared,
    replaced: Sequence[str] = (),
) -> dict[str, Any]:
    """Train an all-ReLU network into a run folder."""
    config: dict[str, Any] = {
        "command": "train",
        "data": data,
        "data_dir": data_dir,
        "seed": shared.seed,
        "limit": limit,
    }
    config |= {"preset": preset, "epochs": epochs, "model": model, "width": width, "resolution": resolution}
    config |= {"replaced": list(replaced)} if replaced else {}
    shared.check()
    schedule = longer(_teacher_schedule(preset), epochs)
    dataset = load_data(config, data_dir, shared.device)
    spec = Spec(model, dataset.classes, dataset.shape, width, resolution, replaced=tuple(replaced))
    check_network(spec)  # before anything is written
    rank, size = join()
    run = shared.run(began(config, dataset, data_dir)) if rank == 0 else Run(shared.out)
    if size > 1:
        torch.distributed.barrier()
    with bars({"teacher": schedule.epochs}) as shown:
        network, history = train_teacher(
            spec, dataset, schedule, shared.settings(), run=run, listen=shown.listen, tensorboard=shared.tensorboard
        )
    if rank == 0:
        run.save_model(spec, network)
        plot_curves(run, run.folder / "curves.png")
    return figures(network, dataset, spec, shared.settings()) | {
        "best_epoch": history.best_epoch,
        "validation": history.best,
        "out": str(shared.out),
    }


def check_network(spec: Spec) -> None:
    """Raise ShoalError unless the base network can be built, is the same traced, and has a logit for each class.

    Networks of the zoo must be for the kind of data: convolutions over the order of points learn nothing of a cloud.
    """
    if is_cloud(spec.shape) and spec.base in NAMES:
        raise ShoalError(
            f"found {spec.base} for point clouds; need one of {', '.join(CLOUDS)}, or your own; choose one"
        )
    network = own_network(spec)
    check_trace(network, spec.shape)
    graph = trace(network, spec.shape)
    logits = graph[graph.outputs[-1]].shape
    if len(logits) != 1 or logits[0] < spec.classes:
        raise ShoalError(
            f"found a result of shape {logits} an image from {spec.base!r}; need {spec.classes} logits, one a class; "
            "change its last layer"
        )


def _teacher_schedule(preset: str) -> Schedule:
    """How a recipe's preset trains the teacher; those of deepreduce go by ``deepreduce-`` and their name."""
    own = {f"deepreduce-{name}": make for name, make in deepreduce.PRESETS.items() if name != "quick"}
    if preset in own:
        return own[preset]().teacher
    if preset not in shallow.PRESETS:
        raise ShoalError(f"found preset {preset!r}; need one of {', '.join([*shallow.PRESETS, *own])}")
    return shallow.PRESETS[preset]().teacher


def _preset(name: str) -> shallow.Preset:
    if name not in shallow.PRESETS:
        raise ShoalError(f"found preset {name!r}; need one of {', '.join(shallow.PRESETS)}")
    return shallow.PRESETS[name]()


def longer(schedule: Schedule, epochs: int | None) -> Schedule:
    """The schedule over another number of epochs, its drops moved in proportion."""
    if epochs is None:
        return schedule
    if epochs < 1:
        raise ShoalError(f"found {epochs} epochs; need 1 or more")
    part = epochs / schedule.epochs
    return replace(schedule, epochs=epochs, milestones=tuple(max(1, round(m * part)) for m in schedule.milestones))


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
    run.save_model(spec, network, "teacher")
    settings = shared.settings(config["seed"])
    if masks_from is not None and begin:
        take_masks(run, Run(masks_from))
        settings = replace(settings, resume=True)  # what has been taken is gone on from
    summary = _reduce(run, spec, network, data, options, plan, settings, shared.tensorboard)
    if chosen is not None:
        summary["reduced"]["plan"] = chosen.outcome(run.load_model()[1])
        run.write_json("summary.json", summary)
    return summary


def teacher_of(folder: Path, shared: Shared) -> tuple[Spec, nn.Module, dict[str, Any]]:
    """A teacher's spec, network and configuration, to be reduced. Raises ShoalError where a reduction cannot begin."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ShoalError("found reduce under torchrun; need one process; use torchrun for shoal train")
    shared.check()
    source = Run(folder)
    spec, network = source.load_model()
    check_teacher(spec)
    return spec, network, source.config()


def given_sensitivity(path: Path | None) -> dict[str, float] | None:
    """The sensitivities in a JSON file. Raises ShoalError unless they are numbers by name."""
    if path is None:
        return None
    body = read_json(path)
    numbers = isinstance(body, dict) and all(isinstance(v, (int, float)) for v in body.values())
    if not body or not numbers:
        raise ShoalError(f"found no sensitivities at {path}; need JSON with a number for each site; mend the file")
    return dict(body)


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


def _reduce(
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
    run.save_model(result.spec, result.model)
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
    own.save_model(spec, model)
    return figures(model, data, spec, settings)


DEMO = shallow.Options(budget=1900, d_th=0.12)
DEMO_WIDTH = 0.25


def demo(out: Path, overwrite: bool, images: int, seed: int) -> dict[str, Any]:
    """The whole job on scikit-learn's digits."""
    from shoal import demo as demonstration
    from shoal.private.certs import make_certificates

    settings = Settings(seed=seed)
    _check_demo(settings, images)
    _clean(out, overwrite)
    with tempfile.TemporaryDirectory(prefix="shoal-") as folder:  # keys never lie in a run folder, nor outlive the demo
        make_certificates(Path(folder))
        run, data, summary = _reduced_digits(out, settings)
        for name, which in (("baseline", "teacher"), ("reduced", "model")):
            network = run.load_model(which)[1]
            summary[name] |= demonstration.measure(name, network, data, out, Path(folder), images, _say)
    summary["agreement"] = demonstration.agreement_of(summary["reduced"])
    run.write_json("summary.json", summary)
    plot_comparison(summary, out / "comparison.png")
    return summary


def _say(text: str) -> None:
    Console(stderr=True).print(text, highlight=False)


def _check_demo(settings: Settings, images: int) -> None:
    """Raise ShoalError, before minutes of training, where the private part could not follow."""
    from shoal.private.engine import require_spu

    settings.check()
    if images < 1:
        raise ShoalError(f"found {images} images to query; need 1 or more; leave --images out for 32")
    require_spu()


def _clean(out: Path, overwrite: bool) -> None:
    from shoal import demo as demonstration

    try:
        demonstration.clean(out, overwrite)
    except OSError as error:
        raise ShoalError(f"found no folder to write at {out} ({error}); need one; choose another --out") from error


def _reduced_digits(out: Path, settings: Settings) -> tuple[Run, Dataset, dict[str, Any]]:
    """Train the demo's teacher and reduce it: the run with both, the data, and the summary so far."""
    data = load("digits", seed=settings.seed)
    plan = shallow.quick(teacher=20, sensitivity=3, mask=8, finetune=30)
    spec = Spec("resnet10", data.classes, data.shape, DEMO_WIDTH)
    run = Run.create(out, {"command": "demo", "data": "digits", "seed": settings.seed, "options": DEMO, "preset": plan})
    _say(f"training an all-ReLU {spec.base} (width {spec.width}) on digits")
    with bars({"teacher": plan.teacher.epochs}) as shown:
        teacher, _ = train_teacher(spec, data, plan.teacher, settings, run=run, listen=shown.listen)
    run.save_model(spec, teacher, "teacher")
    _say(f"reducing it to {DEMO.budget:,} ReLUs: sensitivity, masks, gated branches and auxiliary classifier")
    return run, data, _reduce(run, spec, teacher, data, DEMO, plan, settings)
