"""The job of `shoal plan`: find networks that meet a limit in seconds, bytes or ReLUs, before any training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import nn

from shoal import units
from shoal.costs import candidates as planner
from shoal.costs.plan import FIELDS, FORMAT, ORDER, CandidateRow, Planned, write
from shoal.costs.target import Target
from shoal.errors import ShoalError
from shoal.jobs.costs import machine_at
from shoal.jobs.inputs import given_sensitivity
from shoal.jobs.options import LINK, Subject
from shoal.models import NAMES
from shoal.networks.assembly import own_network
from shoal.networks.spec import Spec
from shoal.networks.stored import load_network
from shoal.reduction.sensitivity import magnitude_densities, pruning_sensitivity
from shoal.storage.run import Run
from shoal.surgery.sites import relu_sites
from shoal.surgery.tracing import check_trace

HALVES = ((0.5, 1.0), (1.0, 0.5), (0.5, 0.5))
HEAD = ["#", "ReLUs", "MACs, millions", "depth", "time, s", "MB sent", "one-way latencies"]
HEAD += ["blocks gated", "lost, points"]


@dataclass(frozen=True)
class Request(Subject):
    """The options of `shoal plan`."""

    limit: str = field(kw_only=True, metadata={"cli": "--target"})
    """Limit of one private inference: seconds (0.5s, 120ms), bytes (80MB) or ReLUs (50krelus)."""
    link: str = field(default="none", metadata=LINK)
    """Link between the two machines: none (no delay), lan (3 Gbit/s, 0.3 ms round trip) or wan (400 Mbit/s, 40 ms round
    trip)."""
    mode: str = "online"
    """What --target limits: the online phase (the query), the offline phase (the preparation of its item), or total
    (both together)."""
    machine: Path | None = None
    """JSON file from shoal calibrate with the measured speed of a machine. If left out: the speed of two cores that
    both parties share."""
    sensitivity: Path | None = None
    """JSON file {site: sensitivity}: ReLU layers (sites) with a higher sensitivity get more of the ReLU budget. If left
    out: the run's own sensitivities, or else estimates from the weights."""
    reshape: bool = False
    """Also try the network with half the channels, half the resolution, and both (built-in networks only)."""
    pick: int = 1
    """Which candidate to write to --out, by its number in the table."""
    out: Path | None = None
    """Write the plan to this file, for shoal reduce --plan."""

    def wanted(self) -> Target:
        """The target. Raises ShoalError for an invalid limit, mode or link."""
        return Target.parse(self.limit, self.mode, self.link)

    def base(self) -> tuple[Spec, nn.Module]:
        """The all-ReLU network and its spec: that of a run (for a reduced run its teacher), or a new one by name."""
        if self.run is not None:
            return load_network(self.run, "teacher" if self.run.has("teacher.json") else "model")
        spec = self.spec()
        network = own_network(spec)
        check_trace(network, spec.shape)
        return spec, network


def sensitivity_of(request: Request, spec: Spec, network: nn.Module) -> tuple[dict[str, float], str]:
    """Each site's sensitivity, and its origin: the given file, stage 1 of the run, or the magnitudes of the weights."""
    if (by_hand := given_sensitivity(request.sensitivity)) is not None:
        return by_hand, str(request.sensitivity)
    run = Run(request.target)
    if run.has("sensitivity.json"):
        return dict(run.read_json("sensitivity.json")), f"stage 1 of {request.target}"
    found = pruning_sensitivity(magnitude_densities(network), relu_sites(network, spec.shape))
    return found, "magnitudes of the weights"


def plan(request: Request, say: Callable[[str], None]) -> Planned:
    """Find candidates for the target; with `out`, also write a plan that chooses the candidate `pick`.

    Raises ShoalError when no candidate meets the target, and for invalid options.
    """
    target, (spec, network), machine = request.wanted(), request.base(), machine_at(request.machine)
    if request.reshape and spec.base not in NAMES:
        raise ShoalError(f"found --reshape of {spec.base!r}; need a built-in network: {', '.join(NAMES)}")
    eta, origin = sensitivity_of(request, spec, network)
    reshapes = HALVES if request.reshape else ()
    original = planner.Original(spec, network, eta)
    found = planner.plan(original, target, machine=machine, reshapes=reshapes, say=say)
    body = Planned(
        format=FORMAT,
        base=spec.base,
        shape=spec.shape,
        width=spec.width,
        resolution=spec.resolution,
        target=target.as_json(),
        machine=asdict(machine) if machine else None,
        sensitivity_from=origin,
        chosen=0,
        fields=FIELDS,
        order=ORDER,
        candidates=[_candidate(own) for own in found],
    )
    if request.out is not None:
        write(body, request.pick, request.out)
    return body


def _candidate(own: planner.Candidate) -> CandidateRow:
    return CandidateRow(
        budget=own.budget,
        gated=own.gated,
        keep=own.keep,
        width=own.width,
        resolution=own.resolution,
        forecast=asdict(own.forecast),
        lost=own.lost,
    )


def table(body: Planned) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the table; the column of width and resolution is left out if no candidate is scaled."""
    shapes = [f"{c['width']:g}x{c['resolution']:g}" for c in body["candidates"]]
    rows = [_row(i, c) for i, c in enumerate(body["candidates"], start=1)]
    if set(shapes) <= {"1x1"}:
        return HEAD, rows
    return [*HEAD, "width x size"], [[*row, shape] for row, shape in zip(rows, shapes, strict=True)]


def footnote(body: Planned) -> str:
    """Lines below the table: what its columns mean, what `lost` is, and why candidates are in this order."""
    target = body["target"]
    over = "" if target["network"] == "none" else f" over {target['network']}"
    return (
        f"Time, MB sent (both directions) and latencies: one private inference, {target['mode']}{over}. Depth: "
        "convolutions on the longest path.\n"
        f"Lost: {FIELDS['lost']}.\n"
        f"Order: {ORDER}."
    )


def _row(i: int, c: CandidateRow) -> list[str]:
    f = c["forecast"]
    counts = [units.count(f["relus"]), units.millions(f["macs"]), units.count(f["depth"])]
    spent = [units.seconds(f["seconds"]), units.megabytes(f["bytes"]), units.count(round(f["latencies"]))]
    gated = f"{len(c['gated'])}{', exit' if c['keep'] == 'auxiliary' else ''}"
    return [str(i), *counts, *spent, gated, f"{c['lost']:.1f}"]
