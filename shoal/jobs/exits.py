"""What `shoal exits` does: thresholds of a run with several exits, chosen on validation and tried on test images."""

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
from shoal.exits.inference import infer
from shoal.exits.latency import Classify, compare, stage_seconds
from shoal.exits.plots import plot_exits
from shoal.exits.records import Chosen, CurveRow, Single, Worth
from shoal.exits.thresholds import CELLS, FILE, METHODS, Found, Goal, Grid, read_thresholds, search, usual_method
from shoal.jobs.inputs import load_data
from shoal.networks.stored import load_whole
from shoal.storage.files import write_text
from shoal.storage.run import Run
from shoal.training.settings import Settings

BATCHES = (64, 1)
"""Sizes of batches whose seconds are measured."""


@dataclass(frozen=True)
class Wanted:
    """The goal that thresholds are to reach; without budget, loss and beta, no loss of validation accuracy."""

    budget: str | None = None
    """Highest accuracy at this fraction of the full network's MACs (0.5), or at this many seconds an image (2ms)."""
    loss: float | None = None
    """Fewest MACs at this loss of validation accuracy, in percentage points. The default goal is a loss of 0."""
    beta: float | None = None
    """The paper's fitness: acceleration + beta x percentage points of accuracy gained."""
    batch: int | None = None
    """Batch size for a budget in seconds; 64 unless given."""

    def __post_init__(self) -> None:
        """Raise ShoalError for more than one goal, a budget that is none, and a batch without seconds."""
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
        """Images in the batches that seconds count for."""
        return 64 if self.batch is None else self.batch

    @property
    def in_seconds(self) -> bool:
        """Whether the budget is seconds and no part of the multiply-adds."""
        return self.budget is not None and self.budget.endswith("s")

    def amount(self) -> float:
        """The budget's number, in seconds or as a part. Raises ShoalError when it is no positive number."""
        text = self.budget or ""
        unit = next((u for u in ("ms", "s") if text.endswith(u)), "")
        try:
            value = float(text.removesuffix(unit)) * (1e-3 if unit == "ms" else 1.0)
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf"):
            raise ShoalError(
                f"found --budget {text!r}; need a part of the full network's multiply-adds, such as 0.5, or seconds "
                "an image, such as 2ms"
            )
        return value

    def described(self) -> dict[str, object]:
        """The goal with its number, for the record."""
        given: dict[str, object] = {
            k: v for k in ("budget", "loss", "beta") if (v := getattr(self, k)) is not None
        } or {"loss": 0.0}
        return given | ({"batch": self.size} if self.in_seconds else {})

    def goal(self, full: float, baseline: float) -> Goal:
        """In numbers, for a full network of this price and validation accuracy."""
        if self.budget is not None:
            return Goal(full, baseline, budget=self.amount() * (1.0 if self.in_seconds else full))
        if self.beta is not None:
            return Goal(full, baseline, beta=self.beta)
        return Goal(full, baseline, loss=self.loss or 0.0)


@dataclass(frozen=True)
class Request:
    """How thresholds are searched and measured."""

    method: str | None = None
    """grid (all combinations), genetic (the paper's) or evolution (differential). Unless given: grid for up to four
    thresholds, evolution for more."""
    ensemble: bool = False
    """Where no exit is confident enough, answer with the mean of all exits' logits."""
    compiled: bool = field(default=False, metadata={"cli": "--compile"})
    """Compile each stage with torch.compile."""
    rounds: int = 5
    """Number of timed rounds; the median is shown."""
    data_dir: Path | None = None
    """Where the data set is, in its published layout."""
    device: str = "cpu"
    """cpu or cuda."""

    def check(self) -> None:
        """Raise ShoalError for an unknown method, no rounds, or a device that this machine does not have."""
        if self.method is not None and self.method not in METHODS:
            raise ShoalError(f"found method {self.method!r}; need one of {', '.join(METHODS)}; choose one")
        if self.rounds < 1:
            raise ShoalError(f"found {self.rounds} rounds; need 1 or more timed ones; leave --rounds out")
        self.settings.check()

    @property
    def settings(self) -> Settings:
        """Settings that measure a network."""
        return Settings(device=self.device)


@dataclass(frozen=True)
class Searched:
    """A network as a cascade, its full network, its data, and the outputs of its exits on both splits."""

    data: Dataset
    network: Cascade
    full: nn.Module
    val: Evidence
    test: Evidence


