"""Cost models of published protocols: SPU's Cheetah and DELPHI."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import NamedTuple

from shoal.errors import ShoalError
from shoal.graph.counting import Cost, Row, cost
from shoal.graph.graph import Graph
from shoal.graph.max_pool import expand_max_pools
from shoal.graph.ops import Node


@dataclass(frozen=True)
class PrivateCost:
    """The predicted cost of one private inference of one image, with bytes of both directions."""

    seconds: float
    bytes: int
    rounds: float


def delphi(total: Cost) -> PrivateCost:
    """DELPHI's online phase: 0.319 s + 18.56 us per ReLU (least squares over deepreduce's Tables 4 and 5).

    About 2 kB per ReLU and two one-way messages per ReLU layer. The seconds differ from the tables by up to 30 %, since
    they depend on the number of ReLUs only. Raises ShoalError for quadratics, which those tables do not contain.
    """
    if total.quadratics:
        raise ShoalError(
            f"found {total.quadratics:,} quadratics; need ReLUs and linear layers alone, as in the tables that "
            "the model was fitted to; use spu_cheetah"
        )
    return PrivateCost(0.319 + 18.56e-6 * total.relus, 2048 * total.relus, 1.0 * total.relu_layers)


@dataclass(frozen=True)
class SpuConstants:
    """Constants of the SPU-Cheetah model: seconds and bytes per operation, and properties of the link.

    The defaults were fitted to direct inference of ResNet18 on two idle cores over loopback (36.6 s and 6.8 s).
    """

    product_s: float = 0.33e-3
    automorphism_s: float = 1.48e-3
    relu_s: float = 12.2e-6
    relu_bytes: float = 98.5
    """Of one ReLU at FM64 with Ferret's oblivious transfers, which `compile` chooses; with Softspoken's it is 860."""
    value_product_s: float = 3.5e-6
    product_bytes: float = 216.0
    """Of one product of two secret values at FM64, both ways; `value_product_s` is its seconds."""
    bytes_per_s: float = 1.0e9
    rtt_s: float = 0.5e-3


def spu_cheetah(graph: Graph, constants: SpuConstants | None = None, fraction_bits: int = 18) -> PrivateCost:
    """The cost in SPU 0.9.5 (Cheetah at FM64) with weights that the server owns.

    A ReLU takes 98.5 bytes, a ReLU layer 11 round trips. Matrix products use SPU's own choice of ciphertext blocks.
    Raises ShoalError for operations without a cost.
    """
    constants = constants or SpuConstants()
    graph = expand_max_pools(graph)
    total = cost(graph)
    odd = [*total.unknown, *(f"{row.name} ({row.op})" for row in total.rows if row.comparisons)]
    if odd:
        raise ShoalError(
            f"found operations without a cost: {', '.join(odd)}; need those of the cost model; replace them"
        )
    seconds, size, rounds = 0.0, 0, 0.0
    for node, row in zip(graph.nodes, total.rows, strict=True):
        s, b, r = _spu_node(graph, node, row, constants, fraction_bits)
        seconds, size, rounds = seconds + s, size + b, rounds + r
    return PrivateCost(seconds + size / constants.bytes_per_s + rounds * constants.rtt_s, size, rounds)


def _spu_node(graph: Graph, node: Node, row: Row, c: SpuConstants, f: int) -> tuple[float, int, float]:
    trunc = _truncation_bytes(prod(node.shape), f)
    if node.op == "quadratic":
        # (a x + b) x + c takes two products, each truncated. The server knows a; x is shared between both parties.
        relu, products = _relu_price(row, c), 2 * row.quadratics
        size = int(c.product_bytes * products) + 2 * trunc
        return relu[0] + c.value_product_s * products, relu[1] + size, relu[2] + 4
    if row.relus:
        return _relu_price(row, c)
    if node.op in ("conv2d", "linear"):
        m, k, n = matmul_shape(graph, node)
        work = cheetah_blocks(m, k, n)
        seconds = c.product_s * work.products + c.automorphism_s * work.automorphisms
        return seconds, work.sent + work.returned + trunc, 2
    return (0.0, trunc, 1) if node.op in ("avg_pool2d", "mean") else (0.0, 0, 0)


def _relu_price(row: Row, c: SpuConstants) -> tuple[float, int, float]:
    return c.relu_s * row.relus, int(c.relu_bytes * row.relus), 11 if row.relus else 0


def _truncation_bytes(elements: int, f: int) -> int:
    # Per element one correlated transfer of f bits, packed by eight, and one choice bit.
    return -(-elements * (-(-8 * f // 64) * 8 + 1) // 8)


def matmul_shape(graph: Graph, node: Node) -> tuple[int, int, int]:
    """(M, K, L) of the M x K by K x L matrix product of a linear layer, or of a convolution after im2col."""
    weight = graph.weights[f"{node.name}.weight"]
    positions = prod(node.shape[1:]) if node.op == "conv2d" else 1
    return positions, weight[0].numel(), weight.shape[0]


ANSWER_BYTES = 127_436
"""Bytes of the answer if it is a single ciphertext."""


class Blocks(NamedTuple):
    """Work of one matrix product.

    Bytes sent and returned, ciphertext products, automorphisms for packing, and the number of ciphertexts to pack.
    """

    sent: int
    returned: int
    products: int
    automorphisms: int
    answers: int


@lru_cache(maxsize=4096)
def cheetah_blocks(m: int, k: int, n: int, degree: int = 8192) -> Blocks:
    """The work of one product of an `m` x `k` and a `k` x `n` matrix at FM64.

    Repeats SPU's search over block shapes, which weights a ciphertext by 1000, an automorphism by 1, a product by 0.1.
    """
    best: tuple[float, Blocks] | None = None
    for d1 in (1 << i for i in range(k.bit_length()) if 1 << i <= k):
        for d0 in range(1, min(degree // d1, m) + 1):
            d2 = min(n, degree // (d0 * d1))
            b0, b1, b2 = -(-m // d0), -(-k // d1), -(-n // d2)
            sent, back, products = min(b0, b2) * b1, -(-b0 * b2 // d1), b0 * b1 * b2
            price = 1000 * (sent + back) + -(-m * n // degree) * d1 + 0.1 * products
            if best is None or price <= best[0]:
                best = price, Blocks(sent * 184_964, back * 254_385, products, back * d1, b0 * b2)
    assert best is not None
    # A single answer is not packed.
    return best[1]._replace(returned=ANSWER_BYTES, automorphisms=0) if best[1].answers == 1 else best[1]
