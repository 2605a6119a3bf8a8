"""The contents of the files that belong to a network with exits: `thresholds.json` and `pruning.json`."""

from __future__ import annotations

from typing import NotRequired, TypedDict


class Worth(TypedDict):
    """Accuracy in percent, mean multiply-adds per image, and the fraction of images that leave at each exit."""

    accuracy: float
    macs: float
    shares: list[float]


class Single(TypedDict):
    """One classifier used for all images: test and validation accuracy in percent, and multiply-adds."""

    accuracy: float
    validation: float
    macs: float


class CurveRow(TypedDict):
    """One choice of thresholds on the Pareto front of validation accuracy and mean multiply-adds."""

    thresholds: list[float]
    validation: float
    validation_macs: float
    accuracy: float
    macs: float


class Chosen(TypedDict):
    """`thresholds.json`: the chosen thresholds and their results.

    `baseline` is the plain network, trained without the other exits, if there is one. `lost` is true if the test
    accuracy is below that of the full network, or that of the baseline if the goal has ``against: baseline``.
    """

    thresholds: list[float]
    ensemble: bool
    method: str
    searched_on: str
    goal: dict[str, object]
    fitness: float
    validation: Worth
    test: Worth
    full: Single
    exits: list[Single]
    ensemble_accuracy: float
    uncounted: list[str]
    seconds: dict[str, dict[str, float]]
    curve: list[CurveRow]
    lost: bool
    baseline: NotRequired[Single]


class PruneRow(TypedDict):
    """A network after pruning by one amount: weights, counts, and accuracy in percent and MACs of every exit.

    `of` is the number of weights before pruning; `whole` names the layers that could not be cut.
    """

    amount: float
    weights: int
    of: int
    accuracy: list[float]
    macs: int
    relus: int
    params: int
    exit_macs: list[int]
    whole: tuple[str, ...]


class Pruning(TypedDict, total=False):
    """`pruning.json`: a row for the network before pruning, then one for each amount."""

    method: str
    source: str
    rows: list[PruneRow]
    torch_pruning: str
