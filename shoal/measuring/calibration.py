"""Measure this machine's constants for the cost model, with two processes, in about two minutes.

Seconds of the offline phase and of direct mode come from one small network whose layers have different shapes. Online
seconds need no SPU: networks of common kinds, with all and with few of their ReLUs, are queried with rehearsal items.
These are random words of the right shapes, and queries with them take as long as with real items. What varies widely is
measured again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from scipy.optimize import nnls
from torch import nn

from shoal.costs.machine import Machine
from shoal.costs.model import chosen_words, homomorphic, linear_values, macs, weights
from shoal.errors import ShoalError
from shoal.graph.folding import fold
from shoal.measuring.loopback import client_tls, serving
from shoal.measuring.rehearsal import stock
from shoal.measuring.repeats import ROUNDS, Laps, repeated, spread
from shoal.models import build
from shoal.private.compiler.compilation import compile
from shoal.private.program.artifact import save_artifact
from shoal.private.program.program import Program, Weights
from shoal.private.protocol.layout import Layout
from shoal.private.serving.client import Client
from shoal.private.serving.options import ClientOptions
from shoal.private.serving.prepared import Offline
from shoal.private.transport.certs import make_certificates
from shoal.reduction.masks import add_masks
from shoal.surgery.sites import relu_sites
from shoal.surgery.tracing import trace

ITEMS, QUERIES, WARM = 3, 16, 6
"""Most items that count, queries of a round, and queries before the first round."""
TRUST = 0.1
"""Weight of the typical constants in a fit: a constant that is off by 100 % costs as much as seconds that are off by 10
%."""
Say = Callable[[str], None]


class Measurements(TypedDict):
    """What the constants were fitted to, and the spread of each measurement."""

    offline: Mapping[str, Mapping[str, float]]
    queries: Mapping[str, Mapping[str, float]]
    spreads: dict[str, float]


def _chain(shape: tuple[int, ...], *layers: tuple[int, ...]) -> nn.Module:
    """Convolutions with ReLUs, average pool, and ten classes.

    Each layer is (channels, stride), or (channels, stride, 0) for one without a ReLU.
    """
    parts: list[nn.Module] = []
    channels = shape[0]
    for width, stride, *relu in layers:
        parts += [nn.Conv2d(channels, width, 3, stride, 1), nn.ReLU() if relu != [0] else nn.Identity()]
        channels = width
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


MIXED = ((3, 16, 16), (16, 1), (64, 1, 0), (64, 1, 0), (128, 2), (128, 2))
SHAPE = (3, 32, 32)
REHEARSED = {
    "residual": ("resnet18", 0.1875, 1.0),
    "residual, sparse": ("resnet18", 0.375, 0.05),
    "shallow": ("resnet10", 0.375, 1.0),
    "shallow, sparse": ("resnet10", 0.75, 0.03),
    "deep": ("resnet44", 0.5, 1.0),
    "deep, sparse": ("resnet56", 0.5, 0.1),
    "plain": ("vgg16-avg", 0.25, 0.5),
}
"""Networks that differ in exchanges, values, ReLUs and multiply-adds: name, width, fraction of ReLUs kept."""


SPU, DIRECT, MAKING, STARTING = "items with SPU", "direct queries", "making networks", "starting servers"
STEPS: dict[str, float] = {SPU: 45.0, DIRECT: 20.0, MAKING: 45.0, STARTING: 10.0}
STEPS |= {f"queries: {name}": 4.0 for name in REHEARSED}
"""The steps of a calibration, with their typical seconds."""


def calibrate(say: Say = lambda _: None) -> tuple[Machine, Measurements]:
    """This machine's constants, and the measurements behind them. Needs SPU and an idle machine.

    `say` is called with the name of each of `STEPS` when it begins. The measurements have ``spreads``: for each of
    them, how much it still varies (see `repeats.spread`). Raises ShoalError when they fit no machine.
    """
    with tempfile.TemporaryDirectory(prefix="shoal-") as scratch:
        folder = Path(scratch)
        make_certificates(folder / "certs")
        say(SPU)
        layout = _compiled(folder / "mixed", *MIXED)
        offline, relu_s, spreads = _with_spu(folder, layout, say)
        say(MAKING)
        layouts = {name: _stocked(folder, name, facts) for name, facts in REHEARSED.items()}
        with ExitStack() as stack, ThreadPoolExecutor(len(layouts)) as starting:
            say(STARTING)
            # Start all at once: a start is mostly imports, and all servers must be idle before the first query.
            waits = {name: starting.submit(_serving, stack, folder, name) for name in layouts}
            servers = {name: wait.result() for name, wait in waits.items()}
            queries = {}
            for name, own in layouts.items():
                say(f"queries: {name}")
                queries[name], spreads[f"queries: {name}"] = _timed(folder, name, own, *servers[name])
    constants = _offline_constants(layout, offline) | _online_constants(list(queries.values()))
    machine = Machine(**constants, direct_relu_s=relu_s)
    kinds = offline.kinds | {"steps": offline.steps}
    return machine, Measurements(offline=kinds, queries=queries, spreads=spreads)


def _compiled(folder: Path, shape: tuple[int, ...], *layers: tuple[int, ...]) -> Layout:
    torch.manual_seed(0)
    return _saved(folder, _chain(shape, *layers), shape)


def _saved(folder: Path, model: nn.Module, shape: tuple[int, ...]) -> Layout:
    graph = fold(trace(model.eval(), shape))
    program, weights = compile(graph, torch.rand(2, *shape) * 2 - 1)
    save_artifact(folder, program, weights)
    return Layout(program)


def _image(program: Program) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (1, *program.input_shape)).astype(np.float32)


def _with_spu(folder: Path, layout: Layout, say: Say) -> tuple[Offline, float, dict[str, float]]:
    """The cost of the fastest item, without the first one; seconds of one ReLU in direct mode; and both spreads."""
    artifact, tls, laps = folder / "mixed", client_tls(folder / "certs"), Laps()
    with serving(artifact, folder / "certs", 2, folder / "spu") as address:
        client = Client(artifact / "client", address, tls)
        made = client.prepare(ITEMS + 1, progress=laps.lap, proceed=laps.are_few).later
        client.close()
        say(DIRECT)
        with Client(artifact / "client", address, tls, ClientOptions(mode="direct")) as direct:
            image = _image(layout.program)
            relus = repeated(lambda: [direct.query(image).relu_s for _ in range(2)])
    spreads = {SPU: spread(laps.seconds), DIRECT: relus.spread}
    relu_s = min(relus.seconds) / sum(relu.count for relu in layout.relus.values())
    return Offline([made.batches[laps.fastest]]), relu_s, spreads


def _sparse(name: str, width: float, share: float) -> nn.Module:
    """A built-in network with random weights that keeps about the fraction `share` of each layer's ReLUs."""
    torch.manual_seed(0)
    model = build(name, 10, width=width)
    if share < 1:
        masks = {site.name: torch.rand(site.shape) < share for site in relu_sites(model, SHAPE)}
        model = add_masks(model, masks)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # statistics of the one batch below; without them, values grow from block to block
    model.train()(torch.rand(8, *SHAPE) * 2 - 1)
    return model


