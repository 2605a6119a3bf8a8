"""A genetic algorithm over binary genes: the threshold search of *Self-Distillation* (Algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shoal.errors import ShoalError

Genes = NDArray[np.bool_]
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Genetic:
    """Options of the algorithm. The paper gives none of these numbers.

    Each number in [0, 1] is coded by `bits` bits, in steps of 1 / (2^bits - 1). Each of `generations` keeps the `elite`
    fittest of `population` and fills the rest with children. Each parent is the fittest of `tournament` individuals
    drawn at random. With probability `crossover`, a child takes each bit from either parent at random, else all bits
    from one parent. Each bit flips with probability `mutation` (None: 1 / number of bits of all thresholds).
    """

    population: int = 64
    generations: int = 40
    bits: int = 12
    crossover: float = 0.9
    mutation: float | None = None
    tournament: int = 3
    elite: int = 2

    def __post_init__(self) -> None:
        """Raise ShoalError for values out of range."""
        whole = {k: getattr(self, k) for k in ("population", "generations", "bits", "tournament")}
        bad = [k for k, v in whole.items() if v < 1]
        rates = {"crossover": self.crossover, "mutation": self.mutation or 0.0}
        bad += [k for k, v in rates.items() if not 0 <= v <= 1]
        bad += ["elite"] if not 0 <= self.elite < self.population else []
        bad += ["bits"] if self.bits > 52 else []
        if bad:
            raise ShoalError(
                f"found {bad[0]} {getattr(self, bad[0])}; need counts of 1 or more (bits: at most 52), rates in [0, 1] "
                "and an elite smaller than the population; change it"
            )


def decode(genes: Genes, bits: int) -> Values:
    """Decode genes [P, T * bits] (bool) to numbers [P, T] in [0, 1]; the highest bit of each number comes first."""
    powers = 2.0 ** np.arange(bits - 1, -1, -1)
    return genes.reshape(len(genes), -1, bits) @ powers / (2.0**bits - 1)


def search(fitness: Callable[[Values], Values], count: int, options: Genetic, seed: int) -> Values:
    """The fittest `count` numbers [T] in [0, 1] that were tried. `fitness` maps numbers [P, T] to fitness [P]."""
    rng = np.random.default_rng(seed)
    genes = rng.random((options.population, count * options.bits)) < 0.5
    scores = fitness(decode(genes, options.bits))
    for _ in range(options.generations):
        order = np.argsort(-scores, kind="stable")
        genes, scores = genes[order], scores[order]
        children = _children(genes, scores, options, rng)
        genes = np.concatenate((genes[: options.elite], children))
        scores = np.concatenate((scores[: options.elite], fitness(decode(children, options.bits))))
    return decode(genes[[int(np.argmax(scores))]], options.bits)[0]


def _children(genes: Genes, scores: Values, options: Genetic, rng: np.random.Generator) -> Genes:
    """The next generation without its elite: tournament selection, uniform crossover, bit flips."""
    count, length = len(genes) - options.elite, genes.shape[1]
    drawn = rng.integers(len(genes), size=(2, count, options.tournament))
    won = np.take_along_axis(drawn, scores[drawn].argmax(2)[..., None], 2)[..., 0]
    first, second = genes[won]
    mixed = rng.random((count, 1)) < options.crossover
    children = np.where(mixed & (rng.random((count, length)) < 0.5), second, first)
    rate = options.mutation if options.mutation is not None else 1 / length
    return children ^ (rng.random((count, length)) < rate)
