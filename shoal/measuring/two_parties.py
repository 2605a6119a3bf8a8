"""Measure trained networks in private inference between two processes: accuracy, counts, seconds and bytes."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from shoal.data.dataset import Dataset
from shoal.errors import ShoalError
from shoal.graph.counting import cost
from shoal.graph.graph import Graph
from shoal.measuring.loopback import client_tls, serving
from shoal.measuring.turns import Turns
from shoal.private.compiler.deployment import clear_agreement, compare, deploy
from shoal.private.program.artifact import save_artifact
from shoal.private.program.program import Program, Weights
from shoal.private.serving.client import Client
from shoal.private.serving.options import ClientOptions
from shoal.private.serving.prepared import Offline
from shoal.private.serving.result import Result
from shoal.progress import counter
from shoal.storage.summary import Figures

Say = Callable[[str], None]
BATCH = 2
"""Items of a batch. Small batches give more of them, and so a median that counts for something."""
WAIT_S = 600.0
"""Seconds to wait for the other party. Preparations take turns, so each also waits for a batch of every other one."""


@dataclass(frozen=True)
class Private:
    """Figures of one network between two processes. Times are in seconds, medians for one image or one item.

    `samples_s` are the seconds of the queries, `offline_samples_s` those of an item in each batch, in order, without
    the first batch, in which the processes also make keys. `offline_bytes` and `bytes` count both directions.
    """

    setup_s: float
    online_s: float
    offline_s: float
    offline_bytes: int
    relu_s: float
    linear_s: float
    bytes: int
    messages: int
    images: int
    argmax_equal: int
    max_abs_logit_error: float
    error_bound: float
    samples_s: tuple[float, ...]
    offline_samples_s: tuple[float, ...]


@dataclass(frozen=True)
class Deployed:
    """One network to measure: its artifact, and the graph that gives the right logits."""

    artifact: Path
    graph: Graph
    program: Program
    weights: Weights


def deployed(artifact: Path, model: nn.Module, data: Dataset) -> Deployed:
    """Compile `model`, and write its artifact."""
    graph, program, weights = deploy(model, data)
    save_artifact(artifact, program, weights)
    return Deployed(artifact, graph, program, weights)


def side_by_side(networks: Mapping[str, Deployed], certificates: Path, images: Tensor) -> dict[str, Private]:
    """Query all normalised `images` [N, C, H, W] with each network, after making an item for each image.

    Each network has a server process, all over mutual TLS. Batches of items, and queries, of the networks alternate.
    Raises ShoalError as `check_images` does.
    """
    check_images(len(images))
    tls, options = client_tls(certificates), ClientOptions(timeout_s=WAIT_S)
    flags = ("--products=seal", f"--timeout={WAIT_S:g}")
    with ExitStack() as stack:
        addresses = {
            name: stack.enter_context(serving(network.artifact, certificates, 2, flags=flags))
            for name, network in networks.items()
        }
        clients = {name: Client(networks[name].artifact, address, tls, options) for name, address in addresses.items()}
        offline = _prepare(clients, len(images))
        results = _query({name: stack.enter_context(client) for name, client in clients.items()}, images)
    return {
        name: _figures(offline[name], results[name], clients[name].setup_s, networks[name], images) for name in networks
    }


def check_images(count: int) -> None:
    """Raise ShoalError for so few images that their items are made in one batch: the first one is not measured."""
    if count <= BATCH:
        raise ShoalError(f"found {count} images to query; need {BATCH + 1} or more; choose more")


def _prepare(clients: Mapping[str, Client], count: int) -> dict[str, Offline]:
    """Make `count` items with each client, whose batches alternate."""
    turns, done = Turns(len(clients)), dict.fromkeys(clients, 0)
    with counter("items", count * len(clients)) as progress, ThreadPoolExecutor(len(clients)) as pool:

        def make(number: int, name: str) -> Offline:
            def told(made: int, _: int) -> None:
                turns.end(number)
                done[name] = made
                progress(sum(done.values()), count * len(clients))

            try:
                return clients[name].prepare(count, batch=BATCH, progress=told, proceed=lambda: turns.take(number))
            finally:
                turns.leave(number)

        making = {name: pool.submit(make, number, name) for number, name in enumerate(clients)}
        return {name: future.result() for name, future in making.items()}


def _query(clients: Mapping[str, Client], images: Tensor) -> dict[str, list[Result]]:
    """Query each image with each client in turn."""
    results: dict[str, list[Result]] = {name: [] for name in clients}
    with counter("queries", len(images)) as progress:
        for i, image in enumerate(images):
            for name, client in clients.items():
                results[name].append(client.query(image[None].numpy()))
            progress(i + 1, len(images))
    return results


def _figures(offline: Offline, results: list[Result], setup: float, network: Deployed, images: Tensor) -> Private:
    with torch.no_grad():
        agreement = compare(network.graph(images)[-1], torch.cat([torch.tensor(r.logits) for r in results]))
    middle = sorted(results, key=lambda r: r.seconds)[len(results) // 2]
    each = tuple(facts["seconds"] / items for items, facts in offline.later.batches)
    traffic = sum(facts["sent"] + facts["received"] for _, facts in offline.later.batches)
    return Private(
        setup_s=setup,
        online_s=middle.seconds,
        offline_s=statistics.median(each),
        offline_bytes=round(traffic / offline.later.items),
        relu_s=middle.relu_s,
        linear_s=middle.linear_s,
        bytes=middle.bytes,
        messages=middle.messages,
        images=agreement.images,
        argmax_equal=agreement.argmax_equal,
        max_abs_logit_error=agreement.max_abs_logit_error,
        error_bound=network.program.error_bound,
        samples_s=tuple(r.seconds for r in results),
        offline_samples_s=each,
    )


def measure(
    models: Mapping[str, nn.Module], data: Dataset, folder: Path, certificates: Path, images: int, say: Say
) -> dict[str, Figures]:
    """Counts, accuracy and private figures of trained networks, as JSON data; each writes its artifact to `folder`.

    `images` is the number of test images to query. `say` is called with a line for each measurement.
    """
    networks = {name: deployed(folder / name, model, data) for name, model in models.items()}
    test, found = data.normalise(data.test.images[:]), {}
    for name, network in networks.items():
        say(f"{name}: the whole test set ({len(test):,} images) in fixed point, in the clear")
        clear, accuracy = clear_agreement(network.graph, network.program, network.weights, test, data.test.labels)
        found[name] = _counts(network, data, test)
        found[name]["clear"] = asdict(clear) | {"accuracy": accuracy, "error_bound": network.program.error_bound}
    say(f"{images} images between two processes over mutual TLS, with each network in turn; first their items")
    for name, private in side_by_side(networks, certificates, test[:images]).items():
        found[name]["prepared"] = asdict(private)
    return found


def _counts(network: Deployed, data: Dataset, test: Tensor) -> Figures:
    graph = network.graph
    with torch.no_grad():
        guesses = torch.cat([graph(test[i : i + 500])[-1].argmax(1) for i in range(0, len(test), 500)])
    total = cost(graph)
    return Figures(
        accuracy=100.0 * float((guesses == data.test.labels).float().mean()),
        relus=total.relus,
        macs=total.macs,
        linear_macs=total.linear_macs,
        depth=total.depth,
        params=total.params,
        relu_layers=total.relu_layers,
        fraction_bits=network.program.fraction_bits,
        weight_bytes=sum(a.nbytes for a in network.weights.arrays.values()),
    )


def clean(out: Path, overwrite: bool) -> None:
    """Remove an earlier run at `out`. Raises ShoalError when there are files and `overwrite` is false, or no run."""
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise ShoalError(f"found files at {out}; need an empty folder; choose another --out or pass --overwrite")
        if not (out / "config.json").exists():
            raise ShoalError(f"found files at {out} that are no shoal run; need another --out")
        shutil.rmtree(out)


def agreement_of(network: Figures) -> dict[str, object]:
    """The summary's `agreement` of one measured network: private logits against plaintext logits."""
    private = network["prepared"]
    return {key: private[key] for key in ("images", "argmax_equal", "max_abs_logit_error", "error_bound")}
