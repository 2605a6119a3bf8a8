"""From a trained network to a program and weights: trace, fold, calibrate, compile; and how well they agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from shoal.data.dataset import Dataset, check_kind
from shoal.graph.folding import fold
from shoal.graph.graph import Graph
from shoal.private.compiler.compilation import compile
from shoal.private.compiler.truncation import MAX_FAILURE
from shoal.private.program.clear import run_clear
from shoal.private.program.program import Program, Weights
from shoal.surgery.tracing import check_same, check_trace

COMPARED = 32
"""Calibration images on which the deployed graph is compared with the module."""


def deploy(
    model: nn.Module,
    data: Dataset,
    *,
    calibration: int = 256,
    fraction_bits: int | None = None,
    max_failure: float = MAX_FAILURE,
) -> tuple[Graph, Program, Weights]:
    """The folded float graph of `model`, its public program and the server's weights.

    Ranges are calibrated on `calibration` training images. `fraction_bits` and `max_failure` are those of `compile`.
    The folded graph is compared with `model` on COMPARED of these images. Raises ShoalError as `check_trace` and
    `check_same` do, and, naming the node, for operations without a private form and for values
    that overflow the ring.
    """
    check_kind(data)
    graph = fold(check_trace(model.cpu().float(), data.shape))
    # Evenly spread, because some data sets are stored class by class.
    chosen = torch.linspace(0, len(data.train) - 1, min(calibration, len(data.train))).long()
    images = data.normalise(data.train.images[chosen])
    check_same(model, graph, images[:COMPARED])
    names = list(data.class_names) or None
    facts = {"mean": list(data.mean), "std": list(data.std), "class_names": names, "fit": data.fit}
    program, weights = compile(graph, images, fraction_bits=fraction_bits, max_failure=max_failure, preprocessing=facts)
    return graph, program, weights


@dataclass(frozen=True)
class Agreement:
    """How private or fixed-point logits compare with the float network's on the same images."""

    images: int
    argmax_equal: int
    max_abs_logit_error: float


def compare(exact: Tensor | np.ndarray, private: Tensor | np.ndarray) -> Agreement:
    """Compare two arrays of logits [N, classes]."""
    a, b = (np.asarray(x, dtype=np.float64) for x in (exact, private))
    return Agreement(len(a), int((a.argmax(1) == b.argmax(1)).sum()), float(np.abs(a - b).max()))


def clear_agreement(
    graph: Graph, program: Program, weights: Weights, images: Tensor, labels: Tensor, chunk: int = 500
) -> tuple[Agreement, float]:
    """Compare the float graph with fixed point in the clear on normalised `images` [N, C, H, W].

    Returns the agreement and the fixed-point accuracy in percent.
    """
    parts, right = [], 0
    for i in range(0, len(images), chunk):
        x = images[i : i + chunk]
        with torch.no_grad():
            exact = graph(x)[-1]
        fixed = np.asarray(run_clear(program, weights, x)[-1])
        parts.append(compare(exact, fixed))
        right += int((fixed.argmax(1) == labels[i : i + chunk].numpy()).sum())
    return _total(parts), 100.0 * right / len(images)


def _total(parts: Sequence[Agreement]) -> Agreement:
    worst = max(p.max_abs_logit_error for p in parts)
    return Agreement(sum(p.images for p in parts), sum(p.argmax_equal for p in parts), worst)
