"""Figures published in papers, from `published.csv`; each row names its source and where the figure was read."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

CERTAINTY = {
    "stated": "printed by the paper that made the network (its text or abstract)",
    "code": "read in public code: its lists of results or its README",
    "second-hand": "printed by another paper",
}


@dataclass(frozen=True)
class Published:
    """One published network: ReLUs as printed, top-1 accuracy in percent, seconds of the online phase, multiply-adds.

    A cost that is not printed is None; each network has one cost or more. The seconds were measured on the authors'
    machines, with DELPHI's protocols. Papers count ReLUs differently: `note` says where a stem or a last ReLU does not
    exist, or where quadratic activations are counted separately. It also says where multiply-adds follow from FLOPs.
    """

    system: str
    dataset: str
    network: str
    relus: int | None
    accuracy: float
    latency_s: float | None
    macs: int | None
    source: str
    certainty: str
    note: str


@cache
def published() -> tuple[Published, ...]:
    """All rows of the table that is shipped with shoal."""
    text = files("shoal.report").joinpath("published.csv").read_text(encoding="utf-8")
    return tuple(_parse(row) for row in csv.DictReader(text.splitlines()))


def _parse(row: dict[str, str]) -> Published:
    kinds = {"relus": int, "accuracy": float, "latency_s": float, "macs": int}
    figures = {name: kind(row[name]) if row[name] else None for name, kind in kinds.items()}
    return Published(**{**row, **figures})  # type: ignore[arg-type]
