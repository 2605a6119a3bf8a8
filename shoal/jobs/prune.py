"""The job of `shoal prune`: prune a run's network by several amounts, and train each result further.

Pruned weights and filters become zeros (`channels.magnitude`). Pruned channels are cut out (`channels.torch_pruning`):
the network then has fewer MACs, ReLUs and parameters, and `model.json` in its run says which channels are left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from shoal.channels.magnitude import METHODS as ZEROING
from shoal.channels.magnitude import pruned, settle, weights_left
from shoal.channels.torch_pruning import cut_channels, torch_pruning, torch_pruning_version
from shoal.errors import ShoalError
from shoal.exits.classifiers import keep_exit
from shoal.exits.plots import plot_pruning
from shoal.exits.records import PruneRow, Pruning
from shoal.jobs.options import ARGUMENT, Shared
from shoal.jobs.training import Job, prepare
from shoal.networks.figures import figures
from shoal.networks.spec import Spec, pruned_spec
from shoal.networks.stored import load_whole, save_network
from shoal.recipes.stages import Stages
from shoal.storage.origins import Config, inherited
from shoal.storage.run import Run
from shoal.storage.summary import Summary
from shoal.surgery.tracing import count
from shoal.training.evaluation import evaluate
from shoal.training.objective import Objective, cross_entropy
from shoal.training.schedule import Schedule
from shoal.training.settings import Settings

METHODS = (*ZEROING, "channels")
"""Names of the pruning methods; the last one needs Torch-Pruning."""


@dataclass(frozen=True)
class Request:
    """The options of `shoal prune`."""

    run: Path = field(metadata=ARGUMENT)
    """A run folder; its network may have one exit or several."""
    amount: tuple[float, ...] = (0.5, 0.7, 0.9)
    """Fractions to prune, between 0 and 1, separated by commas; each gets its own run folder."""
    method: str = "weights"
    """What to prune: weights (the smallest of all layers together), filters (the smallest of each convolution), or
    channels (the least important of each group of layers; cut out by Torch-Pruning, needs shoal[prune])."""
    epochs: int = 10
    """Number of epochs of training after pruning."""
    rate: float = 0.01
    """Initial learning rate; it falls to 0 by a cosine schedule."""
    data_dir: Path | None = None
    """Folder with the data set in its published layout; the run's own if left out."""

    @property
    def schedule(self) -> Schedule:
        """The schedule of the training after pruning."""
        return Schedule(self.epochs, self.rate, kind="cosine")

    def config(self, origin: Config) -> Config:
        """The settings that the run of each amount records; `origin` is the configuration of the run to prune."""
        own = {"command": "prune", "source": self.run.resolve(), "method": self.method}
        return inherited(origin) | own | {"epochs": self.epochs, "rate": self.rate}

    def check(self) -> None:
        """Raise ShoalError for invalid amounts, methods or schedules, and for channels without Torch-Pruning."""
        amounts = self.amount
        if not amounts or not all(0 < a < 1 for a in amounts) or len(set(amounts)) < len(amounts):
            raise ShoalError(
                f"found amounts {list(amounts)}; need different fractions between 0 and 1, such as 0.5,0.8"
            )
        if self.method not in METHODS:
            raise ShoalError(f"found method {self.method!r}; need one of {', '.join(METHODS)}; choose one")
        if self.epochs < 1 or not self.rate > 0:
            raise ShoalError(f"found {self.epochs} epochs at rate {self.rate:g}; need 1 or more and a rate above 0")
        if self.method == "channels":
            torch_pruning()  # raises


@dataclass(frozen=True)
class Pruned:
    """A network to train further, its spec, and the layers that Torch-Pruning could not cut (`whole`)."""

    spec: Spec
    network: nn.Module
    whole: tuple[str, ...] = ()


