"""Constants of this machine for the cost model, from two processes on it: `shoal calibrate`, a minute and a half.

Offline and direct seconds come from one small network of differently shaped layers. Online seconds need no SPU:
networks of the usual kinds, with all and with few of their ReLUs, are queried with rehearsal items, random words of the
right shapes, which take as long as real ones.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import nn

from shoal.costs.machine import Machine
from shoal.costs.model import chosen_words, homomorphic, linear_values, macs, weights, word_ands
from shoal.errors import ShoalError
from shoal.graph.folding import fold
from shoal.measuring.loopback import client_tls, serving
from shoal.measuring.rehearsal import stock
from shoal.models import build
from shoal.private.compiler.compilation import compile
from shoal.private.program.artifact import save_artifact
from shoal.private.program.program import Program
from shoal.private.protocol.plan import Plan
from shoal.private.serving.client import Client
from shoal.private.serving.prepared import Offline
from shoal.private.transport.certs import make_certificates
from shoal.reduction.masks import add_masks
from shoal.surgery.sites import relu_sites
from shoal.surgery.tracing import trace

ITEMS, QUERIES, WARM = 1, 30, 6
TRUST = 0.1
"""In fits: a constant that is off its share of the machine's speed by 1 weighs as much as seconds off by 10 %."""
Say = Callable[[str], None]


def _chain(shape: tuple[int, ...], *layers: tuple[int, ...]) -> nn.Module:
    """Convolutions with ReLUs, each (channels, stride) or (channels, stride, 0 for no ReLU); a mean; ten classes."""
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
"""Networks whose queries weigh exchanges, values, ReLUs and multiply-adds differently: name, width, ReLUs kept."""


def calibrate(say: Say = lambda _: None) -> tuple[Machine, dict[str, Any]]:
    """This machine's constants, and the measurements behind them. Needs SPU; run it on an idle machine."""
    with tempfile.TemporaryDirectory(prefix="shoal-") as scratch:
        folder = Path(scratch)
        make_certificates(folder / "certs")
        say("preparing with SPU")
        plan = _compiled(folder / "mixed", *MIXED)
        offline, relu_s = _with_spu(folder, plan)
        plans = {name: _stocked(folder, name, layout) for name, layout in REHEARSED.items()}
        with ExitStack() as stack, ThreadPoolExecutor(len(plans)) as starting:
            say("starting servers")
            # At once: most of a start is imports, and all of them wait before the first query.
            waits = {name: starting.submit(_serving, stack, folder, name) for name in plans}
            servers = {name: wait.result() for name, wait in waits.items()}
            say("querying")
            queries = {name: _timed(folder, name, plan, *servers[name]) for name, plan in plans.items()}
    constants = _offline_constants(plan, offline) | _online_constants(list(queries.values()))
    machine = Machine(**constants, direct_relu_s=relu_s)
    return machine, {"offline": offline.kinds | {"steps": offline.steps}, "queries": queries}


def _compiled(folder: Path, shape: tuple[int, ...], *layers: tuple[int, ...]) -> Plan:
    torch.manual_seed(0)
    return _saved(folder, _chain(shape, *layers), shape)


def _saved(folder: Path, model: nn.Module, shape: tuple[int, ...]) -> Plan:
    graph = fold(trace(model.eval(), shape))
    program, weights = compile(graph, torch.rand(2, *shape) * 2 - 1)
    save_artifact(folder, program, weights)
    return Plan(program)


def _image(program: Program) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (1, *program.input_shape)).astype(np.float32)


def _with_spu(folder: Path, plan: Plan) -> tuple[Offline, float]:
    """What making items cost, after one that is not counted, and the seconds of a ReLU all in SPU."""
    artifact, tls = folder / "mixed", client_tls(folder / "certs")
    with serving(artifact, folder / "certs", 2, folder / "spu") as address:
        client = Client(artifact / "client", address, tls)
        made = client.prepare(ITEMS + 1).later
        client.close()
        with Client(artifact / "client", address, tls, mode="direct") as direct:
            relu_s = min(direct.query(_image(plan.program)).relu_s for _ in range(2))
    return made, relu_s / sum(relu.count for relu in plan.relus.values())


