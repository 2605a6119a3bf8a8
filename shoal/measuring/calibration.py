"""Measure this machine's constants for the cost model, with two processes, in about two minutes.

Seconds of the offline phase come from one small network whose layers have different shapes. SEAL multiplies most of
them, SPU the others. Items are made one by one, and in batches that share the transforms of weights. Online seconds
need no items: networks of common kinds, with all and with few of their ReLUs, are queried with rehearsal items.
These are random words of the right shapes, and queries with them take as long as with real items. What varies widely is
measured again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from torch import nn

from shoal.costs.machine import Machine
from shoal.graph.folding import fold
from shoal.measuring.fitting import constants, offline_constants, online_row
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

BATCHES, QUERIES, WARM = 3, 16, 6
"""Most batches of one size that count, queries of a round, and queries before the first round."""
TOGETHER = (1, 4)
"""Numbers of items that are made together."""
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


MIXED = ((3, 16, 16), (16, 1), (64, 1, 0), (64, 1, 0), (128, 2), (128, 2), (128, 1, 0), (128, 1))
LEFT_TO_SPU = (3, 5, 8)
"""Linear layers of this network that SPU multiplies, so that its prices are found, too."""
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


SINGLE, BATCHED, MAKING, STARTING = "single items", "items in batches", "making networks", "starting servers"
STEPS: dict[str, float] = {SINGLE: 30.0, BATCHED: 30.0, MAKING: 45.0, STARTING: 10.0}
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
        layout = _mixed(folder / "mixed")
        made, spreads = _prepared(folder, say)
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
    machine = Machine(**offline_constants(layout, made), **constants(list(queries.values())))
    offline = {f"{name}, {own.items} together": row for own in made for name, row in _seconds(own).items()}
    return machine, Measurements(offline=offline, queries=queries, spreads=spreads)


def _mixed(folder: Path) -> Layout:
    """The network whose items are made: SEAL multiplies most of its layers, SPU the others."""
    torch.manual_seed(0)
    shape, *layers = MIXED
    program, weights = _compiled(_chain(shape, *layers), shape)
    steps = program.products["steps"]
    left = [name for at, name in enumerate(steps) if at not in LEFT_TO_SPU]
    program = replace(program, products=program.products | {"steps": left})
    save_artifact(folder, program, weights)
    return Layout(program)


def _compiled(model: nn.Module, shape: tuple[int, ...]) -> tuple[Program, Weights]:
    return compile(fold(trace(model.eval(), shape)), torch.rand(2, *shape) * 2 - 1)


def _image(program: Program) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (1, *program.input_shape)).astype(np.float32)


def _prepared(folder: Path, say: Say) -> tuple[list[Offline], dict[str, float]]:
    """The cost of the fastest batch of each size in `TOGETHER`, without the first one; and the spread of each size."""
    artifact, tls, made, spreads = folder / "mixed", client_tls(folder / "certs"), list[Offline](), {}
    with serving(artifact, folder / "certs", len(TOGETHER), folder / "spu", ("--products", "seal")) as address:
        client = Client(artifact / "client", address, tls)
        for size, name in zip(TOGETHER, (SINGLE, BATCHED), strict=True):
            say(name)
            laps = Laps()
            count = size * (BATCHES + 1)
            found = client.prepare(count, batch=size, progress=laps.lap, proceed=laps.are_few).later
            made.append(Offline([found.batches[laps.fastest]]))
            spreads[name] = spread(laps.seconds)
        client.close()
    return made, spreads


def _seconds(made: Offline) -> dict[str, dict[str, float]]:
    return made.kinds | {"steps": made.steps}


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
    program, weights = _compiled(_sparse(*facts), SHAPE)
    save_artifact(folder / name, program, weights)
    layout = Layout(program)
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
    return online_row(layout) | {"seconds": found.median}, found.spread
