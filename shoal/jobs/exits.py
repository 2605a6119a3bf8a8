"""What `shoal exits` does: thresholds of a run with several exits, chosen on validation and tried on test images."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """What thresholds are to reach, as a user says it; with none of the three, no loss of validation accuracy.

    `budget` is a part of the full network's multiply-adds (``0.5``) or seconds an image (``2ms``, ``0.002s``) in
    batches of `batch` (64 if None); `loss` percentage points of validation accuracy that may be lost; `beta` that of
    the paper's fitness (eq. 7).
    """

    budget: str | None = None
    loss: float | None = None
    beta: float | None = None
    batch: int | None = None

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

    def described(self) -> dict[str, Any]:
        """The goal with its number, for the record."""
        given = {k: v for k in ("budget", "loss", "beta") if (v := getattr(self, k)) is not None} or {"loss": 0.0}
        return given | ({"batch": self.size} if self.in_seconds else {})

    def goal(self, full: float, baseline: float) -> Goal:
        """In numbers, for a full network of this price and validation accuracy."""
        if self.budget is not None:
            return Goal(full, baseline, budget=self.amount() * (1.0 if self.in_seconds else full))
        if self.beta is not None:
            return Goal(full, baseline, beta=self.beta)
        return Goal(full, baseline, loss=self.loss or 0.0)


def exits(
    folder: Path,
    wanted: Wanted,
    *,
    method: str | None = None,
    ensemble: bool = False,
    compiled: bool = False,
    rounds: int = 5,
    data_dir: Path | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Search thresholds, report and time them, and write `thresholds.json` and `exits.png` into the run.

    Raises ShoalError for a run with one exit and when no thresholds reach what is wanted; nothing is written then.
    """
    if method is not None and method not in METHODS:
        raise ShoalError(f"found method {method!r}; need one of {', '.join(METHODS)}; choose one")
    if rounds < 1:
        raise ShoalError(f"found {rounds} rounds; need 1 or more timed ones; leave --rounds out")
    run, data, model, network, full = _opened(folder, data_dir, device)
    val, test = (collect(model, data, split, Settings(device=device)) for split in (data.val, data.test))
    if compiled:
        network.compile_stages()
        full.compile(dynamic=True)
    images = data.normalise(data.test.images[: max(512, 8 * wanted.size)])
    prices, price = _prices(network, full, wanted, images, rounds)
    method = method or usual_method(val.exits if ensemble else val.exits - 1)
    found = search(val, prices, wanted.goal(price, val.accuracies[-1]), method=method, ensemble=ensemble)
    body = _choice(wanted, found, method, ensemble) | _results(network, val, test, data, found, ensemble)
    body["seconds"] = _seconds(network, full, found.thresholds, ensemble, images, rounds)
    body["curve"] = curve(network, val, test, ensemble)
    run.write_json(FILE, body)
    plot_exits(body, run.folder / "exits.png")
    return body


def _opened(folder: Path, data_dir: Path | None, device: str) -> tuple[Run, Dataset, nn.Module, Cascade, nn.Module]:
    """The run, its data, its network, that as a cascade, and its strongest classifier alone."""
    Settings(device=device).check()
    run = Run(folder)
    spec, model = load_whole(run)
    model = model.to(device)
    network, full = cascade(model, spec.shape), strongest(model, spec.shape)
    return run, load_data(run.config(), data_dir, device), model, network, full


def _prices(
    network: Cascade, full: nn.Module, wanted: Wanted, images: torch.Tensor, rounds: int
) -> tuple[Sequence[float], float]:
    """What an image costs that leaves at each exit, and in the full network, in the budget's unit."""
    if not wanted.in_seconds:
        return network.macs, network.full_macs
    few = images[: 8 * wanted.size]
    return stage_seconds(network, few, wanted.size, rounds), compare({"": full}, few, wanted.size, rounds)[""]


def _choice(wanted: Wanted, found: Found, method: str, ensemble: bool) -> dict[str, Any]:
    chosen = {"thresholds": list(found.thresholds), "ensemble": ensemble, "method": method, "searched_on": "val"}
    return chosen | {"goal": wanted.described(), "fitness": found.fitness}


def _results(
    network: Cascade, val: Evidence, test: Evidence, data: Dataset, found: Found, ensemble: bool
) -> dict[str, Any]:
    """Validation figures by what was collected, test figures by dynamic inference itself."""
    settled = val.outcome(found.thresholds, network.macs, ensemble)
    measured = dynamic_outcome(network, data, data.test, found.thresholds, ensemble)
    singles = zip(val.accuracies, test.accuracies, network.alone, strict=True)
    return {
        "validation": _figures(settled),
        "test": _figures(measured),
        "full": {"accuracy": test.accuracies[-1], "validation": val.accuracies[-1], "macs": network.full_macs},
        "exits": [{"validation": v, "accuracy": t, "macs": m} for v, t, m in singles],
        "ensemble_accuracy": 100 * float(test.ensemble_right.mean()),
        "uncounted": list(network.uncounted),
    }


def _figures(outcome: Outcome) -> dict[str, Any]:
    return {"accuracy": outcome.accuracy, "macs": outcome.price, "shares": list(outcome.shares)}


def _seconds(
    network: Cascade, full: nn.Module, thresholds: Sequence[float], ensemble: bool, images: torch.Tensor, rounds: int
) -> dict[str, dict[str, float]]:
    """Seconds an image of both ways, by size of batch."""
    ways: dict[str, Classify] = {"full": full, "dynamic": lambda x: infer(network, x, thresholds, ensemble=ensemble)}
    rows = {}
    for batch in (b for b in BATCHES if b <= len(images)):
        taken = compare(ways, images[: 512 if batch > 1 else 64], batch, rounds)
        rows[str(batch)] = taken | {"speedup": taken["full"] / taken["dynamic"]}
    return rows


def curve(network: Cascade, val: Evidence, test: Evidence, ensemble: bool, most: int = 40) -> list[dict[str, Any]]:
    """Thresholds on the front of validation accuracy and mean multiply-adds, `most` at most, and their test figures.

    With so many exits that a grid has fewer than four levels for each, none.
    """
    count = val.exits if ensemble else val.exits - 1
    if 4**count > CELLS:
        return []
    front = Grid.of(val, network.macs, ensemble).front()
    chosen = sorted({round(i * (len(front) - 1) / (most - 1)) for i in range(most)})
    rows = []
    for found in (front[i] for i in chosen):
        outcome = test.outcome(found.thresholds, network.macs, ensemble)
        row = {"thresholds": list(found.thresholds), "validation": found.accuracy, "validation_macs": found.price}
        rows.append(row | {"accuracy": outcome.accuracy, "macs": outcome.price})
    return rows


def export(folder: Path, out: Path, data_dir: Path | None = None) -> dict[str, Any]:
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
    return {"out": str(out), "stages": len(network), "max_abs_logit_error": error}