def _sparse(name: str, width: float, share: float) -> nn.Module:
    """A network of the zoo with random weights and about this share of each layer's ReLUs."""
    torch.manual_seed(0)
    model = build(name, 10, width=width)
    if share < 1:
        masks = {site.name: torch.rand(site.shape) < share for site in relu_sites(model, SHAPE)}
        model = add_masks(model, masks)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # the statistics of one batch: without them values grow from block to block
    model.train()(torch.rand(8, *SHAPE) * 2 - 1)
    return model


def _stocked(folder: Path, name: str, layout: tuple[str, float, float]) -> Plan:
    """The plan of one network, with rehearsal items for its queries at both sides."""
    plan = _saved(folder / name, _sparse(*layout), SHAPE)
    stock(plan, (folder / name / "mine", folder / name / "theirs"), folder / "certs" / "client.pem", QUERIES)
    return plan


def _serving(stack: ExitStack, folder: Path, name: str) -> tuple[ExitStack, str]:
    """A server of its own, which ends with what is returned, and its address."""
    own = stack.enter_context(ExitStack())
    return own, own.enter_context(serving(folder / name, folder / "certs", 1, folder / name / "theirs"))


def _timed(folder: Path, name: str, plan: Plan, server: ExitStack, address: str) -> dict[str, float]:
    """Median seconds of a query of one network, and what it is made of; its server has ended when this returns.

    A process that ends takes a core for most of a second, which the next network's queries must not feel.
    """
    tls, pool = client_tls(folder / "certs"), folder / name / "mine"
    with Client(folder / name / "client", address, tls, pool=pool) as client:
        seconds = [client.query(_image(plan.program)).seconds for _ in range(QUERIES)]
    server.close()
    return work(plan) | {"seconds": statistics.median(seconds[WARM:])}


def work(plan: Plan) -> dict[str, float]:
    """What the online seconds of a query are made of, by the names of the constants that price it."""
    relus = sum(relu.count for relu in plan.relus.values())
    counts: dict[str, float] = {"query_s": 1, "exchange_s": plan.online.latencies, "mac_s": macs(plan)}
    counts |= {"weight_s": weights(plan)}
    return counts | {"relu_s": float(relus), "value_s": float(linear_values(plan))}


def _offline_constants(plan: Plan, made: Offline) -> dict[str, float]:
    """Seconds of products and automorphisms by least squares over the layers; the other kinds by division."""
    work = [homomorphic(plan, step) for step in plan.linear]
    seconds = np.array([made.steps[step.name] for step in plan.linear]) / made.items
    names = ("product_s", "automorphism_s", "run_s")
    products, automorphisms, run = _fit([[w.products, w.automorphisms, 1.0] for w in work], seconds, _typical(names))
    found = {"product_s": products, "automorphism_s": automorphisms, "run_s": run}
    found["and_s"] = made.kinds["and"]["seconds"] / made.items / word_ands(plan)
    return found | {"chosen_s": made.kinds["chosen"]["seconds"] / made.items / chosen_words(plan)}


def _online_constants(rows: list[dict[str, float]]) -> dict[str, float]:
    names = [name for name in rows[0] if name != "seconds"]
    table, seconds = [[row[name] for name in names] for row in rows], np.array([row["seconds"] for row in rows])
    return dict(zip(names, _fit(table, seconds, _typical(names)), strict=True))


def _typical(names: Iterable[str]) -> list[float]:
    return [float(getattr(Machine(), name)) for name in names]


def _fit(table: list[list[float]], seconds: np.ndarray, typical: list[float]) -> list[float]:
    """Constants of zero or more with the least sum of squared relative errors.

    A few noisy networks do not tell all constants apart. What they leave open follows the `typical` constants, all
    times one factor, which is fitted too: the machine's speed.
    """
    count, typical_ = len(typical), np.asarray(typical)
    rows = np.asarray(table, np.float64) * typical_ / seconds[:, None]
    measured = np.hstack([rows, np.zeros((len(seconds), 1))])
    likely = TRUST * np.hstack([np.eye(count), -np.ones((count, 1))])
    found, _ = nnls(np.vstack([measured, likely]), np.concatenate([np.ones(len(seconds)), np.zeros(count)]))
    if not found.any():
        raise ShoalError("found measurements that fit no machine; need an idle one; calibrate again")
    return [float(v) for v in found[:count] * typical_]
