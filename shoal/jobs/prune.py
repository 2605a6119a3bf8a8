"""What `shoal prune` does: prune a run's network by several amounts, train each on, draw accuracy against what is left.

Smallest weights and filters become zeros (`pruning`); channels are cut out (`channel_pruning`), so that the network is
another one, with fewer MACs, ReLUs and parameters, and its run's `model.json` says which channels stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from shoal.channels.magnitude import METHODS as ZEROING
from shoal.channels.magnitude import pruned, settle, weights_left
from shoal.channels.torch_pruning import cut_channels, torch_pruning, torch_pruning_version
from shoal.errors import ShoalError
from shoal.exits.classifiers import keep_exit
from shoal.exits.plots import plot_pruning
from shoal.jobs.inputs import Shared, load_data
from shoal.networks.figures import figures
from shoal.networks.spec import Spec, pruned_spec
from shoal.networks.stored import load_whole, save_network
from shoal.progress import bars
from shoal.recipes.stages import Stages
from shoal.storage.environment import environment
from shoal.storage.origins import began
from shoal.storage.run import Run
from shoal.surgery.tracing import count
from shoal.training.evaluation import evaluate
from shoal.training.objective import Objective, cross_entropy
from shoal.training.schedule import Schedule
from shoal.training.settings import Settings

METHODS = (*ZEROING, "channels")
"""How to prune; the last one needs Torch-Pruning."""


@dataclass(frozen=True)
class Pruned:
    """A network to train on, its spec, and layers that Torch-Pruning could not cut."""

    spec: Spec
    network: nn.Module
    whole: tuple[str, ...] = ()


def prune_by_amounts(
    source: Path,
    amounts: Sequence[float],
    method: str,
    epochs: int,
    rate: float,
    data_dir: Path | None,
    shared: Shared,
) -> dict[str, Any]:
    """Prune the network at `source` by each of `amounts`, train it on for `epochs`, each as a run in OUT/amount-A.

    All exits learn from the labels, with a rate that falls from `rate` to 0 along a cosine. Writes `pruning.json` and
    `pruning.png`. Raises ShoalError, before anything is written, for amounts and methods without a meaning, without
    Torch-Pruning where it is needed, and for a network whose channels cannot be cut.
    """
    _check(amounts, method, epochs, rate)
    shared.check()
    spec, network = load_whole(Run(source))
    if spec.widths and spec.kept_width is None:
        raise ShoalError("found a slimmable network; need one width or exits; prune one of its narrowed runs")
    config = Run(source).config()
    data, settings = load_data(config, data_dir, shared.device), shared.settings(config["seed"])
    config = {k: config.get(k) for k in ("data", "data_dir", "seed", "limit")}
    config |= {"command": "prune", "source": source.resolve(), "method": method, "epochs": epochs, "rate": rate}
    smaller = {amount: _smaller(spec, network, amount, method) for amount in amounts}
    config = began(config, data, data_dir, source=network)
    run = shared.run(config | {"amounts": list(amounts)})
    stages = Stages(data, settings, run, tensorboard=shared.tensorboard)
    exits = len(evaluate(network, data, data.test.take([0]), settings))
    rows = [_row(0.0, Pruned(spec, network), stages)]
    with bars({f"amount-{a:g}": epochs for a in amounts}) as shown:
        stages.listen = shown.listen
        for amount in amounts:
            below = stages.at(run.below(f"amount-{amount:g}", config | {"amount": amount}), f"amount-{amount:g}")
            _train_on(smaller[amount], exits, Schedule(epochs, rate, kind="cosine"), below)
            rows.append(_row(amount, smaller[amount], below) | {"of": rows[0]["of"]})
            _summarise(below, Pruned(spec, network), smaller[amount])
    body = {"method": method, "source": str(source), "rows": rows}
    body |= {"torch_pruning": torch_pruning_version()} if method == "channels" else {}
    run.write_json("pruning.json", body)
    plot_pruning(body, run.folder / "pruning.png")
    return body


def _check(amounts: Sequence[float], method: str, epochs: int, rate: float) -> None:
    if not amounts or not all(0 < a < 1 for a in amounts) or len(set(amounts)) < len(amounts):
        raise ShoalError(f"found amounts {list(amounts)}; need different parts between 0 and 1, such as 0.5,0.8")
    if method not in METHODS:
        raise ShoalError(f"found method {method!r}; need one of {', '.join(METHODS)}; choose one")
    if epochs < 1 or not rate > 0:
        raise ShoalError(f"found {epochs} epochs at rate {rate:g}; need 1 or more and a rate above 0")
    if method == "channels":
        torch_pruning()  # raises


def _smaller(spec: Spec, network: nn.Module, amount: float, method: str) -> Pruned:
    if method != "channels":
        return Pruned(spec, pruned(network, amount, method))
    cut = cut_channels(network, spec.shape, amount)
    return Pruned(pruned_spec(spec, cut.kept), cut.network, cut.whole)


def _train_on(smaller: Pruned, exits: int, schedule: Schedule, stages: Stages) -> None:
    objective = Objective(tuple(cross_entropy(exit=i, name=f"cross_entropy{i}") for i in range(exits)))
    stages.fit("prune", smaller.network, objective, schedule)
    settle(smaller.network)
    assert stages.run is not None
    save_network(stages.run, smaller.spec, smaller.network)


def _row(amount: float, of: Pruned, stages: Stages) -> dict[str, Any]:
    """What is left of the network and of each exit alone, and accuracy of every exit on test images."""
    data, settings = stages.data, Settings(device=stages.settings.device, precision=stages.settings.precision)
    left, everything = weights_left(of.network)
    accuracy = evaluate(of.network.to(settings.device), data, data.test, settings)
    total = count(of.network, of.spec.shape)
    alone = [count(keep_exit(of.network, i), of.spec.shape).macs for i in range(len(accuracy))]
    found = {"macs": total.macs, "relus": total.relus, "params": total.params, "exit_macs": alone}
    return {"amount": amount, "weights": left, "of": everything, "accuracy": accuracy, **found, "whole": of.whole}


def _summarise(stages: Stages, source: Pruned, smaller: Pruned) -> None:
    """Write the `summary.json` of one amount, for shoal report: the strongest classifier's figures, with all exits."""
    data, settings = stages.data, Settings(device=stages.settings.device, precision=stages.settings.precision)
    sides = {"baseline": source, "reduced": smaller}
    body: dict[str, Any] = {name: figures(side.network, data, side.spec, settings) for name, side in sides.items()}
    body |= {"data": data.name, "model": source.spec.base, "environment": environment(), "seed": stages.settings.seed}
    assert stages.run is not None
    stages.run.write_json("summary.json", body)
