"""ReLU budgets: how many ReLUs each site keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from shoal.errors import ShoalError
from shoal.surgery.sites import ReluSite


@dataclass(frozen=True)
class Budget:
    """The number of ReLUs kept at each site (`counts`) and the number that the site has (`sizes`), by site name."""

    counts: dict[str, int]
    sizes: dict[str, int]

    @property
    def total(self) -> int:
        """ReLUs kept in the whole network."""
        return sum(self.counts.values())

    def ratio(self, site: str) -> float:
        """Fraction of the site's ReLUs that are kept.

        This is the assigned ratio, which gated branching compares with d_th; the paper (Making Models Shallow Again)
        also calls it "ReLU sensitivity".
        """
        return self.counts[site] / self.sizes[site]


def allocate(sites: Sequence[ReluSite], sensitivity: Mapping[str, float], total: int) -> Budget:
    """Divide `total` ReLUs among `sites` in proportion to their sensitivities, at most a site's size to each.

    The surplus of a full site goes to the others in the same proportions (water filling; SENet's Algorithm 1, as
    inferred from its published lists). Counts are rounded by largest remainders and add up to `total` exactly. Raises
    ShoalError when `total` is not between 1 and the number of all ReLUs, when a sensitivity is missing, negative or
    infinite, and when all are zero.
    """
    sizes = {site.name: site.relus for site in sites}
    _check(sizes, sensitivity, total)
    ideal = _water_fill(sizes, {name: Fraction(sensitivity[name]) for name in sizes}, total)
    return Budget(_round(ideal, sizes, total), sizes)


def _check(sizes: Mapping[str, int], sensitivity: Mapping[str, float], total: int) -> None:
    everything = sum(sizes.values())
    if not 1 <= total <= everything:
        raise ShoalError(f"found a budget of {total:,} ReLUs; need 1 to {everything:,}, all that the network has")
    missing = [name for name in sizes if name not in sensitivity]
    if missing:
        raise ShoalError(f"found no sensitivity for {', '.join(missing[:3])}; need one value for each site")
    bad = [name for name in sizes if not 0 <= sensitivity[name] < float("inf")]
    if bad or not any(sensitivity[name] for name in sizes):
        raise ShoalError(f"found unusable sensitivities (at {bad[:3] or 'every site'}); need values >= 0, one above 0")


def _water_fill(sizes: Mapping[str, int], weight: Mapping[str, Fraction], total: int) -> dict[str, Fraction]:
    counts: dict[str, Fraction] = {}
    rest, left = dict(sizes), Fraction(total)
    while rest:
        scale = sum(weight[name] for name in rest)
        if not scale:  # the remaining sites all have sensitivity 0: divide by size
            weight, scale = {name: Fraction(size) for name, size in rest.items()}, Fraction(sum(rest.values()))
        share = {name: left * weight[name] / scale for name in rest}
        full = [name for name in rest if share[name] >= rest[name]]
        if not full:
            return counts | share
        for name in full:
            counts[name] = Fraction(rest.pop(name))
            left -= counts[name]
    return counts


def _round(ideal: Mapping[str, Fraction], sizes: Mapping[str, int], total: int) -> dict[str, int]:
    counts = {name: int(ideal[name]) for name in sizes}
    by_remainder = sorted(sizes, key=lambda name: ideal[name] - counts[name], reverse=True)
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts
