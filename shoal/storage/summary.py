"""`summary.json`: the figures of a finished run, for its baseline and for the network that it made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TypedDict

from shoal.errors import ShoalError
from shoal.storage.environment import environment
from shoal.storage.run import Run

FILE = "summary.json"
ALONE = "figures.json"
"""File with the figures of a run's one network, of runs that compare no two networks, such as those of shoal train."""


class Counts(TypedDict, total=False):
    """The cost of one network for one image."""

    relus: int
    comparisons: int
    quadratics: int
    macs: int
    depth: int
    params: int
    linear_macs: int
    relu_layers: int


class Accounting(TypedDict):
    """Multiply-adds of a network with replaced blocks: the real number, and the number as the paper counts."""

    honest: int
    paper: int


class OnTest(TypedDict, total=False):
    """Test accuracies in percent as some papers report them: the largest of all epochs, its epoch, and the last one.

    The largest one is selected on the test set. A run has these only if it evaluated the test set after each epoch.
    """

    largest_on_test: float
    largest_on_test_epoch: int
    last_on_test: float


class Figures(Counts, OnTest, total=False):
    """Test accuracy in percent and costs of one network, and what else its job measured.

    `test_images` is the number of images that the accuracy was measured on.
    """

    accuracy: float
    test_images: int
    validation: float
    best_epoch: int
    replaced_blocks: list[str]
    macs_accounting: Accounting
    merging: dict[str, dict[str, int]]
    plan: Mapping[str, object]
    private: dict[str, object]
    prepared: dict[str, object]
    clear: dict[str, object]
    fraction_bits: int
    weight_bytes: int


class DesignRow(TypedDict):
    """One trained design of DeepReDuce; accuracies are in percent."""

    name: str
    relus: int
    validation: float
    test: float
    front: bool
    merging: dict[str, dict[str, int]]


class CriticalityRow(TypedDict):
    """One stage of a network, and its criticality (equation 1 of DeepReDuce).

    `accuracy` is the validation accuracy, in percent, with the ReLUs of this stage only.
    """

    stage: int
    relus: int
    accuracy: float
    criticality: float


class ExitRow(TypedDict):
    """One classifier: accuracy in percent, and the parameters, multiply-adds and ReLUs up to it for one image.

    `macs` (of convolutions and linear layers) are those of the classifier alone. `cascaded_macs` include all weaker
    classifiers, which ran before it.
    """

    accuracy: float
    params: int
    relus: int
    macs: int
    cascaded_macs: int


@dataclass
class Summary:
    """The figures of one run. A field with the value None is not in the file.

    `baseline` is None only if no baseline was trained; the file then has another name.
    """

    data: str
    model: str
    seed: int
    baseline: Figures | None
    reduced: Figures
    environment: Mapping[str, object] | None = field(default_factory=environment)
    selected_on: str | None = None
    """The split that chose the best epoch."""
    narrower: Mapping[float | str, Figures] | None = None
    """Shallow: figures of the same network with fewer channels, by width."""
    method: str | None = None
    teacher: Figures | None = None
    classifiers: Sequence[float] | Mapping[str, Figures] | None = None
    """Distill: test accuracy of each classifier trained together. Inplace: each classifier, weak to strong."""
    validation: Mapping[str, float] | None = None
    """Distill: the best validation accuracy of each stage of training."""
    mean_accuracy: float | None = None
    best_epoch: int | None = None
    design: str | None = None
    """DeepReDuce: the name of the network's design."""
    taught_by: str | None = None
    """DeepReDuce: what taught the designs, if not the unreduced network: another network, or ``labels only``."""
    budget: int | None = None
    designs: Sequence[DesignRow] | None = None
    criticality: Sequence[CriticalityRow] | None = None
    after: Sequence[str] | None = None
    """Self-distillation: the positions of its shallow classifiers."""
    exits: Sequence[ExitRow] | None = None
    ensemble: Mapping[str, float] | None = None
    agreement: Mapping[str, object] | None = None
    """Demo: private logits compared with those in the clear."""
    unknown: Mapping[str, object] = field(default_factory=dict)
    """Keys that another version wrote; they are kept when the file is written again."""

    @property
    def lost(self) -> bool:
        """Whether the network's test accuracy is lower than the baseline's."""
        return self.baseline is not None and self.reduced["accuracy"] < self.baseline["accuracy"]

    def verdict(self, method: str) -> str | None:
        """A sentence that says `method` lost against the baseline; None if it did not."""
        if self.baseline is None or not self.lost:
            return None
        own, other = self.reduced["accuracy"], self.baseline["accuracy"]
        return f"{method} lost: {own:.2f} % test accuracy, against {other:.2f} % of the baseline."

    def side(self, name: str) -> Figures:
        """The figures of `baseline` or `reduced`; empty if no baseline was trained."""
        found = self.baseline if name == "baseline" else self.reduced
        return Figures() if found is None else found

    def as_json(self) -> dict[str, object]:
        """The content of the file."""
        body = {name: value for name, value in vars(self).items() if value is not None and name != "unknown"}
        # DeepReDuce's file has the budget even if it is None.
        return {**self.unknown, **body} | ({"budget": self.budget} if self.designs is not None else {})

    def write(self, run: Run, name: str = FILE) -> None:
        """Write the file into the run folder, atomically. Raises ShoalError when it cannot be written."""
        run.write_json(name, self.as_json())

    @classmethod
    def alone(cls, run: Run) -> Summary:
        """The figures that `write_alone` stored, as those of a baseline; `reduced` is empty.

        Raises ShoalError when the file is missing, damaged or of another kind.
        """
        body = run.read_json(ALONE)
        if isinstance(body, dict):
            body = {**body, "baseline": body.get("figures"), "reduced": {}}
        return cls.of(body, run.folder / ALONE)

    @classmethod
    def read(cls, run: Run) -> Summary:
        """The run's summary. Raises ShoalError when the file is missing, damaged or not a summary."""
        return cls.of(run.read_json(FILE), run.folder / FILE)

    @classmethod
    def of(cls, body: object, place: Path) -> Summary:
        """The summary with the JSON content `body` of the file `place`. Raises ShoalError when it is not a summary."""
        kinds = {"data": str, "model": str, "seed": int, "baseline": dict, "reduced": dict}
        if not isinstance(body, dict) or not all(isinstance(body.get(name), kind) for name, kind in kinds.items()):
            raise ShoalError(
                f"found no {', '.join(kinds)} in {place}; need the file that shoal wrote; put it back or "
                "make the run again"
            )
        known = {own.name for own in fields(cls)} - {"unknown"}
        rest = {name: value for name, value in body.items() if name not in known}
        given = {name: value for name, value in body.items() if name in known}
        return cls(**({"environment": None} | given), unknown=rest)


def write_alone(run: Run, data: str, model: str, found: Figures) -> None:
    """Store the figures of a run's one network in `figures.json`, for shoal report.

    `data` is the name of the data set, `model` that of the network. Raises ShoalError when the run's configuration is
    damaged or the file cannot be written.
    """
    body = {"data": data, "model": model, "seed": run.config()["seed"], "figures": found}
    run.write_json(ALONE, body | {"environment": environment()})
