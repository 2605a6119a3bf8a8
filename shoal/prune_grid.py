"""What `shoal prune` does: prune a run's network by several amounts, train each on, draw accuracy against weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from shoal.distill import Objective, cross_entropy
from shoal.early.plots import plot_pruning
from shoal.errors import ShoalError
from shoal.origins import began
from shoal.progress import bars
from shoal.pruning import METHODS, pruned, settle, weights_left
from shoal.run import Run
from shoal.spec import Spec
from shoal.stages import Stages
from shoal.train import Schedule, Settings, evaluate
from shoal.training import Shared, load_data


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
    `pruning.png`. Raises ShoalError, before anything is written, for amounts and methods without a meaning.
    """
    _check(amounts, method, epochs, rate)
    shared.check()
    spec, network = Run(source).load_whole()
    if spec.widths and spec.kept_width is None:
        raise ShoalError("found a slimmable network; need one width or exits; prune one of its narrowed runs")
    config = Run(source).config()
    data, settings = load_data(config, data_dir, shared.device), shared.settings(config["seed"])
    config = {k: config.get(k) for k in ("data", "data_dir", "seed", "limit")} | {
        "command": "prune",
        "source": source.resolve(),
    }
    config |= {"method": method, "epochs": epochs, "rate": rate}
    config = began(config, data, data_dir, source=network)
    run = shared.run(config | {"amounts": list(amounts)})
    stages = Stages(data, settings, run, tensorboard=shared.tensorboard)
    schedule = Schedule(epochs, rate, kind="cosine")
    exits = len(evaluate(network, data, data.test.take([0]), settings))
    rows = [_row(0.0, network, stages)]
    with bars({f"amount-{a:g}": epochs for a in amounts}) as shown:
        stages.listen = shown.listen
        for amount in amounts:
            below = stages.at(run.below(f"amount-{amount:g}", config | {"amount": amount}), f"amount-{amount:g}")
            rows.append(_prune(spec, network, amount, method, exits, schedule, below))
    body = {"method": method, "source": str(source), "rows": rows}
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


def _prune(
    spec: Spec, network: nn.Module, amount: float, method: str, exits: int, schedule: Schedule, stages: Stages
) -> dict[str, Any]:
    sparse = pruned(network, amount, method)
    objective = Objective(tuple(cross_entropy(exit=i, name=f"cross_entropy{i}") for i in range(exits)))
    stages.fit("prune", sparse, objective, schedule)
    settle(sparse)
    assert stages.run is not None
    stages.run.save_model(spec, sparse)
    return _row(amount, sparse, stages)


def _row(amount: float, network: nn.Module, stages: Stages) -> dict[str, Any]:
    """Weights left, and accuracy of every exit on test images."""
    data, settings = stages.data, Settings(device=stages.settings.device, precision=stages.settings.precision)
    left, everything = weights_left(network)
    accuracy = evaluate(network.to(settings.device), data, data.test, settings)
    return {"amount": amount, "weights": left, "of": everything, "accuracy": accuracy}