def prune_by_amounts(request: Request, shared: Shared) -> Pruning:
    """Prune the network of a run by each amount, and train each result further in a run folder OUT/amount-A.

    All exits learn from the labels. Writes `pruning.json` and `pruning.png`. Raises ShoalError, before anything is
    written, for invalid options, for channels without Torch-Pruning, and for a network whose channels cannot be cut.
    """
    request.check()
    shared.check("prune")
    source = Pruned(*load_whole(Run(request.run)))
    if source.spec.widths and source.spec.kept_width is None:
        raise ShoalError("found a slimmable network; need one width or exits; prune one of its narrowed runs")
    config = request.config(Run(request.run).config())
    prepared = prepare(config | {"amounts": list(request.amount)}, request.data_dir, shared)
    smaller = {amount: _smaller(source, amount, request.method) for amount in request.amount}
    job = prepared.fingerprinted(source=source.network).begin()
    rows = _train_all(job, request, source, smaller)
    body = Pruning(method=request.method, source=str(request.run), rows=rows)
    if request.method == "channels":
        body["torch_pruning"] = torch_pruning_version()
    job.run.write_json("pruning.json", body)
    plot_pruning(body, job.run.folder / "pruning.png")
    return body


def _train_all(job: Job, request: Request, source: Pruned, smaller: Mapping[float, Pruned]) -> list[PruneRow]:
    """Train each pruned network in its own run folder; returns a row for the source and for each of them."""
    exits = len(evaluate(source.network, job.data, job.data.test.take([0]), job.settings))
    rows = [_row(0.0, source, job)]
    config = {name: value for name, value in job.config.items() if name != "amounts"}
    with job.training({f"amount-{amount:g}": request.epochs for amount in smaller}) as stages:
        for amount, own in smaller.items():
            name = f"amount-{amount:g}"
            below = stages.at(job.run.below(name, config | {"amount": amount}), name)
            _train_on(own, exits, request.schedule, below)
            row = _row(amount, own, job)
            row["of"] = rows[0]["of"]
            rows.append(row)
            _summarise(below.folder, job, source, own)
    return rows


def _smaller(source: Pruned, amount: float, method: str) -> Pruned:
    if method != "channels":
        return Pruned(source.spec, pruned(source.network, amount, method))
    cut = cut_channels(source.network, source.spec.shape, amount)
    return Pruned(pruned_spec(source.spec, cut.kept), cut.network, cut.whole)


def _train_on(smaller: Pruned, exits: int, schedule: Schedule, stages: Stages) -> None:
    objective = Objective(tuple(cross_entropy(exit=i, name=f"cross_entropy{i}") for i in range(exits)))
    stages.fit("prune", smaller.network, objective, schedule)
    settle(smaller.network)
    save_network(stages.folder, smaller.spec, smaller.network)


def _measuring(job: Job) -> Settings:
    """Settings to evaluate a network: no time limit, nothing to resume."""
    return Settings(device=job.settings.device, precision=job.settings.precision)


def _row(amount: float, of: Pruned, job: Job) -> PruneRow:
    """The size of the network and of each exit alone, and the accuracy of every exit on test images."""
    left, everything = weights_left(of.network)
    accuracy = evaluate(of.network.to(job.settings.device), job.data, job.data.test, _measuring(job))
    total = count(of.network, of.spec.shape)
    return PruneRow(
        amount=amount,
        weights=left,
        of=everything,
        accuracy=accuracy,
        macs=total.macs,
        relus=total.relus,
        params=total.params,
        exit_macs=[count(keep_exit(of.network, i), of.spec.shape).macs for i in range(len(accuracy))],
        whole=of.whole,
    )


def _summarise(run: Run, job: Job, source: Pruned, smaller: Pruned) -> None:
    """Write the `summary.json` of one amount, for shoal report. Its figures are those of the strongest classifier."""
    baseline, reduced = (figures(side.network, job.data, side.spec, _measuring(job)) for side in (source, smaller))
    Summary(
        data=job.data.name, model=source.spec.base, seed=job.settings.seed, baseline=baseline, reduced=reduced
    ).write(run)