def _stocked(folder: Path, name: str, facts: tuple[str, float, float]) -> Layout:
    """The layout of one network, after writing rehearsal items for its queries to both parties' pools."""
    layout = _saved(folder / name, _sparse(*facts), SHAPE)
    pools, count = (folder / name / "mine", folder / name / "theirs"), WARM + ROUNDS * QUERIES
    stock(layout, pools, folder / "certs" / "client.pem", count, Weights.load(folder / name / "server").digest())
    return layout


def _serving(stack: ExitStack, folder: Path, name: str) -> tuple[ExitStack, str]:
    """Start a server; returns a stack that stops it when closed, and its address."""
    own = stack.enter_context(ExitStack())
    return own, own.enter_context(serving(folder / name, folder / "certs", 1, folder / name / "theirs"))


def _timed(folder: Path, name: str, layout: Layout, server: ExitStack, address: str) -> tuple[dict[str, float], float]:
    """Median seconds of a query of one network, with the counts that explain them, and their spread.

    Stops the network's server and waits for its end, because a process that ends uses a core for most of a second and
    would slow down the next network's queries.
    """
    tls, pool, image = client_tls(folder / "certs"), folder / name / "mine", _image(layout.program)
    with Client(folder / name / "client", address, tls, ClientOptions(pool=pool)) as client:

        def seconds(count: int) -> list[float]:
            return [client.query(image).seconds for _ in range(count)]

        seconds(WARM)
        found = repeated(lambda: seconds(QUERIES))
    server.close()
    return work(layout) | {"seconds": found.median}, found.spread


def work(layout: Layout) -> dict[str, float]:
    """The counts that determine the online seconds of a query, by the names of their constants."""
    relus = sum(relu.count for relu in layout.relus.values())
    counts: dict[str, float] = {"query_s": 1, "exchange_s": layout.online.latencies, "mac_s": macs(layout)}
    counts |= {"weight_s": weights(layout)}
    return counts | {"relu_s": float(relus), "value_s": float(linear_values(layout))}


def _offline_constants(layout: Layout, made: Offline) -> dict[str, float]:
    """Seconds of products and automorphisms, by least squares over the layers. Other constants follow by division."""
    work = [homomorphic(layout, step) for step in layout.linear]
    seconds = np.array([made.steps[step.name] for step in layout.linear]) / made.items
    names = ("product_s", "automorphism_s", "run_s")
    products, automorphisms, run = _fit([[w.products, w.automorphisms, 1.0] for w in work], seconds, _typical(names))
    found = {"product_s": products, "automorphism_s": automorphisms, "run_s": run}
    found["and_s"] = made.kinds["and"]["seconds"] / made.items / layout.word_ands
    return found | {"chosen_s": made.kinds["chosen"]["seconds"] / made.items / chosen_words(layout)}


def _online_constants(rows: list[dict[str, float]]) -> dict[str, float]:
    names = [name for name in rows[0] if name != "seconds"]
    table, seconds = [[row[name] for name in names] for row in rows], np.array([row["seconds"] for row in rows])
    return dict(zip(names, _fit(table, seconds, _typical(names)), strict=True))


def _typical(names: Iterable[str]) -> list[float]:
    return [float(getattr(Machine(), name)) for name in names]


def _fit(table: list[list[float]], seconds: np.ndarray, typical: list[float]) -> list[float]:
    """Nonnegative constants with the least sum of squared relative errors.

    A few noisy measurements cannot determine all constants. What they leave open follows the `typical` constants times
    one common factor, the speed of the machine, which is fitted as well.
    """
    count, typical_ = len(typical), np.asarray(typical)
    rows = np.asarray(table, np.float64) * typical_ / seconds[:, None]
    measured = np.hstack([rows, np.zeros((len(seconds), 1))])
    likely = TRUST * np.hstack([np.eye(count), -np.ones((count, 1))])
    found, _ = nnls(np.vstack([measured, likely]), np.concatenate([np.ones(len(seconds)), np.zeros(count)]))
    if not found.any():
        raise ShoalError("found measurements that fit no machine; need an idle one; calibrate again")
    return [float(v) for v in found[:count] * typical_]
