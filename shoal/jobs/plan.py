"""What `shoal plan` does: from seconds, bytes or ReLUs to networks, before any training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from shoal import units
from shoal.costs import candidates as planner
from shoal.costs.machine import Machine
from shoal.costs.plan import FORMAT
from shoal.costs.target import Target
from shoal.errors import ShoalError
from shoal.jobs.inputs import given_sensitivity, parse_shape
from shoal.models import NAMES
from shoal.networks.assembly import own_network
from shoal.networks.spec import Spec
from shoal.networks.stored import load_network
from shoal.reduction.sensitivity import magnitude_densities, pruning_sensitivity
from shoal.storage.run import Run
from shoal.surgery.sites import relu_sites

HALVES = ((0.5, 1.0), (1.0, 0.5), (0.5, 0.5))
HEAD = ["#", "ReLUs", "MACs, millions", "depth", "s", "MB", "one-way latencies", "blocks gated", "points lost"]


def sensitivity_of(target: str, spec: Spec, network: nn.Module, given: Path | None) -> tuple[dict[str, float], str]:
    """Each site's sensitivity, and where it comes from: a file, the run's own stage 1, or weights as they are."""
    if (by_hand := given_sensitivity(given)) is not None:
        return by_hand, str(given)
    run = Run(Path(target))
    if run.has("sensitivity.json"):
        return dict(run.read_json("sensitivity.json")), f"stage 1 of {target}"
    found = pruning_sensitivity(magnitude_densities(network), relu_sites(network, spec.shape))
    return found, "magnitudes of the weights"


def network_of(target: str, size: str, classes: int, width: float, resolution: float) -> tuple[Spec, nn.Module]:
    """A run's all-ReLU network (that which it was reduced from), or a zoo's or a user's by name."""
    if Path(target).is_dir():
        run = Run(Path(target))
        return load_network(run, "teacher" if run.has("teacher.json") else "model")
    spec = Spec(target, classes, parse_shape(size), width, resolution)
    return spec, own_network(spec)


def plan(
    name: str,
    spec: Spec,
    network: nn.Module,
    target: Target,
    machine: Machine | None,
    given: Path | None,
    reshape: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Candidates for `target`, the first of which a written plan chooses."""
    if reshape and spec.base not in NAMES:
        raise ShoalError(f"found --reshape of {spec.base!r}; need a network of the zoo: {', '.join(NAMES)}")
    eta, origin = sensitivity_of(name, spec, network, given)
    reshapes = HALVES if reshape else ()
    found = planner.plan(spec, network, target, machine=machine, sensitivity=eta, reshapes=reshapes, say=say)
    facts = {"format": FORMAT, "base": spec.base, "shape": spec.shape, "width": spec.width}
    facts |= {"resolution": spec.resolution, "target": target.as_json()}
    facts |= {"machine": asdict(machine) if machine else None}
    return facts | {"sensitivity_from": origin, "chosen": 0, "candidates": [asdict(c) for c in found]}


def table(body: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows; width and resolution only where candidates differ in them."""
    shapes = [f"{c['width']:g}x{c['resolution']:g}" for c in body["candidates"]]
    rows = [_row(i, c) for i, c in enumerate(body["candidates"], start=1)]
    if set(shapes) <= {"1x1"}:
        return HEAD, rows
    return [*HEAD, "width x size"], [[*row, shape] for row, shape in zip(rows, shapes, strict=True)]


def _row(i: int, c: dict[str, Any]) -> list[str]:
    f = c["forecast"]
    counts = [units.count(f["relus"]), units.millions(f["macs"]), units.count(f["depth"])]
    spent = [units.seconds(f["seconds"]), units.megabytes(f["bytes"]), units.count(round(f["latencies"]))]
    gated = f"{len(c['gated'])}{', exit' if c['keep'] == 'auxiliary' else ''}"
    return [str(i), *counts, *spent, gated, f"{c['lost']:.1f}"]
