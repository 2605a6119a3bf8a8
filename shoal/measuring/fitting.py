"""The constants of a machine that explain measured seconds: counts of each kind of work, and their prices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import nnls

from shoal.costs.machine import Machine
from shoal.costs.model import linear_values, macs, weights
from shoal.costs.offline import chosen_words, homomorphic, packed
from shoal.errors import ShoalError
from shoal.private.protocol.layout import Layout
from shoal.private.serving.prepared import Offline

TRUST = 0.1
"""Weight of the typical constants in a fit: a constant that is off by 100 % costs as much as seconds that are off by 10
%."""


def online_row(layout: Layout) -> dict[str, float]:
    """The counts that determine the online seconds of a query, by the names of their constants."""
    relus = sum(relu.count for relu in layout.relus.values())
    counts: dict[str, float] = {"query_s": 1, "exchange_s": layout.online.latencies, "mac_s": macs(layout)}
    counts |= {"weight_s": weights(layout)}
    return counts | {"relu_s": float(relus), "value_s": float(linear_values(layout))}


def offline_constants(layout: Layout, made: Sequence[Offline]) -> dict[str, float]:
    """Seconds of all products of linear layers, by least squares over layers and batches, and of bits by division.

    `made` has one batch of each size. Of ANDs and of products of bits and words, the fastest batch counts.
    """
    seal = [seal_rows(layout, own) for own in made]
    spu = [spu_rows(layout, own) for own in made]
    found = constants([row for rows in seal for row in rows])
    found |= constants([row for rows in spu for row in rows])
    for name, kind, count in (("and_s", "and", layout.word_ands), ("chosen_s", "chosen", chosen_words(layout))):
        found[name] = min(own.kinds[kind]["seconds"] / own.items for own in made) / count
    return found


def seal_rows(layout: Layout, made: Offline) -> list[dict[str, float]]:
    """For each step that SEAL multiplies, its counts by the names of their constants, and its seconds.

    The first step also has the keys.
    """
    rows = []
    for at, (name, work) in enumerate(packed(layout, made.items).items()):
        row = {"seal_start_s": float(at == 0), "seal_transform_s": work.transforms, "seal_product_s": work.products}
        row |= {"seal_input_s": work.sent, "seal_answer_s": work.answers}
        rows.append(row | {"seconds": made.steps[name]})
    return rows


def spu_rows(layout: Layout, made: Offline) -> list[dict[str, float]]:
    """The same for each step that SPU multiplies."""
    sealed, rows = packed(layout), []
    for step in (step for step in layout.linear if step.name not in sealed):
        work = homomorphic(layout, step, made.items)
        row = {"product_s": made.items * work.products, "automorphism_s": made.items * work.automorphisms}
        rows.append(row | {"run_s": 1.0, "seconds": made.steps[step.name]})
    return rows


def constants(rows: list[dict[str, float]]) -> dict[str, float]:
    """The constants that explain the ``seconds`` of `rows`, whose other keys are their names."""
    names = [name for name in rows[0] if name != "seconds"]
    table, seconds = [[row[name] for name in names] for row in rows], np.array([row["seconds"] for row in rows])
    typical = [float(getattr(Machine(), name)) for name in names]
    return dict(zip(names, fit(table, seconds, typical), strict=True))


def fit(table: list[list[float]], seconds: np.ndarray, typical: list[float]) -> list[float]:
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