def exits(folder: Path, wanted: Wanted, request: Request) -> Chosen:
    """Search thresholds, report and time them, and write `thresholds.json` and `exits.png` into the run.

    Raises ShoalError for a run with one exit and when no thresholds reach the goal; nothing is written then.
    """
    request.check()
    run, on = Run(folder), _opened(folder, request)
    if request.compiled:
        on.network.compile_stages()
        on.full.compile(dynamic=True)
    images = on.data.normalise(on.data.test.images[: max(512, 8 * wanted.size)])
    prices, price = _prices(on, wanted, images, request.rounds)
    val = on.val
    method = request.method or usual_method(val.exits if request.ensemble else val.exits - 1)
    goal = wanted.goal(price, val.accuracies[-1])
    found = search(val, prices, goal, method=method, ensemble=request.ensemble)
    worth = on.test.accuracies[-1]
    test = _worth(dynamic_outcome(on.network, on.data, on.data.test, found.thresholds, request.ensemble))
    body = Chosen(
        thresholds=list(found.thresholds),
        ensemble=request.ensemble,
        method=method,
        searched_on="val",
        goal=wanted.described(),
        fitness=found.fitness,
        validation=_worth(val.outcome(found.thresholds, on.network.macs, request.ensemble)),
        test=test,
        full=Single(accuracy=worth, validation=val.accuracies[-1], macs=on.network.full_macs),
        exits=_singles(on),
        ensemble_accuracy=100 * float(on.test.ensemble_right.mean()),
        uncounted=list(on.network.uncounted),
        seconds=_seconds(on, found.thresholds, request, images),
        curve=curve(on, request.ensemble),
        lost=test["accuracy"] < worth,
    )
    run.write_json(FILE, body)
    plot_exits(body, run.folder / "exits.png")
    return body


def _opened(folder: Path, request: Request) -> Searched:
    """The run's network and data, and what its exits say of the validation and test images."""
    run, settings = Run(folder), request.settings
    spec, model = load_whole(run)
    model = model.to(request.device)
    network, full = cascade(model, spec.shape), strongest(model, spec.shape)
    data = load_data(run.config(), request.data_dir, request.device)
    val, test = (collect(model, data, split, settings) for split in (data.val, data.test))
    return Searched(data, network, full, val, test)


def _prices(on: Searched, wanted: Wanted, images: torch.Tensor, rounds: int) -> tuple[Sequence[float], float]:
    """What an image costs that leaves at each exit, and in the full network, in the budget's unit."""
    if not wanted.in_seconds:
        return on.network.macs, on.network.full_macs
    few = images[: 8 * wanted.size]
    return stage_seconds(on.network, few, wanted.size, rounds), compare({"": on.full}, few, wanted.size, rounds)[""]


def _singles(on: Searched) -> list[Single]:
    """Each classifier used for all images."""
    columns = zip(on.val.accuracies, on.test.accuracies, on.network.alone, strict=True)
    return [Single(validation=v, accuracy=t, macs=m) for v, t, m in columns]


def _worth(outcome: Outcome) -> Worth:
    return Worth(accuracy=outcome.accuracy, macs=outcome.price, shares=list(outcome.shares))


def _seconds(
    on: Searched, thresholds: Sequence[float], request: Request, images: torch.Tensor
) -> dict[str, dict[str, float]]:
    """Seconds an image with and without early exits, by batch size."""
    ways: dict[str, Classify] = {
        "full": on.full,
        "dynamic": lambda x: infer(on.network, x, thresholds, ensemble=request.ensemble),
    }
    rows = {}
    for batch in (b for b in BATCHES if b <= len(images)):
        taken = compare(ways, images[: 512 if batch > 1 else 64], batch, request.rounds)
        rows[str(batch)] = taken | {"speedup": taken["full"] / taken["dynamic"]}
    return rows


def curve(on: Searched, ensemble: bool, most: int = 40) -> list[CurveRow]:
    """Thresholds on the front of validation accuracy and mean multiply-adds, at most `most`, with test figures.

    None for so many exits that a grid has fewer than four levels for each.
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
    """The folder, how many stages it holds, and the largest error of a logit in onnxruntime."""

    out: str
    stages: int
    max_abs_logit_error: float


def export(folder: Path, out: Path, data_dir: Path | None = None) -> Exported:
    """Write a run's stages as `stage0.onnx`, ... and then `cascade.json` into the new or empty folder `out`.

    Stage 0 reads float32 images [N, C, H, W], (pixel / 255 - mean) / std; the first output of each stage is its
    logits, the others are the inputs of the next stage in order. Every tensor has one row an image and any number
    of them. Raises ShoalError without the extra, without thresholds, and when onnxruntime computes anything else.
    """
    onnx.check_installed()
    run = Run(folder)
    spec, model = load_whole(run)
    network = cascade(model, spec.shape)
    thresholds, ensemble = read_thresholds(run, len(network))
    Run(out).check_free()
    data = load_data(run.config(), data_dir)
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
