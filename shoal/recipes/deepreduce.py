"""DeepReDuce (Jha et al., ICML'21): which networks its three steps give, and how critical each stage's ReLUs are.

Culling drops whole stages' ReLUs, the stem's with the first; thinning drops every other ReLU of what is left; reshaping
scales channels and feature maps. Training the grid by distillation is not here yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from shoal.dropping import culled, drop_blocks, drop_relus, spare_blocks, thinned
from shoal.errors import ShoalError
from shoal.sites import ReluSite, relu_sites

WEIGHT = 0.07
"""Equation 1's w."""


@dataclass(frozen=True)
class Design:
    """One network: stages without ReLUs, stages with every other one, reshaping, one block a stage that has ReLUs.

    `width` is the paper's alpha, `resolution` its rho; both belong to how the base network is built.
    """

    culled: tuple[int, ...] = ()
    thinned: tuple[int, ...] = ()
    width: float = 1.0
    resolution: float = 1.0
    one_block: bool = False


def apply(design: Design, model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """`model`, built at the design's width and resolution, without the ReLUs and blocks that the design drops."""
    kept = {site.stage for site in relu_sites(model, shape)} - {0, *design.culled}
    if design.one_block:
        model = drop_blocks(model, shape, spare_blocks(model, shape, kept))
    sites = relu_sites(model, shape)
    return drop_relus(model, culled(sites, design.culled) + thinned(sites, set(design.thinned) & kept))


def criticality(accuracy: Mapping[int, float], sites: Sequence[ReluSite], weight: float = WEIGHT) -> dict[int, float]:
    """Equation 1 for each stage: (Acc[S_k] - min Acc) / (thousands of ReLUs of S_k)^w, in percent.

    `accuracy` holds the accuracies, in percent, of networks with the ReLUs of one stage only, trained by distillation.
    The paper's Table 3 counts ReLUs in thousands. Raises ShoalError for a stage without ReLUs.
    """
    relus = {stage: sum(s.relus for s in sites if s.stage == stage) for stage in accuracy}
    empty = [stage for stage, count in relus.items() if not count]
    if empty or not accuracy:
        raise ShoalError(f"found accuracies of stages {sorted(accuracy)}; need stages that have ReLUs; mend the list")
    least = min(accuracy.values())
    return {k: (a - least) / (relus[k] / 1000) ** weight for k, a in accuracy.items()}


def grid(critical: Mapping[int, float]) -> tuple[Design, ...]:
    """The 5 (D - 1) designs of section 3.5: stages culled one more each time, the least critical first, never the last.

    Each as it is, thinned, and thinned with half the channels, half the resolution, and both.
    """
    order, designs = sorted(critical, key=lambda stage: critical[stage]), list[Design]()
    for count in range(1, len(order)):
        gone, left = tuple(sorted(order[:count])), tuple(sorted(order[count:]))
        plain, thin = Design(gone), Design(gone, left)
        reshaped = [replace(thin, width=w, resolution=r) for w, r in ((0.5, 1.0), (1.0, 0.5), (0.5, 0.5))]
        designs += [plain, thin, *reshaped]
    return tuple(designs)
