"""`Plan`: a file with the candidate that was chosen to be trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypedDict

from torch import nn

from shoal.costs.candidates import WORTH, Candidate
from shoal.costs.machine import Machine
from shoal.costs.target import Forecast, Target
from shoal.errors import ShoalError
from shoal.graph.folding import fold
from shoal.networks.spec import Spec
from shoal.storage.files import read_json, write_text
from shoal.surgery.tracing import trace

FORMAT = "shoal-plan-1"


class Chosen(TypedDict):
    """Options of the shallow recipe."""

    budget: int
    gates: bool
    gated: tuple[str, ...]
    exit: bool
    keep: str


@dataclass(frozen=True)
class Plan:
    """The chosen candidate for a base network, with the target that it has to meet.

    `shape` is the images' [C, H, W]. `width` and `resolution` are those of the base network.
    """

    base: str
    shape: tuple[int, ...]
    width: float
    resolution: float
    target: Target
    machine: Machine | None
    candidate: Candidate

    def check(self, spec: Spec) -> None:
        """Raise ShoalError unless `spec` is the network that the plan was made for, with the candidate's reshaping."""
        wanted = self.width * self.candidate.width, self.resolution * self.candidate.resolution
        if (spec.base, spec.shape) != (self.base, self.shape):
            raise ShoalError(
                f"found a plan for {self.base} at {self.shape} and a teacher that is {spec.base} at {spec.shape}; "
                "need a plan made for this teacher; run shoal plan on it"
            )
        if (spec.width, spec.resolution) != wanted:
            raise ShoalError(
                f"found a teacher of width {spec.width:g} and resolution {spec.resolution:g}; need the plan's "
                f"{wanted[0]:g} and {wanted[1]:g}; train one: shoal train {self.base} --width {wanted[0]:g} "
                f"--resolution {wanted[1]:g}, or pick a candidate that keeps the shape"
            )

    def choices(self) -> Chosen:
        """The options of the shallow recipe that give this candidate."""
        own = self.candidate
        return Chosen(
            budget=own.budget, gates=bool(own.gated), gated=own.gated, exit=own.keep == "auxiliary", keep=own.keep
        )

    def outcome(self, model: nn.Module) -> dict[str, object]:
        """The target, the planned forecast, and the forecast for the trained network `model`, as JSON values."""
        forecast = self.target.forecast(fold(trace(model, self.shape)), self.machine)
        return {
            "target": self.target.as_json(),
            "planned": asdict(self.candidate.forecast),
            "forecast": asdict(forecast),
        }


class CandidateRow(TypedDict):
    """A `Candidate` in the form of the plan's file."""

    budget: int
    gated: tuple[str, ...]
    keep: str
    width: float
    resolution: float
    forecast: Mapping[str, float]
    lost: float


FIELDS: dict[str, str] = {
    "budget": "ReLU budget of all sites, as shoal reduce takes it; ReLUs of gated blocks and after the exit count",
    "gated": "blocks that become one convolution",
    "keep": "the classifier that is deployed: final or auxiliary",
    "width": "factor for the number of channels",
    "resolution": "factor for the height and width of feature maps",
    "forecast.relus": "ReLUs of the candidate",
    "forecast.macs": "multiply-accumulate operations of convolutions for one image",
    "forecast.depth": "convolutions on the longest path",
    "forecast.relu_layers": "layers with ReLUs",
    "forecast.seconds": "seconds of one private inference in the target's mode over its link",
    "forecast.bytes": "bytes of one private inference, both directions together",
    "forecast.latencies": "messages that wait for each other, each one way",
    "lost": (
        "percentage points of test accuracy that published networks lost on CIFAR-100 with the same changes; not a "
        "forecast for other data"
    ),
}
"""What each field of a candidate means, with its unit, by dotted path."""
ORDER = (
    "ascending by lost, then descending by ReLUs; left out are candidates for which another one has at least as many "
    f"ReLUs, MACs and layers, and those that lose {WORTH:g} points more than the first"
)
"""How candidates are ordered and which are left out."""


class Planned(TypedDict):
    """The contents of a plan's file: the base network, the target, and the candidates, of which one is chosen.

    `fields` and `order` are for readers: `FIELDS` and `ORDER`.
    """

    format: str
    base: str
    shape: tuple[int, ...]
    width: float
    resolution: float
    target: Mapping[str, object]
    machine: Mapping[str, object] | None
    sensitivity_from: str
    chosen: int
    fields: Mapping[str, str]
    order: str
    candidates: list[CandidateRow]


def write(body: Planned, pick: int, out: Path) -> None:
    """Write the plan `body` with candidate `pick`, counted from 1, as the chosen one.

    Raises ShoalError when there is no such candidate.
    """
    if not 1 <= pick <= len(body["candidates"]):
        raise ShoalError(f"found --pick {pick}; need 1 to {len(body['candidates'])}, the number of candidates")
    body["chosen"] = pick - 1
    write_text(out, json.dumps(body, indent=1) + "\n")


def read(path: Path) -> Plan:
    """Read what `write` wrote. Raises ShoalError when the file is missing, damaged or of another kind."""
    body = read_json(path)
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise ShoalError(f"found no plan at {path}; need what shoal plan --out wrote; plan again")
    try:
        chosen = dict(body["candidates"][body["chosen"]])
        chosen["forecast"] = _only(Forecast, chosen["forecast"])
        chosen["gated"] = tuple(chosen["gated"])
        target, shape = Target.from_json(body["target"]), tuple(int(size) for size in body["shape"])
        machine = _only(Machine, body["machine"]) if body["machine"] else None
        facts = (body["base"], shape, body["width"], body["resolution"])
        return Plan(*facts, target, machine, _only(Candidate, chosen))
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise ShoalError(f"found a damaged plan at {path} ({error!r}); need an intact file; plan again") from error


def _only(kind: Any, body: Mapping[str, Any]) -> Any:
    names = {field.name for field in fields(kind)}
    if set(body) != names:
        raise ValueError(f"{kind.__name__} with {sorted(set(body) ^ names)}")
    return kind(**body)
