"""Measure trained networks in private inference between two processes: accuracy, counts, seconds and bytes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from shoal.data.dataset import Dataset
from shoal.errors import ShoalError
from shoal.graph.counting import cost
from shoal.graph.graph import Graph
from shoal.measuring.loopback import client_tls, serving
from shoal.private.compiler.deployment import Agreement, clear_agreement, compare, deploy
from shoal.private.program.artifact import save_artifact
from shoal.private.program.program import Program, Weights
from shoal.private.serving.client import Client
from shoal.private.serving.direct import Result
from shoal.private.serving.options import ClientOptions
from shoal.progress import counter
from shoal.storage.summary import Figures

Say = Callable[[str], None]
SINGLES, PREPARED = 5, 8
"""Number of single-image queries, whose median is the time of an inference; number of images in prepared mode."""


@dataclass(frozen=True)
class Private:
    """Figures of one network between two processes. Times are in seconds, medians over queries of one image.

    `samples_s` are the seconds of these queries, in order.
    """

    mode: str
    setup_s: float
    online_s: float
    offline_s: float
    relu_s: float
    linear_s: float
    bytes: int
    messages: int
    images: int
    argmax_equal: int
    max_abs_logit_error: float
    error_bound: float
    samples_s: tuple[float, ...]


def direct(artifact: Path, certificates: Path, images: Tensor, graph: Graph, *, batch: int = 16) -> Private:
    """Query all normalised `images` [N, C, H, W] in direct mode, between two processes over mutual TLS.

    The first five are queried one by one, to time one inference; the others are queried in batches.
    """
    program, tls = Program.load(artifact / "client"), client_tls(certificates)
    results: list[Result] = []
    with (
        serving(artifact, certificates, 1) as address,
        Client(artifact / "client", address, tls, ClientOptions(mode="direct")) as client,
        counter("queries", len(images)) as progress,
    ):
        done = 0
        while done < len(images):
            results.append(client.query(images[done : done + (1 if done < SINGLES else batch)].numpy()))
            done += len(results[-1].logits)
            progress(done, len(images))
        setup = client.setup_s
    return _figures(results[:SINGLES], setup, 0.0, _agreement(results, images, graph), program)


def prepared(artifact: Path, certificates: Path, images: Tensor, graph: Graph) -> Private:
    """Query all normalised `images` [N, C, H, W] in prepared mode. Both processes first make one item per image."""
    program, tls = Program.load(artifact / "client"), client_tls(certificates)
    with serving(artifact, certificates, 2) as address:
        client = Client(artifact / "client", address, tls)
        begun = time.perf_counter()
        with counter("items", len(images)) as progress:
            client.prepare(len(images), batch=4, progress=progress)
        offline = (time.perf_counter() - begun) / len(images)
        with client:
            results = [client.query(image[None].numpy()) for image in images]
    return _figures(results, client.setup_s, offline, _agreement(results, images, graph), program)


def _agreement(results: list[Result], images: Tensor, graph: Graph) -> Agreement:
    with torch.no_grad():
        return compare(graph(images)[-1], torch.cat([torch.tensor(r.logits) for r in results]))


def _figures(results: list[Result], setup: float, offline: float, agreement: Agreement, program: Program) -> Private:
    middle = sorted(results, key=lambda r: r.seconds)[len(results) // 2]
    return Private(
        mode=middle.mode,
        setup_s=setup,
        online_s=middle.seconds,
        offline_s=offline,
        relu_s=middle.relu_s,
        linear_s=middle.linear_s,
        bytes=middle.bytes,
        messages=middle.messages,
        images=agreement.images,
        argmax_equal=agreement.argmax_equal,
        max_abs_logit_error=agreement.max_abs_logit_error,
        error_bound=program.error_bound,
        samples_s=tuple(r.seconds for r in results),
    )


def measure(artifact: Path, model: nn.Module, data: Dataset, certificates: Path, images: int, say: Say) -> Figures:
    """Counts, accuracy and private figures of one trained network, as JSON data; writes its artifact to `artifact`.

    `images` is the number of test images to query. `say` is called with a line for each measurement.
    """
    graph, program, weights = deploy(model, data)
    name = artifact.name
    save_artifact(artifact, program, weights)
    test = data.normalise(data.test.images[:])
    say(f"{name}: the whole test set ({len(test):,} images) in fixed point, in the clear")
    clear, accuracy = clear_agreement(graph, program, weights, test, data.test.labels)
    say(f"{name}: {images} images between two processes over mutual TLS, direct")
    private = direct(artifact, certificates, test[:images], graph)
    few = min(PREPARED, images)
    say(f"{name}: {few} images from prepared randomness, which is made first")
    ahead = prepared(artifact, certificates, test[:few], graph)
    found = _network(graph, data, test, program, weights)
    found["private"], found["prepared"] = asdict(private), asdict(ahead)
    found["clear"] = asdict(clear) | {"accuracy": accuracy, "error_bound": program.error_bound}
    return found


def _network(graph: Graph, data: Dataset, test: Tensor, program: Program, weights: Weights) -> Figures:
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
        fraction_bits=program.fraction_bits,
        weight_bytes=sum(a.nbytes for a in weights.arrays.values()),
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
    private = network["private"]
    return {key: private[key] for key in ("images", "argmax_equal", "max_abs_logit_error", "error_bound")}
