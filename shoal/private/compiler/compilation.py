"""Compiles a folded Graph into a Program: steps, fraction bits, sign bits, error and failure bounds."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoal.data.images import FITS
from shoal.errors import ShoalError
from shoal.graph.graph import Graph, live
from shoal.graph.max_pool import expand_max_pools
from shoal.graph.ops import Node
from shoal.private.compiler.refusal import refusals, step_of
from shoal.private.compiler.truncation import MAX_FAILURE, exact_steps, failure_chances, ring_bits, sign_bits
from shoal.private.products.parameters import choose
from shoal.private.program.clear import run_clear
from shoal.private.program.fixed import EXACT_BITS, FIELD_BITS, PRODUCT_BITS, Demand, FixedPoint, choose_fraction_bits
from shoal.private.program.program import VERSION, Program, Weights
from shoal.private.program.steps import LINEAR, TRUNCATING, Step
from shoal.private.protocol.carry import SINGLE_GATE_BITS
from shoal.private.protocol.layout import Layout

__all__ = ["compile"]

CHUNK = 32


def compile(
    graph: Graph,
    calibration: Tensor,
    *,
    fraction_bits: int | None = None,
    margin: float = 4.0,
    max_failure: float = MAX_FAILURE,
    preprocessing: dict[str, Any] | None = None,
) -> tuple[Program, Weights]:
    """The public Program and the server's Weights of a folded `graph`.

    `calibration` [N, *input shape] holds preprocessed images; magnitudes up to `margin` times theirs must fit.
    `fraction_bits` None chooses the most that fit, at most 18. Just enough steps are truncated exactly to keep the
    probability of a failed local truncation in one inference at most `max_failure`. SEAL multiplies the weights of all
    steps for which its answers hide them (`shoal.private.products.parameters`). `preprocessing` holds lists
    ``mean`` and ``std``, one number for each channel, ``class_names`` (list or None), and if there is one ``fit``, the
    rule of `shoal.data.images.FITS` for images of another size; by default images are not changed. Raises ShoalError,
    naming the node, for operations without a private form, for NaN and infinity, and for magnitudes that do not fit.
    """
    graph = expand_max_pools(replace(graph, weights={k: w.detach().cpu() for k, w in graph.weights.items()}))
    steps, keep, outputs = lower(graph)
    parameters = _parameters(graph, steps)
    ranges, masses = _ranges(graph, [step.name for step in steps], calibration.detach().cpu(), margin)
    fixed = FixedPoint(
        choose_fraction_bits(_demands(graph.input.name, steps, parameters, ranges, margin), fraction_bits)
    )
    name, shape = graph.input.name, tuple(graph.input.shape)
    asked = _preprocessing(preprocessing, shape[0])
    program = Program(VERSION, fixed.fraction_bits, FIELD_BITS, name, shape, steps, outputs, keep, asked, 0.0, ranges)
    chances = failure_chances(steps, parameters, masses, fixed.fraction_bits, margin)
    bits = {s.name: sign_bits(ranges[s.inputs[0]] * margin, fixed) for s in steps if s.op == "relu"}
    products = {s.name: _product(s, parameters, ranges) * margin for s in steps if s.op in TRUNCATING}
    program = _truncations(replace(program, sign_bits=bits), chances, products, max_failure)
    public = {k: rounded_up(v) for k, v in ranges.items()}
    program = replace(program, ranges=public, input_limit=input_limit(ranges[name], margin))
    weights = Weights({name: fixed.encode(value, name) for name, value in parameters.items()})
    program = replace(program, products=choose(program, weights))
    program.check()
    return replace(program, error_bound=_error_bound(graph, program, weights, calibration.detach().cpu())), weights


def rounded_up(magnitude: float) -> float:
    """The least power of two that is not below `magnitude`; 0 for 0. The client sees it, and not the exact number."""
    mantissa, exponent = math.frexp(magnitude)
    return math.ldexp(1.0, exponent - (mantissa == 0.5)) if magnitude else 0.0


def input_limit(calibrated: float, margin: float) -> float:
    """The largest power of two up to `margin` times `calibrated`, or if that is larger, `calibrated` rounded up."""
    _, exponent = math.frexp(margin * calibrated)
    return max(math.ldexp(1.0, exponent - 1) if calibrated else 0.0, rounded_up(calibrated))


def lower(graph: Graph) -> tuple[tuple[Step, ...], dict[str, np.ndarray], tuple[str, ...]]:
    """Steps of the nodes that the outputs need, kept positions, and names of the outputs.

    A ReLU step without kept positions is the identity and is dropped. `graph` must be folded, with its max pools
    expanded. Raises ShoalError, naming the node, for operations without a private form.
    """
    for refused in refusals(graph):
        raise refused.error()
    alias, needed = {graph.input.name: graph.input.name}, live(graph)
    steps: list[Step] = []
    keep: dict[str, np.ndarray] = {}
    for node in (n for n in graph.nodes[1:] if n.name in needed):
        inputs = tuple(alias[name] for name in node.inputs)
        mask = graph.parameters(node).get("mask")
        positions = None if mask is None else _positions(node, mask)
        alias[node.name] = node.name if positions is None or len(positions) else inputs[0]
        if alias[node.name] == node.name:
            steps.append(replace(step_of(graph, node), inputs=inputs))
            if positions is not None and len(positions) < math.prod(node.shape):
                keep[node.name] = positions
    return tuple(steps), keep, tuple(alias[name] for name in graph.outputs)


def _positions(node: Node, mask: Tensor) -> np.ndarray:
    if mask.dtype != torch.bool or tuple(mask.shape) != tuple(node.shape):
        raise ShoalError(
            f"found a {mask.dtype} mask of shape {tuple(mask.shape)} at {node.name}; need bool "
            f"{tuple(node.shape)}; freeze the masks for this input size"
        )
    return np.flatnonzero(mask.cpu().numpy()).astype(np.int32)


def _parameters(graph: Graph, steps: Iterable[Step]) -> dict[str, np.ndarray]:
    """float64 weight and bias of each linear step (zeros without a bias). Raises ShoalError for NaN and infinity."""
    table: dict[str, np.ndarray] = {}
    for step in steps:
        if step.op in LINEAR:
            own = graph.parameters(step.name)
            bias = own.get("bias", torch.zeros(len(own["weight"])))
            table |= {
                f"{step.name}.weight": own["weight"].double().numpy(),
                f"{step.name}.bias": bias.double().numpy(),
            }
    for name, values in table.items():
        if not np.isfinite(values).all():
            raise ShoalError(f"found NaN or infinity in {name}; need finite weights; look for diverged training")
    return table


def _ranges(graph: Graph, names: list[str], images: Tensor, margin: float) -> tuple[dict[str, float], dict[str, float]]:
    """Largest magnitude of the input and of each named node, and the largest sum of magnitudes in one image."""
    if not len(images) or not images.is_floating_point() or not (math.isfinite(margin) and margin >= 1):
        raise ShoalError(
            f"found {len(images)} {images.dtype} calibration images and margin {margin}; need at least one "
            "preprocessed float image and a margin of 1 or more; pass a few hundred training images"
        )
    ranges = dict.fromkeys([graph.input.name, *names], 0.0)
    masses = dict.fromkeys(ranges, 0.0)
    with torch.no_grad():
        for chunk in images.split(CHUNK):
            values = graph.values(chunk, keep=True)
            for name in ranges:
                # Tensor.max keeps NaN; Python's max would lose it.
                sizes = values[name].abs().flatten(1)
                ranges[name] = float(np.maximum(ranges[name], float(sizes.max())))
                masses[name] = max(masses[name], float(sizes.sum(1).max()))
    for name, value in ranges.items():
        if not math.isfinite(value):
            raise ShoalError(f"found value {value} at {name} in calibration; need finite numbers; check the images")
    return ranges, masses


def _preprocessing(given: dict[str, Any] | None, channels: int) -> dict[str, Any]:
    usual = {"mean": [0.0] * channels, "std": [1.0] * channels, "class_names": None, "fit": None}
    asked = usual | (given or {})
    mean, std = ([float(v) for v in asked[name]] for name in ("mean", "std"))
    names, fit = asked["class_names"], asked["fit"]
    lengths = len(mean) == len(std) == channels
    if len(asked) > len(usual) or not lengths or not all(s > 0 for s in std) or fit not in (None, *FITS):
        raise ShoalError(
            f"found preprocessing {given} for {channels} channels; need lists mean and std (above zero) of "
            f"that length, class_names, and as fit one of {', '.join(FITS)}; pass those that the network was trained "
            "with"
        )
    known = {"mean": mean, "std": std, "class_names": None if names is None else [str(n) for n in names]}
    return known if fit is None else known | {"fit": fit}


def _demands(
    image: str,
    steps: Iterable[Step],
    parameters: dict[str, np.ndarray],
    ranges: dict[str, float],
    margin: float,
) -> list[Demand]:
    # SPU takes inputs, weights and biases as float32, which is exact below 2^24; its truncation needs products below
    # 2^62. The prepared ReLU reads only the low 32 bits, so activations must stay below 2^31.
    what = f"magnitude ({margin:g} times the calibrated one)"
    found = [Demand(k, "magnitude", float(np.abs(v).max(initial=0.0)), 1, 24) for k, v in parameters.items()]
    found.append(Demand(image, what, ranges[image] * margin, 1, 24))
    for step in steps:
        value = ranges[step.name] * margin
        found += [Demand(step.name, what, value, 1, 31), Demand(step.name, what, value, 1, 24, 1)]
        if step.op == "relu":
            # With more bits every layer of signs takes one more exchange, see `shoal.private.protocol.carry`.
            found.append(Demand(step.name, what, ranges[step.inputs[0]] * margin, 1, SINGLE_GATE_BITS, 2))
        if step.op in TRUNCATING:
            product = _product(step, parameters, ranges) * margin
            found.append(Demand(step.name, f"product of {what}", product, 2, 62))
            # The ring holds four times the product; times an output's weights it must fit one limb.
            weight = np.abs(parameters.get(f"{step.name}.weight", np.zeros((1, 1))))
            norm = float(weight.reshape(len(weight), -1).sum(1).max())
            found.append(Demand(step.name, f"exact product of {what}", 4 * product * norm, 3, EXACT_BITS, 3))
    return found


def _product(step: Step, parameters: dict[str, np.ndarray], ranges: dict[str, float]) -> float:
    """The largest magnitude of the product that a step truncates, before the bias is added."""
    bias = parameters.get(f"{step.name}.bias", np.zeros(1))
    return ranges[step.name] + float(np.abs(bias).max(initial=0.0))


def _truncations(
    program: Program, chances: dict[str, float], products: dict[str, float], max_failure: float
) -> Program:
    """`program` with its exact truncations: which steps, and modulo which power of two."""
    fixed, everywhere = FixedPoint(program.fraction_bits), dict.fromkeys(chances, FIELD_BITS)
    # A truncation whose wraps travel with the next signs costs no exchange.
    rides = Layout(replace(program, exact=everywhere)).schedule.rides
    reader = {name: relu for relu, names in rides.items() for name in names}
    rings = {name: ring_bits(product, fixed) for name, product in products.items()}
    # A product in the whole ring would be too wide for SEAL, so other linear layers take an exchange of their own.
    narrow = {step.name for step in program.steps if step.op in LINEAR and rings[step.name] <= PRODUCT_BITS}
    exact, bound = exact_steps(chances, max_failure, narrow | reader.keys())
    rings = {name: bits for name, bits in rings.items() if name in exact}
    for name in rings.keys() & reader.keys():
        rings[name] = max(rings[name], program.fraction_bits + program.sign_bits[reader[name]] + 1)
    return replace(program, exact=rings, failure_bound=bound)


def _error_bound(graph: Graph, program: Program, weights: Weights, images: Tensor) -> float:
    """4 times the largest difference seen, but at least one unit for each truncation and one for the input."""
    private = run_clear(program, weights, images, noise=np.random.default_rng(0), batch=CHUNK)
    with torch.no_grad():
        parts = [graph(chunk) for chunk in images.split(CHUNK)]
    worst = max(
        float(np.abs(torch.cat(column).double().numpy() - logits).max())
        for column, logits in zip(zip(*parts, strict=True), private, strict=True)
    )
    truncations = sum(step.op in TRUNCATING for step in program.steps)
    return max(4 * worst, (1 + truncations) / 2**program.fraction_bits)
