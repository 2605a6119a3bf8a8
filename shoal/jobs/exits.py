"""The jobs of `shoal exits` and `shoal export`: search thresholds for early exits, and write the stages as ONNX.

Thresholds are searched on validation images and reported on test images.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import torch
from torch import nn

from shoal.data.dataset import Dataset
from shoal.errors import ShoalError
from shoal.exits import onnx
from shoal.exits.cascades import Cascade, cascade, strongest
from shoal.exits.evidence import Evidence, Outcome, collect, dynamic_outcome
from shoal.exits.figures import exit_costs
from shoal.exits.inference import infer
from shoal.exits.latency import Classify, compare, stage_seconds
from shoal.exits.plots import plot_exits
from shoal.exits.records import Chosen, CurveRow, Single, Worth
from shoal.exits.thresholds import CELLS, FILE, METHODS, Found, Goal, Grid, read_thresholds, search, usual_method
from shoal.jobs.inputs import load_data, plain_network
from shoal.networks.stored import load_whole
from shoal.storage.files import write_text
from shoal.storage.run import Run
from shoal.surgery.tracing import trace
from shoal.training.settings import Settings

BATCHES = (64, 1)
"""Batch sizes for which seconds are measured."""


@dataclass(frozen=True)
class Wanted:
    """The goal of the search. If none is given, it is the fewest MACs without a loss of validation accuracy."""

    budget: str | None = None
    """Goal: the highest accuracy at no more than this fraction of the full network's MACs (such as 0.5), or this time
    per image (such as 2ms or 0.002s)."""
    loss: float | None = None
    """Goal: the fewest MACs that lose at most this many percentage points of validation accuracy, such as 0.5. Without
    any goal, 0."""
    beta: float | None = None
    """Goal: the highest fitness as in the self-distillation paper: speed-up + beta x percentage points of accuracy
    gained."""
    batch: int | None = None
    """Batch size at which a --budget in seconds is measured; 64 if left out."""

    def __post_init__(self) -> None:
        """Raise ShoalError for more than one goal, an invalid goal, or a batch without a budget in seconds."""
        given = [k for k in ("budget", "loss", "beta") if getattr(self, k) is not None]
        if len(given) > 1:
            raise ShoalError(f"found --{given[0]} and --{given[1]}; need one goal; leave one of them out")
        odd = [k for k in ("loss", "beta") if not math.isfinite(getattr(self, k) or 0.0)]
        if odd:
            raise ShoalError(f"found --{odd[0]} {getattr(self, odd[0])}; need a number; correct it")
        if self.budget is not None:
            self.amount()
        if self.batch is not None and not self.in_seconds:
            raise ShoalError("found --batch and no budget in seconds; need one, such as --budget 2ms; leave it out")

    @property
    def size(self) -> int:
        """Batch size for a budget in seconds."""
        return 64 if self.batch is None else self.batch

    @property
    def in_seconds(self) -> bool:
        """Whether the budget is in seconds, and not a fraction of the multiply-adds."""
        return self.budget is not None and self.budget.endswith("s")

    def amount(self) -> float:
        """The budget as a number: seconds, or a fraction. Raises ShoalError unless it is a positive number."""
        text = self.budget or ""
        unit = next((u for u in ("ms", "s") if text.endswith(u)), "")
        try:
            value = float(text.removesuffix(unit)) * (1e-3 if unit == "ms" else 1.0)
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf"):
            raise ShoalError(
                f"found --budget {text!r}; need a fraction of the full network's multiply-adds, such as 0.5, or "
                "seconds an image, such as 2ms"
            )
        return value

    def described(self) -> dict[str, object]:
        """The goal and its value, for thresholds.json."""
        given: dict[str, object] = {
            k: v for k in ("budget", "loss", "beta") if (v := getattr(self, k)) is not None
        } or {"loss": 0.0}
        return given | ({"batch": self.size} if self.in_seconds else {})

    def goal(self, full: float, baseline: float) -> Goal:
        """The goal of the search, for a full network with the price `full` and the validation accuracy `baseline`."""
        if self.budget is not None:
            return Goal(full, baseline, budget=self.amount() * (1.0 if self.in_seconds else full))
        if self.beta is not None:
            return Goal(full, baseline, beta=self.beta)
        return Goal(full, baseline, loss=self.loss or 0.0)


@dataclass(frozen=True)
class Request:
    """How `shoal exits` searches and measures thresholds."""

    method: str | None = None
    """Search method: grid (all combinations), genetic (the paper's) or evolution (differential evolution). If left out:
    grid for up to four thresholds, evolution for more."""
    ensemble: bool = False
    """If no exit is confident enough, answer with the mean of the logits of all exits."""
    compiled: bool = field(default=False, metadata={"cli": "--compile"})
    """Compile each stage with torch.compile."""
    baseline: Path | None = None
    """A plain network to compare with: a run of shoal train, or a run that has a baseline, such as RUN itself if
    self-distill trained one. --loss and --beta then count from its accuracy; otherwise from that of the last exit."""
    rounds: int = 5
    """Number of timed rounds; the result is their median."""
    data_dir: Path | None = None
    """Folder with the files of the data set, laid out as published; the run's own if left out."""
    device: str = "cpu"
    """Device to compute on: cpu or cuda."""

    def check(self) -> None:
        """Raise ShoalError for an unknown method, fewer than 1 round, or a device that this machine does not have."""
        if self.method is not None and self.method not in METHODS:
            raise ShoalError(f"found method {self.method!r}; need one of {', '.join(METHODS)}; choose one")
        if self.rounds < 1:
            raise ShoalError(f"found {self.rounds} rounds; need 1 or more timed ones; leave --rounds out")
        self.settings.check()

    @property
    def settings(self) -> Settings:
        """Settings to evaluate a network."""
        return Settings(device=self.device)


@dataclass(frozen=True)
class Searched:
    """A network as a cascade of stages, its strongest classifier alone (`full`), its data, and its exits' outputs.

    `plain` is the plain network that the exits are compared with, and `plain_worth` has its figures, if there is one.
    """

    data: Dataset
    network: Cascade
    full: nn.Module
    val: Evidence
    test: Evidence
    plain: nn.Module | None
    plain_worth: Single | None

    @property
    def full_worth(self) -> Single:
        """The figures of the strongest classifier alone."""
        test, val = (evidence.accuracies[-1] for evidence in (self.test, self.val))
        return Single(accuracy=test, validation=val, macs=self.network.full_macs)

    def compile(self) -> None:
        """Compile the stages, the strongest classifier and the plain network with torch.compile."""
        self.network.compile_stages()
        for network in filter(None, (self.full, self.plain)):
            network.compile(dynamic=True)


def exits(folder: Path, wanted: Wanted, request: Request) -> Chosen:
    """Search thresholds, evaluate and time them, and write `thresholds.json` and `exits.png` into the run.

    Raises ShoalError for a run with one exit, for a baseline that was trained on other images, and when no thresholds
    reach the goal; then nothing is written.
    """
    request.check()
    run, on = Run(folder), _opened(folder, request)
    if request.compiled:
        on.compile()
    images = on.data.normalise(on.data.test.images[: max(512, 8 * wanted.size)])
    prices, price = _prices(on, wanted, images, request.rounds)
    val = on.val
    method = request.method or usual_method(val.exits if request.ensemble else val.exits - 1)
    against = on.full_worth if request.baseline is None or on.plain_worth is None else on.plain_worth
    goal = wanted.goal(price, against["validation"])
    found = search(val, prices, goal, method=method, ensemble=request.ensemble)
    test = _worth(dynamic_outcome(on.network, on.data, on.data.test, found.thresholds, request.ensemble))
    body = Chosen(
        thresholds=list(found.thresholds),
        ensemble=request.ensemble,
        method=method,
        searched_on="val",
        goal=wanted.described() | ({} if request.baseline is None else {"against": "baseline"}),
        fitness=found.fitness,
        validation=_worth(val.outcome(found.thresholds, on.network.macs, request.ensemble)),
        test=test,
        full=on.full_worth,
        exits=_singles(on),
        ensemble_accuracy=100 * float(on.test.ensemble_right.mean()),
        uncounted=list(on.network.uncounted),
        seconds=_seconds(on, found.thresholds, request, images),
        curve=curve(on, request.ensemble),
        lost=test["accuracy"] < against["accuracy"],
    )
    if on.plain_worth is not None:
        body["baseline"] = on.plain_worth
    run.write_json(FILE, body)
    plot_exits(body, run.folder / "exits.png")
    return body


def _opened(folder: Path, request: Request) -> Searched:
    """The run's network and data, and the outputs of its exits for the validation and test images."""
    run, settings = Run(folder), request.settings
    spec, model = load_whole(run)
    model = model.to(request.device)
    network, full = cascade(model, spec.shape), strongest(model, spec.shape)
    data = load_data(run.config(), request.data_dir, request.device)
    val, test = (collect(model, data, split, settings) for split in (data.val, data.test))
    found = plain_network(run, request.baseline)
    if found is None:
        return Searched(data, network, full, val, test, None, None)
    plain = found[1].to(request.device)
    alone = [collect(plain, data, split, settings).accuracies[-1] for split in (data.test, data.val)]
    macs = exit_costs(trace(plain, spec.shape)).macs[-1]
    worth = Single(accuracy=alone[0], validation=alone[1], macs=macs)
    return Searched(data, network, full, val, test, plain, worth)


def _prices(on: Searched, wanted: Wanted, images: torch.Tensor, rounds: int) -> tuple[Sequence[float], float]:
    """The price of an image that leaves at each exit, and that of the full network: seconds or multiply-adds."""
    if not wanted.in_seconds:
        return on.network.macs, on.network.full_macs
    few = images[: 8 * wanted.size]
    return stage_seconds(on.network, few, wanted.size, rounds), compare({"": on.full}, few, wanted.size, rounds)[""]


def _singles(on: Searched) -> list[Single]:
    """Figures of each exit when it classifies all images."""
    columns = zip(on.val.accuracies, on.test.accuracies, on.network.alone, strict=True)
    return [Single(validation=v, accuracy=t, macs=m) for v, t, m in columns]


def _worth(outcome: Outcome) -> Worth:
    return Worth(accuracy=outcome.accuracy, macs=outcome.price, shares=list(outcome.shares))


def _seconds(
    on: Searched, thresholds: Sequence[float], request: Request, images: torch.Tensor
) -> dict[str, dict[str, float]]:
    """Seconds for an image with and without early exits, and for the plain network if there is one, by batch size."""
    ways: dict[str, Classify] = {
        "full": on.full,
        "dynamic": lambda x: infer(on.network, x, thresholds, ensemble=request.ensemble),
    }
    if on.plain is not None:
        ways["baseline"] = on.plain
    rows = {}
    for batch in (b for b in BATCHES if b <= len(images)):
        taken = compare(ways, images[: 512 if batch > 1 else 64], batch, request.rounds)
        rows[str(batch)] = taken | {"speedup": taken["full"] / taken["dynamic"]}
    return rows


def curve(on: Searched, ensemble: bool, most: int = 40) -> list[CurveRow]:
    """At most `most` points on the Pareto front of validation accuracy and mean multiply-adds, with test figures.

    Empty for a network with so many exits that a grid has fewer than four levels for each.
    """
    count, macs = on.val.exits if ensemble else on.val.exits - 1, on.network.macs
    if 4**count > CELLS:
        return []
    front = Grid.of(on.val, macs, ensemble).front()
    chosen = sorted({round(i * (len(front) - 1) / (most - 1)) for i in range(most)})
    return [_curve_row(front[i], on.test.outcome(front[i].thresholds, macs, ensemble)) for i in chosen]


def _curve_row(found: Found, outcome: Outcome) -> CurveRow:
    return CurveRow(
        thresholds=list(found.thresholds),
        validation=found.accuracy,
        validation_macs=found.price,
        accuracy=outcome.accuracy,
        macs=outcome.price,
    )


class Exported(TypedDict):
    """The folder, the number of stages in it, and the largest error of a logit in onnxruntime."""

    out: str
    stages: int
    max_abs_logit_error: float


@dataclass(frozen=True)
class Export:
    """The options of `shoal export`."""

    run: Path = field(metadata={"cli": "argument"})
    """A run folder whose network has several exits, such as one of self-distill or inplace."""
    out: Path
    """The folder to write; it must be new or empty."""
    data_dir: Path | None = None
    """Folder with the files of the data set, laid out as published; the run's own if left out."""


def export(wanted: Export) -> Exported:
    """Write a run's stages as `stage0.onnx`, ... and then `cascade.json` into the new or empty folder `wanted.out`.

    Stage 0 reads float32 images [N, C, H, W] of values (pixel / 255 - mean) / std, for any N. The first output of each
    stage is its logits [N, classes]; the others are the inputs of the next stage, in order. Raises ShoalError without
    shoal[export], without thresholds, and when onnxruntime computes other logits than PyTorch.
    """
    onnx.check_installed()
    run, out = Run(wanted.run), wanted.out
    spec, model = load_whole(run)
    network = cascade(model, spec.shape)
    thresholds, ensemble = read_thresholds(run, len(network))
    Run(out).check_free()
    data = load_data(run.config(), wanted.data_dir)
    out.mkdir(parents=True, exist_ok=True)
    images = data.normalise(data.test.images[:16])
    body = {
        "format": onnx.FORMAT,
        "classes": spec.classes,
        "shape": list(spec.shape),
        "mean": data.mean,
        "std": data.std,
    }
    body |= {"thresholds": list(thresholds), "ensemble": ensemble, "macs": list(network.macs)}
    body |= {"alone": list(network.alone), "uncounted": list(network.uncounted)}
    body["stages"] = onnx.write_stages(network, images[:2], out)
    error = onnx.largest_error(network, onnx.open_stages(body, out), images)
    write_text(out / onnx.FILE, json.dumps(body, indent=1))
    return Exported(out=str(out), stages=len(network), max_abs_logit_error=error)
